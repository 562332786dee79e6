"""What every score shares: the shape of its result, the batches it reads, and gradients with respect to gates.

A score maps each module path to one float32 number a *live* rank, in the order of the live slots, on the CPU. Higher means more
worth keeping. Every score takes ``(model, batch, adapter=None, ...)`` where ``batch`` is one batch with labels or a list of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.allocation.gates import GateBank
from gatewise.allocation.slots import live_mask
from gatewise.internals.library_attributes import original_forward
from gatewise.losses import IGNORED, Batch, LossKind, loss_kind, microbatches, row_losses
from gatewise.models.device import random_state_kept

_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)

Scores = dict[str, Tensor]
Batches = Batch | Sequence[Batch]


def as_batches(batch: Batches) -> list[Batch]:
    """One batch or several, as a list."""
    return [batch] if isinstance(batch, Mapping) else list(batch)


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def step_tokens(device: torch.device) -> int:
    """Padded tokens a scoring step takes at once: what a CPU's caches like, or what keeps an accelerator busy."""
    return 1024 if device.type == "cpu" else 8192


def parts_of(model: nn.Module, batch: Batches) -> list[dict[str, Any]]:
    """The batches on the model's device, cut into microbatches of like length, without rows that have no label."""
    device, kind = next(model.parameters()).device, loss_kind(model)
    parts = [part for one in as_batches(batch) for part in microbatches(on_device(one, device), step_tokens(device), kind)]
    # Without any label at all the loss says so.
    return [labelled for part in parts if (labelled := _labelled_rows(part, kind))] or parts


def _labelled_rows(part: dict[str, Any], kind: LossKind) -> dict[str, Any] | None:
    """The rows of a microbatch that a loss can be taken of, None where there are none: a text cut too short has no label left."""
    labels = part.get("labels")
    if kind == "rows" or labels is None:
        return part
    rows = ((labels[:, 1:] if kind == "causal" else labels) != IGNORED).any(dim=1)
    if bool(rows.all()):
        return part
    return {k: v[rows] if isinstance(v, Tensor) and v.ndim else v for k, v in part.items()} if bool(rows.any()) else None


def live_only(bank: GateBank, values: Mapping[str, Tensor]) -> Scores:
    """Keeps the entries (r_max,) of live slots, as float32 on the CPU."""
    return {path: values[path].detach()[live_mask(layer, bank.adapter)].float().cpu() for path, layer in bank.layers.items()}


def gate_gradients(
    model: nn.Module,
    parts: Sequence[Batch],
    leaves: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], float]:
    """Gradient of the mean cross-entropy with respect to leaf tensors, and the loss itself.

    Only the paths from the leaves to the loss are walked back: the frozen weights get no gradient, and memory does not grow
    with the number of ranks.

    Returns:
        Name -> gradient in the shape of its leaf (zero for a leaf the model did not use), and the mean loss in nats.
    """
    names = list(leaves)
    total = {name: torch.zeros_like(leaves[name]) for name in names}
    loss, count = 0.0, 0
    for part in parts:
        sums, counts = row_losses(model, part)
        gradients = torch.autograd.grad(sums.sum(), [leaves[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
        loss, count = loss + float(sums.sum().detach()), count + int(counts.sum())
    return {name: value / count for name, value in total.items()}, loss / count


@contextmanager
def scoring(model: nn.Module, float32: bool = True) -> Iterator[None]:
    """The state in which ranks are scored, undone exactly afterwards: dropout off, no autocast, float32 weights.

    Half-precision weights are converted in place and back, which loses nothing; the differences that single ranks make are
    smaller than half precision resolves. The random state and every module's training mode are as before when it closes. Opened
    inside itself it converts nothing: a round opens it once around all that it measures.

    Args:
        float32: convert half-precision weights while scoring; False scores in the model's own precision (less memory).
    """
    training = [module for module in model.modules() if module.training]
    half = [(tensor, tensor.dtype) for tensor in _half_precision(model)] if float32 else []
    device = next(model.parameters()).device
    # Accelerate puts autocast into the model's own forward, inside any context of ours, and keeps the original beside it.
    original = original_forward(model)
    wrapped = model.__dict__.get("forward") if original is not None else None
    with random_state_kept(device), torch.autocast(device.type, enabled=False):
        try:
            model.eval()
            if original is not None:
                model.forward = original
            for tensor, _ in half:
                tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, dtype in half:
                tensor.data = tensor.data.to(dtype)
            if wrapped is not None:
                model.forward = wrapped
            for module in training:
                module.training = True


def _half_precision(model: nn.Module) -> list[Tensor]:
    """The half-precision weights and buffers of a model, each once, without those of quantised modules.

    A quantised module's packed weights may call themselves bfloat16, and its scales, which may be buffers, belong to them.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not any(map(_is_packed, own)):
            found |= {id(tensor): tensor for tensor in own if tensor.dtype in (torch.bfloat16, torch.float16)}
    return list(found.values())


def _is_packed(tensor: Tensor) -> bool:
    """Whether a tensor holds quantised numbers: bitsandbytes and torchao have their own types, GPTQ and AWQ pack into integers."""
    of_its_own = isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter
    return of_its_own or hasattr(tensor, "quant_state") or tensor.dtype in _PACKED
