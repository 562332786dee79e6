"""Training without padding: a batch of texts in one row, one after another, and attention that keeps them apart.

Of a batch of sentences in random order, two fifths of the tokens are padding, and each costs what a real one does. Losses and
gradients are those of the padded batch. Only attention, which is a small part of the work, still pads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from gatewise.tasks import PadCollator

ATTENTION = "eager_unpadded"
"""For ``set_attn_implementation``: causal models that give their attention ``position_ids``."""


class OneRow(PadCollator):
    """Texts one after another in a single row; positions begin anew with each."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``position_ids`` and ``labels``: (1, tokens of all)."""
        rows = [feature["input_ids"] for feature in features]
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row]]),
            "position_ids": torch.tensor([[at for row in rows for at in range(len(row))]]),
            "labels": torch.tensor([[label for feature in features for label in feature["labels"]]]),
        }


def causal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, position_ids: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Attention of texts padded on the right or, in a single row, one after another.

    Shapes: query (b, h, t, d), key and value (b, k, t, d), result (b, t, h, d).
    """
    to = None
    if len(query) == 1 and position_ids is not None:
        starts = (position_ids[0] == 0).nonzero()[:, 0]
        text = (position_ids[0] == 0).cumsum(0) - 1
        longest = int(position_ids.max()) + 1
        to = text * longest + position_ids[0]  # (tokens,): where each goes in the padded batch
        # What is at the padding is read by no token of a text, and its gradient is zero.
        source = (starts[:, None] + torch.arange(longest)).clamp(max=query.shape[2] - 1).flatten()
        query, key, value = (
            one[0].transpose(0, 1).flatten(1).index_select(0, source).view(len(starts), longest, *one.shape[1::2]).transpose(1, 2)
            for one in (query, key, value)
        )
    b, h, t, d = query.shape
    k = key.shape[1]
    scores = query.reshape(b, k, h // k, t, d) @ key[:, :, None].transpose(-1, -2) * scaling
    later = torch.ones(t, t, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    found = (weights @ value[:, :, None]).view(b, h, t, d).transpose(1, 2)
    return (found if to is None else found.flatten(0, 1).index_select(0, to)[None]), None


AttentionInterface.register(ATTENTION, causal_attention)
