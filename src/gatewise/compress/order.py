"""In which order ranks and modules of an adapter go: what each is worth on some rows, by what leaving it out saves.

``rank_values`` gives every live rank a value; ``moves`` makes one order of all that can be dropped, so that a smaller adapter is
always part of a larger one. The value of a module is the sum of its ranks' values.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from gatewise.adapters.lora import active_adapter
from gatewise.allocation.scores import as_score
from gatewise.allocation.scoring import Batches, Scores
from gatewise.allocation.slots import by_slot, factors, live_mask, lora_layers
from gatewise.errors import GatewiseError

ORDERS = ("path_moments", "singular")
"""The first is the default. Others were tried and lost: ``docs/reports/compress.md``, ``benchmarks/compress.py``."""


def rank_values(
    model: nn.Module, batch: Batches, order: str = ORDERS[0], progress: Callable[[int, int], None] | None = None
) -> Scores:
    """What every live rank is worth, for a model in its singular basis.

    Args:
        batch: one batch (b, t) with labels, or several.
        order: "path_moments", the score of that name; or "singular", the square of the rank's singular value: what leaving it out
            changes of scaling * B A in Frobenius norm.
        progress: called with (done, total).

    Returns:
        Path -> (live ranks,) values, in the order of the live slots.

    Raises:
        GatewiseError: values that are not finite.
    """
    if order == "singular":
        name = active_adapter(model)
        values = {}
        for path, layer in lora_layers(model, name).items():
            a, b = by_slot(layer, name, *(factor.detach().cpu().double() for factor in factors(layer, name)))
            sizes = a.square().sum(dim=1) * b.square().sum(dim=1) * layer.scaling[name] ** 2
            values[path] = sizes[live_mask(layer, name).cpu()]
    else:
        found = as_score(order).of(model, batch, None, progress=progress)
        values = {path: scores.double() for path, scores in found.items()}
    for path, one in values.items():
        if not bool(torch.isfinite(one).all()):
            raise GatewiseError(
                f"the {order} values of {path} are not finite: look for numbers that are not in the adapter and its base model"
            )
    return values


class Move(NamedTuple):
    """One step of the order: ranks of a module that go together, by their places among the module's live ranks."""

    path: str
    ranks: tuple[int, ...]


def moves(values: Mapping[str, Sequence[float]], costs: Mapping[str, float] | None, stays: Container[str] = ()) -> list[Move]:
    """Everything that can be dropped, first what is worth least by what leaving it out saves. Among equals the first module goes.

    Args:
        values: path -> value of each live rank.
        costs: path -> numbers that a rank stores; ranks then go one by one. None: modules go as a whole, and cost the same.
        stays: paths of modules that cannot go. Where ranks go one by one, these keep their best one.
    """
    found: list[tuple[float, Move]] = []
    for path, own in values.items():
        ranks = sorted(range(len(own)), key=lambda rank: (own[rank], rank))
        if costs is None:
            if ranks and path not in stays:
                found.append((math.fsum(own), Move(path, tuple(ranks))))
        else:
            found += [(own[rank] / costs[path], Move(path, (rank,))) for rank in (ranks[:-1] if path in stays else ranks)]
    return [move for _, move in sorted(found, key=lambda one: one[0])]
