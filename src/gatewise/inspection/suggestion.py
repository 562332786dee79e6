"""A rank for every module from what the modules of a trained adapter are worth: a ``LoraConfig`` for the next one.

This is a heuristic of gatewise, not of a paper. The scores say what the ranks that are there do. What more or fewer ranks would do
is guessed: each next rank of a module adds less, so that r ranks do r / (r + 1) of what the module can do.
"""

import heapq
from collections.abc import Sequence
from typing import Any

from gatewise.adapters.lora import rank_settings, target_settings
from gatewise.errors import GatewiseError
from gatewise.inspection import Importance


def suggest(importance: Importance, budget: int) -> dict[str, Any]:
    """Entries for a stock ``peft.LoraConfig``: ``LoraConfig(**suggest(importance, 2_400_000))``.

    Every module keeps the scaling it has in the adapter. Options such as ``use_dora`` and ``task_type`` are the user's to add,
    but not ``use_rslora``: alpha is written for alpha / r.

    Args:
        budget: parameters in all, as many as the adapter has or not. Biases and DoRA's magnitudes do not count.

    Returns:
        r, lora_alpha, rank_pattern, alpha_pattern and target_modules, the full paths of the modules that get a rank.

    Raises:
        GatewiseError: see ``suggested_ranks``.
    """
    ranks = suggested_ranks(importance, budget)
    kept = {path: rank for path, rank in ranks.items() if rank}
    scaling = {module.path: module.scaling for module in importance.modules}
    others = [*ranks, *importance.unscored]
    return {**rank_settings(kept, scaling), "target_modules": target_settings(kept, others)["target_modules"]}


def suggested_ranks(importance: Importance, budget: int) -> dict[str, int]:
    """Path -> rank, for every module; together as many parameters of the budget as ranks can be fitted into.

    The ranks are those with the largest sum of total * r / (r + 1) over the modules, where total is the sum of a module's scores
    and r its new rank: the first rank does half of what the module can do, two do two thirds. Ranks then go roughly with the square
    root of what a parameter is worth, which also keeps chance in a few rows from piling ranks on one module. A module whose total
    is zero or less gets none, nor does one whose first rank would do less, for what it costs, than one more elsewhere.

    Totals decide and not single scores, because how B A is cut into ranks is arbitrary; a total of ``path_integral`` does not
    depend on it at all. Of two modules that cost the same the one with the higher total gets no less, unless it is full
    (min(d_in, d_out)). A larger budget may take away small ranks that filled the rest of the smaller one.

    Raises:
        GatewiseError: no module with a total above zero, a budget above the room of those or in which not even one rank fits, or
            parameters (``target_parameters``).
    """
    if any(module.of_parameter for module in importance.modules):
        raise GatewiseError(
            "the adapter adapts parameters or stacked experts (target_parameters), and ranks are suggested for modules alone: "
            "score an adapter without them, or let RankAllocation move their ranks in training"
        )
    worthy = [module for module in importance.modules if module.total > 0]
    if not worthy:
        raise GatewiseError(
            f"no module has {importance.score} scores that add up to more than zero on these rows, so there is nothing to suggest "
            "ranks by: score more rows or other data"
        )
    costs, room = [module.cost for module in worthy], [module.room for module in worthy]
    most = sum(cost * ranks for cost, ranks in zip(costs, room, strict=True))
    if not min(costs) <= budget <= most:
        raise GatewiseError(
            f"a budget of {budget:,} parameters was asked for, but the {len(worthy):,} modules worth more than nothing take from "
            f"{min(costs):,} (one rank) to {most:,}: give a number between"
        )
    shares = divide([module.total for module in worthy], room, budget, costs)
    given = {module.path: share for module, share in zip(worthy, shares, strict=True)}
    return {module.path: given.get(module.path, 0) for module in importance.modules}


def divide(weights: Sequence[float], room: Sequence[int], budget: int, costs: Sequence[int]) -> list[int]:
    """Shares r, none above its room, that cost at most ``budget``, with a large sum of weight * r / (r + 1).

    One more on a share of r adds weight / ((r + 1) (r + 2)), less each time. Taking the next one that adds most for its cost finds
    the best whole of all that cost no more, as long as it fits; then those that still fit are taken. With costs of 1 that is the
    best whole of exactly ``budget``. Among equals the first is served first.

    Args:
        weights: all above zero.
        room: most of each share.
        costs: of one more on each share.
    """
    shares = [0] * len(weights)
    queue = [(-weight / 2 / costs[index], index) for index, weight in enumerate(weights) if room[index] > 0]
    heapq.heapify(queue)
    while queue:
        index = heapq.heappop(queue)[1]
        if costs[index] > budget:
            continue  # nor will it fit later
        budget -= costs[index]
        shares[index] += 1
        if shares[index] < room[index]:
            gain = weights[index] / ((shares[index] + 1) * (shares[index] + 2))
            heapq.heappush(queue, (-gain / costs[index], index))
    return shares
