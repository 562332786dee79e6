"""Budgets, importance, routing and prompt layers as text: tables for the terminal, lines of a summary, and JSON."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from gatewise.errors import some
from gatewise.files import finite
from gatewise.inspection.budget import BudgetMap
from gatewise.inspection.grid import Grid, percent
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


def budget_json(budget: BudgetMap) -> dict[str, Any]:
    """The whole map as plain lists, numbers and text for ``json.dumps``; numbers that are not finite become None."""
    totals = {name: budget.total(name) for name in ("rank", "capacity", "parameters", "allocated", "norm")}
    return finite(asdict(budget) | {"totals": totals | {"modules": len(budget.modules)}})


def budget_lines(budget: BudgetMap) -> list[str]:
    """The map in a few lines of plain text."""
    capacity, unused = budget.total("capacity"), budget.total("allocated") - budget.parameters
    layers = len({module.layer for module in budget.modules} - {None})
    slots = f" of {capacity:,} slots" if capacity != budget.rank else ""
    dead = f" in use, {unused:,} in dead slots" if unused else ""
    others = f", and {budget.other_parameters:,} outside LoRA" if budget.other_parameters else ""
    lines = [
        f"base model: {budget.base_model or 'not named'}",
        f"adapter: {budget.adapter_type}, {len(budget.modules):,} modules in {layers:,} layers",
        f"total rank: {budget.rank:,}{slots}",
        f"parameters: {budget.parameters:,}{dead}{others}",
    ]
    if budget.rounds:
        lines.append(f"rounds: {budget.rounds}, ranks scored by {budget.score or 'an unknown score'}")
    return lines


def importance_lines(importance: "Importance") -> list[str]:
    """What was scored and how, in a few lines of plain text, and the modules that could go."""
    from gatewise.allocation.scores import as_score

    meaning, unit = as_score(importance.score).meaning, f" {importance.unit}" if importance.unit else ""
    total = f"{importance.total:.4g}{unit}"
    if importance.score == "path_integral":
        total += f"; the ranks lower the loss by {importance.loss_base - importance.loss_adapted:.4g}{unit}"
    useless = [module.path for module in importance.useless]
    could_go = f"{len(useless):,} modules whose scores add up to zero or less: {some(useless, 5)}"
    lines = [
        f"base model: {importance.base_model or 'not named'}",
        f"score: {importance.score}{f' in{unit}' if unit else ', without a unit'}; of each rank, {meaning}",
        f"rows: {importance.rows:,}" + (f" of {importance.data}" if importance.data else ""),
        f"scored: {importance.rank:,} ranks in {len(importance.modules):,} modules",
        f"loss: {importance.loss_base:.4f} nats without these ranks, {importance.loss_adapted:.4f} with them",
        f"sum of scores: {total}",
        f"could go: {could_go if useless else 'no module'}",
    ]
    if importance.unscored:
        named = some(importance.unscored, 5)
        lines.append(f"not scored: {named}: no score reads this kind of layer, and suggestions leave it out")
    return lines


def importance_json(importance: "Importance") -> dict[str, Any]:
    """All of it as plain lists, numbers and text for ``json.dumps``."""
    modules = [asdict(one) | {"rank": one.rank, "total": one.total} for one in importance.modules]
    sums = {"rank": importance.rank, "total": importance.total, "unit": importance.unit or None}
    return finite(asdict(importance) | sums | {"modules": modules, "could_go": [module.path for module in importance.useless]})


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
    return finite(asdict(routing) | {"by_kind": routing.by_kind})


def prompts_table(prompts: PromptMap) -> Table:
    """The layers as a table for the terminal; those with a new prompt stand out."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("layer", Text("total", style="bold"), justify="right")
    table.add_column("prompt", Text(f"{len(prompts.chosen)} new", style="bold"))
    gates = prompts.gates
    if gates is not None:
        table.add_column("gate", justify="right")
    table.add_column("parameters", Text(f"{sum(prompts.parameters.values()):,}", style="bold"), justify="right")
    for layer in range(prompts.layers):
        new = layer in prompts.chosen
        cells = [] if gates is None else [f"{gates[layer]:.3f}" if layer < len(gates) else "·"]
        count = f"{prompts.parameters[layer]:,}" if new else "·"
        table.add_row(str(layer), prompts.role(layer), *cells, count, style="bold" if new and not prompts.hyper_network else "dim")
    return table


def prompts_lines(prompts: PromptMap) -> list[str]:
    """The map in a few lines of plain text."""
    stored = f"{sum(prompts.parameters.values()):,}"
    if prompts.other_parameters:
        stored += f", and {prompts.other_parameters:,} outside the generators"
    how = "fixed by the recipe" if prompts.gates is None else "chosen by the search"
    if prompts.hyper_network:
        how = "the hyper-network of a search, which has not chosen yet"
    return [
        f"base model: {prompts.base_model or 'not named'}",
        f"adapter: selective prompts (SPT), {prompts.num_prompt_tokens} prompt tokens",
        f"layers with a new prompt: {', '.join(map(str, prompts.chosen))} of {prompts.layers} ({how})",
        f"parameters: {stored}",
    ]
