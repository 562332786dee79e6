"""Which learning rate an arm is run at: successive halving, at full length, since short runs prefer other rates.

All rates of a grid are run with one tuning seed, the better half with a second, the best two with a third; the best mean wins.
Where the best rate is at the edge of the grid, the grid goes on outwards, seed by seed as long as that is better. What is returned
depends on the results alone, and not on when they came or who made them, so that several processes take the same decision.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

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


class _MissingError(Exception):
    """Has the runs that must be made before more can be said."""


def best_rate(rates: int, score: Callable[[Trial], Score | None]) -> tuple[list[Trial], int | None]:
    """The step of the best rate, or the runs that have to be made before more can be said.

    Args:
        rates: how many there are in the grid; one is the recipe's own, for which nothing is run. As many more may be added.
        score: what a run came to, or None where it is not finished.

    Returns:
        Runs to be made, and the step; one of the two is empty.
    """

    def ranked(steps: Iterable[int], seeds: int) -> list[int]:
        """Best first; of equals the lowest rate."""
        scores: dict[int, list[Any]] = {step: [score((step, FIRST_SEED + i)) for i in range(seeds)] for step in sorted(steps)}
        if wanted := [(step, FIRST_SEED + i) for step, own in scores.items() for i, one in enumerate(own) if one is None]:
            raise _MissingError(wanted)
        means = {step: [sum(one) / seeds for one in zip(*own, strict=True)] for step, own in scores.items()}
        return sorted(means, key=means.__getitem__, reverse=True)

    if rates == 1:
        return [], 0
    low, high, spare = -(rates // 2), (rates - 1) // 2, rates
    try:
        while (best := ranked(range(low, high + 1), 1)[0]) in (low, high) and spare:
            low, high, spare = low - (best == low), high + (best == high), spare - 1
        better = ranked(range(low, high + 1), 1)[: max(2, math.ceil(rates / 2))]
        best = ranked(ranked(better, 2)[:2], 3)[0]
        while best in (low, high) and spare:
            low, high, spare = low - (best == low), high + (best == high), spare - 1
            beyond = low if best == low + 1 else high
            if any(ranked([best, beyond], seeds)[0] == best for seeds in (1, 2, 3)):  # at once where one seed says so
                break
            best = beyond
    except _MissingError as missing:
        return missing.args[0], None
    return [], best


def runs_of_search(rates: int) -> int:
    """How many runs it takes to find the best of so many rates, if it is not at the edge."""
    return rates + max(2, math.ceil(rates / 2)) + 2 if rates > 1 else 0
