"""Budgets, importance, routing and prompt layers as text: tables for the terminal, lines of a summary, and JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from rich import box
from rich.table import Table
from rich.text import Text

from gatewise.errors import some
from gatewise.files import finite
from gatewise.inspection.budget import BudgetMap, Value
from gatewise.inspection.grid import OTHER, Grid, percent
from gatewise.inspection.prompts import PromptMap
from gatewise.sites import layer_path

if TYPE_CHECKING:
    from gatewise.inspection.importance import Importance
    from gatewise.inspection.routing import RoutingMap

# The lower steps stay as the terminal has them. White on the others has a contrast of 4.5 or more, and all are about as
# light as each other, so they show on a dark terminal and on a light one; grey to orange suits every colour vision.
_TABLE_SHADES = ("", "", "#ffffff on #6e6a66", "#ffffff on #87653f", "bold #ffffff on #a8560f")


# As light and as far apart, for the numbers of a signed grid that are above zero; below it they are orange as above.
_BLUE_SHADES = ("", "", "#ffffff on #666a6e", "#ffffff on #3f6587", "bold #ffffff on #0f56a8")


def ranks_table(budget: BudgetMap, value: Value = "rank") -> Table:
    """The budget as a table for the terminal: layers x kinds with totals, 80 columns wide for a Llama."""
    return grid_table(budget.grid(value))


def grid_table(grid: Grid) -> Table:
    """A grid as a table for the terminal.

    Cells are shaded in five steps from the lowest to the highest number, or, where they have signs, from zero to the largest
    number on either side; the numbers say the same without colour. A dot marks a place without a module.
    """
    finite = [c for row in grid.cells for c in row if c is not None and math.isfinite(c)]
    low, high = (0.0, grid.most) if grid.signed else (min(finite, default=0.0), max(finite, default=0.0))

    def cell(number: float | None) -> Text:
        if number is None or number == 0:
            return Text(grid.write(number), style="dim")
        if high == low or not math.isfinite(number):
            return Text(grid.write(number))
        size = abs(number) if grid.signed else number
        shades = _BLUE_SHADES if grid.signed and number > 0 else _TABLE_SHADES
        step = min(int((size - low) / (high - low) * len(shades)), len(shades) - 1)
        return Text(f" {grid.write(number)}", style=shades[step])

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, collapse_padding=True)
    table.add_column("layer", Text(grid.margin, style="bold"), justify="right", no_wrap=True, min_width=len("layer"))
    cells = [[*map(cell, row), Text(grid.write(total), style="bold")] for row, total in zip(grid.cells, grid.rows, strict=True)]
    heads = zip([*grid.kinds, grid.margin], [*grid.columns, grid.total], strict=True)
    for at, (kind, total) in enumerate(heads):
        foot = Text(grid.write(total), style="bold")
        # Where the table is too wide, the longest names of kinds go on in the next line, and no number is cut short.
        widest = max(text.cell_len for text in (foot, *(row[at] for row in cells)))
        table.add_column(Text(kind, overflow="fold"), foot, justify="right", min_width=widest)
    for layer, row in zip(grid.layers, cells, strict=True):
        table.add_row(Text(layer), *row)
    return table


def to_json(budget: BudgetMap) -> dict[str, Any]:
    """The whole map as plain lists, numbers and text for ``json.dumps``; numbers that are not finite become None."""
    layers, kinds, _ = budget.matrix()
    return finite(
        {
            "base_model": budget.base_model,
            "adapter_type": budget.adapter_type,
            "totals": {
                "modules": len(budget.modules),
                "rank": budget.rank,
                "capacity": budget.capacity,
                "parameters": budget.parameters,
                "allocated": budget.allocated,
                "other_parameters": budget.other_parameters,
                "norm": budget.norm,
            },
            "layers": layers,
            "kinds": kinds,
            "matrix": {value: budget.matrix(value)[2] for value in get_args(Value)},
            "modules": [asdict(module) for module in budget.modules],
            "score": budget.score,
            "rounds": [asdict(entry) for entry in budget.rounds],
        }
    )


def summary_lines(budget: BudgetMap) -> list[str]:
    """The map in a few lines of plain text: base model, type, totals, shares by kind, fullest and empty layers."""
    grid = budget.grid()
    stack = [layer for layer in budget.layers if layer != OTHER]
    rows = dict(zip(budget.layers, grid.rows, strict=True))
    held = {layer: int(rows[layer] or 0) for layer in stack}
    fullest = [layer for layer in sorted(stack, key=lambda layer: -held[layer])[:3] if held[layer]]
    slots = f"{budget.rank:,}" + (f" of {budget.capacity:,} slots" if budget.capacity != budget.rank else "")
    unused = budget.allocated - budget.parameters
    placed = len({module.layer for module in budget.modules} - {None})
    stored = f"{budget.parameters:,}" + (f" in use, {unused:,} in dead slots" if unused else "")
    if budget.other_parameters:
        stored += f", and {budget.other_parameters:,} outside LoRA"
    lines = [
        f"base model: {budget.base_model or 'not named'}",
        f"adapter: {budget.adapter_type}, {_count(len(budget.modules), 'module')} in {_count(placed, 'layer')}",
        f"total rank: {slots}",
        f"parameters: {stored}",
    ]
    if budget.rank:
        shares = ((kind, total or 0) for kind, total in zip(budget.kinds, grid.columns, strict=True))
        lines.append("rank by kind: " + ", ".join(f"{kind} {100 * total / budget.rank:.0f}%" for kind, total in shares))
    if fullest:
        lines.append("most rank: " + ", ".join(f"layer {layer} ({held[layer]})" for layer in fullest))
    lines.append(f"empty layers: {_ranges([int(layer) for layer in stack if held[layer] == 0]) or 'none'}")
    if budget.rounds:
        lines.append(f"rounds: {len(budget.rounds)}" + (f", ranks scored by {budget.score}" if budget.score else ""))
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> "0-2, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


_MOST_NAMED = 5


def importance_lines(importance: "Importance") -> list[str]:
    """What was scored and how, in a few lines of plain text, and the modules that could go."""
    unit = f" {importance.unit}" if importance.unit else ""
    total = f"{importance.total:.4g}{unit}"
    if importance.score == "path_integral":
        total += f"; the ranks lower the loss by {importance.loss_base - importance.loss_adapted:.4g}{unit}"
    useless = [module.path for module in importance.useless]
    could_go = f"{len(useless):,} modules whose scores add up to zero or less: {some(useless, _MOST_NAMED)}"
    lines = [
        f"base model: {importance.base_model or 'not named'}",
        f"score: {importance.score}{f' in{unit}' if unit else ', without a unit'}; of each rank, {importance.meaning}",
        f"rows: {importance.rows:,}" + (f" of {importance.data}" if importance.data else ""),
        f"scored: {importance.rank:,} ranks in {len(importance.modules):,} modules",
        f"loss: {importance.loss_base:.4f} nats without these ranks, {importance.loss_adapted:.4f} with them",
        f"sum of scores: {total}",
        f"could go: {could_go if useless else 'no module'}",
    ]
    if importance.unscored:
        named = some(importance.unscored, _MOST_NAMED)
        lines.append(f"not scored: {named}: no score reads this kind of layer, and suggestions leave it out")
    return lines


def importance_json(importance: "Importance") -> dict[str, Any]:
    """All of it as plain lists, numbers and text for ``json.dumps``."""
    grid = importance.score_grid()
    return finite(
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


def top_table(importance: "Importance", count: int = 10) -> Table:
    """The ``count`` most important modules with their rank and total score, in the unit of ``score_grid``."""
    grid = importance.score_grid()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("most important", overflow="fold")
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    for module in importance.ranked[:count]:
        table.add_row(Text(module.path), str(module.rank), grid.write(module.total))
    return table


def routing_lines(routing: "RoutingMap") -> list[str]:
    """The map in a few lines of plain text."""
    kinds = ", ".join(f"{kind} {percent(share)}" for kind, share in routing.by_kind.items())
    k = routing.top_k
    experts = len(routing.modules) / max(1, len({layer_path(module.path) for module in routing.modules}))
    return [
        f"base model: {routing.base_model or 'not named'}",
        f"prompts: {routing.prompts:,}" + (f" of {routing.data}" if routing.data else ""),
        f"kept: {k} of {experts:.3g} modules a layer; by kind {kinds}",
        f"different choices in a layer: {routing.distinct:.1f} on average",
        f"agreement of two prompts: {routing.agreement:.2f} (1 is the same modules for all, {k / experts:.2f} is chance)",
    ]


def routing_json(routing: "RoutingMap") -> dict[str, Any]:
    """The whole map as plain lists, numbers and text for ``json.dumps``."""
    return finite({**asdict(routing), "modules": [asdict(module) for module in routing.modules], "by_kind": routing.by_kind})


def prompts_table(prompts: PromptMap) -> Table:
    """The layers as a table for the terminal; those with a new prompt stand out."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("layer", Text("total", style="bold"), justify="right")
    table.add_column("prompt", Text(f"{len(prompts.chosen)} new", style="bold"))
    columns = [(name, numbers) for name, numbers in (("gate", prompts.gates), ("loss", prompts.losses)) if numbers is not None]
    for name, _ in columns:
        table.add_column(name, justify="right")
    table.add_column("parameters", Text(f"{sum(prompts.parameters.values()):,}", style="bold"), justify="right")
    for layer in range(prompts.layers):
        new = layer in prompts.chosen
        cells = [f"{numbers[layer]:.3f}" if layer < len(numbers) else "·" for _, numbers in columns]
        count = f"{prompts.parameters[layer]:,}" if new else "·"
        table.add_row(str(layer), prompts.role(layer), *cells, count, style="bold" if new and not prompts.hyper_network else "dim")
    return table


def prompts_lines(prompts: PromptMap) -> list[str]:
    """The map in a few lines of plain text."""
    stored = f"{sum(prompts.parameters.values()):,}"
    if prompts.other_parameters:
        stored += f", and {prompts.other_parameters:,} outside the generators"
    how = "fixed by the recipe" if prompts.gates is None else "chosen by the search"
    if prompts.losses is not None:
        how += ", by the losses with only some layers' gates open"
    if prompts.hyper_network:
        how = "the hyper-network of a search, which has not chosen yet"
    return [
        f"base model: {prompts.base_model or 'not named'}",
        f"adapter: selective prompts (SPT), {prompts.num_prompt_tokens} prompt tokens",
        f"layers with a new prompt: {', '.join(map(str, prompts.chosen))} of {prompts.layers} ({how})",
        f"parameters: {stored}",
    ]


def prompts_json(prompts: PromptMap) -> dict[str, Any]:
    """The whole map as plain lists, numbers and text for ``json.dumps``."""
    return finite({name: list(value) if isinstance(value, tuple) else value for name, value in asdict(prompts).items()})
