"""Checks of values that a user gives: whole numbers, numbers, and text that can be written, printed or means a number."""

import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

from gatewise.errors import GatewiseError


def is_whole(value: object) -> TypeGuard[int]:
    """True for any whole number, NumPy's among them, but not for True and False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """True for any int or float, including NaN and infinity."""
    return isinstance(value, Real) and not isinstance(value, bool)


def number_of(text: str, name: str) -> int:
    """Reads a number such as 500000, "500,000", "500k" or "1.5M". Commas separate thousands.

    Args:
        name: the option's name, for the error.

    Raises:
        GatewiseError: the text is no such number.
    """
    match = re.fullmatch(r"((?:\d+|\d{1,3}(?:[,_]\d{3})+)(\.\d+(?=\D))?)([kKmM]?)", text.strip())
    if match is None:
        raise GatewiseError(f"{name} is {text!r}: expected a number such as 500000, 500k or 1.5M")
    number = match[1].replace(",", "").replace("_", "")
    return round(float(number) * {"k": 1_000, "m": 1_000_000}[match[3].lower()]) if match[3] else int(number)


HALF_A_PAIR = "has half of a surrogate pair, which is no character"


def has_half_a_pair(text: str) -> bool:
    """True for text with half of a surrogate pair, which JSON's "\\ud800" makes and UTF-8 cannot write."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Signs that turn the direction of what stands around them, and others that are not to be seen; joiners are letters' own.
_UNSEEN = re.compile("[\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\U000e0000-\U000e007f]")


def printable(text: str) -> str:
    r"""Removes the control characters that a terminal would obey; tabs and line breaks stay.

    Those that turn what stands around them round, or are not to be seen, are shown as escapes: "\u202e".
    """
    return _UNSEEN.sub(lambda found: found[0].encode("ascii", "backslashreplace").decode(), _CONTROL.sub("", text))


def writable(value: Any) -> Any:
    """Replaces halves of surrogate pairs, in a text or anywhere in mappings and lists, by the replacement character."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_half_a_pair(value) else value
    if isinstance(value, Mapping):
        return {writable(key): writable(item) for key, item in value.items()}
    return [writable(item) for item in value] if isinstance(value, list | tuple) else value
