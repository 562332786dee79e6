"""Which modules prompts chose: shares by layer and kind, shown. What a trained adapter chooses is tested with its run."""

import json
from pathlib import Path

import matplotlib
from maps import rendered

from gatewise.inspection import ModuleUse, RoutingMap, grid_table, plot_routing, routing_json, routing_lines
from gatewise.sites import site


def routing() -> RoutingMap:
    shares = {"layers.0.q_proj": 1.0, "layers.0.v_proj": 0.0, "layers.1.q_proj": 0.5, "layers.1.v_proj": 0.5}
    modules = (ModuleUse(path, site(path).layer, site(path).kind, share, share) for path, share in shares.items())
    return RoutingMap(tuple(modules), prompts=4, top_k=1, distinct=1.5, agreement=0.75, base_model="tiny", data="d.jsonl")


def test_margins_are_means() -> None:
    grid = routing().grid()
    assert (grid.cells, grid.rows, grid.columns, grid.total) == ([[1.0, 0.0], [0.5, 0.5]], [0.5, 0.5], [0.75, 0.25], 0.5)
    assert grid.write(None) == "·"
    assert routing().by_kind == {"q": 0.75, "v": 0.25}


def test_margins_are_called_means() -> None:
    grid = routing().grid()
    assert rendered(grid_table(grid)).split()[:4] == ["layer", "q", "v", "mean"]


def test_the_summary_and_json() -> None:
    assert routing_lines(routing()) == [
        "base model: tiny",
        "prompts: 4 of d.jsonl",
        "kept: 1 of 2 modules a layer; by kind q 75%, v 25%",
        "different choices in a layer: 1.5 on average",
        "agreement of two prompts: 0.75 (1 is the same modules for all, 0.50 is chance)",
    ]
    told = json.loads(json.dumps(routing_json(routing())))
    assert told["by_kind"] == {"q": 0.75, "v": 0.25}
    assert told["modules"][0] == {"path": "layers.0.q_proj", "layer": 0, "kind": "q", "share": 1.0, "gate": 1.0}


def test_routing_is_drawn_with_its_means(tmp_path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawn = plot_routing(routing(), tmp_path / "routing.svg").read_bytes()
    assert drawn.startswith(b"<?xml")
    assert drawn.count(b">mean<") == 2
