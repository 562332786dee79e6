"""Which learning rate an arm is run at: successive halving, at full length, since short runs prefer other rates.

All rates of a grid are run with one tuning seed, the better half with a second, the best two with a third; the best mean wins.
Where the best rate is at the edge of the grid, the grid goes on outwards, seed by seed as long as that is better. What is returned
depends on the results alone, and not on when they came or who made them, so that several processes take the same decision.
"""

import math
from collections.abc import Callable, Iterable

FACTOR = 1.8
"""Between two rates of a grid."""
FIRST_SEED = 1000
"""Tuning seeds begin here; final seeds at 0, so that they tuned nothing."""

Score = tuple[float, ...]
"""How good a run was; more is better, the first number before the next one."""
Trial = tuple[int, int]
"""A step on the grid, from the recipe's own rate, and a seed."""


def rate_at(rate: float, step: int) -> float:
    """The learning rate some steps from a recipe's own; of three digits, so that it can be read and typed."""
    return float(f"{rate * FACTOR**step:.3g}") if step else rate


def best_rate(rates: int, score: Callable[[Trial], Score | None]) -> tuple[list[Trial], int | None]:
    """The step of the best rate, or the runs that have to be made before more can be said.

    Args:
        rates: how many there are in the grid; one is the recipe's own, for which nothing is run. As many more may be added.
        score: what a run came to, or None where it is not finished.

    Returns:
        Runs to be made, and the step; one of the two is empty.
    """
    if rates == 1:
        return [], 0
    low, high, spare = -(rates // 2), (rates - 1) // 2, rates

    def ranked(steps: Iterable[int], seeds: int) -> list[int]:
        """Best first; of equals the lowest rate."""
        return sorted(sorted(steps), key=lambda step: _mean([score((step, FIRST_SEED + i)) for i in range(seeds)]), reverse=True)

    def missing(steps: Iterable[int], seeds: int) -> list[Trial]:
        return [trial for step in steps for i in range(seeds) if score(trial := (step, FIRST_SEED + i)) is None]

    while True:
        if wanted := missing(range(low, high + 1), 1):
            return wanted, None
        best = ranked(range(low, high + 1), 1)[0]
        if low < best < high or not spare:
            break
        low, high, spare = low - (best == low), high + (best == high), spare - 1
    better = ranked(range(low, high + 1), 1)[: max(2, math.ceil(rates / 2))]
    if wanted := missing(better, 2):
        return wanted, None
    last = ranked(better, 2)[:2]
    if wanted := missing(last, 3):
        return wanted, None
    best = ranked(last, 3)[0]
    while best in (low, high) and spare:
        low, high, spare = low - (best == low), high + (best == high), spare - 1
        beyond = low if best == low + 1 else high
        for seeds in (1, 2, 3):  # given up as soon as it is no better on the same seeds
            if wanted := missing([beyond], seeds):
                return wanted, None
            if ranked([best, beyond], seeds)[0] == best:
                return [], best
        best = beyond
    return [], best


def _mean(scores: list[Score | None]) -> Score:
    return tuple(sum(values) / len(values) for values in zip(*(one for one in scores if one is not None), strict=True))
