"""Tables that fit a terminal and read without colour, summaries, and JSON that is plain and complete."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import random_factors, write_folder
from maps import budget_stack, importance, importance_stack, module, rendered

from gatewise.inspection import (
    BudgetMap,
    ModuleBudget,
    budget_json,
    budget_lines,
    grid_table,
    importance_json,
    importance_lines,
    read_budget,
)


@pytest.mark.parametrize("value", ["rank", "norm", "parameters"])
def test_table_fits_eighty_columns_and_reads_without_colour(value: Any) -> None:
    budget = budget_stack(80, parameters=123_457)
    text = rendered(grid_table(budget.grid(value)))
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    rows = [line.split() for line in text.splitlines() if line.split()]
    assert rows[0] == ["layer", "q", "k", "v", "o", "gate", "up", "down", "total"]
    numbered = [row for row in rows if row[0].isdigit() or row[0] == "total"]
    assert [row[0] for row in numbered] == [*map(str, range(80)), "total"]
    assert all(len(row) == 9 for row in numbered)


def test_summary_says_where_it_went(tmp_path: Path) -> None:
    tensors = random_factors("model.layers.0.self_attn.q_proj", r=1) | random_factors("model.layers.3.self_attn.v_proj", r=3)
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"][:] = 0
    tensors["model.layers.0.self_attn.q_proj.lora_B.weight"][:] = 0
    tensors["classifier.weight"] = torch.ones(2, 2)
    budget = read_budget(write_folder(tmp_path, tensors, base_model_name_or_path="some/model", use_rslora=True))
    assert budget_lines(budget) == [
        "base model: some/model",
        "adapter: rsLoRA, 2 modules in 2 layers",
        "total rank: 3 of 4 slots",
        "parameters: 33 in use, 11 in dead slots, and 4 outside LoRA",
    ]


def test_json_of_a_budget_is_plain_and_complete() -> None:
    budget = budget_stack(3)
    plain = json.loads(json.dumps(budget_json(budget), allow_nan=False))
    assert plain["totals"]["rank"] == budget.rank == sum(module["rank"] for module in plain["modules"])
    assert plain["modules"][0] | {"norm": 0} == {
        "path": "model.layers.0.self_attn.q_proj",
        "layer": 0,
        "kind": "q",
        "rank": 0,
        "capacity": 16,
        "parameters": 0,
        "allocated": 1600,
        "scaling": 2.0,
        "norm": 0,
    }
    broken = BudgetMap((ModuleBudget("a.layers.0.q_proj", 0, "q", 1, 1, 9, 9, 1.0, math.nan),))
    assert json.loads(json.dumps(budget_json(broken), allow_nan=False))["modules"][0]["norm"] is None


def test_the_table_shades_either_side_of_zero_in_its_own_colour() -> None:
    def colours(*totals: float) -> set[str]:
        shown = grid_table(importance(*(module(f"layers.0.{i}", t) for i, t in enumerate(totals))).score_grid())
        return set(re.findall(r"48;2;(\d+;\d+;\d+)", rendered(shown, colour=True)))

    assert len(colours(1.0, 0.1)) == len(colours(-1.0, -0.1)) == 1
    assert colours(1.0) | colours(-1.0) == colours(1.0, -1.0)
    assert colours(1.0) != colours(-1.0)


def test_the_summary_names_what_could_go() -> None:
    found = importance(
        module("layers.0.q_proj", 0.5, 0.3), module("layers.0.v_proj", 0.1, -0.2), module("layers.1.q_proj"),
        unscored=("conv",),
    )  # fmt: skip
    assert importance_lines(found) == [
        "base model: tiny",
        "score: path_integral in nats; of each rank, its share of the loss that the adapter takes away",
        "rows: 8 of d.jsonl",
        "scored: 4 ranks in 3 modules",
        "loss: 2.0000 nats without these ranks, 1.2500 with them",
        "sum of scores: 0.7 nats; the ranks lower the loss by 0.75 nats",
        "could go: 2 modules whose scores add up to zero or less: layers.0.v_proj, layers.1.q_proj",
        "not scored: conv: no score reads this kind of layer, and suggestions leave it out",
    ]
    many = importance(*(module(f"layers.{i}.q_proj", -1.0) for i in range(7)), score="sensitivity")
    lines = importance_lines(many)
    assert "score: sensitivity, without a unit; of each rank, AdaLoRA's |weight x gradient|, never below zero" in lines
    assert "sum of scores: -7" in lines
    assert lines[-1].endswith("layers.3.q_proj, layers.4.q_proj and 2 more")
    assert importance_lines(importance(module("layers.0.q_proj", 1.0)))[-1] == "could go: no module"


def test_json_of_importance_is_plain_and_complete() -> None:
    found = importance_stack(3)
    told = json.loads(json.dumps(importance_json(found), allow_nan=False))
    assert told["total"] == pytest.approx(sum(sum(m["scores"]) for m in told["modules"]))
    assert told["could_go"] == [m["path"] for m in told["modules"] if m["total"] <= 0]
    assert (told["score"], told["unit"], told["rows"], told["rank"]) == ("path_integral", "nats", 8, 42)
