"""One Transformer layer that prompts pass through: it puts them in front of the text, runs as ever, and takes them off again.

A layer is not given hooks; its class is exchanged for a subclass of it, as PyTorch's FSDP2 does. For gradient checkpointing runs
``forward`` a second time in the backward pass, without hooks and when no pass is open any more. All that ``forward`` needs comes to
it as arguments, tensors with a gradient as positional ones, and the prompt it leaves is part of what it returns: so both kinds of
checkpointing give a plain run's gradients.

Shapes: b batch, t tokens, l prompt tokens, d hidden size.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.internals.class_swap import Front, put_front, take_front
from gatewise.prompts.cache import prompts_arriving
from gatewise.prompts.forward import PassTracker, PromptPass
from gatewise.prompts.layer import PromptLayer, mixed


class Place:
    """Where a layer stands, and the names of its ``forward``'s arguments."""

    def __init__(self, block: nn.Module, index: int, path: str, tracker: PassTracker) -> None:
        self.index, self.path, self._tracker = index, path, tracker
        self.names = list(inspect.signature(type(block).forward).parameters)[1:]

    def enter(self) -> PromptPass | None:
        """The pass that the layer runs in; None where it has no part in it, below the first layer with prompts."""
        running = self._tracker.current
        if running is not None:
            generates = running.text is not None and self.index in running.gates
            return running if self.index >= running.first or generates else None
        if not self._tracker.running:
            raise GatewiseError(
                f"layer {self.path} was run outside the forward of its model, so there is no text to generate prompts from: call "
                "the model"
            )
        return None


class PromptedBlock(Front, nn.Module):
    """What a layer's class is given in front of its own ``__call__`` and ``forward``."""

    place: Place
    selective_prompt: PromptLayer

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = self.place.enter()
        if running is None:
            return super().__call__(*args, **kwargs)
        given = {**dict(zip(self.place.names, args, strict=False)), **kwargs}
        hidden, gate = given.pop(self.place.names[0]), running.gates.get(self.place.index)
        if self.place.index < running.first:
            # A prompt of zeros, for its graph only, as data-parallel training wants every parameter to have a part. The layer
            # does not see it: the text would attend to it, and a norm's gradient at zero, layer upon layer, grows past all numbers.
            # Outside the layer's own call, so Accelerate has not brought the tensors to its device yet.
            device = next(self.selective_prompt.parameters()).device
            carried = None if running.propagated is None else running.propagated.to(device)
            running.propagated = self._prompt(hidden.to(device), carried, gate, running)
            return super().__call__(*args, **kwargs)
        given["attention_mask"] = running.mask(given.get("attention_mask"))
        if running.text is not None and given.get("position_embeddings") is not None:
            given["position_embeddings"] = running.positions(given["position_embeddings"])
        # Hooks on the layer see the pair, whose first part is what they would see without prompts.
        pair = super().__call__(hidden, running.propagated, gate, prompt_pass=running, **given)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise GatewiseError(
                f"a forward hook on layer {self.place.path} returned a {type(pair).__name__}, but with selective prompts a layer's "
                "output is the pair (hidden states, prompt): return the pair with the hidden states changed"
            )
        text, running.propagated = pair
        return text

    def forward(self, *args: Any, prompt_pass: PromptPass | None = None, **kwargs: Any) -> Any:
        """The layer's own; in a pass: from (h (b, t, d), p^propagated (b, l, d), a (1,)) to (h, p), with no p if it continues.

        Mask and position embeddings are those of prompt and text.
        """
        if prompt_pass is None:
            return super().forward(*args, **kwargs)
        if len(args) != 3:
            raise GatewiseError(
                f"a forward pre-hook on layer {self.place.path} returned {len(args)} arguments, but with selective prompts a "
                "layer's are (hidden states, prompt, gate): return the three with the hidden states changed"
            )
        hidden, propagated, gate = args
        if prompt_pass.text is None:
            return super().forward(hidden, **kwargs), None
        prompt = self._prompt(hidden, propagated, gate, prompt_pass)
        length = prompt.shape[1]
        filled = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        with prompts_arriving(filled, prompt_pass.owner, prompt_pass.adapter, length):
            both = super().forward(torch.cat([prompt, hidden], dim=1), **kwargs)
        return both[:, length:], both[:, :length]

    def _prompt(self, hidden: Tensor, propagated: Tensor | None, gate: Tensor | None, running: PromptPass) -> Tensor:
        if self.place.index not in running.gates:
            assert propagated is not None
            return propagated
        assert running.pooling is not None
        new = self.selective_prompt.new_prompt(running.adapter, hidden, running.pooling.to(hidden.device))
        # Up to the first prompt what is propagated are zeros, for their graph only: they have no direction.
        balanced = running.balanced and self.place.index > running.first
        return mixed(propagated, new, gate, running.config.tau, balanced).to(hidden.dtype)


def install(block: Any, place: Place) -> None:
    """Makes a layer one that prompts pass through."""
    block.place = place
    put_front(block, PromptedBlock)


def uninstall(block: Any) -> None:
    """Undoes ``install``, and takes the generators off."""
    del block.place
    if hasattr(block, "selective_prompt"):
        del block.selective_prompt
    take_front(block)
