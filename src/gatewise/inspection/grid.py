"""The numbers of modules laid out by layer and kind, with totals or means at the margins: what tables and pictures show."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gatewise.sites import Site, kind_key

OTHER = "other"
"""The row label of modules outside the stack of layers, such as a pooler."""


Module = TypeVar("Module", bound=Site)


@dataclass(frozen=True)
class Grid:
    """One number for each layer and kind, with totals at the margins.

    Attributes:
        title: what the numbers are, with their unit.
        layers, kinds: labels of the rows and columns.
        cells: the rows; None where there is no module.
        rows, columns, total: of a row, of a column and of all.
        margin: what these are, in one word: "total" or "mean".
        write: a number as short text; a dot for None.
        signed: numbers below zero mean something, so the colours part at zero.
    """

    title: str
    layers: Sequence[str]
    kinds: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    rows: Sequence[float | None]
    columns: Sequence[float | None]
    total: float
    write: Callable[[float | None], str]
    signed: bool = False
    margin: str = "total"

    @property
    def most(self) -> float:
        """The size of the largest finite cell, where the colours end; 0 without one."""
        return max((abs(cell) for row in self.cells for cell in row if cell is not None and math.isfinite(cell)), default=0.0)


def grid_of(
    modules: Sequence[Module],
    number: Callable[[Sequence[Module]], float | None],
    *,
    title: str,
    write: Callable[[float | None], str],
    signed: bool = False,
    margin: str = "total",
) -> Grid:
    """Lays modules out by layer, from 0 to the last one that has a module, and kind.

    Args:
        number: what stands for a group of modules: those of a cell, a row, a column or all; None for an empty group.
    """
    kinds = sorted({module.kind for module in modules}, key=kind_key)
    numbers = {module.layer for module in modules if module.layer is not None}
    layers: list[int | None] = [*range(max(numbers, default=-1) + 1), *([None] if any(m.layer is None for m in modules) else [])]
    return Grid(
        title=title,
        layers=[OTHER if layer is None else str(layer) for layer in layers],
        kinds=kinds,
        cells=[[number([m for m in modules if (m.layer, m.kind) == (layer, kind)]) for kind in kinds] for layer in layers],
        rows=[number([m for m in modules if m.layer == layer]) for layer in layers],
        columns=[number([m for m in modules if m.kind == kind]) for kind in kinds],
        total=number(modules) or 0.0,
        write=write,
        signed=signed,
        margin=margin,
    )


def short_number(number: float | None, whole: bool = False) -> str:
    """At most six characters: a rank in full; norms 0.034, 4e-05; parameters 960, 18.4k, 2.43M. A dot for no module."""
    if number is None:
        return "·"
    if not math.isfinite(number):
        return "nan" if math.isnan(number) else "inf"
    if number == 0 or whole or (number < 1000 and number == int(number)):
        return str(int(number))
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:#.3g}".rstrip(".") if number >= 1e-3 else f"{number:.0e}"


def percent(share: float | None) -> str:
    """A share from 0 to 1 as a percentage. A dot for no module."""
    return "·" if share is None else f"{100 * share:.0f}%"
