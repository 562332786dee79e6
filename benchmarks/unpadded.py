"""Training without padding: a batch of texts in one row, one after another, and attention that keeps them apart.

Of a batch of sentences in random order, two fifths of the tokens are padding, and each costs what a real one does. Losses and
gradients are those of the padded batch. Attention takes one text at a time.
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
    h, k, t = query.shape[1], key.shape[1], query.shape[2]
    lengths = [t]
    if len(query) == 1 and position_ids is not None:
        starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], t], strict=True)]
    grouped = ((query * scaling).view(len(query), k, h // k, t, -1), key[:, :, None], value[:, :, None])
    made = []
    for own, keys, values in zip(*(one.split(lengths, 3) for one in grouped), strict=True):
        later = own.new_full((own.shape[3],) * 2, float("-inf")).triu(1)
        made.append((own @ keys.transpose(-1, -2) + later).softmax(-1, dtype=torch.float32).to(own.dtype) @ values)
    return torch.cat(made, 3).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, causal_attention)
