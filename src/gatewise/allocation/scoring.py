"""What every score shares: the shape of its result, the batches it reads, and gradients with respect to gates.

A score maps each module path to one float32 number a *live* rank, in the order of the live slots, on the CPU. Higher means more
worth keeping. Every score takes ``(model, batch, adapter=None, ...)`` where ``batch`` is one batch with labels or a list of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.allocation.gates import GateBank
from gatewise.allocation.slots import live_mask
from gatewise.internals.library_attributes import original_forward, recomputed_layers
from gatewise.internals.quantised import computing_as_in_training, is_quantised
from gatewise.losses import Batch, base_of, labelled_microbatches, loss_kind, mean_loss, padded_tokens, row_losses, rows_of
from gatewise.models.device import has_bfloat16, random_state_kept
from gatewise.processes import count, is_sharded, own_share, summed

Scores = dict[str, Tensor]
Batches = Batch | Sequence[Batch]


def as_batches(batch: Batches) -> list[Batch]:
    """One batch or several, as a list."""
    return [batch] if isinstance(batch, Mapping) else list(batch)


_most_tokens: ContextVar[int] = ContextVar("most_tokens", default=8192)


def step_tokens(device: torch.device) -> int:
    """Padded tokens a scoring step takes at once: what a CPU's caches like, or what keeps an accelerator busy and fits into it."""
    return 384 if device.type == "cpu" else _most_tokens.get()


@contextmanager
def in_steps_of(rows: int, batches: Batches, model: nn.Module) -> Iterator[None]:
    """While open, a scoring step takes no more memory on an accelerator than training on so many rows like the longest of these."""
    several, kind = as_batches(batches), loss_kind(model)
    longest = max(padded_tokens(one, kind) // len(one["labels"]) for one in several)
    token = _most_tokens.set(min(rows * longest, _most_tokens.get()))
    try:
        yield
    finally:
        _most_tokens.reset(token)


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


def parts_of(model: nn.Module, batch: Batches, single_rows: bool = False) -> Parts:
    """The batches as the model reads them, cut into microbatches of like length, without rows that have no label.

    Every process must be given the same batches. Images, sounds and embedded texts are read in the model's precision as it is now:
    that is another than in training while half-precision weights are converted, or while autocast is off.

    Args:
        single_rows: a microbatch is one row.
    """
    given, device = as_batches(batch), next(model.parameters()).device
    most_tokens = 1 if single_rows else step_tokens(device)
    n, kind, dtype = count(), loss_kind(model), getattr(base_of(model), "dtype", None)
    batches = [
        {
            key: value.to(device, dtype if value.is_floating_point() and key != "labels" else None)
            if isinstance(value, Tensor)
            else value
            for key, value in one.items()
        }
        for one in given
    ]
    parts = labelled_microbatches(batches, most_tokens, kind)
    while len(parts) % n and (rows := max(len(part["labels"]) for part in parts)) > 1:
        at = [len(part["labels"]) for part in parts].index(rows)
        parts[at : at + 1] = [rows_of(parts[at], slice(rows // 2)), rows_of(parts[at], slice(rows // 2, None))]
    own, copies = own_share(parts, even=is_sharded(model)) if n > 1 else (parts, 1)
    return Parts(own, n, copies, device)


def labelled_parts(model: nn.Module, *batches: Batch) -> list[dict[str, Any]]:
    """The batches cut into microbatches of like length, without rows that have no label; their losses add up to those of all."""
    return labelled_microbatches(batches, step_tokens(next(model.parameters()).device), loss_kind(model))


def live_only(bank: GateBank, values: Mapping[str, Tensor]) -> Scores:
    """Keeps the entries (..., r_max) of live slots, as float32 on the CPU."""
    return {path: values[path].detach()[..., live_mask(layer, bank.adapter)].float().cpu() for path, layer in bank.layers.items()}


def from_nothing(scores: Mapping[str, Tensor], shift: float) -> Scores:
    """Scores, float64 on the CPU, on which a rank that does nothing has zero, where it had ``-shift``: CE(all ranks) - CE(no rank).

    What float32 scores so far from zero cannot tell from it becomes zero.
    """
    noise = 4 * torch.finfo(torch.float32).eps * abs(shift)
    moved = {path: torch.as_tensor(values).cpu().double() + shift for path, values in scores.items()}  # MPS has no float64
    return {path: values.masked_fill(values.abs() < noise, 0.0) for path, values in moved.items()}


def loss_without(model: nn.Module, parts: Parts, adapter: str | None = None) -> float:
    """The mean cross-entropy (nats) without any rank."""
    with GateBank(model, adapter) as gates, gates.only(set()):
        return parts.loss(model)


def losses_without_and_with(
    model: nn.Module, batch: Batches, adapter: str | None = None, float32: bool | None = True
) -> tuple[float, float]:
    """Mean cross-entropy (nats) over the labels of the batch without any rank and with all of them."""
    with scoring(model, float32):
        parts = parts_of(model, batch)
        return loss_without(model, parts, adapter), parts.loss(model)


@torch.enable_grad()
def gate_gradients(
    model: nn.Module,
    parts: Parts,
    leaves: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], float]:
    """Gradient of the mean cross-entropy with respect to leaf tensors, and the loss itself.

    Only the paths from the leaves to the loss are walked back: the frozen weights get no gradient, and memory does not grow
    with the number of ranks.

    Returns:
        Name -> gradient in the shape of its leaf (zero for a leaf the model did not use), and the mean loss in nats.
    """
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    loss, labels = 0.0, 0
    for part in parts.own:
        sums, counts = row_losses(model, part)
        gradients = torch.autograd.grad(sums.sum(), list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
        loss, labels = loss + float(sums.sum().detach()), labels + int(counts.sum())
    (told,) = parts.total(torch.tensor([loss, labels], dtype=torch.float32 if parts.device.type == "mps" else torch.float64))
    loss, labels = told.tolist()
    return {name: value / labels for name, value in zip(leaves, parts.total(*total.values()), strict=True)}, loss / labels


_being_scored: ContextVar[nn.Module | None] = ContextVar("being_scored", default=None)


@contextmanager
def scoring(model: nn.Module, float32: bool | None = True) -> Iterator[None]:
    """The state in which ranks are scored, undone exactly afterwards: dropout off, no autocast, float32 weights.

    Half-precision weights are converted in place and back, which loses nothing; the differences of losses that single ranks make
    are smaller than half precision resolves. Their gradients are not: for these bfloat16 will do. The random state and every
    module's training mode are as before when it closes. Opened inside itself it does nothing: a round opens it once around all
    that it measures. Layers under gradient checkpointing keep no activations here either.

    Args:
        float32: convert half-precision weights while scoring; False scores in the model's own precision (less memory). None, for
            gradients, converts float16, in which small ones are lost, and bfloat16 where the device only emulates it, which is
            slower. Quantised weights and those of a sharded model are left as they are in any case.
    """
    if _being_scored.get() is model:
        yield
        return
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    # Accelerate puts autocast into the model's own forward, inside any context of ours, and keeps the original beside it.
    original, recomputed = original_forward(model), recomputed_layers(model)
    wrapped = model.__dict__.get("forward") if original is not None else None
    kept = float32 is None and has_bfloat16(device)
    kinds = (torch.float16,) if kept else (torch.bfloat16, torch.float16)
    half = _half_precision(model, kinds) if float32 is not False and not is_sharded(model) else []
    # What is trained may be a view of a buffer of DeepSpeed's, and must stay one.
    before = [(tensor, tensor.dtype, tensor.data if tensor.requires_grad else None) for tensor in half]
    token = _being_scored.set(model)
    with random_state_kept(device), torch.autocast(device.type, enabled=False), ExitStack() as stack:
        try:
            model.eval()
            for layer in recomputed:
                layer.training = True  # only the layer itself, which looks whether to keep its activations; its dropout is off
            stack.enter_context(computing_as_in_training(model))
            if original is not None:
                model.forward = original
            for tensor in half:
                tensor.data = tensor.data.float()
            yield
        finally:
            stack.close()  # first: it gives quantised layers the mode that they were in under ``model.eval()``
            for tensor, dtype, place in before:
                tensor.data = tensor.data.to(dtype) if place is None else place.copy_(tensor.data)
            if wrapped is not None:
                model.forward = wrapped
            for module in training:
                module.training = True
            _being_scored.reset(token)


def _half_precision(model: nn.Module, kinds: tuple[torch.dtype, ...]) -> list[Tensor]:
    """The weights and buffers of a model in these kinds of half precision, each once, without those of quantised modules.

    A quantised module's packed weights may call themselves bfloat16, and its scales, which may be buffers, belong to them.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.dtype in kinds for tensor in own) and not is_quantised(module):
            found |= {id(tensor): tensor for tensor in own if tensor.dtype in kinds}
    return list(found.values())
