"""Importance scores of ranks: one file a score. To add one, put a file ``NAME.py`` with a function ``NAME`` here, nothing else.

A score is called as ``score(model, batch, adapter=None, float32=True, ...)`` and returns a ``gatewise.allocation.scoring.Scores``:
module path -> one number a live rank, higher for ranks worth more.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

NAMES: tuple[str, ...] = tuple(sorted(module.name for module in iter_modules(__path__)))
"""The scores that ``RankAllocation`` and recipes know by name."""


class _Scores(Mapping[str, Callable[..., Any]]):
    """Name -> function. A file is imported when its score is asked for: names alone need no torch."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in NAMES:
            raise KeyError(name)
        score: Callable[..., Any] = getattr(import_module(f"{__name__}.{name}"), name)
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


SCORES = _Scores()
