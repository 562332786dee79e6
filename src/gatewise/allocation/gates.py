"""GateBank: multiplies each LoRA rank by a gate through hooks. The one mechanism under all scores.

With A (r, d_in), B (d_out, r) and gates alpha (r,), the adapted module computes x W + s (x A^T * alpha) B^T: the G = diag(alpha)
of ALoRA (arXiv 2403.16187), put between the two factors without touching PEFT's forward. Where no module of its own computes
the second product (embeddings, stacked experts), the gates multiply the rows of A.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from gatewise.adapters.lora import active_adapter
from gatewise.allocation.slots import Expert, capacities, carries_more_than_ranks, factors, layers_of
from gatewise.errors import GatewiseError
from gatewise.internals.library_attributes import adapters_off
from gatewise.internals.torch_modules import replaced_while_running
from gatewise.losses import Batch, base_of, row_losses


class GateBank:
    """Gates on every rank of an adapter while the context is open; all gates start open (no multiplication at all).

    A gate is (r,), the same for the whole batch, or (b, 1, r), one row of gates for each row of the batch: see ``watching``.

    Args:
        model: a ``PeftModel`` with the LoRA adapter active and not merged.

    Raises:
        GatewiseError: the adapter is merged into the base weights, or is not the active one, so gates would do nothing.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        self.adapter = active_adapter(model, adapter)
        self.layers: dict[str, LoraLinear] = layers_of(model, self.adapter)
        # Only without a magnitude or a bias is a module without ranks its base module.
        self.plain = not any(carries_more_than_ranks(layer, self.adapter) for layer in self.layers.values())
        sizes = capacities(self.layers, self.adapter)
        self._open = {
            path: torch.ones(sizes[path], device=factors(layer, self.adapter)[0].device) for path, layer in self.layers.items()
        }
        self._model = model
        self._gates: dict[str, Tensor] = {}
        self._watchers: list[Callable[[str, Tensor], None]] = []
        self._undo = ExitStack()
        for path, layer in self.layers.items():
            if layer.merged:
                raise GatewiseError(f"the adapter is merged into {path}: call model.unmerge_adapter() before scoring ranks")
            if self.adapter not in layer.active_adapters or layer.disable_adapters:
                raise GatewiseError(f"adapter {self.adapter!r} is not active: call model.set_adapter({self.adapter!r}) first")

    def __enter__(self) -> "GateBank":
        in_rows: dict[nn.Module, list[str]] = {}  # the experts of a parameter are all held by one LoRA layer
        for path, layer in self.layers.items():
            if self._gates_rows_of_a(layer):
                in_rows.setdefault(self.modules[path], []).append(path)
            else:
                hook = layer.lora_B[self.adapter].register_forward_pre_hook(partial(self._gated, path))
                self._undo.callback(hook.remove)
        for module, paths in in_rows.items():
            embeddings: nn.ParameterDict = module.lora_embedding_A  # type: ignore[assignment]
            linear: nn.ModuleDict = module.lora_A  # type: ignore[assignment]
            held, name = (embeddings, self.adapter) if self.adapter in embeddings else (linear[self.adapter], "weight")
            self._undo.callback(replaced_while_running(module, held, name, partial(self._gated_rows, paths)))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._gates.clear()

    def _gates_rows_of_a(self, layer: LoraLinear) -> bool:
        return isinstance(layer, Expert) or self.adapter in layer.lora_embedding_A

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Path -> the module that runs a gate's ranks: the experts of a parameter run in one."""
        return {path: layer.layer if isinstance(layer, Expert) else layer for path, layer in self.layers.items()}

    def assign(self, path: str, gate: Tensor) -> None:
        """Sets one module's gates, (r,) or (b, 1, r)."""
        self._gates[path] = gate

    def fill(self, value: float, requires_grad: bool = False) -> dict[str, Tensor]:
        """Sets every gate to ``value`` and returns them: path -> (r,) float32, leaves of the graph if asked for."""
        self._gates = {path: self.like(path, value).requires_grad_(requires_grad) for path in self.layers}
        return dict(self._gates)

    @torch.enable_grad()
    def row_gradients(self, part: Batch, value: float, apart: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Gradients of each row's summed loss with respect to the gates, all of which are ``value``.

        Args:
            part: a microbatch of b rows.
            apart: each row has gates of its own, see ``watching``; else the microbatch must be one row.

        Returns:
            Path -> (b, r) gradients, summed losses (b,) in nats, and numbers of labels (b,).
        """
        leaves = self.fill(value, requires_grad=not apart)
        if apart:
            rows = len(part["labels"])
            leaves = {path: gate.expand(rows, 1, -1).clone().requires_grad_() for path, gate in leaves.items()}
            self._gates = dict(leaves)
        sums, counts = row_losses(self._model, part)
        gradients = torch.autograd.grad(sums.sum(), list(leaves.values()), allow_unused=True)
        found = zip(leaves.items(), gradients, strict=True)
        of_rows = {p: (torch.zeros_like(leaf) if g is None else g).reshape(-1, leaf.shape[-1]) for (p, leaf), g in found}
        return of_rows, sums.detach(), counts

    def like(self, path: str, value: float) -> Tensor:
        """Gates of one module, (r,) float32, that are all ``value``. They are not put in place."""
        return torch.full_like(self._open[path], value)

    @contextmanager
    def watching(self) -> Iterator[Callable[[int], bool]]:
        """Watches a forward; the answer, given the rows of its batch, says whether gates may be (b, 1, r).

        They may where each module sees one row of hidden states for each row of the batch. Not so with DoRA, which computes its
        weight norm through the same modules, in an LM head that sees labelled positions only, in embeddings and stacked experts,
        and where a model flattens batch and tokens (OPT, some mixtures of experts).
        """
        seen: list[torch.Size] = []
        layers = self.layers.values()
        everywhere = self.plain and not any(map(self._gates_rows_of_a, layers))

        def rows_apart(rows: int) -> bool:
            return everywhere and all(len(shape) in (2, 3) and shape[0] == rows for shape in seen)

        with self.looking(lambda path, hidden: seen.append(hidden.shape)):
            everywhere = everywhere and id(base_of(self._model).get_output_embeddings()) not in map(id, layers)
            yield rows_apart

    @contextmanager
    def looking(self, look: Callable[[str, Tensor], None]) -> Iterator[None]:
        """While open, ``look(path, hidden)`` is called with what A gives, (b, t, r), before the module's gate.

        Not for embeddings and stacked experts, whose gates lie in A itself.
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
            modules = self.modules
            needed = {id(modules[path]) for path in paths}
            for path, layer in self.layers.items():
                if path in paths:
                    continue
                if self.plain and len(layer.active_adapters) == 1 and id(modules[path]) not in needed:
                    stack.enter_context(adapters_off(modules[path]))
                else:
                    self._gates[path] = self.like(path, 0.0)
                    stack.callback(self._gates.pop, path)
            yield

    def _gated(self, path: str, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What A gives, (b, t, r), or (b, r) of one pooled token a row, by the module's gate."""
        hidden, *more = args
        for look in self._watchers:
            look(path, hidden)
        gate = self._gates.get(path)
        if gate is None:
            return args
        if gate.ndim == 3 and hidden.ndim == 2:
            gate = gate[:, 0]
        # In half precision the product is taken in float32, so that the gates' gradients are summed in float32 too.
        full = hidden.dtype in (torch.float32, torch.float64)
        return (hidden * gate if full else (hidden.float() * gate).to(hidden.dtype), *more)

    def _gated_rows(self, paths: list[str], a: Tensor) -> Tensor:
        """A with its rows multiplied by the gates, (r,) each, of the modules it holds."""
        if not any(path in self._gates for path in paths):
            return a
        gate = torch.cat([self._gates.get(path, self._open[path]) for path in paths])
        return (a * gate[:, None]).to(a.dtype)
