"""What every score shares: the gates on ranks, the state in which a model is scored, and the batches that a score reads.

With A (r, d_in), B (d_out, r) and gates alpha (r,), a module with LoRA computes x W + s (x A^T * alpha) B^T: the G = diag(alpha) of
ALoRA (arXiv 2403.16187), put between the two factors by hooks, so that PEFT's forward is not touched. Where no module of its own
computes the second product (embeddings, stacked experts), the gates multiply the rows of A.

A score maps each module's path to one float32 number a *live* rank, in the order of the live slots, on the CPU. Higher means more
worth keeping. Every score takes ``(model, batch, adapter=None, ...)`` where ``batch`` is one batch with labels or a list of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from gatewise.adapters.lora import active_adapter
from gatewise.allocation.slots import Expert, carries_more_than_ranks, layers_of, live_mask
from gatewise.errors import GatewiseError
from gatewise.internals.quantised import evaluating, half_precision, original_forward
from gatewise.internals.torch_modules import replaced_while_running
from gatewise.losses import (
    Batch,
    base_of,
    labelled_microbatches,
    loss_kind,
    mean_loss,
    padded_tokens,
    row_losses,
    rows_of,
)
from gatewise.models.device import has_bfloat16
from gatewise.processes import count, device_of, is_sharded, own_share, summed

Scores = dict[str, Tensor]
Batches = Batch | Sequence[Batch]


@dataclass(frozen=True, eq=False)
class Score:
    """A way to score ranks. It is called like its function.

    Attributes:
        function: (model, batch, adapter=..., **options) -> path -> one number a live rank, higher for ranks worth more.
        meaning: what a rank's number says, for tables and pages.
        unit: "nats", or "" for a number without a unit.
        idle_is_zero: True if a rank that does nothing scores zero. If not, it scores CE(all ranks) - CE(no rank).
        by_losses: True for differences of losses, which half precision does not resolve: a round then measures its own losses in
            float32 too. Gradients are precise enough in bfloat16.
        options: option -> its value in rounds and ``inspect --scores``, of all that the function takes; None if that is not known.
        takes: what the function wants to be given, each an argument of it: "prune", how much the round will prune, and "costs",
            where the budget counts parameters, what a rank of each module costs (``prune`` is then in that unit); "on_loss", to be
            called with the mean loss with all ranks on, which the round then need not measure; "seed", a number of a round to draw
            from, the same in every process; "progress", to be called with (done, total).
        check: called with the options, to refuse wrong ones before training.
    """

    function: Callable[..., Any]
    meaning: str = "higher is worth more"
    unit: str = ""
    idle_is_zero: bool = True
    by_losses: bool = True
    options: Mapping[str, Any] | None = None
    takes: tuple[str, ...] = ()
    check: Callable[..., object] | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.__dict__.update(name=getattr(self.function, "__name__", "custom"), __doc__=self.function.__doc__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def of(self, model: Any, batch: Any, adapter: str | None, **more: Any) -> Any:
        """The scores of an adapter's ranks, with ``options`` and those of ``more`` that the function ``takes`` and are not None."""
        taken = {name: value for name, value in more.items() if name in self.takes and value is not None}
        return self.function(model, batch, adapter=adapter, **{**taken, **(self.options or {})})


class GateBank:
    """Gates on every rank of an adapter while the context is open.

    Attributes:
        adapter: its name.
        layers: path -> LoRA layer.
        live: path -> (r_max,) bool, the slots that live.
        gates: path -> gates, (r_max,) for the whole batch, or (b, 1, r_max) with one row for each row of the batch. A module that
            is not listed has all its gates open.
        rows_apart: each module sees one row of hidden states for each row of a batch, so that gates may be (b, 1, r_max). Not so in
            an LM head that sees labelled positions only, with DoRA, on embeddings and stacked experts. Where a model flattens batch
            and tokens (OPT, some mixtures of experts), it is found out by the first gates of rows, which then do nothing.

    Raises:
        GatewiseError: the adapter is merged into the base weights, or is not the active one, so gates would do nothing.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        self.adapter = active_adapter(model, adapter)
        self.layers: dict[str, LoraLinear] = layers_of(model, self.adapter)
        self.live = {path: live_mask(layer, self.adapter) for path, layer in self.layers.items()}
        self.gates: dict[str, Tensor] = {}
        self._model = model
        head = cast(Any, model).get_base_model().get_output_embeddings()
        # DoRA computes its weight norm through the same modules.
        self.rows_apart = not any(layer is head or carries_more_than_ranks(layer, self.adapter) for layer in self.layers.values())
        self._undo = ExitStack()
        for path, layer in self.layers.items():
            if layer.merged:
                raise GatewiseError(f"the adapter is merged into {path}: call model.unmerge_adapter() before scoring ranks")
            if self.adapter not in layer.active_adapters or layer.disable_adapters:
                raise GatewiseError(f"adapter {self.adapter!r} is not active: call model.set_adapter({self.adapter!r}) first")

    def __enter__(self) -> "GateBank":
        in_rows: dict[nn.Module, list[str]] = {}  # one LoRA layer has the factors of all experts of a parameter
        for path, layer in self.layers.items():
            if isinstance(layer, Expert) or self.adapter in layer.lora_embedding_A:
                in_rows.setdefault(layer.layer if isinstance(layer, Expert) else layer, []).append(path)
            else:
                hook = layer.lora_B[self.adapter].register_forward_pre_hook(partial(self._gated, path))
                self._undo.callback(hook.remove)
        self.rows_apart = self.rows_apart and not in_rows
        for module, paths in in_rows.items():
            embeddings: nn.ParameterDict = module.lora_embedding_A  # type: ignore[assignment]
            linear: nn.ModuleDict = module.lora_A  # type: ignore[assignment]
            holder, name = (embeddings, self.adapter) if self.adapter in embeddings else (linear[self.adapter], "weight")
            self._undo.callback(replaced_while_running(module, holder, name, partial(self._gated_rows, paths)))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self.gates.clear()

    def fill(self, value: float, requires_grad: bool = False) -> dict[str, Tensor]:
        """Sets every gate to ``value`` and returns them: path -> (r_max,) float32, leaves of the graph if asked for."""
        self.gates = {
            path: torch.full(live.shape, value, dtype=torch.float32, device=live.device, requires_grad=requires_grad)
            for path, live in self.live.items()
        }
        return dict(self.gates)

    @torch.enable_grad()
    def row_gradients(self, part: Batch, value: float, apart: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Gradients of each row's summed loss with respect to the gates, all of which are ``value``.

        Args:
            part: a microbatch of b rows.
            apart: each row has gates of its own; else the microbatch must be one row.

        Returns:
            Path -> (b, r_max) gradients, summed losses (b,) in nats, and numbers of labels (b,). No gradients where ``rows_apart``
            is found to be false on the way.
        """
        leaves = self.fill(value, requires_grad=not apart)
        if apart:
            rows = len(part["labels"])
            leaves = {path: gate.expand(rows, 1, -1).clone().requires_grad_() for path, gate in leaves.items()}
            self.gates = dict(leaves)
        sums, counts = row_losses(self._model, part)
        if apart and not self.rows_apart:
            return {}, sums.detach(), counts
        gradients = torch.autograd.grad(sums.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return {path: g.reshape(-1, g.shape[-1]) for path, g in zip(leaves, gradients, strict=True)}, sums.detach(), counts

    def live_only(self, values: Mapping[str, Tensor]) -> Scores:
        """Keeps the entries (..., r_max) of live slots, as float32 on the CPU."""
        return {path: values[path].detach()[..., live].float().cpu() for path, live in self.live.items()}

    def _gated(self, path: str, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Multiplies what A gives, (b, t, r), or (b, r) of one pooled token a row, by the module's gates."""
        hidden, *more = args
        gate = self.gates.get(path)
        if gate is None:
            return args
        if gate.ndim == 3:
            if hidden.ndim not in (2, 3) or len(hidden) != len(gate):
                self.rows_apart = False
                return args
            gate = gate[:, 0] if hidden.ndim == 2 else gate
        # In half precision the product is taken in float32, so that the gates' gradients are summed in float32 too.
        full = hidden.dtype in (torch.float32, torch.float64)
        return (hidden * gate if full else (hidden.float() * gate).to(hidden.dtype), *more)

    def _gated_rows(self, paths: list[str], a: Tensor) -> Tensor:
        """A with its rows multiplied by the gates, (r_max,) each, of the modules that it has the ranks of."""
        if not any(path in self.gates for path in paths):
            return a
        gate = torch.cat([self.gates.get(path, torch.ones_like(self.live[path], dtype=torch.float32)) for path in paths])
        return (a * gate[:, None]).to(a.dtype)


# ---------------------------------------------------------------- the state in which a model is scored

_being_scored: ContextVar["tuple[nn.Module | None, int | None, list[tuple[Batches, Parts]]]"] = ContextVar(
    "being_scored", default=(None, None, [])
)
"""The model, how many rows training takes at once, and the last batch that was cut into microbatches, for who asks again."""


@contextmanager
def scoring(model: nn.Module, float32: bool = True, rows: int | None = None) -> Iterator[None]:
    """The state in which ranks are scored, undone exactly afterwards: dropout off, no autocast, float32 weights.

    Half-precision weights are converted in place and back, which loses nothing; quantised weights and those of a sharded model are
    left alone. Every module's training mode is as before when it closes. Opened inside itself it does nothing: a round opens it
    once around all that it measures. Layers under gradient checkpointing keep no activations here either.

    Args:
        float32: convert all half-precision weights, as the differences of losses that single ranks make are smaller than half
            precision resolves. False is for gradients: it converts float16, in which small ones are lost, and bfloat16 where the
            device only emulates it, which is slower.
        rows: how many rows training takes at once, so that scoring takes no more memory on an accelerator.
    """
    if _being_scored.get()[0] is model:
        yield
        return
    device = device_of(model)
    is_quick, half = has_bfloat16(device), half_precision(model)
    # Accelerate puts autocast into the model's own forward, inside any context of ours, and keeps the original beside it.
    original, wrapped = original_forward(model), model.forward
    if half and not float32 and is_quick:
        half = [tensor for tensor in half if tensor.dtype == torch.float16]
    if half and is_sharded(model):
        half = []
    # What is trained may be a view of a buffer of DeepSpeed's, and must stay one.
    before = [(tensor, tensor.dtype, tensor.data if tensor.requires_grad else None) for tensor in half]
    token = _being_scored.set((model, rows, []))
    with torch.autocast(device.type, enabled=False), evaluating(model):
        try:
            if original is not None:
                model.forward = original
            for tensor in half:
                tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, dtype, place in before:
                tensor.data = tensor.data.to(dtype) if place is None else place.copy_(tensor.data)
            if original is not None:
                model.forward = wrapped
            _being_scored.reset(token)


# ---------------------------------------------------------------- batches, losses and gradients


def as_batches(batch: Batches) -> list[Batch]:
    """One batch or several, as a list."""
    return [batch] if isinstance(batch, Mapping) else list(batch)


@dataclass(frozen=True)
class Parts:
    """The microbatches that this process scores. Several processes share out what a round scores, and add up what they find.

    Attributes:
        own: the microbatches. A process may have none, but not with a sharded model.
        processes: how many there are.
        copies: how many of them score each microbatch.
        device: of the model.
    """

    own: list[dict[str, Any]]
    processes: int
    copies: int
    device: torch.device

    def total(self, *values: Tensor) -> list[Tensor]:
        """Sums over all processes, each microbatch counted once. Every process gets the same numbers."""
        return [value / self.copies for value in summed(values, self.device)] if self.processes > 1 else list(values)

    def loss(self, model: nn.Module) -> float:
        """The mean cross-entropy (nats) over all labels of the microbatches of all processes."""
        return mean_loss(model, self.own, over_all=self.processes > 1)


def step_tokens(device: torch.device, batches: Sequence[Batch]) -> int:
    """Padded tokens a scoring step takes at once: what a CPU's caches like, or what keeps an accelerator busy and fits into it."""
    rows = _being_scored.get()[1]
    if device.type == "cpu" or rows is None:
        return 384 if device.type == "cpu" else 8192
    return min(8192, rows * max(padded_tokens(one) // len(one["labels"]) for one in batches))


def parts_of(model: nn.Module, batch: Batches, single_rows: bool = False) -> Parts:
    """The batches as the model reads them, cut into microbatches of like length, without rows that have no label.

    Every process must be given the same batches. Images, sounds and embedded texts are read in the model's precision as it is now:
    that is another than in training while half-precision weights are converted, or while autocast is off.

    Args:
        single_rows: a microbatch is one row.
    """
    scored, _, kept = _being_scored.get()
    if scored is model and not single_rows and kept and kept[0][0] is batch:
        return kept[0][1]
    given, device = as_batches(batch), device_of(model)
    most_tokens = 1 if single_rows else step_tokens(device, given)
    kind, dtype = loss_kind(model), getattr(base_of(model), "dtype", None)
    batches = [
        {
            key: value.to(device, dtype if value.is_floating_point() and key != "labels" else None)
            if isinstance(value, Tensor)
            else value
            for key, value in one.items()
        }
        for one in given
    ]
    parts, n = labelled_microbatches(batches, most_tokens, kind), count()
    while len(parts) % n and (rows := max(len(part["labels"]) for part in parts)) > 1:
        at = [len(part["labels"]) for part in parts].index(rows)
        parts[at : at + 1] = [rows_of(parts[at], slice(rows // 2)), rows_of(parts[at], slice(rows // 2, None))]
    own, copies = own_share(parts, even=is_sharded(model)) if n > 1 else (parts, 1)
    found = Parts(own, n, copies, device)
    if scored is model and not single_rows:
        kept[:] = [(batch, found)]
    return found


def from_nothing(scores: Mapping[str, Tensor], shift: float) -> Scores:
    """Scores, float64 on the CPU, on which a rank that does nothing has zero, where it had ``-shift``: CE(all ranks) - CE(no rank).

    What float32 scores so far from zero cannot tell from it becomes zero.
    """
    noise = 4 * torch.finfo(torch.float32).eps * abs(shift)
    moved = {path: torch.as_tensor(values).cpu().double() + shift for path, values in scores.items()}  # MPS has no float64
    return {path: values.masked_fill(values.abs() < noise, 0.0) for path, values in moved.items()}


def loss_without(model: nn.Module, parts: Parts, adapter: str | None = None) -> float:
    """The mean cross-entropy (nats) without any rank."""
    with GateBank(model, adapter) as gates:
        gates.fill(0.0)
        return parts.loss(model)


def losses_without_and_with(
    model: nn.Module, batch: Batches, adapter: str | None = None, float32: bool = True
) -> tuple[float, float]:
    """Mean cross-entropy (nats) over the labels of the batch without any rank and with all of them."""
    with scoring(model, float32):
        parts = parts_of(model, batch)
        return loss_without(model, parts, adapter), parts.loss(model)


@torch.enable_grad()
def gate_gradients(model: nn.Module, parts: Parts, leaves: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Gradient of the mean cross-entropy with respect to leaf tensors, and the loss itself.

    Only the paths from the leaves to the loss are walked back: the frozen weights get no gradient, and memory does not grow
    with the number of ranks.

    Returns:
        Name -> gradient in the shape of its leaf (zero for a leaf the model did not use), and the mean loss in nats.
    """
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    loss, labels = 0.0, 0
    for part in parts.own:
        own, counts = row_losses(model, part)
        gradients = torch.autograd.grad(own.sum(), list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
        loss, labels = loss + float(own.sum().detach()), labels + int(counts.sum())
    (sums,) = parts.total(torch.tensor([loss, labels], dtype=torch.float32 if parts.device.type == "mps" else torch.float64))
    loss, labels = sums.tolist()
    return {name: value / labels for name, value in zip(leaves, parts.total(*total.values()), strict=True)}, loss / labels
