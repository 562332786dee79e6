"""Importance scores of ranks: one file a score, all called as ``score(model, batch)`` -> path -> one number a live rank."""

from collections.abc import Callable

from gatewise.scores.ablation import ablation
from gatewise.scores.base import Scores
from gatewise.scores.sensitivity import sensitivity
from gatewise.scores.taylor import taylor

SCORES: dict[str, Callable[..., Scores]] = {"ablation": ablation, "taylor": taylor, "sensitivity": sensitivity}
"""The scores ``RankAllocation`` and recipes know by name."""

__all__ = ["SCORES", "Scores", "ablation", "sensitivity", "taylor"]
