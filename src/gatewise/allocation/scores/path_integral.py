"""PI-LoRA's score: the gradient of a rank's gate, integrated from the base model to the adapted one.

PI-LoRA (Li et al., "FT-MDT", EMNLP 2025 Industry, arXiv 2510.04655) ranks by gradients integrated along a path and motivates it
with Shapley values. Its formula was not at hand: what follows is a *reconstruction*. All gates are scaled together by c,

    PI(r) = - integral from 0 to 1 of dCE/dalpha_r (alpha = c everywhere) dc,

the Aumann-Shapley value of rank r in the game "how much the adapter lowers the loss". It is complete, the scores of all ranks
add up to CE(no rank) - CE(all ranks), and symmetric, two identical ranks of a module score the same. The two-point trapezoid is
half of first-order AB-LoRA (``taylor``) up to a constant: AB-LoRA reads the two ends of the path and nothing between them.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor, nn

from gatewise.allocation.scoring import Batches, GateBank, Score, Scores, gate_gradients, parts_of, scoring
from gatewise.checks import is_whole
from gatewise.errors import GatewiseError


def quadrature(points: int = 8) -> tuple[list[float], list[float]]:
    """Gauss-Legendre nodes in [0, 1] and their weights, which add up to 1: exact for polynomials of degree 2 points - 1."""
    if not is_whole(points) or points < 1:
        raise GatewiseError(f"points is {points!r}; expected a whole number of at least 1")
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


@partial(
    Score,
    meaning="its share of the loss that the adapter takes away",
    unit="nats",
    by_losses=False,
    options={"points": 8},
    takes=("progress",),
    check=quadrature,
)
def path_integral(
    model: nn.Module,
    batch: Batches,
    points: int = 8,
    *,
    adapter: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Path-integral score of every live rank (a reconstruction of PI-LoRA's, see the module).

    Cost: ``points`` forward and backward passes over the batch, whatever the number of ranks; the gates are the leaves, so memory
    does not grow with it either. ``losses_without_and_with`` of the same batch tells how far the scores are from complete.

    Args:
        batch: one batch (b, t) with labels, or several.
        points: of the quadrature.
        progress: called with (points done, points to do).

    Returns:
        Path -> (live ranks,) scores in nats, positive for a rank that lowers the loss. With DoRA or a LoRA bias "no rank" still has
        the trained magnitude or bias, and with DoRA the scores do not quite add up: PEFT keeps the gradient from flowing through
        the norm, here as in training.

    Raises:
        GatewiseError: too few points, or a batch without labels.
    """
    nodes, weights = quadrature(points)
    with scoring(model, float32=False), GateBank(model, adapter) as gates:
        parts = parts_of(model, batch)
        totals: dict[str, Tensor] = {}
        for done, (node, weight) in enumerate(zip(nodes, weights, strict=True), start=1):
            gradients, _ = gate_gradients(model, parts, gates.fill(node, requires_grad=True))
            for path, gradient in gradients.items():
                totals[path] = totals[path] - weight * gradient if path in totals else -weight * gradient
            if progress:
                progress(done, points)
        return gates.live_only(totals)
