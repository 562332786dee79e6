"""Text that can be written: Python's strings may hold half of a surrogate pair, which no file and no tokenizer takes."""

from collections.abc import Mapping
from typing import Any

HALF_A_PAIR = "has half of a surrogate pair, which is no character"


def has_half_a_pair(text: str) -> bool:
    """Whether a text holds what is no character, as JSON's "\\ud800" makes it."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def writable(value: Any) -> Any:
    """Text, or text anywhere in mappings and lists, with the replacement character in place of what is no character."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_half_a_pair(value) else value
    if isinstance(value, Mapping):
        return {writable(key): writable(item) for key, item in value.items()}
    return [writable(item) for item in value] if isinstance(value, list | tuple) else value
