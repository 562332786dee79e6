"""Importance scores of ranks: one file a score. To add a score, put one file ``NAME.py`` into this folder; nothing else changes.

The file has a ``Score`` called ``NAME``. One's own need not lie here: ``RankAllocation(score=...)`` takes a ``Score``, or a plain
function (model, batch, adapter=...) -> path -> one number a live rank, or its name as "module:function".
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from gatewise.allocation import load_function
from gatewise.checks import is_number
from gatewise.errors import GatewiseError

NAMES: tuple[str, ...] = tuple(sorted(module.name for module in iter_modules(__path__)))
"""The scores that ``RankAllocation``, recipes and the command line know by name. Names alone need no torch."""
DEFAULT = "path_moments"
"""The one default score, of ``RankAllocation``, recipes and ``inspect --scores``: the best on average for the least work in
``docs/scores.md``. The method pi-lora has ``path_integral``, which is what makes it PI-LoRA."""


@dataclass(frozen=True, eq=False)
class Score:
    """A way to score ranks. It is called like its function.

    Attributes:
        function: (model, batch, adapter=..., **options) -> path -> one number a live rank, higher for ranks worth more.
        meaning: what a rank's number says, for tables and pages.
        unit: "nats", or "" for a number without a unit.
        idle_is_zero: whether a rank that does nothing scores zero. If not, it scores CE(all ranks) - CE(no rank).
        options: option -> its value in rounds and ``inspect --scores``, of all that it takes; None if that is not known. Of these
            ``float32`` is for ``scoring``: a round measures its losses in the same precision.
        takes: what it wants to be told, each an argument of the function: "prune", how much the round will prune, and "costs",
            where the budget counts parameters, what a rank of each module costs (``prune`` is then in that unit); "on_loss", to be
            called with the mean loss with all ranks on, which the round then need not measure; "progress", to be called with
            (done, total).
        check: called with the options, to refuse before training what can be seen to be wrong.
    """

    function: Callable[..., Any]
    meaning: str = "higher is worth more"
    unit: str = ""
    idle_is_zero: bool = True
    options: Mapping[str, Any] | None = None
    takes: tuple[str, ...] = ()
    check: Callable[..., object] | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        function = self.function.func if isinstance(self.function, partial) else self.function
        self.__dict__.update(name=getattr(function, "__name__", getattr(function, "name", "custom")), __doc__=function.__doc__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def of(self, model: Any, batch: Any, adapter: str | None, given: Mapping[str, Any] | None = None, **told: Any) -> Any:
        """The scores of an adapter's ranks with the options that rounds use, or those given.

        Args:
            told: what a score may want to be told; None for what is not known here.
        """
        told = {name: value for name, value in told.items() if name in self.takes and value is not None}
        return self.function(model, batch, adapter=adapter, **{**(self.options or {}), **told, **(given or {})})

    def checked(self, options: Mapping[str, Any] | None) -> "Score":
        """This score, whose function takes these options.

        Raises:
            GatewiseError: an option that the score does not take or cannot work with.
        """
        known = (options if self.options is None else self.options) or {}
        for key, value in (options or {}).items():
            if key not in known:
                raise GatewiseError(
                    f"score_options has {key!r}, but score {self.name!r} takes {', '.join(known)}{_near(key, known)}"
                )
            usual = known[key]
            if (isinstance(usual, bool) or key == "float32") and not isinstance(value, bool):
                raise GatewiseError(f"score_options has {key}={value!r}; expected true or false")
            if isinstance(usual, float) and not is_number(value):
                raise GatewiseError(f"score_options has {key}={value!r}; expected a number")
        if self.check is not None:
            self.check(**(options or {}))
        return self


class _Scores(Mapping[str, Score]):
    """Name -> score. A file is imported when its score is asked for."""

    def __getitem__(self, name: str) -> Score:
        if name not in NAMES:
            raise KeyError(name)
        score: Score = getattr(import_module(f"{__name__}.{name}"), name)
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


SCORES = _Scores()


def as_score(given: str | Score | Callable[..., Any], options: Mapping[str, Any] | None = None) -> Score:
    """The score that is meant by a name, a function or "module:function". That of a ``partial`` is its function's.

    Args:
        options: to be checked.

    Raises:
        GatewiseError: an unknown name, or an option that the score does not take or cannot work with.
    """
    if isinstance(given, str):
        if given not in NAMES and ":" not in given:
            raise GatewiseError(f"score {given!r} is not known; expected one of {', '.join(NAMES)}{_near(given, NAMES)}")
        given = SCORES[given] if given in NAMES else load_function(given)
    if isinstance(given, partial) and not given.args:
        score = as_score(given.func, given.keywords)
        given = replace(score, function=given, options=score.options and {**score.options, **given.keywords})
    if not callable(given):
        raise GatewiseError(f"score is {given!r}; expected a name, a function or a gatewise.scores.Score")
    return (given if isinstance(given, Score) else Score(given)).checked(options)


def _near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
