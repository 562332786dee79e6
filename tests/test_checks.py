"""What counts as a number."""

import pytest

from gatewise.checks import is_number, is_whole


@pytest.mark.parametrize(
    ("value", "number", "whole"),
    [(0, True, True), (-3, True, True), (0.5, True, False), (float("nan"), True, False), (True, False, False)]
    + [(other, False, False) for other in (False, None, "1", [1], 1j)],
)
def test_numbers(value, number, whole):
    assert (is_number(value), is_whole(value)) == (number, whole)
