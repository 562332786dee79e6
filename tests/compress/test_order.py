"""The order in which ranks go: against a slow search of the next step, and values against their formulas."""

import math
import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, random_adapter, tiny_base

from gatewise.allocation.slots import live_slots, lora_layers
from gatewise.compress.basis import to_singular_basis
from gatewise.compress.order import ORDERS, Cost, above_cap, module_costs, moves, parameter_costs, rank_values
from gatewise.scores import SCORES


def adapted(family: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    model = random_adapter(get_peft_model(tiny_base(family), LoraConfig(**{"r": 3, "target_modules": "all-linear"} | settings)))
    to_singular_basis(model)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (4, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def slow_moves(values: dict[str, list[float]], costs: dict[str, Cost]) -> list[tuple[str, tuple[int, ...]]]:
    """Every step found anew, by trying all that could go next."""
    left = {path: list(range(len(own))) for path, own in values.items()}
    found = []
    while True:
        best: tuple[float, str, tuple[int, ...]] | None = None
        for path, ranks in left.items():
            cost, own = costs[path], values[path]
            choices = []
            if ranks and not cost.stays:
                choices.append((sum(own[r] for r in ranks) / (cost.fixed + cost.each * len(ranks)), tuple(sorted(ranks))))
            if cost.each and len(ranks) > 1:
                lowest = min(ranks, key=lambda r: own[r])
                choices.append((own[lowest] / cost.each, (lowest,)))
            for worth, ranks_gone in choices:
                if best is None or worth < best[0] - 1e-12:
                    best = (worth, path, ranks_gone)
        if best is None:
            return found
        found.append((best[1], best[2]))
        left[best[1]] = [rank for rank in left[best[1]] if rank not in best[2]]


@pytest.mark.parametrize("kind", ["parameters", "modules", "both"])
@pytest.mark.parametrize("seed", range(5))
def test_moves_are_the_cheapest_next_steps(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    values = {f"m{i}": [draw.uniform(-0.3, 1) for _ in range(draw.randint(1, 5))] for i in range(8)}
    costs = {
        path: Cost(draw.choice([1.0, 7.0]) if kind != "parameters" else 0.0, draw.choice([3.0, 5.0]) if kind != "modules" else 0.0,
                   stays=draw.random() < 0.2)
        for path in values
    }  # fmt: skip
    made = [(move.path, tuple(sorted(move.ranks))) for move in moves(values, costs)]
    assert made == slow_moves(values, costs)


def test_all_goes_but_the_best_rank_of_modules_that_stay() -> None:
    values = {"a": [0.2, 0.1], "b": [3.0, 1.0, 2.0]}
    order = moves(values, {"a": Cost(0, 4), "b": Cost(0, 2, stays=True)})
    gone = {path: sorted(rank for move in order if move.path == path for rank in move.ranks) for path in values}
    assert gone == {"a": [0, 1], "b": [1, 2]}


def test_what_is_above_a_cap_is_gone_before() -> None:
    values = {"a": [0.5, 0.1, 0.3], "b": [1.0]}
    capped = above_cap(values, 2)
    assert capped == {"a": [1]}
    order = moves(values, {"a": Cost(0, 1), "b": Cost(0, 1)}, capped)
    assert [(move.path, move.ranks) for move in order] == [("a", (2,)), ("a", (0,)), ("b", (0,))]


def test_singular_values_order_by_what_leaving_out_changes() -> None:
    model = adapted()
    values = rank_values(model, batch(), "singular")
    for path, layer in lora_layers(model, "default").items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for rank, value in enumerate(values[path].tolist()):
            change = layer.scaling["default"] * torch.outer(b[:, rank], a[rank])
            assert value == pytest.approx(float(change.square().sum()), rel=1e-4)


def test_scores_value_as_they_score() -> None:
    model = adapted()
    found = rank_values(model, batch(), "path_moments")
    wanted = SCORES["path_moments"](model, batch())
    assert all(torch.allclose(found[path], wanted[path].double()) for path in wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_values_every_live_rank(order: str) -> None:
    model = adapted()
    values = rank_values(model, batch(), order)
    for path, layer in lora_layers(model, "default").items():
        assert len(values[path]) == len(live_slots(layer, "default"))
        assert all(map(math.isfinite, values[path].tolist()))


def test_costs_are_numbers_stored_and_modules() -> None:
    model = adapted(use_dora=True, target_modules=["q_proj", "down_proj"])
    costs = parameter_costs(model, "default")
    assert costs["model.layers.0.self_attn.q_proj"] == Cost(0.0, 32, stays=True)
    assert costs["model.layers.0.mlp.down_proj"] == Cost(0.0, 40, stays=True)
    plain = adapted(target_modules=["q_proj"])
    assert module_costs(plain, "default")["model.layers.1.self_attn.q_proj"] == Cost(1.0, 0.0)
