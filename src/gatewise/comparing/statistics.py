"""Whether one method is better than another, from runs of both with the same seeds on the same rows.

Another seed would have given other numbers, and so would other rows. Both are taken into account: the difference of a seed and a
row is the true one plus what is peculiar to the seed, to the row, and to both together. Of S seeds and n rows its mean varies by

    seeds / S + rows / n + rest / (S n)  =  (A + B) / (S n)    where A = n seeds + rest, and B = S rows

A is known from the S means over rows, and so by Student's t of S - 1 degrees of freedom; B from the n means over seeds. The half
width of the interval is ``sqrt((t[S-1]^2 A + t[n-1]^2 B) / (S n))``: that of the seeds and that of the rows, added as squares.

This was chosen by simulation (tests/comparing/test_statistics.py). One t with Satterthwaite's degrees of freedom, which is usual,
finds differences that are not there in up to 9% of cases at three seeds: where the seeds happen to lie close together, both the
interval and its t are too small. Two more things keep it from that. A is never taken to be less than the rest, which is well known.
And where few rows differ at all, which says little of how many might, both grow by ``1 + 2 / rows that differ``. What it costs:
with three seeds the interval is up to twice as wide as if the spread were known, with five 1.3 times, with ten 1.1 times.

Rows are taken to be drawn one by one: if they come in groups, such as questions on one text, the interval is too short.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Student's t by integration and interpolation: levels from 1 to 1e-9, and u = asinh(t), which is as fine near zero as far away.
_LEVELS: Array = np.logspace(0, -9, 4001)
_STEPS: Array = np.linspace(0, 32, 32001)


@dataclass(frozen=True)
class Difference:
    """How much more b has than a.

    Attributes:
        mean: over seeds and rows.
        low, high: the 95% interval; None where there is none.
        p: how often a difference at least as large is found where there is none.
        over: what it is over: "seeds and rows", or "seeds" where there are no numbers of rows: then other rows may say otherwise.
        why: the reason why there is no interval.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    over: str
    why: str | None = None


@dataclass(frozen=True)
class Spread:
    """Standard deviations of a difference: by seed, by row, and of what is left."""

    seeds: float
    rows: float
    rest: float


ASSUMED = Spread(seeds=1.0, rows=100 * math.sqrt(0.1 / 3), rest=100 * math.sqrt(0.1 * 2 / 3))
"""Of accuracies before anything is measured: their difference varies by one point from seed to seed, and two runs differ on 10% of
the rows, a third of which would be the same with other seeds."""


def difference(d: Array) -> Difference:
    """The mean of b - a, with what seeds and rows leave open.

    Args:
        d: b - a, (seeds, rows); (seeds, 1) where rows have no numbers of their own.
    """
    seeds, rows = d.shape
    mean, over = float(d.mean()), "seeds and rows" if rows > 1 else "seeds"
    if seeds < 2:
        return Difference(mean, None, None, None, over, "one seed does not say how much another would change")
    by_seed, by_row = _parts(d)
    if by_seed + by_row <= 1e-20 * mean**2:  # what rounding leaves
        return Difference(mean, None, None, None, over, f"all {seeds} seeds{' and all rows' * (rows > 1)} have the same difference")
    half = float(_half_width(by_seed, by_row, seeds, rows))
    widths = np.sqrt(by_seed * _student(seeds - 1) ** 2 + by_row * _student(max(rows - 1, 1)) ** 2)
    p = math.exp(np.interp(abs(mean), widths, np.log(_LEVELS)))
    return Difference(mean, mean - half, mean + half, p, over)


def _parts(d: Array) -> tuple[Array, Array]:
    """A / (S n) and B / (S n) of differences of shape (..., S, n)."""
    seeds, rows = d.shape[-2:]
    of_seeds, of_rows, rest, more = _variances(d)
    more = more / (seeds * rows)
    return np.maximum(rows * of_seeds, rest) * more, np.maximum(seeds * of_rows - rest, 0) * more


def _variances(d: Array) -> tuple[Array, Array, Array, Array]:
    """Variances of the means of seeds, of the means of rows, and of the rest of (..., S, n), and 1 + 2 / rows that differ.

    Where rows have no numbers of their own (n = 1), all is of the seeds.
    """
    seeds, rows = d.shape[-2:]
    d = d - d.mean((-2, -1), keepdims=True)
    of_seeds, of_rows = d.mean(-1), d.mean(-2)
    rest = ((d - of_seeds[..., None] - of_rows[..., None, :]) ** 2).sum((-2, -1)) / ((seeds - 1) * max(rows - 1, 1))
    squares = of_rows**2
    differ = squares.sum(-1) ** 2 / np.maximum((squares**2).sum(-1), 1e-300)
    more = 1 + (rows > 1) * 2 / np.maximum(differ, 1)
    return (of_seeds**2).sum(-1) / (seeds - 1), squares.sum(-1) / max(rows - 1, 1), rest, more


def _half_width(by_seed: Array, by_row: Array, seeds: int, rows: int, level: float = 0.05) -> Array:
    of_seeds, of_rows = (np.interp(-math.log(level), -np.log(_LEVELS), _student(max(df, 1))) for df in (seeds - 1, rows - 1))
    return np.sqrt(by_seed * of_seeds**2 + by_row * of_rows**2)


@lru_cache
def _student(df: int) -> Array:
    """The t that is exceeded, on either side, at each level of _LEVELS."""
    t = np.sinh(_STEPS)
    density = np.exp(-(df + 1) / 2 * np.log1p(t**2 / df)) * np.cosh(_STEPS)
    beyond = np.append(np.cumsum((density[1:] + density[:-1])[::-1])[::-1], 0)
    return np.interp(-np.log(_LEVELS), -np.log(np.maximum(beyond / beyond[0], 1e-300)), t)


def by_chance_of_rows(d: Array, comparisons: int) -> float | None:
    """The largest mean of so many differences where there is none, in 19 of 20 cases, if these rows alone leave it to chance.

    Args:
        d: one of the differences, (seeds, rows).
    """
    rows = d.shape[1]
    of_rows = d.mean(0).var(ddof=1) / rows if rows > 1 else None
    return None if of_rows is None else float(_half_width(np.zeros(()), of_rows, 2, rows, 0.05 / max(comparisons, 1)))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p of several comparisons, so that a false one among them all is as rare as p says. Those without a p have none."""
    there = sorted(p for p in ps if p is not None)
    adjusted = [*accumulate((min(1.0, p * (len(there) - place)) for place, p in enumerate(there)), max)]
    return [None if p is None else adjusted[there.index(p)] for p in ps]


# How much can be found ------------------------------------------------------------------------------------------------------


def spread(pairs: Sequence[Array]) -> Spread | None:
    """The spread of pairs of arms, each as for ``difference`` and as uncertain where few rows differ, on average; None where none
    has two seeds and rows, or all are the same."""
    found = []
    for d in pairs:
        seeds, rows = d.shape
        if seeds > 1 and rows > 1:
            of_seeds, of_rows, rest, more = _variances(d)
            found.append(more * np.array([max(of_seeds - rest / rows, 0), max(of_rows - rest / seeds, 0), rest]))
    return Spread(*np.sqrt(np.mean(found, 0)).tolist()) if np.any(found) else None


def detectable(rows: int, seeds: int, known: Spread = ASSUMED, comparisons: int = 1) -> float | None:
    """The smallest difference that is found four times in five; None with fewer than two seeds.

    Args:
        comparisons: how many arms are compared with the first: where one differs, Holm's level for it is 5% by that.
    """
    if seeds < 2:
        return None
    chance = np.random.default_rng(0)
    rest, of_rows = known.rest**2 / (seeds * rows), np.asarray(known.rows**2 / rows)
    of_seeds = known.seeds**2 / seeds + rest
    guessed = np.maximum(of_seeds * chance.chisquare(seeds - 1, 20_000) / (seeds - 1), rest)
    half = _half_width(guessed, of_rows, seeds, rows, 0.05 / comparisons)
    return float(np.quantile(half + np.sqrt(of_seeds + of_rows) * chance.standard_normal(20_000), 0.8))


def needed(size: float, rows: int, seeds: int, known: Spread = ASSUMED, comparisons: int = 1) -> tuple[int | None, int | None]:
    """How many seeds on these rows find a difference of this size four times in five, and how many rows with these seeds: None
    where a hundred seeds, or a million rows, do not."""

    def enough(rows: int, seeds: int) -> bool:
        found = detectable(rows, seeds, known, comparisons)
        return found is not None and found <= size

    more_seeds = bisect_left(range(101), True, key=lambda seeds: enough(rows, seeds))
    more_rows = bisect_left(range(1, 1_000_001), True, key=lambda rows: enough(rows, seeds)) + 1
    return more_seeds if more_seeds <= 100 else None, more_rows if more_rows <= 1_000_000 else None
