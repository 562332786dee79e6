"""A Transformer layer that prompts pass through, and what adapters have there. SPT, arXiv 2310.20127.

``PromptedBlock`` is the layer with prompts in it; ``PromptLayer`` holds a prompt generator for each adapter and, in a
hyper-network, a gate; ``mixed`` is how a new prompt and the one from below become one.

Shapes: b batch, t tokens, l prompt tokens, d hidden size.
"""

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import CallState, cache_of
from gatewise.internals.class_swap import ObjectMixin, add_mixin, remove_mixin
from gatewise.internals.layer_stack import forward_arguments
from gatewise.prompts.cache import prompts_arriving
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.forward import PromptPass
from gatewise.prompts.generator import PromptGenerator


class PromptedBlock(ObjectMixin, nn.Module):
    """The ``__call__`` and ``forward`` that a Transformer layer is given in front of its own.

    It puts the prompts in front of the text, runs as ever, and takes them off again. It is not given hooks, for gradient
    checkpointing runs ``forward`` a second time in the backward pass, without hooks and when no pass is open any more. All that
    ``forward`` needs comes to it as arguments, tensors with a gradient as positional ones, and the prompt it leaves is part of what
    it returns: so both kinds of checkpointing give a plain run's gradients.
    """

    place: "Place"
    selective_prompt: "PromptLayer"

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place = self.place
        running = place.enter()
        if running is None:
            return super().__call__(*args, **kwargs)
        given = {**dict(zip(place.names, args, strict=False)), **kwargs}
        hidden, gate = given.pop(place.names[0]), running.adapter.gates.get(place.index)
        if place.index < running.first:
            # A prompt of zeros, for its graph only, as data-parallel training wants every parameter to have a part. The layer
            # does not see it: the text would attend to it, and a norm's gradient at zero, layer upon layer, grows past all numbers.
            # Outside the layer's own call, so Accelerate has not brought the tensors to its device yet.
            device = next(self.selective_prompt.parameters()).device
            carried = None if running.propagated is None else running.propagated.to(device)
            running.propagated = self._prompt(hidden.to(device), carried, gate, running)
            return super().__call__(*args, **kwargs)
        given["attention_mask"] = running.mask(given.get("attention_mask"))
        if running.text is not None and given.get("position_embeddings") is not None:
            given["position_embeddings"] = running.rotary[id(given["position_embeddings"][0])][1]
        # Hooks on the layer see the pair, whose first part is what they would see without prompts.
        text, running.propagated = super().__call__(hidden, running.propagated, gate, prompt_pass=running, **given)
        return text

    def forward(self, *args: Any, prompt_pass: PromptPass | None = None, **kwargs: Any) -> Any:
        """The layer's own; in a pass: from (h (b, t, d), p^propagated (b, l, d), a (1,)) to (h, p), with no p if it continues.

        Mask and position embeddings are those of prompt and text.
        """
        if prompt_pass is None:
            return super().forward(*args, **kwargs)
        hidden, propagated, gate = args
        if prompt_pass.text is None:
            return super().forward(hidden, **kwargs), None
        prompt = self._prompt(hidden, propagated, gate, prompt_pass)
        length = prompt.shape[1]
        with prompts_arriving(cache_of(kwargs), prompt_pass.tracker, prompt_pass.adapter.name, length):
            both = super().forward(torch.cat([prompt, hidden], dim=1), **kwargs)
        return both[:, length:], both[:, :length]

    def _prompt(self, hidden: Tensor, propagated: Tensor | None, gate: Tensor | None, running: PromptPass) -> Tensor:
        index, adapter = self.place.index, running.adapter
        if index not in adapter.gates:
            assert propagated is not None
            return propagated
        assert running.pooling is not None
        new = self.selective_prompt.new_prompt(adapter.name, hidden, running.pooling.to(hidden.device))
        # The layers of encoders end in a norm, so what they leave has about the size of what generators write.
        balanced = running.causal if adapter.config.balanced is None else adapter.config.balanced
        # Up to the first prompt what is propagated are zeros, for their graph only: they have no direction.
        return mixed(propagated, new, gate, adapter.config.tau, balanced and index > running.first).to(hidden.dtype)


class Place:
    """Where a layer stands, which it makes one that prompts pass through, and the names of its ``forward``'s arguments."""

    def __init__(self, block: Any, index: int, path: str, now: CallState) -> None:
        self.index, self._path, self._now, self.names = index, path, now, forward_arguments(block)
        block.place = self
        add_mixin(block, PromptedBlock)

    def enter(self) -> PromptPass | None:
        """The pass that the layer runs in; None where it has no part in it, below the first layer with prompts."""
        running: PromptPass | None = self._now.current
        if running is not None:
            generates = running.text is not None and self.index in running.adapter.gates
            return running if self.index >= running.first or generates else None
        if self._now.opened_by is None:
            raise GatewiseError(
                f"layer {self._path} was run outside the forward of its model, so there is no text to generate prompts from: call "
                "the model"
            )
        return None


def uninstall(block: Any) -> None:
    """The layer is what it was, without generators."""
    del block.place
    if hasattr(block, "selective_prompt"):
        del block.selective_prompt
    remove_mixin(block)


class PromptLayer(nn.Module, BaseTunerLayer):
    """The generators and gate logits α (1,) of one layer, by adapter: a child of the Transformer block that prompts enter.

    PEFT saves, loads, freezes and deletes what it finds here. The block runs as ever; see ``PromptedBlock``.
    """

    adapter_layer_names: tuple[str, ...] = ("spt_generator", "spt_gate_logit")
    # PEFT looks for them in the module that a layer wraps; this one stands beside modules and wraps none.
    weight: Any = None
    bias: Any = None

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that the block does not become a part of its own part
        self.spt_generator = nn.ModuleDict()
        self.spt_gate_logit = nn.ParameterDict()

    def add(self, adapter: str, config: SelectivePromptConfig, hidden_size: int) -> None:
        """Gives an adapter a generator and, if its configuration is a hyper-network, a gate."""
        self.spt_generator[adapter] = PromptGenerator(
            hidden_size, config.bottleneck, config.phm, config.activation, config.normalize_states
        )
        if config.prompt_layers is None:
            self.spt_gate_logit[adapter] = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    def new_prompt(self, adapter: str, hidden: Tensor, pooling: Tensor) -> Tensor:
        """p^new (b, l, d) for h (b, t, d) and pooling weights (b, l, t)."""
        return cast(PromptGenerator, self.spt_generator[adapter])(hidden, pooling)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT, but each adapter keeps its precision."""
        device = device or next(self._block[0].parameters()).device
        if device.type != "meta" and not any(parameter.is_meta for parameter in self.parameters()):
            self.to(device)


def mixed(propagated: Tensor | None, new: Tensor, gate: Tensor | None, tau: float, balanced: bool) -> Tensor:
    """p = (1 − w) p^propagated + w p^new (b, l, d) with w = τ a; ``gate`` a (1,), None for one; ``propagated`` None for zero.

    Balanced, each prompt token has the size s = |p^propagated|^(1 − w) · |p^new|^w that lies between those of the two, and they
    count by their directions: p = s · ((1 − w) p^propagated / |p^propagated| + w p^new / |p^new|). Both are the same for a w of
    zero or one. |p| is the root mean square of a token's numbers, never quite zero.
    """
    share = new.new_tensor(tau) if gate is None else tau * gate.to(new.device, new.dtype)
    if propagated is None:
        return share * new
    propagated = propagated.to(new.dtype)
    if not balanced:
        return share * new + (1 - share) * propagated
    ratio = _size(new) / _size(propagated)
    return share * ratio ** (share - 1) * new + (1 - share) * ratio**share * propagated


def _size(prompt: Tensor) -> Tensor:
    """|p| (b, l, 1)."""
    return (prompt.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
