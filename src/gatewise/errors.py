"""The exception whose message is for the user: what was given, what was expected, what to do. And helpers to word it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class GatewiseError(Exception):
    """Something is wrong with what the user gave. The message is one clear sentence; the command line then exits with code 2."""


class DivergedError(GatewiseError):
    """What a model computes is not finite, while it trains or after."""


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around an import: where the package is missing, says what needs it and which extra of gatewise brings it.

    Raises:
        GatewiseError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise GatewiseError(f"{what} needs {name}, which is not installed: pip install 'gatewise[{extra}]'") from error


def reason_of(error: BaseException, most: int = 300) -> str:
    """The message of a library's error on one line of at most ``most`` characters, or its class's name if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names and the number of the others: "a, b, c and 5 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
