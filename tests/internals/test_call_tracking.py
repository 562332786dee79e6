"""What is being done with a model, and what its masks say of padding."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from gatewise.internals.call_tracking import CallState, seems_to_hold_answers, seen_by_the_last_token


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_begins_anew(twin):
    state = CallState()
    state.opened_by = 3
    assert (twin(state).opened_by, state.opened_by) == (None, 3)


@pytest.mark.parametrize("window", [3, 100])
@pytest.mark.parametrize("name", ["full_attention", "sliding_attention", None])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_padding_is_read_off_a_mask(window, name, kind):
    """Two columns of it on the left of one row and on the right of the other, and room for two more tokens in the cache."""
    present = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    row, column = torch.arange(6)[:, None], torch.arange(8)
    seen = (column <= row) & (row - column < window)
    mask = (seen & torch.nn.functional.pad(present, (0, 2))[:, None, :])[:, None]
    if kind == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(seen_by_the_last_token(mask if name is None else {name: mask}, 6), present)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, True),
        ({"use_cache": False}, True),
        ({"logits_to_keep": 0}, True),
        ({"logits_to_keep": torch.tensor([1])}, True),
        ({"past_key_values": None}, True),
        ({"use_cache": True}, False),
        ({"logits_to_keep": 1}, False),
        ({"past_key_values": DynamicCache()}, False),
    ],
)
def test_a_call_that_scores_a_text(arguments, expected):
    """Who goes on after a prompt gives a cache or asks for one, or wants the last logits alone."""
    assert seems_to_hold_answers({"input_ids": torch.ones(2, 5, dtype=torch.long), **arguments}) is expected
    assert seems_to_hold_answers({"inputs_embeds": torch.ones(2, 5, 8), **arguments}) is expected
    assert not seems_to_hold_answers({"input_ids": torch.ones(2, 1, dtype=torch.long), **arguments})
