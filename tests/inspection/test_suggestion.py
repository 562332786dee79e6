"""The ranks suggested: the best division by brute force, what must hold for any scores, and a config that PEFT reads as meant."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import random_adapter, tiny_base

from gatewise.allocation.slots import factors, lora_layers
from gatewise.errors import GatewiseError
from gatewise.inspection import Importance, ModuleImportance
from gatewise.inspection.importance import importance_of
from gatewise.inspection.suggestion import divide, suggest, suggested_ranks


def scored(totals: Sequence[float], room: int | Sequence[int] = 16) -> Importance:
    """An adapter whose modules have two ranks with these totals."""
    rooms = [room] * len(totals) if isinstance(room, int) else room
    modules = tuple(
        ModuleImportance(f"layers.{index}.q_proj", index, "q", (total + 1, -1.0), 2.0, most)
        for index, (total, most) in enumerate(zip(totals, rooms, strict=True))
    )
    return Importance(modules, "path_integral", 8, 2.0, 1.0)


def best(totals: Sequence[float], rooms: Sequence[int], budget: int) -> float:
    """The largest sum of total * r / (r + 1) over all ways to divide the budget, tried one by one."""
    ways = itertools.product(*(range(room + 1) for room in rooms))
    return max(sum(t * r / (r + 1) for t, r in zip(totals, way, strict=True)) for way in ways if sum(way) == budget)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 5)), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_no_other_division_is_worth_more(modules: list[tuple[float, int]], data: st.DataObject) -> None:
    totals, rooms = zip(*modules, strict=True)
    budget = data.draw(st.integers(1, sum(rooms)))
    shares = divide(totals, rooms, budget)
    assert sum(shares) == budget
    worth = sum(t * r / (r + 1) for t, r in zip(totals, shares, strict=True))
    assert worth == pytest.approx(best(totals, rooms, budget))


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 40)), min_size=1, max_size=12), st.integers(1, 200))
@settings(deadline=None)
def test_what_holds_for_any_scores(modules: list[tuple[float, int]], budget: int) -> None:
    totals, rooms = zip(*modules, strict=True)
    importance = scored(totals, rooms)
    exact = [module.total for module in importance.modules]  # rounded as sums of floats are
    if budget > sum(room for total, room in zip(exact, rooms, strict=True) if total > 0):
        with pytest.raises(GatewiseError):
            suggested_ranks(importance, budget)
        return
    ranks = list(suggested_ranks(importance, budget).values())
    assert sum(ranks) == budget
    assert all(0 <= rank <= room for rank, room in zip(ranks, rooms, strict=True))
    assert not any(rank for rank, total in zip(ranks, exact, strict=True) if total <= 0)
    for one, other in itertools.permutations(range(len(ranks)), 2):
        if exact[one] > exact[other]:
            assert ranks[one] >= min(ranks[other], rooms[one])
        elif exact[one] == exact[other] > 0:
            assert abs(ranks[one] - ranks[other]) <= 1 or rooms[one] != rooms[other]
    if budget > 1:
        smaller = suggested_ranks(importance, budget - 1).values()
        assert all(less <= rank for less, rank in zip(smaller, ranks, strict=True))


def test_ranks_go_with_the_square_root_of_the_totals() -> None:
    assert list(suggested_ranks(scored([1.0, 4.0, 9.0, 0.0, -3.0], room=1000), 600).values()) == [100, 200, 300, 0, 0]


def test_a_module_worth_next_to_nothing_gets_none_while_others_can_use_it() -> None:
    assert list(suggested_ranks(scored([1.0, 0.001]), 16).values()) == [16, 0]
    assert list(suggested_ranks(scored([1.0, 0.001]), 32).values()) == [16, 16]


@pytest.mark.parametrize(
    ("totals", "budget", "said"),
    [
        ([1.0], 0, "a budget of 0 ranks was asked for: expected the ranks of all modules together, at least 1"),
        ([1.0], -8, "a budget of -8 ranks was asked for"),
        ([1.0, -1.0, 2.0], 33, "budget of 33 ranks was asked for, but the 2 modules worth more than nothing have room for 32"),
        ([0.0, -1.0], 4, "no module has path_integral scores that add up to more than zero"),
    ],
)
def test_budgets_that_make_no_sense(totals: list[float], budget: int, said: str) -> None:
    with pytest.raises(GatewiseError, match=said):
        suggest(scored(totals), budget)


@pytest.mark.parametrize("budget", [1, 9, 200])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"r": 5, "lora_alpha": 7}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stock_lora_config_makes_exactly_these_ranks(family: str, config: dict[str, Any], budget: int, batch: Any) -> None:
    given_config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **config})
    model = random_adapter(get_peft_model(tiny_base(family), given_config))
    (scaling,) = {layer.scaling["default"] for layer in lora_layers(model).values()}
    importance = importance_of(model, batch(family))
    budget = min(budget, sum(module.room for module in importance.modules if module.total > 0))
    expected = {path: rank for path, rank in suggested_ranks(importance, budget).items() if rank}
    # As a user would: out of the JSON file, onto the base model as it came.
    suggestion = json.loads(json.dumps(suggest(importance, budget)))
    assert set(suggestion) == {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    fresh = get_peft_model(tiny_base(family), LoraConfig(**suggestion))
    layers = lora_layers(fresh)
    assert {path: len(factors(layer, "default")[0]) for path, layer in layers.items()} == expected
    assert sum(expected.values()) == budget
    assert [layer.scaling["default"] for layer in layers.values()] == pytest.approx([scaling] * len(layers))
    assert suggestion["r"] == max(expected.values())
    assert suggestion["lora_alpha"] / suggestion["r"] == pytest.approx(scaling)


def test_modules_keep_scalings_of_their_own(batch: Any) -> None:
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 12})
    model = random_adapter(get_peft_model(tiny_base("llama"), config))
    fresh = get_peft_model(tiny_base("llama"), LoraConfig(**suggest(importance_of(model, batch()), 20)))
    scalings = {path.rpartition(".")[2]: layer.scaling["default"] for path, layer in lora_layers(fresh).items()}
    assert scalings == pytest.approx({name: {"q_proj": 1.0, "v_proj": 3.0}[name] for name in scalings})
