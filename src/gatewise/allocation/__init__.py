"""ALoRA and PI-LoRA: ranks that move between the LoRA modules of a model while it trains.

``callback.py`` is ``RankAllocation``, what a Trainer calls. ``algorithm.py`` is a round, from scores to what is pruned and grown.
``slots.py`` has the live and dead ranks of stock LoRA layers, ``growth.py`` what the optimiser keeps and makes of them,
``refusals.py`` the adapters and bases whose ranks cannot be moved, ``gates.py`` the gates that scores are taken through, and
``scores/`` one file a score.
"""

from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from gatewise.allocation.algorithm import Round
    from gatewise.allocation.callback import RankAllocation

__all__ = ["RankAllocation", "Round"]

Schedule = Literal["constant-budget", "cubic"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
"""How the budget goes over the rounds: ALoRA's, which gives away what it takes, and AdaLoRA's, which only comes down."""

Unit = Literal["parameters", "ranks", "modules"]
UNITS: tuple[str, ...] = get_args(Unit)
"""What a budget counts: numbers of live ranks, live ranks (ALoRA's), or modules that have any."""


def __getattr__(name: str) -> Any:
    # RankAllocation brings Transformers' Trainer; the schedules and scores' names do without.
    if name not in __all__:
        raise AttributeError(f"module 'gatewise.allocation' has no attribute {name!r}")
    from gatewise.allocation import algorithm, callback

    return getattr(algorithm if name == "Round" else callback, name)
