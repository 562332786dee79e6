"""When rounds run, and how much of the budget each of them prunes: ``ConstantBudget`` (ALoRA) or ``Cubic`` (AdaLoRA's curve)."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

from gatewise.checks import is_number, is_whole
from gatewise.errors import GatewiseError


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """When rounds run.

    Attributes:
        rounds: most rounds to run (the paper's N_A). Those that would fall on or after the last step are left out: what they
            grow could not learn any more.
        first_round: when the first round runs: epochs, or steps when an int above 1 (K1).
        recover: training between rounds: epochs, or steps when an int above 1 (K2).

    Raises:
        GatewiseError: a setting that cannot be.
    """

    name: ClassVar[str]
    rounds: int = 8
    first_round: float = 1.0
    recover: float = 0.25

    def __post_init__(self) -> None:
        for name in ("rounds", "first_round", "recover", "grace_rounds"):
            number = getattr(self, name, 0)
            span = name in ("first_round", "recover")
            if not (is_number(number) and number > 0 if span else is_whole(number) and number >= 0):
                expected = "epochs or steps above 0" if span else "a whole number of at least 0"
                raise GatewiseError(f"{name} is {number!r}; expected {expected}")

    def steps(self, steps_per_epoch: int | None) -> list[int]:
        """The steps after which rounds run, if training goes on for so long.

        Args:
            steps_per_epoch: None where the training data has no length.

        Raises:
            GatewiseError: epochs of data that has no length.
        """
        for name, value in (("first_round", self.first_round), ("recover", self.recover)):
            if steps_per_epoch is None and not _is_steps(value):
                raise GatewiseError(f"{name}={value} means epochs, but the training data has no length: give steps, an int above 1")
        first, between = (in_steps(value, steps_per_epoch or 0) for value in (self.first_round, self.recover))
        return [first + between * index for index in range(self.rounds)]

    def cut(self, start: int, target: int, live: int, done: int, rounds: int) -> tuple[int, int]:
        """What a round prunes at least, and the most that lives after it; both in the unit of the budget.

        Args:
            start: what lived at the start.
            target: what is to live at the end.
            live: what lives before the round.
            done: how many rounds there will have been, this one included.
            rounds: how many there are in all.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ConstantBudget(Rounds):
    """ALoRA's schedule (arXiv 2403.16187, algorithm 1): what is pruned is given to other modules.

    Attributes:
        prune_fraction: share of the budget pruned in a round (n_A).
        r_max: slots of each layer, the most ranks that it can grow to; None for twice its rank at the start.
        grace_rounds: for so many rounds a new rank is not pruned. It starts with B at zero, so that in a short round it has no
            time to earn a score; 0, the paper's rule, prunes it like any other.
    """

    name: ClassVar[str] = "constant-budget"
    prune_fraction: float = 1 / 8
    r_max: int | None = None
    grace_rounds: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.prune_fraction) or not 0 < self.prune_fraction < 1:
            raise GatewiseError(f"prune_fraction is {self.prune_fraction!r}; expected a share between 0 and 1, such as 1/8")
        if self.r_max is not None and not is_whole(self.r_max):
            raise GatewiseError(f"r_max is {self.r_max!r}; expected a number of ranks, or None for twice as many as at the start")

    def cut(self, start: int, target: int, live: int, done: int, rounds: int) -> tuple[int, int]:
        """The same share in each round."""
        return max(1, round(self.prune_fraction * start)), start


@dataclass(frozen=True, kw_only=True)
class Cubic(Rounds):
    """A budget that comes down from a larger adapter on AdaLoRA's curve (arXiv 2303.10512, eq. 12), fast at first. Nothing grows.

    Attributes:
        target_rank: what is left at the end: so many ranks a module on average, or the parameters of an adapter that has this
            rank everywhere.
    """

    name: ClassVar[str] = "cubic"
    target_rank: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.target_rank) or not 0 < self.target_rank < math.inf:
            raise GatewiseError(
                f"target_rank is {self.target_rank!r}; expected a number above 0, the mean rank of a module at the end"
            )

    def cut(self, start: int, target: int, live: int, done: int, rounds: int) -> tuple[int, int]:
        """Down to target + (start - target) (1 - done / rounds)^3: the target itself from the last round on."""
        left = max(0.0, 1 - done / rounds) if rounds else 0.0
        budget = target + round((start - target) * left**3)
        return max(0, live - budget), budget


def in_steps(value: float, steps_per_epoch: int) -> int:
    """A span of training, in epochs, or in steps where it is a whole number above 1, as a number of optimiser steps."""
    return int(value) if _is_steps(value) else max(1, round(value * steps_per_epoch))


def _is_steps(value: float) -> bool:
    return isinstance(value, Integral) and value > 1
