"""A rank for every module from what the modules of a trained adapter are worth: a ``LoraConfig`` for the next one.

This is a heuristic of gatewise, not of a paper. The scores say what the ranks that are there do. What more or fewer ranks would do
is guessed: each next rank of a module adds less, so that r ranks do r / (r + 1) of what the module can do.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from gatewise.adapters.lora import rank_settings
from gatewise.errors import GatewiseError
from gatewise.inspection import Importance


def suggest(importance: Importance, budget: int) -> dict[str, Any]:
    """Entries for a stock ``peft.LoraConfig``: ``LoraConfig(**suggest(importance, 1680))``.

    Every module keeps the scaling it has in the adapter. Options such as ``use_dora`` and ``task_type`` are the user's to add,
    but not ``use_rslora``: alpha is written for alpha / r.

    Args:
        budget: ranks in all, as many as the adapter has or not.

    Returns:
        r, lora_alpha, rank_pattern, alpha_pattern and target_modules, the full paths of the modules that get a rank.

    Raises:
        GatewiseError: see ``suggested_ranks``.
    """
    return lora_settings(importance, suggested_ranks(importance, budget))


def suggested_ranks(importance: Importance, budget: int) -> dict[str, int]:
    """Path -> rank, for every module; together exactly ``budget`` ranks.

    The ranks are those with the largest sum of total * r / (r + 1) over the modules, where total is the sum of a module's scores
    and r its new rank: the first rank does half of what the module can do, two do two thirds. Ranks then go roughly with the square
    root of the totals, which also keeps chance in a few rows from piling ranks on one module. A module whose total is zero or
    less gets none, nor does one whose first rank would do less than one more elsewhere.

    Totals decide and not single scores, because how B A is cut into ranks is arbitrary; a total of ``path_integral`` does not
    depend on it at all. No module gets less than one with a lower total unless it is full (min(d_in, d_out)), equals differ by
    one at most, and a larger budget takes nothing away from any module.

    Raises:
        GatewiseError: a budget below 1 or above the room of the modules with a total above zero, no such module, or stacked
            experts.
    """
    check_budget(budget)
    if any(module.path.endswith("]") for module in importance.modules):
        raise GatewiseError(
            "the adapter adapts stacked experts (target_parameters), and PEFT gives all experts of a parameter the same rank, so "
            "none can be suggested for each: score an adapter without them, or let RankAllocation move their ranks in training"
        )
    worthy = [module for module in importance.modules if module.total > 0]
    if not worthy:
        raise GatewiseError(
            f"no module has {importance.score} scores that add up to more than zero on these rows, so there is nothing to suggest "
            "ranks by: score more rows or other data"
        )
    room = sum(module.room for module in worthy)
    if budget > room:
        raise GatewiseError(
            f"a budget of {budget:,} ranks was asked for, but the {len(worthy):,} modules worth more than nothing have room for "
            f"{room:,}, the smaller side of each weight: give {room:,} or less"
        )
    shares = divide([module.total for module in worthy], [module.room for module in worthy], budget)
    given = {module.path: share for module, share in zip(worthy, shares, strict=True)}
    return {module.path: given.get(module.path, 0) for module in importance.modules}


def lora_settings(importance: Importance, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The ``LoraConfig`` entries for these ranks (path -> rank, at least one above zero), as ``suggest`` returns them."""
    kept = {path: rank for path, rank in ranks.items() if rank}
    scaling = {module.path: module.scaling for module in importance.modules}
    return {**rank_settings(kept, scaling), "target_modules": list(kept)}


def check_budget(budget: int) -> None:
    """Raises GatewiseError for a budget below 1."""
    if budget < 1:
        raise GatewiseError(f"a budget of {budget} ranks was asked for: expected the ranks of all modules together, at least 1")


def divide(weights: Sequence[float], room: Sequence[int], budget: int) -> list[int]:
    """Shares r that add up to ``budget``, none above its room, with the largest sum of weight * r / (r + 1).

    One more on a share of r adds weight / ((r + 1) (r + 2)), less each time, so taking the best next one each time finds the
    best whole. Among equals the first is served first.

    Args:
        weights: all above zero.
        room: most of each share, together at least ``budget``.
    """
    shares = [0] * len(weights)
    queue = [(-weight / 2, index) for index, weight in enumerate(weights) if room[index] > 0]
    heapq.heapify(queue)
    for _ in range(budget):
        index = queue[0][1]
        shares[index] += 1
        if shares[index] < room[index]:
            gain = weights[index] / ((shares[index] + 1) * (shares[index] + 2))
            heapq.heapreplace(queue, (-gain, index))
        else:
            heapq.heappop(queue)
    return shares
