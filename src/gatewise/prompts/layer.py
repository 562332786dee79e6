"""What adapters have at one Transformer layer: a prompt generator each and, in a hyper-network, a gate. SPT, arXiv 2310.20127."""

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.generator import PromptGenerator


class PromptLayer(nn.Module, BaseTunerLayer):
    """The generators and gate logits α (1,) of one layer, by adapter: a child of the Transformer block that prompts enter.

    PEFT saves, loads, freezes and deletes what it finds here. The block runs as ever; see ``gatewise.prompts.block``.
    """

    adapter_layer_names: tuple[str, ...] = ("spt_generator", "spt_gate_logit")

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
    devices = [getattr(getattr(module, "_hf_hook", None), "execution_device", None) for module in block.modules()]
    runs_on = next((one for one in devices if one is not None), None)
    return None if runs_on is None else torch.device(runs_on)


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
