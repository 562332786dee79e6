"""What counts as a number, and what numbers texts mean."""

import numpy as np
import pytest

from gatewise import RoutedLoraConfig, SelectivePromptConfig
from gatewise.checks import is_number, is_whole, number_of
from gatewise.errors import GatewiseError


@pytest.mark.parametrize(
    ("value", "number", "whole"),
    [
        (0, True, True),
        (-3, True, True),
        (0.5, True, False),
        (np.int64(2), True, True),
        (np.float64(2), True, False),
        (float("nan"), True, False),
        (True, False, False),
    ]
    + [(other, False, False) for other in (False, np.bool_(True), None, "1", [1], 1j)],
)
def test_numbers(value, number, whole):
    assert (is_number(value), is_whole(value)) == (number, whole)


def test_numbers_of_numpy_in_a_configuration_can_be_saved(tmp_path):
    RoutedLoraConfig(r=np.int64(4), top_k=np.int64(2)).save_pretrained(tmp_path)
    SelectivePromptConfig(bottleneck=np.int64(8), phm=np.int64(4), prompt_layers=list(np.arange(2))).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("0", 0), ("500000", 500_000), (" 500,000 ", 500_000), ("2_440_000", 2_440_000), ("500k", 500_000), ("1.1M", 1_100_000)],
        *[("12,345,678", 12_345_678), ("2,400.5k", 2_400_500)],
    ],
)
def test_the_number_of_a_text(text, number):
    assert number_of(text, "--suggest") == number


@pytest.mark.parametrize(
    "text", ["", "-3", "1.5", "k", "1e6", "5 kk", "nan", "1.M", "2,4M", "1,5", "500,00", "5,000,00", ",500", "1_5"]
)
def test_texts_that_mean_no_number(text):
    with pytest.raises(GatewiseError, match=r"^--suggest is '.*': expected a number such as 500000, 500k or 1\.5M$"):
        number_of(text, "--suggest")
