"""The exception whose message is for the user: what was given, what was expected, what to do. And helpers to word it."""

from collections.abc import Iterable


class GatewiseError(Exception):
    """Something is wrong with what the user gave. The message is one clear sentence; the command line then exits with code 2."""


def reason_of(error: BaseException, most: int = 300) -> str:
    """The message of a library's error on one line of at most ``most`` characters, or its class's name if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names and the number of the others: "a, b, c and 5 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
