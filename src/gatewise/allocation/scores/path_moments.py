"""The first two moments over examples of a rank's path gradient: gatewise's own score.

Three things weaken the other scores when they choose ranks to prune. The path integral (``path_integral``) and AB-LoRA are ruled by
the lower end of the path, where the base model first learns what an answer looks like and which pruning never visits. Sums over
examples let them cancel: a rank that helps one half of them and harms the other scores zero. And magnitudes alone, AdaLoRA's
sensitivity among them, keep ranks that only do harm. So each example e keeps its own integral over the upper half of the path,

    a_e(r) = - mean over c in [1/2, 1] of dCE_e/dalpha_r (alpha = c everywhere),

and a rank is worth what it does for the examples on average and how strongly single ones react to it, both in units of their
spread over all ranks:

    PM(r) = mean_e a_e(r) / std_r(mean_e a_e) + rms_e a_e(r) / std_r(rms_e a_e)

The second term alone at c = 1 is the root of the gates' empirical Fisher information, the measure of Optimal Brain Damage.
Not from the four papers; ``docs/reports/scores.md`` has the deletion curves that led to it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gatewise.allocation.scoring import Batches, GateBank, Parts, Score, Scores, parts_of, scoring

NODES = ((2 / 3, 3 / 4), (1.0, 1 / 4))
"""Points of the path and their weights: the two of Gauss-Radau in [1/2, 1], of which the last is the end of the path."""


@partial(
    Score,
    meaning="what it does for an example on average, plus how strongly single ones react to it, each in its spread",
    by_losses=False,
    options={},
    takes=("progress", "on_loss"),
)
def path_moments(
    model: nn.Module,
    batch: Batches,
    *,
    adapter: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_loss: Callable[[float], None] | None = None,
) -> Scores:
    """Mean and root mean square over examples of every live rank's path gradient, each standardised, and added.

    Cost: two forward and backward passes over the batch, whatever the number of ranks. The last of them is with all ranks on, so
    that a round has its loss for nothing.

    Args:
        batch: one batch (b, t) with labels, or several. An example is a row; its loss is the sum over its labels.
        progress: called with (microbatches done, microbatches to do).
        on_loss: called with the mean cross-entropy (nats) over the labels of the batch, all ranks on.

    Returns:
        Path -> (live ranks,) scores without a unit. 0 for a rank that does nothing, below 0 for one that mostly does harm.

    Raises:
        GatewiseError: a batch without labels.
    """
    with scoring(model, float32=False), GateBank(model, adapter) as gates:
        parts = parts_of(model, batch)
        if gates.rows_apart:
            first, second, loss = _sums(gates, parts, True, progress)
        if not gates.rows_apart:  # as may have been found out meanwhile
            parts = parts_of(model, batch, single_rows=True)
            first, second, loss = _sums(gates, parts, False, progress)
        (loss,) = parts.total(loss)
        totals = parts.total(*(torch.stack([first[path], second[path]]) for path in first))
        moments = gates.live_only(dict(zip(first, totals, strict=True)))
    if on_loss:
        on_loss(float(loss[0] / loss[1]))
    mean, size = {path: both[0] for path, both in moments.items()}, {path: both[1].sqrt() for path, both in moments.items()}
    # The spread over all ranks; 1 where they are all the same and there is nothing to weigh.
    of_mean, of_size = (float(torch.cat(list(one.values())).double().std(correction=0)) or 1.0 for one in (mean, size))
    return {path: mean[path] / of_mean + size[path] / of_size for path in mean}


def _sums(
    gates: GateBank, parts: Parts, apart: bool, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Sums over the examples of this process of a_e and of its square, path -> (r_max,), and (summed loss, number of labels)."""
    first = {path: torch.zeros_like(gate) for path, gate in gates.fill(1.0).items()}
    second = {path: torch.zeros_like(gate) for path, gate in first.items()}
    loss = torch.zeros(2, dtype=torch.float32 if parts.device.type == "mps" else torch.float64)
    for done, part in enumerate(parts.own, start=1):
        own: dict[str, Tensor] = {}
        for node, weight in NODES:
            gradients, sums, counts = gates.row_gradients(part, node, apart)
            if apart and not gates.rows_apart:
                return first, second, loss
            for path, gradient in gradients.items():
                own[path] = own[path] - weight * gradient if path in own else -weight * gradient
        loss += torch.tensor([float(sums.sum()), float(counts.sum())], dtype=loss.dtype)  # of the last node, which is 1
        for path, value in own.items():
            first[path] += value.sum(dim=0)
            second[path] += value.square().sum(dim=0)
        if progress:
            progress(done, len(parts.own))
    return first, second, loss
