"""Grids as one HTML page that needs no network: facts, a heatmap that shows any of the grids, and a list of all modules."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from gatewise.inspection.budget import BudgetMap, ModuleBudget, Value
from gatewise.inspection.grid import Grid, finite_or_zero, places_of, short_number
from gatewise.inspection.importance import Importance, ModuleImportance
from gatewise.inspection.page_parts import PAGE, SCRIPT, STYLE, value_style
from gatewise.inspection.text import facts_of, importance_facts


@dataclass(frozen=True)
class Page:
    """What a page shows. Texts are plain; they are escaped here.

    Attributes:
        title: the heading.
        facts: (name, text) pairs under the heading.
        grids: the numbers to choose from, all over the same modules; their names must be plain words.
        shown: the name of the grid shown first.
        tips: (row label, column label) -> what is said of a cell when it is pointed at.
        caption: what the numbers and their totals are.
        sections: HTML between the heatmap and the list.
        columns: heads of the list of modules, after the path.
        modules: the rows of that list: path, then one text a column.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    grids: Sequence[Grid]
    shown: str
    tips: Mapping[tuple[str, str], str]
    caption: str
    sections: str
    columns: Sequence[str]
    modules: Sequence[Sequence[str]]


def html_of(page: Page) -> str:
    facts = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_unbroken(text))}</dd></div>" for name, text in page.facts)
    choices = "".join(
        f'<label><input type="radio" name="value" value="{grid.name}"{" checked" if grid.name == page.shown else ""}>'
        f"{grid.name}</label>"
        for grid in page.grids
    )
    return PAGE.format(
        title=html.escape(page.title),
        value=page.shown,
        style=STYLE + value_style({grid.name: grid.signed for grid in page.grids}),
        script=SCRIPT,
        facts=facts,
        choices=choices,
        least=_spans(page.grids, (-grid.most if grid.signed else 0 for grid in page.grids)),
        most=_spans(page.grids, (grid.most for grid in page.grids)),
        caption=html.escape(page.caption),
        heat=_heat_rows(page),
        sections=page.sections,
        columns="".join(f'<th scope="col">{html.escape(name)}</th>' for name in page.columns),
        modules="".join(map(_module_row, page.modules)),
    )


def _unbroken(text: str) -> str:
    """Keeps a number on the line of the word it belongs to."""
    return re.sub(r" (?=\(?\d)", "\N{NO-BREAK SPACE}", text)


def _spans(grids: Sequence[Grid], numbers: Iterable[float | None]) -> str:
    """One span a grid with its number; the style sheet shows that of the chosen one."""
    return "".join(
        f'<span class="{grid.name}">{html.escape(grid.write(number))}</span>' for grid, number in zip(grids, numbers, strict=True)
    )


def _heat_rows(page: Page) -> str:
    grids, layers, kinds = page.grids, page.grids[0].layers, page.grids[0].kinds
    lines = ['<thead><tr><th scope="col">layer</th>']
    lines += [f'<th scope="col">{html.escape(kind)}</th>' for kind in kinds]
    lines.append('<th scope="col" class="sum">total</th></tr></thead><tbody>')
    for y, layer in enumerate(layers):
        lines.append(f'<tr><th scope="row">{layer}</th>')
        for x, kind in enumerate(kinds):
            if (layer, kind) not in page.tips:
                lines.append('<td class="none" tabindex="-1"><span aria-label="no module">·</span></td>')
                continue
            numbers = [finite_or_zero(grid.cells[y][x]) for grid in grids]
            heat = ";".join(
                f"--{grid.name}:{abs(number) / (grid.most or 1.0):.3f}" for grid, number in zip(grids, numbers, strict=True)
            )
            below = "".join(f" minus-{grid.name}" for grid, number in zip(grids, numbers, strict=True) if number < 0)
            shown = _spans(grids, (grid.cells[y][x] for grid in grids))
            tip = html.escape(page.tips[layer, kind])
            lines.append(f'<td class="cell{below}" tabindex="-1" style="{heat}" data-tip="{tip}">{shown}</td>')
        shown = _spans(grids, (grid.rows[y] for grid in grids))
        lines.append(f'<td class="sum">{shown}</td></tr>')
    lines.append('</tbody><tfoot><tr><th scope="row">total</th>')
    for x in range(len(kinds)):
        shown = _spans(grids, (grid.columns[x] for grid in grids))
        lines.append(f'<td class="sum">{shown}</td>')
    lines.append(f'<td class="sum">{_spans(grids, (grid.total for grid in grids))}</td></tr></tfoot>')
    return "".join(lines)


def _module_row(texts: Sequence[str]) -> str:
    path, *cells = map(html.escape, texts)
    return f'<tr><th scope="row">{path}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def page_of(budget: BudgetMap, value: Value, title: str) -> str:
    return html_of(
        Page(
            title=title,
            facts=facts_of(budget),
            grids=[budget.grid(each) for each in get_args(Value)],
            shown=value,
            tips={place: "\n".join(map(_tip, here)) for place, here in places_of(budget.modules).items()},
            caption="Totals of norms are roots of summed squares.",
            sections=_rounds_section(budget),
            columns=("rank", "slots", "parameters", "allocated", "norm", "scaling"),
            modules=[
                (
                    m.path,
                    str(m.rank),
                    str(m.capacity),
                    f"{m.parameters:,}",
                    f"{m.allocated:,}",
                    short_number(m.norm),
                    f"{m.scaling:.4g}",
                )
                for m in budget.modules
            ],
        )
    )


def _tip(module: ModuleBudget) -> str:
    return (
        f"{module.path}\nrank {module.rank} of {module.capacity}\n"
        f"{module.parameters:,} of {module.allocated:,} parameters\n"
        f"norm {short_number(module.norm)}, scaling {module.scaling:.4g}"
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


def importance_page(importance: Importance, title: str, suggested: Mapping[str, int] | None = None) -> str:
    grids = [importance.score_grid(), importance.rank_grid()]
    if suggested is not None:
        grids.append(importance.rank_grid(suggested, "suggested"))

    def tip(module: ModuleImportance) -> str:
        lines = [module.path, f"score {module.total:.4g} {importance.unit}".rstrip(), f"rank {module.rank}"]
        if suggested is not None:
            lines.append(f"suggested {suggested[module.path]}")
        return "\n".join(lines)

    def row(module: ModuleImportance) -> list[str]:
        mean = module.total / module.rank if module.rank else math.nan
        spread = (min(module.scores), max(module.scores)) if module.rank else (math.nan, math.nan)
        texts = [module.path, f"{module.total:.4g}", str(module.rank)]
        texts += ["·" if math.isnan(number) else f"{number:.3g}" for number in (mean, *spread)]
        return texts if suggested is None else [*texts, str(suggested[module.path])]

    columns = ["score", "rank", "mean of its ranks", "lowest", "highest"]
    return html_of(
        Page(
            title=title,
            facts=importance_facts(importance),
            grids=grids,
            shown="score",
            tips={place: "\n".join(map(tip, here)) for place, here in places_of(importance.modules).items()},
            caption=f"Shown as score: {grids[0].title}, summed over the ranks of a module.",
            sections="",
            columns=columns if suggested is None else [*columns, "suggested"],
            modules=[row(module) for module in importance.modules],
        )
    )
