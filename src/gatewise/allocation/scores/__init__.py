"""Importance scores of ranks: one file a score. To add a score, put one file ``NAME.py`` into this folder; nothing else changes.

The file has a ``Score`` called ``NAME``. One's own need not lie here: ``RankAllocation(score=...)`` takes a ``Score``, or a plain
function (model, batch, adapter=...) -> path -> one number a live rank, or its name as "module:function".
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from gatewise.allocation import load_function
from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    from gatewise.allocation.scoring import Score

NAMES: tuple[str, ...] = tuple(sorted(module.name for module in iter_modules(__path__)))
"""The scores that ``RankAllocation``, recipes and the command line know by name. Names alone need no torch."""
DEFAULT = "path_moments"
"""The one default score, of ``RankAllocation``, recipes and ``inspect --scores``: the best on average for the least work in
``docs/reports/scores.md``. The method pi-lora has ``path_integral``, which is what makes it PI-LoRA."""


def as_score(given: "str | Score | Callable[..., Any]", options: Mapping[str, Any] | None = None) -> "Score":
    """The score that is meant by a name, a function or "module:function", with these options in the place of its own.

    A ``partial`` of a score is that score with other options.

    Raises:
        GatewiseError: an unknown name, or an option that the score does not take or cannot work with.
    """
    from gatewise.allocation.scoring import Score  # not at the top: names alone need no torch

    options = options or {}
    if isinstance(given, str):
        if given not in NAMES and ":" not in given:
            raise GatewiseError(f"score {given!r} is not known; expected one of {', '.join(NAMES)}")
        given = getattr(import_module(f"{__name__}.{given}"), given) if given in NAMES else load_function(given)
    if isinstance(given, partial) and isinstance(given.func, Score) and not given.args:
        return as_score(given.func, {**given.keywords, **options})
    if not callable(given):
        raise GatewiseError(f"score is {given!r}; expected a name, a function or a gatewise.scores.Score")
    score = given if isinstance(given, Score) else Score(given)
    known = score.options if score.options is not None else options
    for key in options:
        if key not in known:
            takes = ", ".join(known) or "no options"
            raise GatewiseError(f"score_options has {key!r}, but score {score.name!r} takes {takes}")
    if score.check is not None:
        score.check(**options)
    return replace(score, options={**known, **options})
