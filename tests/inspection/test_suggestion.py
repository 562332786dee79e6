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


def scored(totals: Sequence[float], room: int | Sequence[int] = 16, costs: Sequence[int] | None = None) -> Importance:
    """An adapter whose modules have two ranks with these totals, of 40 parameters each unless told otherwise."""
    rooms = [room] * len(totals) if isinstance(room, int) else room
    modules = tuple(
        ModuleImportance(f"layers.{index}.q_proj", index, "q", (total + 1, -1.0), 2.0, most, cost)
        for index, (total, most, cost) in enumerate(zip(totals, rooms, costs or [40] * len(totals), strict=True))
    )
    return Importance(modules, "path_integral", 8, 2.0, 1.0)


def best_that_costs(totals: Sequence[float], rooms: Sequence[int], costs: Sequence[int], most: int) -> float:
    """The largest sum of total * r / (r + 1) over all ways that cost no more than ``most``."""
    ways = itertools.product(*(range(room + 1) for room in rooms))
    fit = [way for way in ways if sum(c * r for c, r in zip(costs, way, strict=True)) <= most]
    return max(sum(t * r / (r + 1) for t, r in zip(totals, way, strict=True)) for way in fit)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_ranks_that_cost_are_as_good_as_any_for_less_than_one_rank_less(
    modules: list[tuple[float, int, int]], data: st.DataObject
) -> None:
    totals, rooms, costs = zip(*modules, strict=True)
    budget = data.draw(st.integers(max(costs), sum(r * c for r, c in zip(rooms, costs, strict=True))))
    shares = divide(totals, rooms, budget, costs)
    left = budget - sum(c * r for c, r in zip(costs, shares, strict=True))
    assert left >= 0
    assert all(share <= room for share, room in zip(shares, rooms, strict=True))
    assert not any(cost <= left and share < room for cost, share, room in zip(costs, shares, rooms, strict=True))
    worth = sum(t * r / (r + 1) for t, r in zip(totals, shares, strict=True))
    assert worth >= best_that_costs(totals, rooms, costs, budget - max(costs)) - 1e-9


def test_parameters_go_where_each_is_worth_most() -> None:
    # The second module is worth as much and costs a fourth, so that it gets ranks first, and twice as many.
    ranks = suggested_ranks(scored([1.0, 1.0, -1.0], room=1000, costs=[400, 100, 1]), 40_000)
    assert list(ranks.values()) == [66, 136, 0]
    assert list(suggested_ranks(scored([1.0, 1.0], costs=[400, 100]), 350).values()) == [0, 3]
    # 60 is too little for the better module.
    assert list(suggested_ranks(scored([9.0, 1.0], costs=[100, 50]), 60).values()) == [0, 1]


@given(st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 40)), min_size=1, max_size=12), st.integers(1, 200))
@settings(deadline=None)
def test_what_holds_for_any_scores(modules: list[tuple[float, int]], budget: int) -> None:
    totals, rooms = zip(*modules, strict=True)
    importance = scored(totals, rooms)
    exact = [module.total for module in importance.modules]  # rounded as sums of floats are
    most = sum(room for total, room in zip(exact, rooms, strict=True) if total > 0)
    if budget > most:
        with pytest.raises(GatewiseError):
            suggested_ranks(importance, 40 * budget)
        return
    ranks = list(suggested_ranks(importance, 40 * budget).values())
    assert sum(ranks) == budget
    assert all(0 <= rank <= room for rank, room in zip(ranks, rooms, strict=True))
    assert not any(rank for rank, total in zip(ranks, exact, strict=True) if total <= 0)
    for one, other in itertools.permutations(range(len(ranks)), 2):
        if exact[one] > exact[other]:
            assert ranks[one] >= min(ranks[other], rooms[one])
        elif exact[one] == exact[other] > 0:
            assert abs(ranks[one] - ranks[other]) <= 1 or rooms[one] != rooms[other]
    if budget > 1:
        smaller = suggested_ranks(importance, 40 * (budget - 1)).values()
        assert all(less <= rank for less, rank in zip(smaller, ranks, strict=True))


def test_ranks_go_with_the_square_root_of_the_totals() -> None:
    assert list(suggested_ranks(scored([1.0, 4.0, 9.0, 0.0, -3.0], room=1000), 600 * 40).values()) == [100, 200, 300, 0, 0]


def test_a_module_worth_next_to_nothing_gets_none_while_others_can_use_it() -> None:
    assert list(suggested_ranks(scored([1.0, 0.001]), 16 * 40).values()) == [16, 0]
    assert list(suggested_ranks(scored([1.0, 0.001]), 32 * 40).values()) == [16, 16]


@pytest.mark.parametrize(
    ("totals", "budget", "said"),
    [
        ([1.0], 0, r"a budget of 0 parameters was asked for, but the 1 modules .* take from 40 \(one rank\) to 640"),
        ([1.0, -1.0, 2.0], 1281, "but the 2 modules worth more than nothing take from 40"),
        ([0.0, -1.0], 400, "no module has path_integral scores that add up to more than zero"),
    ],
)
def test_budgets_that_make_no_sense(totals: list[float], budget: int, said: str) -> None:
    with pytest.raises(GatewiseError, match=said):
        suggest(scored(totals), budget)


@pytest.mark.parametrize("budget", [40, 400, 9000])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"r": 5, "lora_alpha": 7}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stock_lora_config_makes_exactly_these_ranks(family: str, config: dict[str, Any], budget: int, batch: Any) -> None:
    given_config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **config})
    model = random_adapter(get_peft_model(tiny_base(family), given_config))
    (scaling,) = {layer.scaling["default"] for layer in lora_layers(model).values()}
    importance = importance_of(model, batch(family))
    worthy = [module for module in importance.modules if module.total > 0]
    budget = max(min(budget, sum(module.room * module.cost for module in worthy)), min(module.cost for module in worthy))
    expected = {path: rank for path, rank in suggested_ranks(importance, budget).items() if rank}
    # As a user would: out of the JSON file, onto the base model as it came.
    suggestion = json.loads(json.dumps(suggest(importance, budget)))
    assert set(suggestion) == {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    fresh = get_peft_model(tiny_base(family), LoraConfig(**suggestion))
    layers = lora_layers(fresh)
    assert {path: len(factors(layer, "default")[0]) for path, layer in layers.items()} == expected
    assert [layer.scaling["default"] for layer in layers.values()] == pytest.approx([scaling] * len(layers))
    assert suggestion["r"] == max(expected.values())
    assert suggestion["lora_alpha"] / suggestion["r"] == pytest.approx(scaling)


def test_modules_keep_scalings_of_their_own(batch: Any) -> None:
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 12})
    model = random_adapter(get_peft_model(tiny_base("llama"), config))
    fresh = get_peft_model(tiny_base("llama"), LoraConfig(**suggest(importance_of(model, batch()), 600)))
    scalings = {path.rpartition(".")[2]: layer.scaling["default"] for path, layer in lora_layers(fresh).items()}
    assert scalings == pytest.approx({name: {"q_proj": 1.0, "v_proj": 3.0}[name] for name in scalings})
