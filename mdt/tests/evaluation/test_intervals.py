"""Bootstrap intervals against the slow way: draw passages, measure them again, sort the values."""

from typing import Any

import numpy as np
import pytest
from gatewise_mdt import evaluate
from gatewise_mdt.evaluation.intervals import intervals
from gatewise_mdt.evaluation.metrics import count_trees, metrics_of
from mdt_trees import gout, node, triple


def changed(place: int, object_: str) -> list[dict[str, Any]]:
    made = gout()
    made[place]["triples"] = [triple(object_)]
    return made


STUMP = [node("D", triple("check uric acid", "therapeutic schedule"))]
GOLD = [gout(), gout(), STUMP, changed(2, "x"), [node("D")], STUMP, gout()]
FOUND: list[Any] = [gout(), changed(1, "y"), STUMP, gout(), [node("D")], [], "nonsense"]


def slow(gold: list[Any], found: list[Any], draws: int, seed: int) -> dict[str, tuple[float, float]]:
    """Each draw measured from its trees; percentiles by linear interpolation between the sorted values."""
    random = np.random.default_rng(seed)
    values: dict[str, list[float]] = {}
    for _ in range(draws):
        some = [int(random.integers(len(gold))) for _ in gold]
        for name, value in evaluate([gold[i] for i in some], [found[i] for i in some]).to_json().items():
            values.setdefault(name, []).append(value)
    ends = {}
    for name, column in values.items():
        column.sort()
        both = []
        for share in (0.025, 0.975):
            place = share * (draws - 1)
            below = int(place)
            both.append(column[below] + (place - below) * (column[min(below + 1, draws - 1)] - column[below]))
        ends[name] = both[0], both[1]
    return ends


def test_intervals_are_those_of_trees_measured_again() -> None:
    expected = slow(GOLD, FOUND, draws=200, seed=3)
    made = intervals(count_trees(GOLD, FOUND), draws=200, seed=3)
    assert set(made) == set(expected) - {"n", "malformed", "empty"}
    for name, ends in made.items():
        assert (ends["low"], ends["high"]) == pytest.approx(expected[name]), name
    metrics = evaluate(GOLD, FOUND).to_json()
    assert all(ends["low"] <= metrics[name] <= ends["high"] for name, ends in made.items())
    assert made["triplet_f1"]["low"] < made["triplet_f1"]["high"]


def test_metrics_are_those_of_the_counts() -> None:
    assert metrics_of(count_trees(GOLD, FOUND)) == evaluate(GOLD, FOUND)
    assert intervals(count_trees(GOLD, FOUND)) == intervals(count_trees(GOLD, FOUND))
    assert intervals(count_trees(GOLD, FOUND)) != intervals(count_trees(GOLD, FOUND), seed=1)


def test_a_share_of_passages_has_the_interval_of_the_binomial() -> None:
    gold = [STUMP] * 400
    ends = intervals(count_trees(gold, [*gold[:100], *[[node("D")]] * 300]))["tree_acc"]
    spread = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (ends["low"], ends["high"]) == pytest.approx((0.25 - spread, 0.25 + spread), abs=0.005)


def test_one_passage_has_no_interval() -> None:
    assert intervals(count_trees([STUMP], [STUMP])) == {}
