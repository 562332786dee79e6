"""Fixtures that all tests of selective prompts share."""

import pytest
import torch
from tiny_models import VOCABULARY

LENGTHS = [9, 4, 7, 2]


@pytest.fixture
def texts() -> list[torch.Tensor]:
    """Four texts of different lengths, one shorter than the prompt."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
