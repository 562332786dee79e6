"""A grid as a heatmap with totals at its margins, in PNG or SVG."""

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from gatewise.inspection.grid import Grid, finite_or_zero

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT, _BAR, _ABSENT = "#1b2733", "#5c6b7a", "#9fb4c7", "#eceff2"


# One hue from light to dark: it keeps its order in every kind of colour vision and in grey print.
_RAMP = ("#f1f6fb", "#86b3d6", "#0b3f73")


# With signs, lightest at zero and orange below it, which every kind of colour vision tells from the blue.
_SIGNED_RAMP, _BELOW_BAR = ("#6b2d00", "#dfa67c", "#f6f5f4", "#86b3d6", "#0b3f73"), "#d9ab8a"


def image_of(grid: Grid, title: str, notes: Sequence[str], kind_of_file: str) -> bytes:
    """The heatmap as a file's bytes; the notes are two lines under the title."""
    return file_of(partial(_draw, grid, title, notes), kind_of_file)


def file_of(draw: Callable[[], "Figure"], kind_of_file: str) -> bytes:
    """A figure, drawn in the font of all plots, as a file's bytes ("png" or "svg"): the same figure always gives the same."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "gatewise", "font.family": "DejaVu Sans"}):
        file = io.BytesIO()
        # No date among the bytes.
        draw().savefig(file, format=kind_of_file, dpi=160, metadata={"Date": None} if kind_of_file == "svg" else None)
    return file.getvalue()


def _draw(grid: Grid, title: str, notes: Sequence[str]) -> "Figure":
    """The heatmap, laid out in inches so that a row keeps its height from 6 layers to 80."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

    layers, kinds = grid.layers, grid.kinds
    row_height = 0.26 if len(layers) <= 40 else 0.21
    heat_width, heat_height = max(0.66 * len(kinds), 3.0), row_height * max(len(layers), 1)
    left, bottom, kinds_height, bars_width, head = 0.85, 0.4, 0.75, 1.7, 0.85
    width = left + heat_width + 0.1 + bars_width + 1.15
    height = bottom + heat_height + 0.1 + kinds_height + head
    figure = Figure(figsize=(width, height), facecolor="white")

    def axes(x: float, y: float, w: float, h: float) -> "Axes":
        made = figure.add_axes((x / width, y / height, w / width, h / height))
        made.tick_params(length=0, labelsize=8, labelcolor=_INK)
        for spine in made.spines.values():
            spine.set_visible(False)
        return made

    room = int((width - left - 0.2) / 0.068)
    head_lines = [(title, 12, _INK, "bold", 0.3)]
    head_lines += [(note, 8, _FAINT, "normal", down) for note, down in zip(notes, (0.51, 0.68), strict=True)]
    for text, size, colour, weight, down in head_lines:
        fits = _shorten(text, int(room * 8 / size))
        figure.text(
            left / width,
            1 - down / height,
            fits,
            size=size,
            color=colour,
            weight=weight,
            va="baseline",
            parse_math=False,
        )

    ramp = LinearSegmentedColormap.from_list("gatewise", _SIGNED_RAMP if grid.signed else _RAMP)
    top = grid.most or 1.0
    scale = Normalize(-top if grid.signed else 0, top)
    heat = axes(left, bottom, heat_width, heat_height)
    heat.set_xlim(0, max(len(kinds), 1))
    heat.set_ylim(max(len(layers), 1), 0)
    texts = [[grid.write(number) for number in row] for row in grid.cells]
    for y, row in enumerate(grid.cells):
        for x, number in enumerate(row):
            known = number is not None and math.isfinite(number)
            face = ramp(scale(number)) if number is not None and known else _ABSENT
            edge, hatch = ("#cfd6dc", "////") if number is None else ("white", None)
            heat.add_patch(Rectangle((x + 0.02, y + 0.03), 0.96, 0.94, facecolor=face, edgecolor=edge, linewidth=0, hatch=hatch))
            if number is not None:
                ink = "white" if known and abs(number) > 0.66 * top else _INK
                heat.text(x + 0.5, y + 0.52, texts[y][x], size=7.5, color=ink, ha="center", va="center")
    heat.set_xticks([x + 0.5 for x in range(len(kinds))], [_shorten(kind, 11) for kind in kinds], parse_math=False)
    heat.set_yticks([y + 0.5 for y in range(len(layers))], layers)
    heat.set_ylabel("layer", size=8.5, color=_FAINT)

    small: dict[str, Any] = {"size": 7.5, "color": _INK}
    by_kind = axes(left, bottom + heat_height + 0.1, heat_width, kinds_height)
    tops = [finite_or_zero(total) for total in grid.columns]
    by_kind.bar([x + 0.5 for x in range(len(kinds))], tops, width=0.86, color=_bars(tops))
    by_kind.set_xlim(heat.get_xlim())
    by_kind.set_ylim(*_span(tops, 0.3))
    by_kind.set_xticks([])
    by_kind.set_yticks([])
    for x, text in enumerate([grid.write(total) for total in grid.columns]):
        side: dict[str, Any] = {"va": "baseline"} if tops[x] >= 0 else {"va": "top"}
        at, away = (x + 0.5, tops[x]), (0, 2 if tops[x] >= 0 else -2)
        by_kind.annotate(text, at, away, textcoords="offset points", ha="center", **side, **small)

    by_layer = axes(left + heat_width + 0.1, bottom, bars_width, heat_height)
    ends = [finite_or_zero(total) for total in grid.rows]
    by_layer.barh([y + 0.5 for y in range(len(layers))], ends, height=0.8, color=_bars(ends))
    by_layer.set_xlim(*_span(ends, 0.32))
    by_layer.set_ylim(heat.get_ylim())
    by_layer.set_xticks([])
    by_layer.set_yticks([])
    by_layer.set_xlabel(f"{grid.margin} per layer", size=8.5, color=_FAINT, loc="left")
    for y, text in enumerate([grid.write(total) for total in grid.rows]):
        side = {"ha": "left"} if ends[y] >= 0 else {"ha": "right"}
        at, away = (ends[y], y + 0.52), (3 if ends[y] >= 0 else -3, 0)
        by_layer.annotate(text, at, away, textcoords="offset points", va="center", **side, **small)

    bar_height = min(heat_height, 2.6)
    colours = axes(left + heat_width + bars_width + 0.3, bottom + heat_height - bar_height, 0.13, bar_height)
    ticks = MaxNLocator(nbins=5, integer=grid.whole).tick_values(-top if grid.signed else 0, top)
    labels = FixedFormatter([grid.tick(number) for number in ticks])
    key = figure.colorbar(ScalarMappable(scale, ramp), cax=colours, ticks=FixedLocator(ticks), format=labels)
    key.outline.set_visible(False)
    colours.tick_params(length=0, labelsize=7.5, labelcolor=_INK)
    return figure


def _bars(totals: Sequence[float]) -> list[str]:
    return [_BAR if total >= 0 else _BELOW_BAR for total in totals]


def _span(totals: Sequence[float], margin: float) -> tuple[float, float]:
    """The limits of an axis of bars: zero, the bars, and room beyond their ends for the numbers."""
    low, high = min((0.0, *totals)), max((0.0, *totals))
    if low == high:
        return 0.0, 1 + margin
    room = margin * (high - low)
    return (low - room if low < 0 else 0.0), (high + room if high > 0 else 0.0)


def _shorten(text: str, room: int) -> str:
    """Cuts text in the middle, where paths and names differ least."""
    room = max(room, 5)
    return text if len(text) <= room else f"{text[: (room - 1) // 2]}…{text[len(text) - room // 2 :]}"
