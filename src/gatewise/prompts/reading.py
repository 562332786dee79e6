"""Which tokens of a call the generators read: the prompt, never an answer, never padding.

Shapes: b batch, t tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import cache_of, fitted, seen_by_the_last_token
from gatewise.losses import IGNORED, before_first


@dataclass(frozen=True)
class Call:
    """What ``generate`` was given: how many prompts, their width, and which of their columns are no padding. Else width is None."""

    rows: int = 1
    width: int | None = None
    attention_mask: Tensor | None = None

    def by_row(self, given: Tensor, batch: int) -> Tensor:
        """What was given for each prompt, for each of the rows (beams, samples) that ``generate`` has made of it."""
        return given if self.width is None else given.repeat_interleave(batch // self.rows, dim=0)

    def guides(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a forward that begins a text is not of the prompt, but of what classifier-free guidance compares it with.

        Only there ``generate`` leaves it to the model to make a cache.
        """
        return self.width is not None and bool(arguments.get("use_cache")) and cache_of(arguments) is None


@dataclass(frozen=True)
class Text:
    """A batch: ``present`` (b, t) is true at its tokens, ``prompt`` (b, t) at those of them that generators read."""

    present: Tensor
    prompt: Tensor


def inputs_of(arguments: Mapping[str, Any]) -> Tensor:
    """The ids (b, t) or embeddings (b, t, d) of a call.

    Raises:
        GatewiseError: there are none, or several texts a row.
    """
    ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    inputs, dimensions = (ids, 2) if ids is not None else (embeddings, 3)
    if not isinstance(inputs, Tensor) or inputs.ndim != dimensions:
        raise GatewiseError(
            "selective prompts read one text a row: the model was called without input_ids of shape (b, t) or inputs_embeds of "
            "shape (b, t, d)"
        )
    return inputs


def read_text(arguments: Mapping[str, Any], call: Call, told: Tensor | None, causal: bool, training: bool) -> Text:
    """Where the tokens lie, and the prompts.

    In a causal model the prompt is what was told or, else, what stands before the first label that is not -100 or, else, what
    ``generate`` was given or, else, everything. What guidance compares it with is a prompt by itself. A row without a prompt
    (plain language modelling, all labels) has its first token for one, which no position predicts. Elsewhere the text is it.

    Raises:
        GatewiseError: shapes that do not fit, packed rows, or a causal model that is trained without a word on its prompts.
    """
    inputs = inputs_of(arguments)
    batch, tokens = inputs.shape[:2]
    present = _present(arguments, call, inputs)
    prompt, labels = present, arguments.get("labels")
    if call.guides(arguments):
        prompt = present
    elif told is not None:
        prompt = present & fitted(call.by_row(told, batch), batch, tokens).to(present.device)
    elif causal and isinstance(labels, Tensor) and labels.shape == (batch, tokens):
        prompt = present & before_first(labels != IGNORED).to(present.device)
    elif causal and training:
        raise GatewiseError(
            "a decoder with selective prompts was trained without labels in its call, so that prompts would be generated from the "
            "answers: pass labels with -100 before the answer, or run the forward under model.prompt_positions(mask)"
        )
    elif causal and call.width is not None:
        prompt = present & (torch.arange(tokens, device=present.device) < call.width)
    first = present & (present.cumsum(dim=1) == 1)
    return Text(present, torch.where(prompt.any(dim=1, keepdim=True), prompt, first))


def _present(arguments: Mapping[str, Any], call: Call, inputs: Tensor) -> Tensor:
    batch, tokens = inputs.shape[:2]
    mask: Any = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        if call.width is None:
            raise GatewiseError("attention_mask is not of shape (b, t): selective prompts need to know which tokens are padding")
        # Inside `generate` with a static cache the model gets the mask of its attention instead of the one that was given.
        given = call.attention_mask
        mask = seen_by_the_last_token(mask, tokens) if given is None else call.by_row(given, batch)
    if mask is None:
        positions = arguments.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim == 2 and bool((positions.diff(dim=1) < 0).any()):
            raise GatewiseError(
                "a row holds several packed samples, but a prompt stands in front of one: train without packing and padding_free"
            )
        return torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
    return mask[:, -tokens:].to(inputs.device).bool()
