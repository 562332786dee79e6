"""Text that can be written: Python's strings may hold half of a surrogate pair, which no file and no tokenizer takes."""

HALF_A_PAIR = "has half of a surrogate pair, which is no character"


def has_half_a_pair(text: str) -> bool:
    """Whether a text holds what is no character, as JSON's "\\ud800" makes it."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
