"""Checks of values that a user gives: whole numbers, numbers, and text that can be written, printed or means a number."""

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from gatewise.errors import GatewiseError


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number, not a number (NaN) and infinity among them."""
    return is_whole(value) or isinstance(value, float)


def number_of(text: str, name: str) -> int:
    """The whole number that a text means: 500000, "500,000", "500k" or "1.5M". A comma parts thousands, and nothing else.

    Args:
        name: of the option that it was given for, for the error.

    Raises:
        GatewiseError: it means none.
    """
    match = re.fullmatch(r"((?:\d+|\d{1,3}(?:[,_]\d{3})+)(\.\d+(?=\D))?)([kKmM]?)", text.strip())
    if match is None:
        raise GatewiseError(f"{name} is {text!r}: expected a number such as 500000, 500k or 1.5M")
    number = match[1].replace(",", "").replace("_", "")
    return round(float(number) * {"k": 1_000, "m": 1_000_000}[match[3].lower()]) if match[3] else int(number)


HALF_A_PAIR = "has half of a surrogate pair, which is no character"


def has_half_a_pair(text: str) -> bool:
    """Whether a text holds what is no character, as JSON's "\\ud800" makes it."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Text without the control characters that a terminal would obey; tabs and line breaks stay."""
    return _CONTROL.sub("", text)


def writable(value: Any) -> Any:
    """Text, or text anywhere in mappings and lists, with the replacement character in place of what is no character."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_half_a_pair(value) else value
    if isinstance(value, Mapping):
        return {writable(key): writable(item) for key, item in value.items()}
    return [writable(item) for item in value] if isinstance(value, list | tuple) else value
