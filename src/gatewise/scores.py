"""The scores of ranks as functions: ``gatewise.scores.taylor(model, batch)``. Each has its file in ``allocation/scores``.

Each takes a PEFT model with LoRA and a batch with labels, or several, and gives module -> one number for each live rank; higher is
worth more.
"""

from gatewise.allocation.scores.ablation import ablation
from gatewise.allocation.scores.path_integral import path_integral
from gatewise.allocation.scores.path_moments import path_moments
from gatewise.allocation.scores.random import random
from gatewise.allocation.scores.sensitivity import sensitivity
from gatewise.allocation.scores.taylor import taylor
from gatewise.allocation.scoring import Score, Scores, losses_without_and_with

__all__ = [
    "Score",
    "Scores",
    "ablation",
    "losses_without_and_with",
    "path_integral",
    "path_moments",
    "random",
    "sensitivity",
    "taylor",
]
