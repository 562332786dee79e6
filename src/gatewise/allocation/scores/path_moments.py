"""The first two moments over examples of a rank's path gradient: gatewise's own score.

Three things weaken the other scores when they choose ranks to prune. The path integral (``path_integral``) and AB-LoRA are ruled by
the lower end of the path, where the base model first learns what an answer looks like and which pruning never visits. Sums over
examples let them cancel: a rank that helps one half of them and harms the other scores zero. And magnitudes alone, AdaLoRA's
sensitivity among them, keep ranks that only do harm. So each example e keeps its own integral over the upper part of the path,

    a_e(r) = - mean over c in [start, 1] of dCE_e/dalpha_r (alpha = c everywhere),

and a rank is worth what it does for the examples on average and how strongly single ones react to it, both in units of their
spread over all ranks:

    PM(r) = mean_e a_e(r) / std_r(mean_e a_e) + rms_e a_e(r) / std_r(rms_e a_e)

The second term alone with start = 1 is the root of the gates' empirical Fisher information, the measure of Optimal Brain Damage.
Not from the four papers; ``docs/scores.md`` has the deletion curves that led to it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.allocation.gates import GateBank
from gatewise.allocation.scores import Score
from gatewise.allocation.scores.path_integral import quadrature
from gatewise.allocation.scoring import Batches, Scores, live_only, parts_of, scoring
from gatewise.errors import GatewiseError
from gatewise.losses import row_losses, rows_of


def nodes_above(start: float = 0.5, points: int = 2, **_: Any) -> tuple[list[float], list[float]]:
    """Gauss-Radau nodes in [start, 1], of which 1 is one, and their weights. Raises GatewiseError for a path that there is not."""
    if not 0 <= start <= 1:
        raise GatewiseError(f"start is {start}; expected a point of the path, from 0 (no rank) to 1 (all ranks on)")
    nodes, weights = quadrature(points, "gauss-radau")
    return [start + (1 - start) * node for node in nodes], weights


@partial(
    Score,
    meaning="what it does for an example on average, plus how strongly single ones react to it, each in its spread",
    options={"start": 0.5, "points": 2, "float32": None},
    takes=("progress", "on_loss"),
    check=nodes_above,
)
def path_moments(
    model: nn.Module,
    batch: Batches,
    start: float = 0.5,
    points: int = 2,
    *,
    adapter: str | None = None,
    float32: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_loss: Callable[[float], None] | None = None,
) -> Scores:
    """Mean and root mean square over examples of every live rank's path gradient, each standardised, and added.

    Cost: ``points`` forward and backward passes over the batch, whatever the number of ranks. The last of them is with all ranks
    on, so that a round has its loss for nothing.

    Args:
        batch: one batch (b, t) with labels, or several. An example is a row; its loss is the sum over its labels.
        start: where on the path the integral begins; it ends at 1, all ranks on.
        points: Gauss-Radau nodes in [start, 1], of which 1 is one.
        float32: whether half-precision weights are scored in float32; None where that is needed, see ``scoring``.
        progress: called with (microbatches done, microbatches to do).
        on_loss: called with the mean cross-entropy (nats) over the labels of the batch, all ranks on.

    Returns:
        Path -> (live ranks,) scores without a unit. 0 for a rank that does nothing, below 0 for one that mostly does harm.

    Raises:
        GatewiseError: ``start`` outside [0, 1], too few points, or a batch without labels.
    """
    nodes, weights = nodes_above(start, points)
    with GateBank(model, adapter) as gates, scoring(model, float32):
        parts, apart = parts_of(model, batch), True
        if parts.own:
            few = rows_of(parts.own[0], slice(2))
            with gates.watching() as rows_apart, torch.no_grad():
                row_losses(model, few)
            apart = rows_apart(len(few["labels"]))
        if not apart:  # each microbatch is a row
            parts = parts_of(model, batch, single_rows=True)
        first: dict[str, Tensor] = {path: torch.zeros_like(gate) for path, gate in gates.fill(1.0).items()}
        second = {path: torch.zeros_like(gate) for path, gate in first.items()}
        loss = torch.zeros(2, dtype=torch.float32 if parts.device.type == "mps" else torch.float64)  # summed, and labels
        for done, part in enumerate(parts.own, start=1):
            own: dict[str, Tensor] = {}
            for node, weight in zip(nodes, weights, strict=True):
                gradients, sums, counts = gates.row_gradients(part, node, apart)
                for path, gradient in gradients.items():
                    own[path] = own[path] - weight * gradient if path in own else -weight * gradient
            loss += torch.tensor([float(sums.sum()), float(counts.sum())], dtype=loss.dtype)  # of the last node, which is 1
            for path, value in own.items():
                first[path] += value.sum(dim=0)
                second[path] += value.square().sum(dim=0)
            if progress:
                progress(done, len(parts.own))
        (loss,) = parts.total(loss)
        totals = parts.total(*(torch.stack([first[path], second[path]]) for path in first))
        sums_of = live_only(gates, dict(zip(first, totals, strict=True)))
    mean, size = {path: both[0] for path, both in sums_of.items()}, {path: both[1].sqrt() for path, both in sums_of.items()}
    if on_loss:
        on_loss(float(loss[0] / loss[1]))
    of_mean, of_size = _spread(mean), _spread(size)
    return {path: mean[path] / of_mean + size[path] / of_size for path in mean}


def _spread(scores: Scores) -> float:
    """Standard deviation over all live ranks; 1 where they are all the same and there is nothing to weigh."""
    flat = torch.cat(list(scores.values())).double()
    return float(flat.std(correction=0)) or 1.0
