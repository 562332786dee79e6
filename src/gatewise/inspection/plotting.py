"""Writes plots into files: the name says whether an image (.png, .svg) or a page (.html)."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.errors import GatewiseError
from gatewise.files import whole_file
from gatewise.inspection.budget import BudgetMap, Value
from gatewise.inspection.grid import finite_or_zero
from gatewise.inspection.image import file_of, image_of
from gatewise.inspection.page import budget_page, importance_page
from gatewise.inspection.prompts import PromptMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gatewise.inspection.importance import Importance
    from gatewise.inspection.routing import RoutingMap


def plot(budget: BudgetMap, out: str | Path, value: Value = "rank", title: str | None = None) -> Path:
    """Draws the map into a file, whole or not at all.

    Args:
        out: ``.png`` and ``.svg`` give a heatmap with totals at its margins; ``.html`` one page that needs no network
            and shows rank, norm and parameters, and the rounds where they are known. Missing folders are made.
        value: what is drawn, or shown first.
        title: the heading; by default says what is shown.

    Returns:
        The path written.

    Raises:
        GatewiseError: another suffix, or a path that cannot be written.
        ValueError: ``value`` is not one of "rank", "norm" and "parameters".
    """
    grid = budget.grid(value)  # refuses an unknown value before anything is drawn
    title = title or "Where the budget went"
    notes = (
        f"{grid.title} by layer and kind · {budget.base_model or budget.adapter_type}",
        f"total rank {budget.rank:,} · {budget.parameters:,} parameters",
    )
    suffix = check_suffix(out)
    page = budget_page(budget, value, title).encode() if suffix == "html" else None
    return write_bytes(out, page or image_of(grid, title, notes, suffix))


def plot_importance(
    importance: "Importance", out: str | Path, suggested: Mapping[str, int] | None = None, title: str | None = None
) -> Path:
    """Draws what every layer and module is worth into a file, whole or not at all.

    Scores below zero are orange and the others blue.

    Args:
        out: as for ``plot``; the page also shows the ranks.
        suggested: path -> rank of every module, which the page shows too.
        title: the heading; by default says what is shown.

    Returns:
        The path written.

    Raises:
        GatewiseError: another suffix, or a path that cannot be written.
    """
    grid = importance.score_grid()
    title = title or "What each module is worth"
    notes = (
        f"{grid.title} by layer and kind · {importance.base_model or 'base model not named'}",
        f"{importance.rows:,} rows{f' of {importance.data}' if importance.data else ''} · total rank {importance.rank:,}",
    )
    suffix = check_suffix(out)
    page = importance_page(importance, title, suggested).encode() if suffix == "html" else None
    return write_bytes(out, page or image_of(grid, title, notes, suffix))


def plot_routing(routing: "RoutingMap", out: str | Path, title: str | None = None) -> Path:
    """Draws which modules the prompts chose into a file, whole or not at all.

    Args:
        out: a name that ends in ``.png`` or ``.svg``. Missing folders are made.

    Returns:
        The path written.

    Raises:
        GatewiseError: another suffix, or a path that cannot be written.
    """
    suffix, grid = check_image_suffix(out, "routing is"), routing.grid()
    notes = (
        f"{grid.title}, by layer and kind · {routing.base_model or 'base model not named'}",
        f"{routing.prompts:,} prompts{f' of {routing.data}' if routing.data else ''} · {routing.top_k} modules a layer",
    )
    return write_bytes(out, image_of(grid, title or "Which modules the prompts chose", notes, suffix))


def check_suffix(out: str | Path) -> str:
    """The suffix of a plot's file in lower case, without the dot.

    Raises:
        GatewiseError: nothing can be drawn into a file of that name.
    """
    suffix = Path(out).suffix.lower()
    if suffix not in (".png", ".svg", ".html"):
        raise GatewiseError(f"cannot plot to {out}: expected a name that ends in .png, .svg or .html")
    return suffix[1:]


def check_image_suffix(out: str | Path, what: str) -> str:
    """``check_suffix`` for what can be drawn as an image only.

    Args:
        what: what is drawn and its verb, such as "routing is", for the message.
    """
    suffix = Path(out).suffix.lower()
    if suffix not in (".png", ".svg"):
        raise GatewiseError(f"cannot plot to {out}: {what} drawn into a name that ends in .png or .svg")
    return suffix[1:]


def write_bytes(out: str | Path, content: bytes) -> Path:
    """Writes a plot's file, whole or not at all."""
    with whole_file(out) as part:
        part.write_bytes(content)
    return Path(out)


_INK, _FAINT, _REST = "#1b2733", "#5c6b7a", "#c3cfda"


# From light to dark by depth, so that neighbours can be told apart in every kind of colour vision and in grey print.
_FROM, _TO = "#86b3d6", "#0b3f73"


def plot_gates(gates: Sequence[Sequence[float]], chosen: Sequence[int], out: str | Path, base_model: str | None = None) -> Path:
    """Draws the gates of a search over its steps; chosen layers are coloured and named at their ends.

    Args:
        gates: (s + 1, n), step by layer.
        chosen: layers, in order.
        out: a name that ends in ``.png`` or ``.svg``, written whole or not at all.

    Raises:
        GatewiseError: another suffix, or a path that cannot be written.
    """

    def draw(figure: "Figure") -> None:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.ticker import MaxNLocator

        axes = _axes(figure, "The gates of the search", base_model, "step", "gate")
        ramp = LinearSegmentedColormap.from_list("depth", [_FROM, _TO])
        steps = range(len(gates))
        for layer in range(len(gates[0])):
            if layer not in chosen:
                axes.plot(steps, [row[layer] for row in gates], color=_REST, linewidth=0.9)
        every = [gate for row in gates for gate in row]
        ends = _apart([gates[-1][layer] for layer in chosen], 0.04 * (max(every) - min(every)))
        for place, layer in enumerate(chosen):
            colour = ramp(place / max(1, len(chosen) - 1))
            axes.plot(steps, [row[layer] for row in gates], color=colour, linewidth=1.8)
            small: dict[str, Any] = {"size": 8, "color": _INK, "va": "center"}
            at = (len(gates) - 1, ends[place])
            axes.annotate(f"layer {layer}", at, (5, 0), textcoords="offset points", annotation_clip=False, **small)
        axes.set_xlim(0, max(1, len(gates) - 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        rest = len(gates[0]) - len(chosen)
        axes.text(0, -0.17, f"grey: the {rest} layers not chosen", transform=axes.transAxes, size=8, color=_FAINT)

    return _write_figure(draw, out, (7.2, 4.2))


def plot_prompts(prompts: PromptMap, out: str | Path) -> Path:
    """Draws a bar a layer: as long as its gate after a search, dark where the layer takes a new prompt.

    Args and errors as for ``plot_gates``.
    """

    def draw(figure: "Figure") -> None:
        known = prompts.gates is not None
        axes = _axes(figure, "Where the prompts enter", prompts.base_model, "gate" if known else "", "layer")
        for layer in range(prompts.layers):
            new = layer in prompts.chosen
            size = finite_or_zero(prompts.gates[layer]) if prompts.gates and layer < len(prompts.gates) else float(new)
            axes.barh(layer, size, height=0.8, color=_TO if new else _REST)
            words = {"new": "new prompt", "carried": "carried on", "none": ""}[prompts.role(layer)]
            axes.annotate(words, (size, layer), (4, 0), textcoords="offset points", va="center", size=7.5, color=_INK)
        axes.set_ylim(prompts.layers - 0.4, -0.6)
        axes.set_xlim(0, 1.35 * max([1.0] if prompts.gates is None else [*map(finite_or_zero, prompts.gates), 1e-6]))
        axes.set_yticks(range(prompts.layers))
        if not known:
            axes.set_xticks([])

    return _write_figure(draw, out, (5.4, 1.4 + 0.24 * prompts.layers))


def _axes(figure: "Figure", title: str, base_model: str | None, x: str, y: str) -> "Axes":
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", size=12, color=_INK, weight="bold", pad=20)
    axes.text(0, 1.02, base_model or "base model not named", transform=axes.transAxes, size=8, color=_FAINT, parse_math=False)
    axes.set_xlabel(x, size=8.5, color=_FAINT)
    axes.set_ylabel(y, size=8.5, color=_FAINT)
    axes.tick_params(length=0, labelsize=8, labelcolor=_INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_REST)
    return axes


def _apart(heights: Sequence[float], room: float) -> list[float]:
    """Where to write at the ends of lines: no two closer than ``room``, the order kept."""
    places = list(heights)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for below, above in pairwise(order):
        places[above] = max(places[above], places[below] + room)
    return places


def _write_figure(draw: Callable[["Figure"], None], out: str | Path, size: tuple[float, float]) -> Path:
    suffix = check_image_suffix(out, "prompts are")

    def drawn() -> "Figure":
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, facecolor="white", layout="constrained")
        draw(figure)
        return figure

    return write_bytes(out, file_of(drawn, suffix))
