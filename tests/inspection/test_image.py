"""Heatmaps: rows keep a readable height, colours part at zero, and any numbers can be drawn."""

import re
from pathlib import Path

import pytest
from maps import budget_stack, importance, module, rendered

from gatewise.inspection import BudgetMap, grid_table, plot, plot_importance, summary_lines
from gatewise.inspection.image import image_of


def test_image_grows_with_the_layers(tmp_path: Path) -> None:
    def size(layers: int) -> tuple[int, int]:
        header = plot(budget_stack(layers), tmp_path / "map.png").read_bytes()[16:24]
        return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")

    small, large = size(6), size(80)
    assert small[0] == large[0]
    assert large[1] - small[1] > 74 * 0.2 * 160 * 0.8  # every row keeps a readable height, about 0.2 inches


@pytest.mark.filterwarnings("error")
def test_empty_map_is_drawn(tmp_path: Path) -> None:
    for name in ("a.png", "a.svg", "a.html"):
        assert plot(BudgetMap(()), tmp_path / name).stat().st_size > 0
    assert summary_lines(BudgetMap(()))[2] == "total rank: 0"


def test_colours_part_at_zero() -> None:
    def faces(*totals: float) -> list[tuple[int, int, int]]:
        grid = importance(*(module(f"layers.0.kind{i}", t) for i, t in enumerate(totals))).score_grid()
        svg = image_of(grid, "title", ("a", "b"), "svg").decode()
        fills = re.findall(r'<g id="patch_\d+">\s*<path [^>]*?style="fill: #([0-9a-f]{6})"', svg)
        shown = fills[2 : 2 + len(totals)]  # after the figure and its first axes
        return [tuple(int(text[i : i + 2], 16) for i in (0, 2, 4)) for text in shown]  # type: ignore[misc]

    below, above, zero = faces(-1.0, 1.0, 0.0)
    assert below[0] > below[2] + 60  # orange
    assert above[2] > above[0] + 60  # blue
    assert max(zero) - min(zero) < 8  # neither
    assert min(zero) > 230
    # As far from zero, as strong, whichever side is longer.
    assert faces(-1.0, 4.0)[0] != below


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scores", [(), (0.0,), (-1.0,), (-1.0, -2.0)])
def test_any_signs_are_drawn(scores: tuple[float, ...], tmp_path: Path) -> None:
    found = importance(*(module(f"layers.{i}.q_proj", score) for i, score in enumerate(scores)))
    for name in ("a.png", "a.svg", "a.html"):
        assert plot_importance(found, tmp_path / name).stat().st_size > 0
    assert rendered(grid_table(found.score_grid()))
