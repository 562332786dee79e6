"""The page of a budget: rank, norm and parameters, the rounds where they are known, and every module."""

import html
from typing import get_args

from gatewise.report.budget_map import BudgetMap, ModuleBudget, Value
from gatewise.report.grid import places_of, short_number
from gatewise.report.page import Page, html_of
from gatewise.report.table import facts_of


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
