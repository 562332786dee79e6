"""Numbers by layer and kind: sums over places, margins, labels, and the unit that suits them."""

import math
from pathlib import Path

import pytest
from adapter_folders import random_factors, write_folder
from maps import importance, module

from gatewise.inspection import read_budget


def test_a_grid_adds_up_places_and_shows_holes(tmp_path: Path) -> None:
    tensors = random_factors("model.layers.3.mlp.experts.0.up_proj") | random_factors("model.layers.3.mlp.experts.1.up_proj", r=2)
    tensors |= random_factors("model.layers.1.self_attn.q_proj", r=1) | random_factors("classifier.dense", r=3)
    budget = read_budget(write_folder(tmp_path, tensors))
    grid = budget.grid()
    assert (grid.layers, grid.kinds) == (["0", "1", "2", "3", "other"], ["q", "up", "dense"])
    assert grid.cells == [[None] * 3, [1, None, None], [None] * 3, [None, 6, None], [None, None, 3]]
    norms = {module.path: module.norm for module in budget.modules}
    both = math.hypot(norms["model.layers.3.mlp.experts.0.up_proj"], norms["model.layers.3.mlp.experts.1.up_proj"])
    assert budget.grid("norm").cells[3][1] == pytest.approx(both)
    assert budget.grid("parameters").cells[3][1] == 6 * 11


@pytest.mark.parametrize(
    ("total", "unit", "text"),
    [
        (0.0312, "10⁻³ nats", "31.2"),
        (-0.0312, "10⁻³ nats", "-31.2"),
        (0.00123, "10⁻³ nats", "1.23"),
        (4.5e-7, "10⁻⁹ nats", "450.0"),
        (2.5, "nats", "2.50"),
        (1234.5, "10³ nats", "1.23"),
        (0.0, "nats", "0"),
    ],
)
def test_the_unit_suits_the_largest_cell(total: float, unit: str, text: str) -> None:
    grid = importance(module("layers.0.q_proj", total)).score_grid()
    assert grid.title == f"path_integral score in {unit}"
    assert (grid.write(grid.cells[0][0]), grid.write(None)) == (text, "·")
    assert importance(module("layers.0.q_proj", total), score="sensitivity").score_grid().title == (
        f"sensitivity score in {unit.removesuffix('nats').strip()}" if unit != "nats" else "sensitivity score"
    )


def test_cells_and_margins_are_sums_over_modules() -> None:
    grid = importance(
        module("layers.0.q_proj", 0.25, -1.0), module("layers.2.q_proj", 0.5), module("layers.2.experts.0.up_proj", 1.0),
        module("layers.2.experts.1.up_proj", 2.0), module("classifier.dense", -4.0),
    ).score_grid()  # fmt: skip
    assert (grid.layers, grid.kinds) == (["0", "1", "2", "other"], ["q", "up", "dense"])
    assert grid.cells == [[-0.75, None, None], [None] * 3, [0.5, 3.0, None], [None, None, -4.0]]
    assert (grid.rows, grid.columns, grid.total) == ([-0.75, None, 3.5, -4.0], [-0.25, 3.0, -4.0], -1.25)
    assert (grid.most, grid.signed) == (4.0, True)
