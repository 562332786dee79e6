"""When rounds run, and the budget's rules as properties over arbitrary scores, with the paper's own example."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatewise import ConstantBudget, Cubic
from gatewise.allocation import algorithm
from gatewise.allocation.algorithm import Limits, Plan, in_steps, spread
from gatewise.errors import GatewiseError

# A busy machine draws slowly.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

finite = st.floats(-1, 1, allow_nan=False)
module_scores = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.lists(finite, max_size=6), min_size=1, max_size=7)


def plan_round(scores, count, capacity, budget, module_pruning=False, **limits):
    return algorithm.plan_round(scores, Limits(count, budget, capacity, **limits), module_pruning)


def prune_lowest(scores, count, **limits):
    return algorithm.prune_lowest(scores, Limits(count, 0, {}, **limits))


def test_the_papers_example():
    assert spread(8, {"m1": 9, "m2": 9, "m3": 9}, {"m1": 3.0, "m2": 2.0, "m3": 1.0}) == {"m1": 3, "m2": 3, "m3": 2}


def test_spared_ranks_stay():
    assert prune_lowest({"a": [0.1, 0.2], "b": [0.3]}, 2, spared={"a": {0}}) == {"a": [1], "b": [0]}
    plan = plan_round({"a": [0.1, 0.2], "b": [0.3]}, 1, {"a": 4, "b": 4}, 3, spared={"a": {0, 1}})
    assert plan.pruned == {"b": [0]}


def test_module_pruning():
    scores = {"good": [0.1, 0.5], "bad": [0.9, -1.0], "worse": [-2.0, -1.0, 1.0], "empty": [], "zero": [0.0]}
    capacity = dict.fromkeys(scores, 4)
    # "worse" goes first and whole, "bad" fits no more, "zero" does. What was lost goes to the modules that lost none and are there.
    plan = plan_round(scores, 4, capacity, 8, module_pruning=True)
    assert plan.pruned == {"worse": [0, 1, 2], "zero": [0]}
    assert plan.grown == {"good": 2, "bad": 2}
    # None fits, so single ranks go, and a module's last one stays for now.
    assert plan_round({"bad": [0.9, -1.0], "fair": [0.1]}, 1, capacity | {"fair": 1}, 8, module_pruning=True).pruned == {"bad": [1]}
    # All three that are worth nothing or less; "good" keeps one of its ranks whatever the number.
    plan = plan_round(scores, 7, capacity, 8, module_pruning=True)
    assert plan.pruned == {"good": [0], "bad": [0, 1], "worse": [0, 1, 2], "zero": [0]}
    # A module with a rank that is too new to judge is not worthless yet.
    plan = plan_round(scores, 3, capacity, 8, module_pruning=True, spared={"worse": {2}})
    assert plan.pruned == {"bad": [0, 1], "zero": [0]}
    # Without it the same call takes single ranks.
    assert plan_round(scores, 3, capacity, 8).pruned == {"bad": [1], "worse": [0, 1]}


@given(module_scores, st.integers(0, 30))
def test_module_pruning_keeps_a_rank_of_what_is_worth_something(scores, count):
    plan = plan_round(scores, count, {m: len(v) + 3 for m, v in scores.items()}, 99, module_pruning=True)
    for module, values in scores.items():
        left = len(values) - len(plan.pruned.get(module, []))
        if math.fsum(values) > 0:
            assert left >= 1
        assert values or module not in plan.grown
    live = sum(map(len, scores.values()))
    assert sum(map(len, plan.pruned.values())) <= min(count, max(0, live - 1))


def plan_by_the_rule(scores, count, capacity, budget, costs, min_rank=0):
    """A round, rank by rank: the slow reference. Without costs no more ranks grow than were pruned."""
    modules, unit = list(scores), costs is None
    costs = dict.fromkeys(scores, 1) if unit else costs
    left = {module: set(range(len(values))) for module, values in scores.items()}

    def live():
        return sum(len(left[module]) * costs[module] for module in modules)

    count = min(count, live() - max((costs[m] for m in modules if scores[m]), default=0))
    freed, pruned = 0, {}
    while freed < count:
        open_to_all = [(scores[m][i] / costs[m], at, i) for at, m in enumerate(modules) if len(left[m]) > min_rank for i in left[m]]
        if not open_to_all:
            break
        _, at, i = min(open_to_all)
        left[modules[at]].remove(i)
        pruned.setdefault(at, []).append(i)
        freed += costs[modules[at]]
    # What need not have gone comes back, the most valuable for its cost first.
    gone = [(scores[modules[at]][i] / costs[modules[at]], at, i) for at in pruned for i in pruned[at]]
    for _, at, i in sorted(gone, reverse=True):
        if freed - costs[modules[at]] >= count:
            left[modules[at]].add(i)
            pruned[at].remove(i)
            freed -= costs[modules[at]]
    pruned = {at: gone for at, gone in pruned.items() if gone}

    def worth(module):
        return sum(scores[module]) / len(scores[module]) / costs[module] if scores[module] else -math.inf

    takers = sorted((m for at, m in enumerate(modules) if at not in pruned), key=worth, reverse=True)
    rest, grown = min(budget - live(), freed if unit else math.inf), dict.fromkeys(takers, 0)
    took = True
    while took:
        took = False
        for module in takers:
            if costs[module] <= rest and len(scores[module]) + grown[module] < capacity[module]:
                rest, grown[module], took = rest - costs[module], grown[module] + 1, True
    return Plan({modules[at]: sorted(pruned[at]) for at in sorted(pruned)}, {m: grown[m] for m in modules if grown.get(m)})


# Sixty-fourths, whose sums are exact in any order.
exact_scores = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.lists(st.integers(-64, 64).map(lambda n: n / 64), max_size=6),
    min_size=1,
    max_size=7,
)


@given(exact_scores, st.booleans(), st.integers(0, 100), st.integers(0, 6), st.integers(0, 2), st.data())
def test_a_round_is_the_rule_applied_rank_by_rank(scores, unit, unused, spare, min_rank, data):
    costs = {module: 1 if unit else data.draw(st.sampled_from([1, 8, 16, 24, 40])) for module in scores}
    capacity = {module: len(values) + data.draw(st.integers(0, spare)) for module, values in scores.items()}
    live = sum(len(values) * costs[module] for module, values in scores.items())
    count, given_costs = data.draw(st.integers(0, live + 20)), None if unit else costs
    plan = plan_round(scores, count, capacity, live + unused, min_rank=min_rank, costs=given_costs)
    assert plan == plan_by_the_rule(scores, count, capacity, live + unused, given_costs, min_rank)
    after = {m: len(v) - len(plan.pruned.get(m, [])) + plan.grown.get(m, 0) for m, v in scores.items()}
    assert all(0 <= after[module] <= capacity[module] for module in scores)
    assert sum(after[module] * costs[module] for module in scores) <= live + unused
    assert not plan.pruned.keys() & plan.grown.keys()
    assert not live or sum(len(v) - len(plan.pruned.get(m, [])) for m, v in scores.items()) > 0


def test_a_worthless_module_goes_whole_where_its_cost_fits():
    scores, costs = {"good": [5.0], "bad": [-1.0, 0.5], "worse": [-2.0]}, {"good": 10, "bad": 10, "worse": 30}
    plan = plan_round(scores, 20, dict.fromkeys(scores, 4), 60, module_pruning=True, costs=costs)
    assert plan == Plan({"bad": [0, 1]}, {"good": 2})


def test_whole_numbers_above_one_are_steps_and_others_epochs():
    assert [in_steps(value, 100) for value in (2, 1, 1.0, 0.25, 2.0, 0.001)] == [2, 100, 100, 25, 200, 1]
    assert ConstantBudget(rounds=3, first_round=1.0, recover=3).steps(10) == [10, 13, 16]


def test_numpys_whole_numbers_are_steps_too():
    """They were epochs."""
    schedule = ConstantBudget(rounds=np.int64(2), first_round=np.int64(2), recover=np.int32(3))
    assert schedule.steps(100) == schedule.steps(None) == [2, 5]


def test_epochs_of_data_without_a_length_are_refused():
    with pytest.raises(GatewiseError, match=r"recover=0\.25 means epochs, but the training data has no length: give steps"):
        ConstantBudget(first_round=3).steps(None)


def test_a_constant_budget_prunes_the_same_share_each_time():
    assert [ConstantBudget().cut(100, 100, live, 1, 8) for live in (100, 90)] == [(12, 100), (12, 100)]
    assert ConstantBudget(prune_fraction=0.001).cut(100, 100, 100, 1, 8) == (1, 100)


def test_a_cubic_budget_comes_down_fast_at_first():
    cut = Cubic(target_rank=1).cut
    assert [cut(100, 36, 100, done, 4)[1] for done in range(6)] == [100, 63, 44, 37, 36, 36]
    assert cut(100, 36, 63, 2, 4) == (19, 44)
    assert cut(100, 36, 40, 2, 4) == (0, 44)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ConstantBudget, {"prune_fraction": 1.5}, "prune_fraction is 1.5; expected a share between 0 and 1"),
        (ConstantBudget, {"recover": 0}, "recover is 0; expected epochs or steps above 0"),
        (ConstantBudget, {"first_round": "1"}, "first_round is '1'; expected epochs or steps above 0"),
        (ConstantBudget, {"grace_rounds": -1}, "grace_rounds is -1; expected a whole number of at least 0"),
        (ConstantBudget, {"grace_rounds": 1.5}, "grace_rounds is 1.5; expected a whole number"),
        (ConstantBudget, {"rounds": "3"}, "rounds is '3'; expected a whole number"),
        (ConstantBudget, {"r_max": 4.5}, "r_max is 4.5; expected a number of ranks"),
        *(
            (Cubic, {"target_rank": wrong}, f"target_rank is {wrong!r}; expected a number above 0")
            for wrong in (0, math.nan, "2", math.inf)
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, settings, message):
    with pytest.raises(GatewiseError, match=message):
        kind(**settings)
