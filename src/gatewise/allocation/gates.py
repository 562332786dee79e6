"""GateBank: multiplies each LoRA rank by a gate through hooks. The one mechanism under all scores.

With A (r, d_in), B (d_out, r) and gates alpha (r,), the adapted module computes x W + s (x A^T * alpha) B^T: the G = diag(alpha)
of ALoRA (arXiv 2403.16187), put between the two factors without touching PEFT's forward. Where nothing runs between the two, the
gates multiply the rows of A.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from gatewise.adapters.lora import active_adapter
from gatewise.allocation.slots import Expert, all_factors, capacities, carries_more_than_ranks, lora_layers
from gatewise.errors import GatewiseError
from gatewise.internals.library_attributes import adapters_off, between_embedding_factors
from gatewise.internals.torch_modules import replaced_while_running
from gatewise.losses import base_of


@dataclass(frozen=True)
class _GateShape:
    """What a gate of a module is like: how many slots it multiplies, where, and the dimensions of what a convolution looks at."""

    slots: int
    device: torch.device
    pixels: int


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
        self._base = base_of(model)
        self._head = id(self._base.get_output_embeddings())
        self._gates: dict[str, Tensor] = {}
        slots, pairs = capacities(self.layers, self.adapter), all_factors(self.layers, self.adapter)
        self._shapes = {path: _GateShape(slots[path], a.device, a.ndim - 2) for path, (a, _) in pairs.items()}
        self._watchers: list[Callable[[str, Tensor], None]] = []
        self._undo = ExitStack()
        for path, layer in self.layers.items():
            if layer.merged:
                raise GatewiseError(f"the adapter is merged into {path}: call model.unmerge_adapter() before scoring ranks")
            if self.adapter not in layer.active_adapters or layer.disable_adapters:
                raise GatewiseError(f"adapter {self.adapter!r} is not active: call model.set_adapter({self.adapter!r}) first")

    def __enter__(self) -> "GateBank":
        together: dict[nn.Module, list[str]] = {}  # the experts of a parameter, which one LoRA layer holds
        for path, layer in self.layers.items():
            if isinstance(layer, Expert):
                together.setdefault(layer.layer, []).append(path)
            else:
                self._undo.callback(self._put_gate(path, layer))
        for wrapper, paths in together.items():
            held = self.layers[paths[0]].lora_A[self.adapter]
            self._undo.callback(replaced_while_running(wrapper, held, "weight", partial(self._gated_rows, paths)))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._gates.clear()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Path -> the module that runs a gate's ranks: the experts of a parameter run in one."""
        return {path: layer.layer if isinstance(layer, Expert) else layer for path, layer in self.layers.items()}

    def assign(self, path: str, gate: Tensor) -> None:
        """Sets one module's gates, (r,) or (b, 1, r)."""
        self._gates[path] = gate

    def fill(self, value: float, requires_grad: bool = False) -> dict[str, Tensor]:
        """Sets every gate to ``value`` and returns them: path -> (r,) float32, leaves of the graph if asked for."""
        for path in self.layers:
            self._gates[path] = self.like(path, value).requires_grad_(requires_grad)
        return dict(self._gates)

    def like(self, path: str, value: float) -> Tensor:
        """Gates of one module, (r,) float32, that are all ``value``. They are not put in place."""
        shape = self._shapes[path]
        return torch.full((shape.slots,), value, device=shape.device)

    @contextmanager
    def watching(self) -> Iterator[Callable[[int], bool]]:
        """Looks on while a forward runs; the answer, given the rows of its batch, says whether gates may be (b, 1, r).

        They may where each module sees one row of hidden states for each row of the batch. Not so with DoRA, in an LM head that
        sees labelled positions only, in embeddings of anything but tokens, in stacked experts, and where a model flattens batch and
        tokens (OPT, some mixtures of experts).
        """
        seen: list[tuple[str, torch.Size]] = []

        def fits(path: str, shape: torch.Size, rows: int) -> bool:
            layer = self.layers[path]
            if self.adapter in layer.lora_embedding_A:  # a table of positions may see as many positions as there are rows
                words = self._base.get_input_embeddings().weight.shape[0]
                return layer.get_base_layer().num_embeddings == words and len(shape) == 3 and shape[0] == rows
            convolution = not isinstance(layer.lora_B[self.adapter], nn.Linear)
            return (convolution or len(shape) in (2, 3)) and shape[0] == rows

        def answer(rows: int) -> bool:
            apart = all(fits(path, shape, rows) for path, shape in seen)
            apart = apart and not any(isinstance(layer, Expert) for layer in self.layers.values())
            return self.plain and self._head not in map(id, self.layers.values()) and apart

        with self.looking(lambda path, hidden: seen.append((path, hidden.shape))):
            yield answer

    @contextmanager
    def looking(self, look: Callable[[str, Tensor], None]) -> Iterator[None]:
        """While open, ``look(path, hidden)`` is called with what A gives, (b, t, r) or (b, r, *pixels), before the module's gate.

        Not for stacked experts, nor for DoRA of embeddings and convolutions, whose gates lie in A itself.
        """
        self._watchers.append(look)
        try:
            yield
        finally:
            self._watchers.remove(look)

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
            needed = {id(layer.layer) for path, layer in self.layers.items() if path in paths and isinstance(layer, Expert)}
            for path, layer in self.layers.items():
                if path in paths:
                    continue
                own = layer.layer if isinstance(layer, Expert) else layer
                if self.plain and len(layer.active_adapters) == 1 and id(own) not in needed:
                    stack.enter_context(adapters_off(own))
                else:
                    self._gates[path] = self.like(path, 0.0)
                    stack.callback(self._gates.pop, path)
            yield

    def by_rank(self, path: str, hidden: Tensor) -> Tensor:
        """What A gives, as ``looking`` shows it, as (tokens or pixels, r)."""
        return (hidden.movedim(1, -1) if self._shapes[path].pixels else hidden).flatten(0, -2)

    def _put_gate(self, path: str, layer: LoraLinear) -> Callable[[], None]:
        """Has a module's gate, once it has one, multiply its ranks; returns what undoes it."""
        embedding = self.adapter in layer.lora_embedding_A
        if self.adapter in layer.lora_variant and (embedding or not isinstance(layer.lora_B[self.adapter], nn.Linear)):
            # DoRA of embeddings and convolutions reads its weight norm from A and B themselves.
            held, name = (layer.lora_embedding_A, self.adapter) if embedding else (layer.lora_A[self.adapter], "weight")
            return replaced_while_running(layer, held, name, partial(self._gated_rows, [path]))
        multiply = partial(self._gated, path)
        if embedding:
            return between_embedding_factors(layer, self.adapter, multiply)
        hook = layer.lora_B[self.adapter].register_forward_pre_hook(lambda _, args: (multiply(args[0]), *args[1:]))
        return hook.remove

    def _gated(self, path: str, hidden: Tensor) -> Tensor:
        """What A gives, (b, t, r) or (b, r, *pixels) in a convolution, by the module's gate."""
        for look in self._watchers:
            look(path, hidden)
        gate = self._gates.get(path)
        if gate is None:
            return hidden
        pixels = self._shapes[path].pixels
        if gate.ndim == 3 and (pixels or hidden.ndim == 2):  # a convolution, or a module that acts on one pooled token a row
            gate = gate[:, 0]
        gate = gate.view(*gate.shape, *[1] * pixels)
        # In half precision the product is taken in float32, so that the gates' gradients are summed in float32 too.
        return hidden * gate if hidden.dtype in (torch.float32, torch.float64) else (hidden.float() * gate).to(hidden.dtype)

    def _gated_rows(self, paths: list[str], a: Tensor) -> Tensor:
        """A with its rows multiplied by the gates, (r,) each, of the modules it holds."""
        if not any(path in self._gates for path in paths):
            return a
        gate = torch.cat([self._gates[path] if path in self._gates else self.like(path, 1.0) for path in paths])
        return (a * gate.view(-1, *[1] * (a.ndim - 1))).to(a.dtype)
