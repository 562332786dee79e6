"""One expert: a LoRA module whose product is scaled by the request's gate. MiLoRA, arXiv 2410.18035.

    y = W x + gate · alpha / r · B A dropout(x)        for a row of the batch that keeps this expert; W x alone for the others

Shapes: b batch, n rows of one adapter, t tokens, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.routed.inference import Running

NO_MERGE = (
    "a routed adapter cannot be merged, because every prompt chooses other modules: use it unmerged, or train a plain LoraConfig "
    "adapter where one fixed model is needed"
)


@dataclass(frozen=True)
class Share:
    """What one adapter adds in one module to the ``rows`` (n,) of a batch, None for all of them: its gates ``gate`` (n,)."""

    adapter: str
    rows: Tensor | None
    gate: Tensor


@dataclass(frozen=True)
class Shares:
    """All that is added in one module while a forward of ``batch`` rows of ``tokens`` each runs."""

    parts: Sequence[Share]
    batch: int
    tokens: int


class RoutedLinear(nn.Module, LoraLayer):
    """PEFT's A and B around any linear base module: ``nn.Linear``, GPT-2's ``Conv1D``, quantised layers. Only base(x) is called.

    In inference, ``running`` tells what it runs (inference.py); it is one object for the whole model. Else ``shares`` do, which are
    there for as long as the module's block runs. ``lora_router`` holds the routers of the adapters whose first expert in the block
    this is: there PEFT saves, loads, moves, freezes and deletes them with A and B.
    """

    adapter_layer_names: tuple[str, ...] = (*LoraLayer.adapter_layer_names, "lora_router")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.lora_router = nn.ModuleDict()
        self.running = Running()
        self.shares: Shares | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base module's output with the delta of every share added to its rows. One without shares costs nothing more.

        Raises:
            GatewiseError: the module was run outside its model, or does not see every token of every row.
        """
        if kwargs:
            kwargs.pop("adapter_names", None)
        run = self.running.runs.get(self)
        if run is not None:
            return run(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.running.alone or self.disable_adapters:
            return result
        if self.shares is None:
            if not any(name in self.lora_A for name in self.active_adapters):
                return result
            raise GatewiseError("a routed module was run by itself, without gates: run the whole model, which reads the prompt")
        return self.with_shares(x, result, self.shares.parts, self.shares.batch, self.shares.tokens)

    def with_shares(self, x: Tensor, result: Tensor, parts: Sequence[Share], batch: int, tokens: int) -> Tensor:
        """``result`` (b, ..., d_out) with the delta of every part added, one after the other, with its graph."""
        dtype = result.dtype
        for share in parts:
            rows, gate = self._spread(share, x, batch, tokens)
            delta = self.delta(x if rows is None else x[rows], share.adapter, gate)
            result = result.to(torch.result_type(result, delta))  # rounded once, at the end
            result = result + delta if rows is None else result.index_add(0, rows, delta.to(result.dtype))
        return result.to(dtype)

    def delta(self, x: Tensor, adapter: str, gate: Tensor) -> Tensor:
        """gate · alpha / r · B A dropout(x): the one place where a request's routing meets the weights.

        The gate multiplies the r numbers between the factors, not the output. In half precision that product is taken in float32,
        so that the gate's gradient is summed in float32 too.

        Args:
            x: (n, ..., d_in).
            gate: (n,).
        """
        first, second = cast(nn.Linear, self.lora_A[adapter]), self.lora_B[adapter]
        ranks = first(self.lora_dropout[adapter](self._cast_input_dtype(x, first.weight.dtype)))
        scale = (self.scaling[adapter] * gate).to(ranks.device).view(-1, *[1] * (ranks.ndim - 1))
        return second((ranks * scale).to(ranks.dtype))

    def check_flattened(self, x: Tensor, batch: int, tokens: int) -> None:
        """Nothing, if x (b · t, d_in) holds every token of every row, as where the model flattens the two (OPT).

        Raises:
            GatewiseError: it does not.
        """
        if x.ndim != 2 or len(x) != batch * tokens:
            raise GatewiseError(
                f"a routed module was given {tuple(x.shape)} for {batch} rows of {tokens} tokens: modules that see a choice of "
                "tokens, such as the experts of a mixture, cannot be routed; leave them out with exclude_modules"
            )

    def _spread(self, share: Share, x: Tensor, batch: int, tokens: int) -> tuple[Tensor | None, Tensor]:
        """Places along the first dimension of x, and a gate for each: rows, or their tokens where the model flattens the two."""
        if len(x) == batch:
            return share.rows, share.gate
        self.check_flattened(x, batch, tokens)
        gate = share.gate.repeat_interleave(tokens)
        if share.rows is None:
            return None, gate
        columns = torch.arange(tokens, device=share.rows.device)
        return (share.rows[:, None] * tokens + columns).flatten(), gate

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see ``RoutedLoraModel.merge_adapter``."""
        raise GatewiseError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT, which also casts to the base's precision; the router keeps its own."""
        router = self.lora_router.pop(adapter_name) if adapter_name in self.lora_router else None
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if router is not None:
            target = device or cast(nn.Linear, self.lora_A[adapter_name]).weight.device
            held_back = any(parameter.is_meta for parameter in router.parameters())
            self.lora_router[adapter_name] = router if held_back else router.to(target)

    def __repr__(self) -> str:
        return "routed." + super().__repr__()
