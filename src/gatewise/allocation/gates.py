"""GateBank: multiplies each LoRA rank by a gate through hooks. The one mechanism under all scores.

With A (r, d_in), B (d_out, r) and gates alpha (r,), the adapted module computes x W + s (x A^T * alpha) B^T: the G = diag(alpha)
of ALoRA (arXiv 2403.16187), put between the two factors without touching PEFT's forward.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gatewise.adapters.lora import active_adapter
from gatewise.allocation.slots import carries_more_than_ranks, factors, lora_layers
from gatewise.errors import GatewiseError
from gatewise.internals.library_attributes import adapters_off
from gatewise.losses import base_of


class GateBank:
    """Gates on every rank of an adapter while the context is open; all gates start open (no multiplication at all).

    A gate is (r,), the same for the whole batch, or (b, 1, r), one row of gates for each row of the batch. DoRA computes its
    weight norm through the same modules, so there a gate must be (r,).

    Args:
        model: a ``PeftModel`` with the LoRA adapter active and not merged.

    Raises:
        GatewiseError: the adapter is merged into the base weights, or is not the active one, so gates would do nothing.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        self.adapter = active_adapter(model, adapter)
        self.layers: dict[str, LoraLinear] = lora_layers(model, self.adapter)
        # Only without a magnitude or a bias is a module without ranks its base module.
        self.plain = not any(carries_more_than_ranks(layer, self.adapter) for layer in self.layers.values())
        self._head = id(base_of(model).get_output_embeddings())
        self._gates: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for path, layer in self.layers.items():
            if layer.merged:
                raise GatewiseError(f"the adapter is merged into {path}: call model.unmerge_adapter() before scoring ranks")
            if self.adapter not in layer.active_adapters or layer.disable_adapters:
                raise GatewiseError(f"adapter {self.adapter!r} is not active: call model.set_adapter({self.adapter!r}) first")

    def __enter__(self) -> "GateBank":
        for path, layer in self.layers.items():
            hook = self._hook(path)
            self._handles.append(layer.lora_B[self.adapter].register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gates.clear()

    def assign(self, path: str, gate: Tensor) -> None:
        """Sets one module's gates, (r,) or (b, 1, r)."""
        self._gates[path] = gate

    def fill(self, value: float, requires_grad: bool = False) -> dict[str, Tensor]:
        """Sets every gate to ``value`` and returns them: path -> (r,) float32, leaves of the graph if asked for."""
        for path, layer in self.layers.items():
            a, _ = factors(layer, self.adapter)
            self._gates[path] = torch.full((len(a),), value, dtype=torch.float32, device=a.device, requires_grad=requires_grad)
        return dict(self._gates)

    @contextmanager
    def watching(self) -> Iterator[Callable[[int], bool]]:
        """Looks on while a forward runs; the answer, given the rows of its batch, says whether gates may be (b, 1, r).

        They may where each module sees one row of hidden states for each row of the batch. Not so with DoRA, in an LM head that
        sees labelled positions only, and where a model flattens batch and tokens (OPT, some mixtures of experts).
        """
        seen: list[torch.Size] = []

        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].shape)

        def answer(rows: int) -> bool:
            apart = all(len(shape) in (2, 3) and shape[0] == rows for shape in seen)
            return self.plain and self._head not in map(id, self.layers.values()) and apart

        with ExitStack() as stack:
            for layer in self.layers.values():
                stack.callback(layer.lora_B[self.adapter].register_forward_pre_hook(look).remove)
            yield answer

    def open(self) -> None:
        """Opens every gate: the adapted model as it is."""
        self._gates.clear()

    @contextmanager
    def only(self, paths: set[str]) -> Iterator[None]:
        """While open, the LoRA of every module outside ``paths`` is off, without the cost of its two products.

        Where switching the adapter off would also take away a magnitude (DoRA), a bias or another active adapter, gates of zero
        are used instead.
        """
        with ExitStack() as stack:
            for path, layer in self.layers.items():
                if path in paths:
                    continue
                if self.plain and len(layer.active_adapters) == 1:
                    stack.enter_context(adapters_off(layer))
                else:
                    a, _ = factors(layer, self.adapter)
                    self._gates[path] = torch.zeros(len(a), device=a.device)
                    stack.callback(self._gates.pop, path)
            yield

    def _hook(self, path: str):  # type: ignore[no-untyped-def]
        def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            gate = self._gates.get(path)
            if gate is None:
                return None
            hidden = args[0]
            if gate.ndim == 3 and hidden.ndim == 2:  # a module that acts on one pooled token a row
                gate = gate[:, 0]
            # In half precision the product is taken in float32, so that the gates' gradients are summed in float32 too.
            gated = hidden * gate if hidden.dtype in (torch.float32, torch.float64) else (hidden.float() * gate).to(hidden.dtype)
            return (gated, *args[1:])

        return multiply
