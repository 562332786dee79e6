"""Importance scores of ranks: one file a score. To add a score, put one file ``NAME.py`` into this folder; nothing else changes.

The file has a function ``NAME(model, batch, *, adapter=None, float32=None, ...) -> Scores``: module path -> one number a live rank,
higher for ranks worth more. ``float32`` is for ``scoring``: None by default where the score is made of gradients, True where it is
made of differences of losses. A round measures its losses in the same precision. Beside the function stand what its numbers mean,
for tables and pages:

    MEANING = "what a rank's number says"
    UNIT = "nats"        # "" for a number without a unit
    FROM_BASE = False    # True where a rank that does nothing scores CE(all ranks) - CE(no rank), not zero

It may also have ``IN_ROUNDS``, options that rounds and ``inspect --scores`` give it unless told otherwise, and
``check_options(**options)``, which raises ``GatewiseError`` for options that can be seen to be wrong before training. A score with
an argument ``prune`` is told how many ranks the round will prune; one that has ``costs`` too is told, where the budget counts
parameters, what a rank of each module costs, and ``prune`` in that unit. One with ``progress`` may report (done, total); one with
``on_loss`` may tell the mean loss with all ranks on, which the round then need not measure.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from gatewise.checks import is_number
from gatewise.errors import GatewiseError

NAMES: tuple[str, ...] = tuple(sorted(module.name for module in iter_modules(__path__)))
"""The scores that ``RankAllocation``, recipes and the command line know by name. Names alone need no torch."""
DEFAULT = "path_moments"
"""The one default score, of ``RankAllocation``, recipes and ``inspect --scores``: the best on average for the least work in
``docs/scores.md``. The method pi-lora has ``path_integral``, which is what makes it PI-LoRA."""


class _Scores(Mapping[str, Callable[..., Any]]):
    """Name -> function. A file is imported when its score is asked for."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in NAMES:
            raise KeyError(name)
        score: Callable[..., Any] = getattr(_file_of(name), name)
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


SCORES = _Scores()


@dataclass(frozen=True)
class About:
    """What the file of a score says of it: see the top of this one."""

    meaning: str = ""
    unit: str = ""
    from_base: bool = False
    in_rounds: Mapping[str, Any] = field(default_factory=dict)


def about(name: str) -> About:
    """What a score of this name says of a rank; nothing for a score of the user's own."""
    if name not in NAMES:
        return About()
    file = _file_of(name)
    return About(file.MEANING, file.UNIT, file.FROM_BASE, getattr(file, "IN_ROUNDS", {}))


def check_score(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuses a name or options that no score has, before long work.

    Raises:
        GatewiseError: an unknown name, or an option that the score does not take or cannot work with.
    """
    if name not in NAMES:
        raise GatewiseError(f"score {name!r} is not known; expected one of {', '.join(NAMES)}{_near(name, NAMES)}")
    if not options:
        return
    arguments = inspect.signature(SCORES[name]).parameters
    known = [key for key in arguments if key not in ("model", "batch", "adapter", "on_loss", "costs")]
    for key, value in options.items():
        if key not in known:
            raise GatewiseError(f"score_options has {key!r}, but score {name!r} takes {', '.join(known)}{_near(key, known)}")
        default = arguments[key].default
        if (isinstance(default, bool) or key == "float32") and not isinstance(value, bool):
            raise GatewiseError(f"score_options has {key}={value!r}; expected true or false")
        if isinstance(default, float) and not is_number(value):
            raise GatewiseError(f"score_options has {key}={value!r}; expected a number")
    check = getattr(_file_of(name), "check_options", None)
    if check is not None:
        check(**options)


def _file_of(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def _near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
