"""In which order ranks and modules of an adapter go: what each is worth on some rows, by what leaving it out saves.

``rank_values`` gives every live rank a value; ``moves`` makes one order of all that can be dropped, so that a smaller adapter is
always part of a larger one. A value is the worth of a rank alone; those of a module add up to the module's.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from gatewise.adapters.lora import active_adapter
from gatewise.allocation import slots
from gatewise.allocation.scores import SCORES
from gatewise.allocation.scoring import Batches, Scores
from gatewise.allocation.slots import Expert, by_slot, carries_more_than_ranks, factors, live_mask, lora_layers
from gatewise.errors import GatewiseError

ORDERS = ("path_moments", "singular")
"""The first is the default. Others were tried and lost: ``docs/compress.md``, ``benchmarks/compress.py``."""


def rank_values(
    model: nn.Module,
    batch: Batches,
    order: str = ORDERS[0],
    *,
    adapter: str | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        name = active_adapter(model, adapter)
        values = {}
        for path, layer in lora_layers(model, name).items():
            a, b = by_slot(layer, name, *(factor.detach().cpu().double() for factor in factors(layer, name)))
            sizes = a.square().sum(dim=1) * b.square().sum(dim=1) * layer.scaling[name] ** 2
            values[path] = sizes[live_mask(layer, name).cpu()]
    else:
        found = SCORES[order].of(model, batch, adapter, progress=progress)
        values = {path: scores.double() for path, scores in found.items()}
    for path, one in values.items():
        if not bool(torch.isfinite(one).all()):
            raise GatewiseError(
                f"the {order} values of {path} are not finite: look for numbers that are not in the adapter and its base model"
            )
    return values


@dataclass(frozen=True)
class Cost:
    """What a module costs: ``fixed`` once, and ``each`` for every rank; in parameters or in modules.

    Attributes:
        stays: the module cannot go as a whole: DoRA's magnitude or a bias belongs to the adapter too.
    """

    fixed: float
    each: float
    stays: bool = False


def parameter_costs(model: nn.Module, adapter: str) -> dict[str, Cost]:
    """Path -> cost in numbers stored."""
    layers = lora_layers(model, adapter)
    each = slots.costs(layers, adapter)
    return {path: Cost(0.0, each[path], carries_more_than_ranks(layer, adapter)) for path, layer in layers.items()}


def module_costs(model: nn.Module, adapter: str) -> dict[str, Cost]:
    """Path -> cost in modules: one each, whatever its rank."""
    return {path: Cost(1.0, 0.0, stays_whole(layer, adapter)) for path, layer in lora_layers(model, adapter).items()}


def stays_whole(layer: LoraLinear, adapter: str) -> bool:
    """True if a layer cannot go as a whole: it has a trained magnitude or bias, or is an expert, of which PEFT keeps all."""
    return carries_more_than_ranks(layer, adapter) or isinstance(layer, Expert)


@dataclass(frozen=True)
class Move:
    """One step of the order: ranks of a module that go together.

    Attributes:
        ranks: their places among the module's live ranks.
    """

    path: str
    ranks: tuple[int, ...]


def moves(
    values: Mapping[str, Sequence[float]], costs: Mapping[str, Cost], dropped: Mapping[str, Sequence[int]] = {}
) -> list[Move]:
    """Everything that can be dropped, first what is worth least by what leaving it out saves.

    In each step that is the lowest rank of some module, by value / ``each``, or a whole module, by its value / (``fixed`` +
    ``each`` times its ranks). Where ranks cost by themselves (parameters) a module goes rank by rank; where a rank alone saves
    nothing (modules), as a whole. Among equals the first module goes first.

    Args:
        values: path -> value of each live rank.
        dropped: path -> ranks that are gone before, such as those above a cap.

    Returns:
        The steps. Modules that must stay keep their best rank; of an adapter without such modules nothing is left at the end.
    """
    left = {
        path: sorted((rank for rank in range(len(own)) if rank not in dropped.get(path, ())), key=lambda rank: (own[rank], rank))
        for path, own in values.items()
    }
    queue: list[tuple[float, int, bool, int]] = []
    paths = list(left)

    def push(at: int) -> None:
        path = paths[at]
        ranks, cost = left[path], costs[path]
        if not ranks or (cost.stays and len(ranks) == 1):
            return
        if not cost.stays:
            worth = math.fsum(values[path][rank] for rank in ranks)
            heapq.heappush(queue, (worth / (cost.fixed + cost.each * len(ranks)), at, True, len(ranks)))
        if cost.each and (len(ranks) > 1 or cost.stays):
            heapq.heappush(queue, (values[path][ranks[0]] / cost.each, at, False, len(ranks)))

    for at in range(len(paths)):
        push(at)
    order: list[Move] = []
    while queue:
        _, at, whole, count = heapq.heappop(queue)
        ranks = left[paths[at]]
        if len(ranks) != count:  # put there before ranks of this module went
            continue
        gone = tuple(ranks) if whole else (ranks[0],)
        order.append(Move(paths[at], gone))
        left[paths[at]] = ranks[len(gone) :]
        push(at)
    return order


def above_cap(values: Mapping[str, Sequence[float]], cap: int) -> dict[str, list[int]]:
    """Path -> the ranks that a module has too many for a cap, those worth least."""
    found = {
        path: sorted(range(len(own)), key=lambda rank: (own[rank], rank))[: max(0, len(own) - cap)] for path, own in values.items()
    }
    return {path: ranks for path, ranks in found.items() if ranks}
