"""Importance scores of ranks: one file a score, all called as ``score(model, batch)`` -> path -> one number a live rank."""

from gatewise.scores.ablation import ablation
from gatewise.scores.base import Scores
from gatewise.scores.sensitivity import sensitivity
from gatewise.scores.taylor import taylor

__all__ = ["Scores", "ablation", "sensitivity", "taylor"]
