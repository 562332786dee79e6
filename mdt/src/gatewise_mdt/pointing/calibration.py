"""How likely a node is right, from what the heads say of it.

The heads' probabilities are too sure of themselves, and each knows its own part alone. Platt scaling (1999) mends both: a
logistic regression of "the node is one of the gold tree's" on the logarithms of the four, fitted on trees that were not trained
on.
"""

import math
from collections.abc import Sequence

import torch
from pydantic.dataclasses import dataclass
from torch.nn import functional as F

FEWEST = 20
"""Nodes, below which nothing is fitted."""
LEAST = -30.0
"""No logarithm counts as less: a head may hold impossible what the others force on it."""


@dataclass(frozen=True)
class Calibration:
    """A logistic regression; without arguments, the product of what the heads say of phrases, groups and joins.

    Attributes:
        weights: of the logarithms of phrases, groups, joins and arcs, see :class:`gatewise_mdt.pointing.decoding.Found`.
        bias: added to them; None for the product.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)
    bias: float | None = None

    def confidence(self, logs: Sequence[float]) -> float:
        """In [0, 1], for the logarithms of one node."""
        total = sum(weight * log for weight, log in zip(self.weights, (max(log, LEAST) for log in logs), strict=True))
        if self.bias is None:
            return math.exp(min(total, 0.0))
        return 1 / (1 + math.exp(min(-total - self.bias, 700.0)))


def fitted(logs: Sequence[Sequence[float]], right: Sequence[bool], strength: float = 1.0) -> Calibration | None:
    """The regression, with a penalty of ``strength`` · |w - w0|² / 2, so that few nodes leave the product (w0) nearly as it is.

    No weight is below 0: what a head is less sure of never counts for a node.

    Returns:
        None with fewer than ``FEWEST`` nodes, or where all are right or all wrong.
    """
    if len(right) < FEWEST or len(set(right)) < 2:
        return None
    x, y = torch.tensor([list(one) for one in logs], dtype=torch.float64).clamp(min=LEAST), torch.tensor(right, dtype=torch.float64)
    start = torch.tensor(Calibration().weights, dtype=torch.float64)
    roots = torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([roots, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        made = F.binary_cross_entropy_with_logits(x @ roots**2 + bias, y, reduction="sum")
        made = made + strength * ((roots**2 - start) ** 2).sum() / 2
        made.backward()
        return made

    optimizer.step(loss)
    phrases, groups, joins, arcs = (round(one, 5) for one in (roots.detach() ** 2).tolist())
    return Calibration((phrases, groups, joins, arcs), round(float(bias.detach()), 5))
