"""The map as one HTML page that needs no network: the heatmap of every value, the rounds, and a list of all modules."""

import html
import re
from collections.abc import Mapping
from typing import get_args

from gatewise.report.budget_map import BudgetMap, ModuleBudget, Value, places_of, totals_of
from gatewise.report.page_parts import PAGE, SCRIPT, STYLE
from gatewise.report.table import facts_of, finite_or_zero, largest, short_number


def page_of(budget: BudgetMap, value: Value, title: str) -> str:
    facts = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_unbroken(text))}</dd></div>" for name, text in facts_of(budget)
    )
    choices = "".join(
        f'<label><input type="radio" name="value" value="{each}"{" checked" if each == value else ""}>{each}</label>'
        for each in get_args(Value)
    )
    return PAGE.format(
        title=html.escape(title),
        value=value,
        style=STYLE,
        script=SCRIPT,
        facts=facts,
        choices=choices,
        most=_by_value({each: short_number(largest(budget.matrix(each)[2]), each) for each in get_args(Value)}),
        heat=_heat_rows(budget),
        rounds=_rounds_section(budget),
        modules=_module_rows(budget),
    )


def _unbroken(text: str) -> str:
    """Keeps a number on the line of the word it belongs to."""
    return re.sub(r" (?=\(?\d)", "\N{NO-BREAK SPACE}", text)


def _by_value(texts: Mapping[str, str]) -> str:
    """One span a value; the style sheet shows the chosen one."""
    return "".join(f'<span class="{value}">{html.escape(text)}</span>' for value, text in texts.items())


def _heat_rows(budget: BudgetMap) -> str:
    values = get_args(Value)
    layers, kinds, _ = budget.matrix()
    cells = {value: budget.matrix(value)[2] for value in values}
    totals = {value: totals_of(budget, value) for value in values}
    most = {value: largest(cells[value]) or 1.0 for value in values}
    places = places_of(budget)
    lines = ['<thead><tr><th scope="col">layer</th>']
    lines += [f'<th scope="col">{html.escape(kind)}</th>' for kind in kinds]
    lines.append('<th scope="col" class="sum">total</th></tr></thead><tbody>')
    for y, layer in enumerate(layers):
        lines.append(f'<tr><th scope="row">{layer}</th>')
        for x, kind in enumerate(kinds):
            here = places.get((layer, kind))
            if not here:
                lines.append('<td class="none" tabindex="-1"><span aria-label="no module">·</span></td>')
                continue
            heat = ";".join(f"--{value}:{finite_or_zero(cells[value][y][x]) / most[value]:.3f}" for value in values)
            tip = html.escape("\n".join(_tip(module) for module in here))
            shown = _by_value({value: short_number(cells[value][y][x], value) for value in values})
            lines.append(f'<td class="cell" tabindex="-1" style="{heat}" data-tip="{tip}">{shown}</td>')
        shown = _by_value({value: short_number(totals[value][0][y], value) for value in values})
        lines.append(f'<td class="sum">{shown}</td></tr>')
    lines.append('</tbody><tfoot><tr><th scope="row">total</th>')
    for x in range(len(kinds)):
        shown = _by_value({value: short_number(totals[value][1][x], value) for value in values})
        lines.append(f'<td class="sum">{shown}</td>')
    lines.append(
        f'<td class="sum">{_by_value({value: short_number(totals[value][2], value) for value in values})}</td></tr></tfoot>'
    )
    return "".join(lines)


def _tip(module: ModuleBudget) -> str:
    return (
        f"{module.path}\nrank {module.rank} of {module.capacity}\n"
        f"{module.parameters:,} of {module.allocated:,} parameters\n"
        f"norm {short_number(module.norm, 'norm')}, scaling {module.scaling:.4g}"
    )


def _rounds_section(budget: BudgetMap) -> str:
    if not budget.rounds:
        return ""
    by = f", ranks scored by {html.escape(budget.score)}" if budget.score else ""
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("round", "step", "budget before", "pruned", "grown", "budget after", "loss before", "loss after")
    )

    def loss(number: float | None) -> str:
        return "·" if number is None else f"{number:.4f}"

    body = ""
    for entry in budget.rounds:
        numbers = [
            "·" if entry.step is None else str(entry.step),
            f"{entry.budget_before:,}",
            f"{entry.pruned:,}",
            f"{entry.grown:,}",
            f"{entry.budget_after:,}",
            loss(entry.loss_before),
            loss(entry.loss_after),
        ]
        cells = "".join(f"<td>{html.escape(number)}</td>" for number in numbers)
        body += f'<tr><th scope="row">{entry.round}</th>{cells}</tr>'
    return (
        f'<section><h2>Rounds</h2><div class="wide"><table class="list"><caption>{len(budget.rounds)} rounds{by}. '
        "Budgets are total ranks; losses are those of the validation batch.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _module_rows(budget: BudgetMap) -> str:
    return "".join(
        f'<tr><th scope="row">{html.escape(m.path)}</th><td>{m.rank}</td><td>{m.capacity}</td><td>{m.parameters:,}</td>'
        f"<td>{m.allocated:,}</td><td>{short_number(m.norm, 'norm')}</td><td>{m.scaling:.4g}</td></tr>"
        for m in budget.modules
    )
