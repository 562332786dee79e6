"""What counts as a number where a user may have given anything: not True and False, which Python has among the whole numbers."""

from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number, not a number (NaN) and infinity among them."""
    return is_whole(value) or isinstance(value, float)
