"""Importance scores of ranks: one file a score, all called as ``score(model, batch)`` -> path -> one number a live rank."""

from collections.abc import Callable

from gatewise.scores.ablation import ablation
from gatewise.scores.base import Scores
from gatewise.scores.path_integral import Convergence, path_integral
from gatewise.scores.path_moments import path_moments
from gatewise.scores.sensitivity import sensitivity
from gatewise.scores.taylor import taylor

SCORES: dict[str, Callable[..., Scores]] = {
    "ablation": ablation,
    "taylor": taylor,
    "path_integral": path_integral,
    "path_moments": path_moments,
    "sensitivity": sensitivity,
}
"""The scores ``RankAllocation`` and recipes know by name."""

__all__ = ["SCORES", "Convergence", "Scores", "ablation", "path_integral", "path_moments", "sensitivity", "taylor"]
