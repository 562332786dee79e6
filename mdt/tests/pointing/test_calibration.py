"""Confidence: fitted weights against the gradient of what they are the least of, and what they never do."""

import math
import random

import pytest
from gatewise_mdt.pointing.calibration import FEWEST, Calibration, fitted

Logs = tuple[float, float, float, float]
START = (1.0, 1.0, 1.0, 0.0)


def nodes(count: int, weights: tuple[float, ...], bias: float, seed: int = 0) -> tuple[list[Logs], list[bool]]:
    """Nodes whose chance of being right is a logistic regression's."""
    draw = random.Random(seed)
    logs: list[Logs] = []
    right = []
    for _ in range(count):
        one = tuple(-draw.expovariate(1.0) for _ in range(4))
        logs.append((one[0], one[1], one[2], one[3]))
        total = bias + sum(weight * log for weight, log in zip(weights, one, strict=True))
        right.append(draw.random() < 1 / (1 + math.exp(-total)))
    return logs, right


def loss(logs: list[Logs], right: list[bool], weights: list[float], bias: float, strength: float) -> float:
    total = strength * sum((weight - start) ** 2 for weight, start in zip(weights, START, strict=True)) / 2
    for one, good in zip(logs, right, strict=True):
        z = bias + sum(weight * log for weight, log in zip(weights, one, strict=True))
        total += math.log1p(math.exp(-z if good else z))
    return total


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(("weights", "bias"), [((0.5, 2.0, 1.0, 0.3), 1.5), ((2.0, 0.0, 0.0, 0.0), 2.0)])
def test_the_loss_is_the_least_there_is(weights: tuple[float, ...], bias: float, strength: float) -> None:
    """At its minimum no weight that is not below zero, and no bias, is better."""
    logs, right = nodes(120, weights, bias)
    made = fitted(logs, right, strength)
    assert made is not None
    assert made.bias is not None
    assert min(made.weights) >= 0
    found, best = list(made.weights), loss(logs, right, list(made.weights), made.bias, strength)
    for step in (-0.02, 0.02):
        assert loss(logs, right, found, made.bias + step, strength) > best - 1e-6
        for i in range(4):
            moved = [weight + step * (k == i) for k, weight in enumerate(found)]
            if min(moved) >= 0:
                assert loss(logs, right, moved, made.bias, strength) > best - 1e-6


def test_many_nodes_give_the_weights_that_made_them() -> None:
    made = fitted(*nodes(6000, (0.5, 2.0, 1.0, 0.3), 1.5))
    assert made is not None
    assert made.bias == pytest.approx(1.5, abs=0.3)
    assert made.weights == pytest.approx((0.5, 2.0, 1.0, 0.3), abs=0.3)


def test_few_or_equal_nodes_fit_nothing() -> None:
    logs, right = nodes(FEWEST, (1.0, 1.0, 1.0, 0.0), 2.0)
    assert len(set(right)) == 2
    assert fitted(logs, right) is not None
    assert fitted(logs[1:], right[1:]) is None
    assert fitted(logs, [True] * FEWEST) is None
    assert fitted(logs, [False] * FEWEST) is None
    assert fitted([], []) is None


def test_endless_doubt_is_no_fault() -> None:
    logs, right = nodes(40, (1.0, 1.0, 1.0, 0.0), 2.0)
    logs[0], logs[1] = (-1e9, -math.inf, 0.0, 0.0), (0.0, 0.0, 0.0, -math.inf)
    made = fitted(logs, right)
    assert made is not None
    assert all(math.isfinite(weight) for weight in made.weights)
    assert Calibration().confidence((0.0, 0.0, 0.0, -math.inf)) == 1.0
    assert Calibration().confidence((-math.inf, 0.0, 0.0, 0.0)) == pytest.approx(0.0)
    for one in logs:
        assert 0 <= made.confidence(one) <= 1


@pytest.mark.parametrize("bias", [None, 0.7])
def test_more_doubt_is_never_more_confidence(bias: float | None) -> None:
    calibration = Calibration((0.5, 1.5, 0.0, 2.0), bias)
    draw = random.Random(0)
    for _ in range(100):
        one = [-draw.expovariate(0.3) for _ in range(4)]
        for i in range(4):
            worse = [log - draw.random() * (k == i) for k, log in enumerate(one)]
            assert 0 <= calibration.confidence(worse) <= calibration.confidence(one) <= 1


def test_without_a_fit_it_is_the_product() -> None:
    logs = [math.log(0.9), math.log(0.5), math.log(0.8), -5.0]
    assert Calibration().confidence(logs) == pytest.approx(0.36)
    assert Calibration().confidence([0.0, 0.0, 0.0, -3.0]) == 1.0
