"""Weights on one stream of data, gates on another, in alternation (first-order DARTS, arXiv 1806.09055).

``trainer.py`` is the Trainer, ``state.py`` the state of its upper level: parameters, order of rows, checkpoints.
"""

from gatewise.bilevel.state import split_in_half
from gatewise.bilevel.trainer import BilevelMixin, BilevelTrainer

__all__ = ["BilevelMixin", "BilevelTrainer", "split_in_half"]
