"""Pictures: a heatmap of any grid with totals at its margins, and the gates and layers of SPT, in PNG or SVG.

Matplotlib is imported only where something is drawn: it comes with the extra ``plot``.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.errors import GatewiseError, needs
from gatewise.files import whole_file
from gatewise.inspection.budget import BudgetMap, Value
from gatewise.inspection.grid import Grid
from gatewise.inspection.prompts import PromptMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gatewise.inspection.importance import Importance
    from gatewise.inspection.routing import RoutingMap

BUDGET_TITLE = "Where the budget went"
_INK, _FAINT, _BAR, _ABSENT, _REST = "#1b2733", "#5c6b7a", "#9fb4c7", "#eceff2", "#c3cfda"

# One hue from light to dark: it keeps its order in every kind of colour vision and in grey print.
_RAMP = ("#f1f6fb", "#86b3d6", "#0b3f73")

# With signs, lightest at zero and orange below it, which every kind of colour vision tells from the blue.
_SIGNED_RAMP, _BELOW_BAR = ("#6b2d00", "#dfa67c", "#f6f5f4", "#86b3d6", "#0b3f73"), "#d9ab8a"


def check_plot(out: str | Path) -> str:
    """The kind of file that a plot's name asks for, "png" or "svg".

    Raises:
        GatewiseError: a name that ends otherwise, or there is no matplotlib.
    """
    suffix = Path(out).suffix.lower()
    if suffix not in (".png", ".svg"):
        raise GatewiseError(f"cannot plot to {out}: expected a name that ends in .png or .svg")
    with needs("plot", "drawing"):
        import matplotlib  # noqa: F401
    return suffix[1:]


@contextmanager
def figure_for(out: str | Path, width: float, height: float, **settings: Any) -> Iterator["Figure"]:
    """A figure to draw in, which is then written into a file, whole or not at all; the same figure always gives the same bytes."""
    kind = check_plot(out)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "gatewise", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), facecolor="white", **settings)
        yield figure
        with whole_file(out) as part:
            # No date among the bytes.
            figure.savefig(part, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)


def plot(budget: BudgetMap, out: str | Path, value: Value = "rank") -> Path:
    """Draws where the budget went into a file, whole or not at all: a heatmap with totals at its margins.

    Args:
        out: a name that ends in ``.png`` or ``.svg``. Missing folders are made.

    Returns:
        The path written.

    Raises:
        GatewiseError: another suffix, a path that cannot be written, or matplotlib is not installed.
    """
    grid = budget.grid(value)
    return heatmap(grid, BUDGET_TITLE, budget.notes(grid.title), out)


def plot_importance(importance: "Importance", out: str | Path) -> Path:
    """Draws what every layer and module is worth: scores below zero are orange and the others blue. Otherwise as ``plot``."""
    grid = importance.score_grid()
    notes = (
        f"{grid.title} by layer and kind · {importance.base_model or 'base model not named'}",
        f"{importance.rows:,} rows{f' of {importance.data}' if importance.data else ''} · total rank {importance.rank:,}",
    )
    return heatmap(grid, "What each module is worth", notes, out)


def plot_routing(routing: "RoutingMap", out: str | Path) -> Path:
    """Draws which modules the prompts chose. Otherwise as ``plot``."""
    grid = routing.grid()
    notes = (
        f"{grid.title}, by layer and kind · {routing.base_model or 'base model not named'}",
        f"{routing.prompts:,} prompts{f' of {routing.data}' if routing.data else ''} · {routing.top_k} modules a layer",
    )
    return heatmap(grid, "Which modules the prompts chose", notes, out)


def heatmap(grid: Grid, title: str, notes: Sequence[str], out: str | Path) -> Path:
    """Draws a grid with its totals below and at the right, and two lines under the title. A row has the same height in any grid."""
    rows, columns, top = len(grid.layers), len(grid.kinds), grid.most or 1.0
    width = max(0.66 * columns, 3.0) + 2.2
    with figure_for(out, width, 1.6 + (0.26 if rows <= 40 else 0.21) * (rows + 1), layout="constrained") as figure:
        import numpy as np
        from matplotlib.colors import LinearSegmentedColormap

        ramp = LinearSegmentedColormap.from_list("gatewise", _SIGNED_RAMP if grid.signed else _RAMP).with_extremes(bad=_ABSENT)
        room = int(width / 0.068)
        figure.suptitle(title, x=0.01, ha="left", size=12, color=_INK, weight="bold", parse_math=False)
        axes = figure.add_subplot()
        axes.set_title("\n".join(_shorten(note, room) for note in notes), loc="left", size=8, color=_FAINT, parse_math=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, labelcolor=_INK)
        axes.set(xlim=(0, columns + 1), ylim=(rows + 1, 0))
        axes.set_ylabel("layer", size=8.5, color=_FAINT)
        kinds = [_shorten(kind, 11) for kind in grid.kinds]
        axes.set_xticks([x + 0.5 for x in range(columns + 1)], [*kinds, grid.margin], parse_math=False)
        axes.set_yticks([y + 0.5 for y in range(rows + 1)], [*grid.layers, grid.margin])
        if rows:
            numbers = np.array(grid.cells, dtype=float)  # None becomes NaN
            low = -top if grid.signed else 0.0
            axes.pcolormesh(np.ma.masked_invalid(numbers), cmap=ramp, vmin=low, vmax=top, edgecolors="white", linewidth=1)
        for y, row in enumerate([*grid.cells, grid.columns]):
            for x, number in enumerate([*row, grid.rows[y] if y < rows else grid.total]):
                if number is None:
                    continue
                inside = x < columns and y < rows
                ink = "white" if inside and math.isfinite(number) and abs(number) > 0.66 * top else _INK
                style: dict[str, Any] = {"color": ink, "weight": "normal" if inside else "bold", "size": 7.5}
                axes.text(x + 0.5, y + 0.52, grid.write(number), ha="center", va="center", **style)
    return Path(out)


def _shorten(text: str, room: int) -> str:
    """Cuts text in the middle, where paths and names differ least."""
    return text if len(text) <= room else f"{text[: (room - 1) // 2]}…{text[len(text) - room // 2 :]}"


def plot_prompts(prompts: PromptMap, out: str | Path) -> Path:
    """Draws a bar a layer: as long as its gate after a search, dark where the layer takes a new prompt.

    Otherwise as ``plot``.
    """

    with figure_for(out, 5.4, 1.4 + 0.24 * prompts.layers, layout="constrained") as figure:
        axes = labelled_axes(figure, "Where the prompts enter", prompts.base_model, "gate" if prompts.gates else "", "layer")
        gates = [gate if math.isfinite(gate) else 0.0 for gate in prompts.gates or ()]
        for layer in range(prompts.layers):
            new = layer in prompts.chosen
            size = gates[layer] if layer < len(gates) else float(new)
            axes.barh(layer, size, height=0.8, color=_RAMP[-1] if new else _REST)
            words = {"new": "new prompt", "carried": "carried on", "none": ""}[prompts.role(layer)]
            axes.annotate(words, (size, layer), (4, 0), textcoords="offset points", va="center", size=7.5, color=_INK)
        axes.set_ylim(prompts.layers - 0.4, -0.6)
        axes.set_xlim(0, 1.35 * max([*gates, 1e-6] if gates else [1.0]))
        axes.set_yticks(range(prompts.layers))
        if not gates:
            axes.set_xticks([])
    return Path(out)


def labelled_axes(figure: "Figure", title: str, base_model: str | None, x: str, y: str) -> "Axes":
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", size=12, color=_INK, weight="bold", pad=20)
    axes.text(0, 1.02, base_model or "base model not named", transform=axes.transAxes, size=8, color=_FAINT, parse_math=False)
    axes.set_xlabel(x, size=8.5, color=_FAINT)
    axes.set_ylabel(y, size=8.5, color=_FAINT)
    axes.tick_params(length=0, labelsize=8, labelcolor=_INK)
    axes.spines[:].set_color(_REST)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
