"""Fixtures that all tests of selective prompts share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY

LENGTHS = [9, 4, 7, 2]


@pytest.fixture
def texts() -> list[torch.Tensor]:
    """Four texts of different lengths, one shorter than the prompt."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture
def data() -> Callable[[str], list[dict[str, Any]]]:
    """Texts of one length; the class is in the first token, and the answer of a decoder repeats the text."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 60, (24, 6), generator=generator)

    def make(family: str) -> list[dict[str, Any]]:
        if family == "bert":
            return [{"input_ids": row, "labels": row[0] % 3} for row in ids]
        return [{"input_ids": row, "labels": torch.where(torch.arange(6) < 3, -100, row)} for row in ids]

    return make
