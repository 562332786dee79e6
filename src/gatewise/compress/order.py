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
from torch import Tensor, nn

from gatewise.allocation import slots
from gatewise.allocation.gates import GateBank
from gatewise.allocation.scores import DEFAULT, SCORES
from gatewise.allocation.scoring import Batches, Scores, from_nothing, live_only, losses_without_and_with, parts_of, scoring
from gatewise.allocation.slots import Expert, by_slot, carries_more_than_ranks, factors, live_mask, lora_layers
from gatewise.errors import GatewiseError
from gatewise.losses import row_losses
from gatewise.sites import sites_in_order

OWN = ("singular", "activation", "random", "last")
"""Orders that are no score of ``gatewise.scores``."""
ORDERS: tuple[str, ...] = (*SCORES, *OWN)


def rank_values(
    model: nn.Module,
    batch: Batches,
    order: str = DEFAULT,
    *,
    adapter: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """What every live rank is worth, for a model in its singular basis.

    Args:
        batch: one batch (b, t) with labels, or several.
        order: a score of ``gatewise.scores``, or one of

            - "singular": the square of the rank's singular value: what leaving it out changes of scaling * B A in Frobenius norm;
            - "activation": the mean square, over the tokens of the batch, of what the rank adds to its module's output (the
              singular value weighted by the inputs that there are);
            - "random": by ``seed``; "last": the last layers are worth most, as a guess without any data.
        progress: called with (done, total) by scores that take long.

    Returns:
        Path -> (live ranks,) values, in the order of the live slots.

    Raises:
        GatewiseError: an unknown order, or values that are not finite.
    """
    if order not in ORDERS:
        raise GatewiseError(f"order {order!r} is not known; expected one of {', '.join(ORDERS)}")
    if order in SCORES:
        values: Scores = SCORES[order].of(model, batch, adapter, progress=progress)
        values = {path: scores.double() for path, scores in values.items()}
        if not SCORES[order].idle_is_zero:
            # Counted from CE(all ranks) - CE(no rank), a sum over the ranks of a module would mostly count them.
            without, whole = losses_without_and_with(model, batch, adapter)
            values = from_nothing(values, without - whole)
    elif order == "activation":
        values = _activation(model, batch, adapter)
    else:
        values = _without_data(model, order, adapter, seed)
    for path, one in values.items():
        if not bool(torch.isfinite(one).all()):
            raise GatewiseError(
                f"the {order} values of {path} are not finite: look for numbers that are not in the adapter and its base model"
            )
    return values


def _activation(model: nn.Module, batch: Batches, adapter: str | None) -> Scores:
    """Mean over tokens of the square of scaling * (a_i x) * b_i, summed over the outputs, of every rank i."""
    with scoring(model, None), GateBank(model, adapter) as gates, torch.no_grad():
        sums: dict[str, Tensor] = {path: torch.zeros_like(gate, dtype=torch.float32) for path, gate in gates.fill(1.0).items()}
        seen = dict.fromkeys(sums, 0)
        gates.open()

        def look(path: str, hidden: Tensor) -> None:
            flat = hidden.flatten(0, -2).float()
            sums[path] += flat.square().sum(dim=0)
            seen[path] += len(flat)

        with gates.looking(look):
            # One row at a time: positions of padding would count as tokens.
            for part in parts_of(model, batch, single_rows=True).own:
                row_losses(model, part)
        unseen = [path for path, count in seen.items() if not count]
        if unseen:
            raise GatewiseError(f"order activation does not see what reaches {unseen[0]}: take another order, such as {DEFAULT}")
        for path, layer in gates.layers.items():
            _, columns = by_slot(layer, gates.adapter, *(factor.detach() for factor in factors(layer, gates.adapter)))
            size = (layer.scaling[gates.adapter] * columns.float()).square().sum(dim=1)
            sums[path] = sums[path] / seen[path] * size
        return {path: values.double() for path, values in live_only(gates, sums).items()}


def _without_data(model: nn.Module, order: str, adapter: str | None, seed: int) -> Scores:
    gates = GateBank(model, adapter)  # not opened: it knows the layers of the adapter
    generator = torch.Generator().manual_seed(seed)
    found: Scores = {}
    for site in sites_in_order(gates.layers):
        layer = gates.layers[site.path]
        live = live_mask(layer, gates.adapter).cpu()
        rows, columns = by_slot(layer, gates.adapter, *(factor.detach().cpu().double() for factor in factors(layer, gates.adapter)))
        sizes = (rows.square().sum(dim=1) * columns.square().sum(dim=1) * layer.scaling[gates.adapter] ** 2)[live]
        if order == "random":
            sizes = torch.rand(len(sizes), generator=generator, dtype=torch.float64) + torch.rand(1, generator=generator).double()
        elif order == "last":
            depth = len(found) if site.layer is None else site.layer
            sizes = (1 + depth) + sizes / (1 + sizes.sum())  # within a layer the smaller singular values go first
        found[site.path] = sizes
    return {path: found[path] for path in gates.layers}


# ---------------------------------------------------------------- what leaving out saves


@dataclass(frozen=True)
class Cost:
    """What a module costs: ``fixed`` once, and ``each`` for every rank; in parameters, modules or seconds.

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
    """Whether a layer cannot go as a whole: a magnitude or bias was trained too, or it is an expert, whose fellows PEFT keeps."""
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
    nothing (modules, time), as a whole. Among equals the first module goes first.

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
