"""A Transformer layer that prompts pass through, and what adapters have there. SPT, arXiv 2310.20127.

``PromptedBlock`` is the layer with prompts in it; ``PromptLayer`` holds a prompt generator for each adapter and, in a
hyper-network, a gate; ``mixed`` is how a new prompt and the one from below become one.

Shapes: b batch, t tokens, l prompt tokens, d hidden size.
"""

import inspect
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.internals.class_swap import ObjectMixin, add_mixin, remove_mixin
from gatewise.internals.library_attributes import execution_device
from gatewise.prompts.cache import prompts_arriving
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.forward import PassTracker, PromptPass
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
        handed = given.pop("position_bias", None)
        bias = () if running.biases is None else (running.position_bias(),)
        # Hooks on the layer see the pair, whose first part is what they would see without prompts.
        text, running.propagated = super().__call__(hidden, running.propagated, gate, *bias, prompt_pass=running, **given)
        # With relative position biases a layer hands them on, and those of a cross-attention, which an encoder has not.
        return (text, handed, None) if bias else text

    def forward(self, *args: Any, prompt_pass: PromptPass | None = None, **kwargs: Any) -> Any:
        """The layer's own; in a pass: from (h (b, t, d), p^propagated (b, l, d), a (1,)) to (h, p), with no p if it continues.

        A fourth argument are relative position biases. They, mask and position embeddings are those of prompt and text.
        """
        if prompt_pass is None:
            return super().forward(*args, **kwargs)
        hidden, propagated, gate, *bias = args
        if bias:
            kwargs["position_bias"] = bias[0]
        if prompt_pass.text is None:
            return super().forward(hidden, **kwargs), None
        prompt = self._prompt(hidden, propagated, gate, prompt_pass)
        length = prompt.shape[1]
        filled = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        with prompts_arriving(filled, prompt_pass.tracker, prompt_pass.adapter, length):
            both = super().forward(torch.cat([prompt, hidden], dim=1), **kwargs)
        both = both[0] if bias else both
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


class Place:
    """Where a layer stands, and the names of its ``forward``'s arguments."""

    def __init__(self, block: nn.Module, index: int, path: str, tracker: PassTracker) -> None:
        self.index, self.path, self._now = index, path, tracker.now
        self.names = list(inspect.signature(type(block).forward).parameters)[1:]

    def enter(self) -> PromptPass | None:
        """The pass that the layer runs in; None where it has no part in it, below the first layer with prompts."""
        running = self._now.current
        if running is not None:
            generates = running.text is not None and self.index in running.gates
            return running if self.index >= running.first or generates else None
        if self._now.opened_by is None:
            raise GatewiseError(
                f"layer {self.path} was run outside the forward of its model, so there is no text to generate prompts from: call "
                "the model"
            )
        return None

    def install(self, block: Any) -> None:
        """Makes a layer one that prompts pass through."""
        block.place = self
        add_mixin(block, PromptedBlock)

    def uninstall(self, block: Any) -> None:
        """Undoes ``install``, and takes the generators off."""
        del block.place
        if hasattr(block, "selective_prompt"):
            del block.selective_prompt
        remove_mixin(block)


class PromptLayer(nn.Module, BaseTunerLayer):
    """The generators and gate logits α (1,) of one layer, by adapter: a child of the Transformer block that prompts enter.

    PEFT saves, loads, freezes and deletes what it finds here. The block runs as ever; see ``PromptedBlock``.
    """

    adapter_layer_names: tuple[str, ...] = ("spt_generator", "spt_gate_logit")

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that the block does not become a part of its own part
        self.spt_generator = nn.ModuleDict()
        self.spt_gate_logit = nn.ParameterDict()

    @property
    def weight(self) -> Tensor:
        """None: PEFT looks for it in the module that a layer wraps, and as this one wraps none it would ask here again."""
        raise AttributeError("a layer of prompt generators has no weight: it stands beside modules and wraps none")

    @property
    def bias(self) -> Tensor:
        """None, as ``weight``."""
        raise AttributeError("a layer of prompt generators has no bias: it stands beside modules and wraps none")

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
        device = device or _device_of(self._block[0])
        if device is None:
            return
        for held in (self.spt_generator, self.spt_gate_logit):
            if adapter_name not in held:
                continue
            one: Any = held[adapter_name]
            parameters = [one] if isinstance(one, nn.Parameter) else list(one.parameters())
            if not any(parameter.is_meta for parameter in parameters):
                for parameter in parameters:
                    parameter.data = parameter.data.to(device)


def _device_of(block: nn.Module) -> torch.device | None:
    """Where a layer runs, which Accelerate's hooks know when the parameters are offloaded; None if nobody does."""
    device = next(block.parameters()).device
    if device.type != "meta":
        return device
    return next((runs_on for runs_on in map(execution_device, block.modules()) if runs_on is not None), None)


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
