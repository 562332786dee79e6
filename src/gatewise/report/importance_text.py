"""Importance as text: the lines of its summary, the most important modules, and JSON."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from gatewise.report.importance_map import Importance
from gatewise.report.table import plain

_MOST_NAMED = 5


def importance_lines(importance: Importance) -> list[str]:
    """What was scored and how, in a few lines of plain text, and the modules that could go."""
    return [f"{name}: {text}" for name, text in importance_facts(importance)]


def importance_facts(importance: Importance) -> list[tuple[str, str]]:
    unit = f" {importance.unit}" if importance.unit else ""
    total = f"{importance.total:.4g}{unit}"
    if importance.score == "path_integral":
        total += f"; the ranks lower the loss by {importance.loss_base - importance.loss_adapted:.4g}{unit}"
    useless = importance.useless
    facts = [
        ("base model", importance.base_model or "not named"),
        ("score", f"{importance.score}{f' in{unit}' if unit else ', without a unit'}; of each rank, {importance.meaning}"),
        ("rows", f"{importance.rows:,}" + (f" of {importance.data}" if importance.data else "")),
        ("scored", f"{importance.rank:,} ranks in {len(importance.modules):,} modules"),
        ("loss", f"{importance.loss_base:.4f} nats without these ranks, {importance.loss_adapted:.4f} with them"),
        ("sum of scores", total),
        (
            "could go",
            f"{len(useless):,} modules whose scores add up to zero or less: {_some([module.path for module in useless])}"
            if useless
            else "no module",
        ),
    ]
    if importance.unscored:
        facts.append(("not scored", f"{_some(importance.unscored)}: not a linear layer"))
    return facts


def importance_json(importance: Importance) -> dict[str, Any]:
    """All of it as plain lists, numbers and text for ``json.dumps``."""
    grid = importance.score_grid()
    return plain(
        {
            "score": importance.score,
            "unit": importance.unit or None,
            "rows": importance.rows,
            "data": importance.data,
            "base_model": importance.base_model,
            "loss_base": importance.loss_base,
            "loss_adapted": importance.loss_adapted,
            "total": importance.total,
            "rank": importance.rank,
            "layers": list(grid.layers),
            "kinds": list(grid.kinds),
            "matrix": [list(row) for row in grid.cells],
            "by_layer": importance.by_layer,
            "by_kind": importance.by_kind,
            "modules": [
                {
                    "path": module.path,
                    "layer": module.layer,
                    "kind": module.kind,
                    "rank": module.rank,
                    "total": module.total,
                    "scores": list(module.scores),
                }
                for module in importance.modules
            ],
            "could_go": [module.path for module in importance.useless],
            "not_scored": list(importance.unscored),
        }
    )


def top_table(importance: Importance, count: int = 10) -> Table:
    """The ``count`` most important modules with their rank and total score, in the unit of ``score_grid``."""
    grid = importance.score_grid()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("most important", overflow="fold")
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    for module in importance.ranked[:count]:
        table.add_row(Text(module.path), str(module.rank), grid.write(module.total))
    return table


def _some(paths: Sequence[str]) -> str:
    more = len(paths) - _MOST_NAMED
    return ", ".join(paths[:_MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")
