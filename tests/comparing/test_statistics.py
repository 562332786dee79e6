"""Statistics against SciPy, formulas by hand, and simulated runs whose truth is known."""

import itertools

import numpy as np
import pytest
from scipy import stats

from gatewise.comparing import statistics
from gatewise.comparing.statistics import ASSUMED, Spread, by_chance_of_rows, detectable, difference, holm, needed, spread


def right_or_wrong(
    count: int,
    seeds: int,
    rows: int,
    accuracy: float,
    seed_sd: float,
    differ: tuple[float, float],
    gains: list[float],
    chance: np.random.Generator,
) -> np.ndarray:
    """Accuracies in points (count, arms, seeds, rows) of arms whose true ones are ``accuracy`` and gains over it, in points.

    An answer is right where the sum of how easy the row is, how good the arm, how it likes this row, how lucky the seed was and
    chance is above zero. All but the first are each arm's own. ``differ``: shares of row and arm, and of chance, in the variance.
    """
    by_arm, by_chance = differ
    lucky = seed_sd / 100 / stats.norm.pdf(stats.norm.ppf(accuracy))
    draw = lambda *shape: chance.standard_normal(shape, np.float32)  # noqa: E731
    arms = len(gains) + 1
    level = stats.norm.ppf(accuracy + np.array([0, *gains]) / 100) * np.sqrt(1 + lucky**2)
    total = draw(count, arms, seeds, rows) * by_chance**0.5
    total += level.astype(np.float32)[:, None, None]
    total += draw(count, 1, 1, rows) * (1 - by_arm - by_chance) ** 0.5
    total += draw(count, arms, 1, rows) * by_arm**0.5
    total += draw(count, arms, seeds, 1) * np.float32(lucky)
    return 100.0 * (total > 0)


def missed(d: np.ndarray, truth: float = 0.0, level: float = 0.05) -> np.ndarray:
    """Which intervals do not hold the truth; ``difference`` for many at once."""
    half = statistics._half_width(*statistics._parts(d), *d.shape[-2:], level)
    return np.abs(d.mean((-2, -1)) - truth) > half


# Accuracy and its sd over seeds; shares of arm and row, and of chance.
TRUTHS = [
    (accuracy, seed_sd, differ)
    for accuracy, seed_sd, differ in itertools.product((0.6, 0.8, 0.95), (0, 1, 2), ((0.0, 0.1), (0.05, 0.1)))
]


@pytest.mark.parametrize("gain", [0.0, 2.0])
def test_intervals_hold_the_truth(gain: float) -> None:
    """No difference is found in at most 5% of cases where there is none; two points are in 95% of the intervals."""
    chance = np.random.default_rng(0)
    found = {}
    for (seeds, rows), truth in itertools.product([(3, 100), (3, 2000), (5, 500), (10, 200)], TRUTHS):
        cases = max(100_000 // (seeds * rows), 40)
        runs = right_or_wrong(cases, seeds, rows, *truth, [gain], chance)
        found[seeds, rows, truth] = missed(runs[:, 1] - runs[:, 0], gain)
    assert np.concatenate(list(found.values())).mean() < 0.04
    for at, one in found.items():
        assert one.mean() <= 0.05 + 3 * (0.05 / len(one)) ** 0.5, at


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_as_good_where_one_part_is_all_there_is(seeds: int) -> None:
    """Seeds alone, rows alone, or both: never more than 5% missed, nor than a seventh of it; and with seeds alone all of the 5%."""
    chance, count, rows = np.random.default_rng(seeds), 2000, 60
    for by_seed, by_row in [(5, 0), (0, 5), (1, 1), (0, 0)]:
        d = chance.standard_normal((count, seeds, rows), np.float32)
        d += by_seed * chance.standard_normal((count, seeds, 1), np.float32)
        d += by_row * chance.standard_normal((count, 1, rows), np.float32)
        rate = missed(d).mean()
        assert rate < 0.065
        assert missed(d, level=0.05 / 7).mean() < 0.0135
        if (by_seed, by_row) == (5, 0):
            assert rate > 0.025


def test_holm_over_seven_arms_that_are_all_the_same() -> None:
    chance = np.random.default_rng(1)
    false = []
    for seeds, rows, accuracy, seed_sd in [(3, 200, 0.8, 2), (5, 200, 0.9, 1), (5, 100, 0.6, 0)]:
        runs = right_or_wrong(60, seeds, rows, accuracy, seed_sd, (0.05, 0.1), [0.0] * 7, chance)
        false += [min(p for p in holm([difference(arm - case[0]).p for arm in case[1:]]) if p is not None) < 0.05 for case in runs]
    assert np.mean(false) <= 0.05


def test_it_finds_what_it_says_can_be_found() -> None:
    chance = np.random.default_rng(2)
    for seeds, rows, known in [(3, 100, ASSUMED), (5, 200, Spread(0.3, 20, 10))]:
        size = detectable(rows, seeds, known)
        assert size is not None
        d = size + known.rest * chance.standard_normal((1500, seeds, rows), np.float32)
        d += known.rows * chance.standard_normal((1500, 1, rows), np.float32)
        d += known.seeds * chance.standard_normal((1500, seeds, 1), np.float32)
        assert missed(d).mean() == pytest.approx(0.8, abs=0.04)
        again = spread([*d])
        assert again is not None
        assert (again.seeds, again.rows, again.rest) == pytest.approx((known.seeds, known.rows, known.rest), rel=0.3, abs=1)
    more_seeds, more_rows = needed(size, 200, 5, known)
    assert (more_seeds, more_rows) == (5, pytest.approx(200, abs=2))
    assert needed(0.01, 200, 5, known) == (None, None)
    assert detectable(1000, 1) is None
    assert detectable(1000, 5, comparisons=6) > detectable(1000, 5)  # type: ignore[operator]


def test_the_formula_by_hand() -> None:
    chance = np.random.default_rng(3)
    a, b = chance.normal(50, 5, (4, 30)), chance.normal(53, 5, (4, 30)) + chance.normal(0, 6, (4, 1)) + chance.normal(0, 4, (1, 30))
    d = b - a
    of_seeds = [np.mean(d[s]) for s in range(4)]
    of_rows = [np.mean(d[:, i]) for i in range(30)]
    mean = np.mean(d)
    rest = sum((d[s, i] - of_seeds[s] - of_rows[i] + mean) ** 2 for s in range(4) for i in range(30)) / (3 * 29)
    A = max(30 * np.var(of_seeds, ddof=1), rest)
    B = max(4 * np.var(of_rows, ddof=1) - rest, 0)
    differ = sum((x - mean) ** 2 for x in of_rows) ** 2 / sum((x - mean) ** 4 for x in of_rows)
    half = np.sqrt((stats.t.isf(0.025, 3) ** 2 * A + stats.t.isf(0.025, 29) ** 2 * B) / 120 * (1 + 2 / differ))
    found = difference(b - a)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-4)
    assert found.over == "seeds and rows"
    p = found.p
    assert p is not None
    wide = np.sqrt((stats.t.isf(p / 2, 3) ** 2 * A + stats.t.isf(p / 2, 29) ** 2 * B) / 120 * (1 + 2 / differ))
    assert wide == pytest.approx(abs(mean), rel=1e-4)


def test_seeds_alone_are_a_paired_t_test() -> None:
    a, b = np.array([[70.0], [72.0], [71.0]]), np.array([[73.0], [73.5], [75.0]])
    found, known = difference(b - a), stats.ttest_rel(b, a)
    interval = known.confidence_interval()
    assert (found.low, found.high, found.p) == pytest.approx((interval.low[0], interval.high[0], known.pvalue[0]), rel=1e-4)
    assert found.over == "seeds"


@pytest.mark.parametrize(
    ("seeds", "rows", "why"),
    [
        (1, 50, "one seed does not say how much another would change"),
        (3, 50, "all 3 seeds and all rows have the same difference"),
        (3, 1, "all 3 seeds have the same difference"),
    ],
)
def test_no_interval_where_nothing_says_how_wide(seeds: int, rows: int, why: str) -> None:
    found = difference(np.ones((seeds, rows)))
    assert (found.mean, found.low, found.high, found.p, found.why) == (1.0, None, None, None, why)


def test_rounding_is_no_spread() -> None:
    found = difference(np.array([[70.4], [70.5], [70.6]]) - np.array([[70.1], [70.2], [70.3]]))
    assert (found.p, found.why) == (None, "all 3 seeds have the same difference")


def test_p_is_below_5_percent_where_the_interval_is_without_zero() -> None:
    chance, both = np.random.default_rng(3), set()
    for _ in range(200):
        seeds, rows = chance.integers(2, 6), chance.integers(2, 40)
        a, b = 100.0 * (chance.random((2, seeds, rows)) < np.array([0.5, 0.9])[:, None, None])
        found = difference(b - a)
        if found.p is not None and found.low is not None and found.high is not None:
            both.add((found.p < 0.05, found.low > 0 or found.high < 0))
    assert both == {(True, True), (False, False)}


def test_equal_rates_lie_apart_by_chance() -> None:
    """Five rates that are as good as each other: what their best is above their worst is less than is said, 19 times in 20."""
    chance, beyond = np.random.default_rng(4), []
    for _ in range(400):
        right = 100.0 * (chance.random((5, 1, 60)) < 0.8)
        order = right.mean((1, 2)).argsort()
        d = right[order[-1]] - right[order[0]]
        limit = by_chance_of_rows(d, 10)
        assert limit is not None
        beyond.append(d.mean() > limit)
    assert np.mean(beyond) < 0.07
    assert by_chance_of_rows(np.ones((3, 1)), 10) is None


def test_t_is_scipys() -> None:
    for df in (1, 2, 4, 30, 5000):
        np.testing.assert_allclose(statistics._student(df)[1:], stats.t.isf(statistics._LEVELS[1:] / 2, df), rtol=1e-4)


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
