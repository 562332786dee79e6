"""The one exception a user is meant to read: what was given, what was expected, what to do; and words for its message."""

from collections.abc import Iterable


class GatewiseError(Exception):
    """A fault in what the user gave. The message is one clear sentence; the command line exits with code 2."""


def reason_of(error: BaseException, most: int = 300) -> str:
    """What a library's error says, on one line and cut to a readable length, or its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names and how many follow: "a, b, c and 5 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
