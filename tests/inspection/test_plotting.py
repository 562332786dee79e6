"""Pictures: what the name says, the same bytes for the same map, whole or not at all, and any numbers can be drawn."""

import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from maps import budget_stack, importance, importance_stack, module
from matplotlib.axes import Axes

from gatewise.errors import GatewiseError
from gatewise.inspection import BudgetMap, plot, plot_importance


@pytest.mark.parametrize("value", ["rank", "norm", "parameters"])
def test_a_budget_as_png_and_svg(value: Any, tmp_path: Path) -> None:
    budget = replace(budget_stack(6), base_model="ranks of $x_{ & <b>")
    png = plot(budget, tmp_path / "new" / "map.png", value).read_bytes()
    assert png.startswith(b"\x89PNG\r\n")
    svg = plot(budget, tmp_path / "map.svg", value)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    first = svg.read_bytes()
    assert plot(budget, svg, value).read_bytes() == first  # the same map gives the same bytes
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["map.png", "map.svg"]


def test_every_number_and_total_is_written(tmp_path: Path) -> None:
    budget = budget_stack(6)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn = plot(budget, tmp_path / "map.svg").read_text()
    grid = budget.grid()
    for number in (*grid.rows, *grid.columns, grid.total, *(cell for row in grid.cells for cell in row)):
        assert f">{number}<" in drawn


def test_other_names_are_refused(tmp_path: Path) -> None:
    for name in ("map.pdf", "map.html"):
        with pytest.raises(GatewiseError, match=r"cannot plot to .*map\.\w+: expected a name that ends in \.png or \.svg"):
            plot_importance(importance_stack(1), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GatewiseError, match=r"matplotlib, which is not installed: pip install 'gatewise\[plot\]'"):
        plot(budget_stack(1), tmp_path / "map.png")


@pytest.mark.filterwarnings("error")
def test_empty_map_is_drawn(tmp_path: Path) -> None:
    assert plot(BudgetMap(()), tmp_path / "a.png").stat().st_size > 0


def test_colours_part_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = Axes.pcolormesh
    monkeypatch.setattr(Axes, "pcolormesh", lambda *given, **how: seen.append(real(*given, **how)) or seen[-1])

    def faces(*totals: float) -> list[tuple[float, float, float]]:
        plot_importance(importance(*(module(f"layers.0.kind{i}", t) for i, t in enumerate(totals))), tmp_path / "map.png")
        return [tuple(255 * c for c in face[:3]) for face in seen[-1].to_rgba(list(totals))]  # type: ignore[misc]

    below, above, zero = faces(-1.0, 1.0, 0.0)
    assert below[0] > below[2] + 60  # orange
    assert above[2] > above[0] + 60  # blue
    assert max(zero) - min(zero) < 8  # neither
    assert min(zero) > 230
    # As far from zero, as strong, whichever side is longer.
    assert faces(-1.0, 4.0)[0] != below
