"""Prompts in a key-value cache: kept beside the text's own keys and values, so that the cache is as long as the text.

Everything in Transformers that counts cached tokens (positions, masks, sliding windows, cropping, beams) then goes on as it would
without prompts. Attention gets the prompt's keys and values in front of those the cache gives.

Shapes: b batch, h heads, l prompt tokens, t tokens, c head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from gatewise.internals.class_swap import ObjectMixin, add_mixin


@dataclass
class CachedPrompts:
    """The prompts of the text that filled a cache: of which tracker and adapter, and keys and values (b, h, l, c) by layer.

    While ``arriving`` is not zero, what the cache is given begins with so many prompt tokens.
    """

    tracker: int
    adapter: str
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    arriving: int = 0

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, as the cache does."""
        self.states = {
            layer: (keys[rows.to(keys.device)], values[rows.to(values.device)]) for layer, (keys, values) in self.states.items()
        }


class PromptedCache(ObjectMixin, Cache):
    """The methods that a cache with prompts is given in front of its own."""

    gatewise_prompts: CachedPrompts

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores what follows the prompt, and returns prompt and text."""
        held = self.gatewise_prompts
        if held.arriving:
            front, text = slice(None, held.arriving), slice(held.arriving, None)
            # Copies, or the views would keep the text's keys and values alive a second time.
            held.states[layer_idx] = key_states[:, :, front].clone(), value_states[:, :, front].clone()
            key_states, value_states = key_states[:, :, text], value_states[:, :, text]
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in held.states:
            return keys, values
        prompt_keys, prompt_values = held.states[layer_idx]
        return torch.cat([prompt_keys, keys], dim=2), torch.cat([prompt_values, values], dim=2)

    def reset(self) -> None:
        super().reset()
        self.gatewise_prompts.states.clear()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.gatewise_prompts.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.gatewise_prompts.select(indices)


@contextmanager
def prompts_arriving(cache: Any, tracker: int, adapter: str, tokens: int) -> Iterator[None]:
    """While open, keys and values given to the cache (None: there is none) begin with those of ``tokens`` prompt tokens."""
    if cache is None:
        yield
        return
    if not isinstance(cache, PromptedCache):
        add_mixin(cache, PromptedCache)
        cache.gatewise_prompts = CachedPrompts(tracker, adapter)
    held = cache.gatewise_prompts
    held.tracker, held.adapter, held.arriving = tracker, adapter, tokens
    try:
        yield
    finally:
        held.arriving = 0


def prompts_of(cache: Any) -> CachedPrompts | None:
    """The prompts in a cache, None if there are none."""
    held = cache.gatewise_prompts if isinstance(cache, PromptedCache) else None
    return held if held is not None and held.states else None


def append_prompts(cache: Any, other: Any) -> None:
    """To the prompts in a cache, if there are any, those in another one whose rows have been appended to its own."""
    held, more = prompts_of(cache), prompts_of(other)
    if held is not None and more is not None:
        held.states = {
            layer: (torch.cat([keys, more.states[layer][0]]), torch.cat([values, more.states[layer][1]]))
            for layer, (keys, values) in held.states.items()
        }
