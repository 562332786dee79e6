"""What every score shares: the shape of its result, the batches it reads, and gradients with respect to gates.

A score maps each module path to one float32 number a *live* rank, in the order of the live slots, on the CPU. Higher means more
worth keeping. Every score takes ``(model, batch, adapter=None, ...)`` where ``batch`` is one batch with labels or a list of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.gates import GateBank
from gatewise.losses import Batch, microbatches, row_losses
from gatewise.slots import live_mask

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
    """The batches on the model's device, cut into microbatches of like length."""
    device = next(model.parameters()).device
    return [part for one in as_batches(batch) for part in microbatches(on_device(one, device), step_tokens(device))]


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
