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
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from gatewise.allocation.gates import GateBank
from gatewise.allocation.scores import Score
from gatewise.allocation.scoring import Batches, Scores, gate_gradients, live_only, parts_of, scoring
from gatewise.checks import is_whole
from gatewise.errors import GatewiseError

Rule = Literal["gauss-legendre", "gauss-radau", "trapezoid"]
RULES: tuple[str, ...] = get_args(Rule)


def quadrature(points: int = 8, rule: str = "gauss-legendre", **_: Any) -> tuple[list[float], list[float]]:
    """Nodes in [0, 1] and their weights, which add up to 1.

    Args:
        points: how many.
        rule: "gauss-legendre" (no node at the ends, exact for polynomials of degree 2 points - 1), "gauss-radau" (the upper end is
            a node, exact up to degree 2 points - 2) or "trapezoid" (evenly spaced nodes, both ends among them, so at least two
            points).

    Raises:
        GatewiseError: an unknown rule, or too few points for it.
    """
    if rule not in RULES:
        raise GatewiseError(f"quadrature rule {rule!r} is not known; expected one of {', '.join(RULES)}")
    least = 2 if rule == "trapezoid" else 1
    if not is_whole(points) or points < least:
        raise GatewiseError(f"points is {points!r}; expected a whole number of at least {least} with the {rule} rule")
    if rule == "trapezoid":
        step = 1 / (points - 1)
        return [i * step for i in range(points - 1)] + [1.0], [step / 2, *[step] * (points - 2), step / 2]
    if rule == "gauss-radau":
        # The roots of P_(n-1) + P_n, mirrored so that the end among them is the upper one.
        nodes = np.polynomial.legendre.legroots([0.0] * (points - 1) + [1.0, 1.0]).real
        nodes[0] = -1.0
        weights = (1 - nodes) / (points * np.polynomial.legendre.legval(nodes, [0.0] * (points - 1) + [1.0])) ** 2
        nodes, weights = -nodes[::-1], weights[::-1]
        nodes[-1] = 1.0
    else:
        nodes, weights = np.polynomial.legendre.leggauss(points)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


@partial(
    Score,
    meaning="its share of the loss that the adapter takes away",
    unit="nats",
    options={"points": 8, "rule": "gauss-legendre", "float32": None},
    takes=("progress",),
    check=quadrature,
)
def path_integral(
    model: nn.Module,
    batch: Batches,
    points: int = 8,
    rule: Rule = "gauss-legendre",
    *,
    adapter: str | None = None,
    float32: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Path-integral score of every live rank (a reconstruction of PI-LoRA's, see the module).

    Cost: ``points`` forward and backward passes over the batch, whatever the number of ranks; the gates are the leaves, so memory
    does not grow with it either. How far the scores are from complete, ``losses_without_and_with`` of the same batch tells.

    Args:
        batch: one batch (b, t) with labels, or several.
        points, rule: of the quadrature, see ``quadrature``.
        float32: whether half-precision weights are scored in float32; None where that is needed, see ``scoring``.
        progress: called with (points done, points to do).

    Returns:
        Path -> (live ranks,) scores in nats, positive for a rank that lowers the loss. With DoRA or a LoRA bias "no rank" still has
        the trained magnitude or bias, and with DoRA the scores do not quite add up: PEFT keeps the gradient from flowing through
        the norm, here as in training.

    Raises:
        GatewiseError: an unknown rule, too few points, or a batch without labels.
    """
    nodes, weights = quadrature(points, rule)
    with scoring(model, float32), GateBank(model, adapter) as gates:
        parts = parts_of(model, batch)
        totals: dict[str, Tensor] = {}
        for done, (node, weight) in enumerate(zip(nodes, weights, strict=True), start=1):
            gradients, _ = gate_gradients(model, parts, gates.fill(node, requires_grad=True))
            for path, gradient in gradients.items():
                totals[path] = totals[path] - weight * gradient if path in totals else -weight * gradient
            if progress:
                progress(done, points)
        return live_only(gates, totals)
