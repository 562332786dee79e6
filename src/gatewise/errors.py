"""The one exception a user is meant to read: what was given, what was expected, what to do; and words for its message."""

from collections.abc import Iterable


class GatewiseError(Exception):
    """A fault in what the user gave. The message is one clear sentence; the command line exits with code 2."""


def reason_of(error: Exception) -> str:
    """The first line of what a library's error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names and how many follow: "a, b, c and 5 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
