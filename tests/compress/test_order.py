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
from gatewise.compress.order import ORDERS, moves, rank_values


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


def slow_moves(
    values: dict[str, list[float]], costs: dict[str, float] | None, stays: set[str]
) -> list[tuple[str, tuple[int, ...]]]:
    """Every step found anew, by trying all that could go next."""
    left = {path: list(range(len(own))) for path, own in values.items()}
    found = []
    while True:
        choices = []
        for path, ranks in left.items():
            if costs is None and ranks and path not in stays:
                choices.append((sum(values[path][r] for r in ranks), path, tuple(ranks)))
            if costs is not None and len(ranks) > (path in stays):
                lowest = min(ranks, key=lambda r: values[path][r])
                choices.append((values[path][lowest] / costs[path], path, (lowest,)))
        if not choices:
            return found
        _, path, gone = min(choices)
        found.append((path, gone))
        left[path] = [rank for rank in left[path] if rank not in gone]


@pytest.mark.parametrize("by_rank", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_moves_are_the_cheapest_next_steps(by_rank: bool, seed: int) -> None:
    draw = random.Random(seed)
    values = {f"m{i}": [draw.uniform(-0.3, 1) for _ in range(draw.randint(1, 5))] for i in range(8)}
    costs = {path: draw.choice([3.0, 5.0]) for path in values} if by_rank else None
    stays = {path for path in values if draw.random() < 0.2}
    made = [(move.path, tuple(sorted(move.ranks))) for move in moves(values, costs, stays)]
    assert made == slow_moves(values, costs, stays)


def test_singular_values_order_by_what_leaving_out_changes() -> None:
    model = adapted()
    values = rank_values(model, batch(), "singular")
    for path, layer in lora_layers(model, "default").items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for rank, value in enumerate(values[path].tolist()):
            change = layer.scaling["default"] * torch.outer(b[:, rank], a[rank])
            assert value == pytest.approx(float(change.square().sum()), rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_values_every_live_rank(order: str) -> None:
    model = adapted()
    values = rank_values(model, batch(), order)
    for path, layer in lora_layers(model, "default").items():
        assert len(values[path]) == len(live_slots(layer, "default"))
        assert all(map(math.isfinite, values[path].tolist()))
