"""A rank for every module from what the modules of a trained adapter are worth: a ``LoraConfig`` for the next one.

This is a heuristic of gatewise, not of a paper. The scores say what the ranks that are there do. What more or fewer ranks would do
is guessed: each next rank of a module adds less, so that r ranks do r / (r + 1) of what the module can do. A budget counts
parameters, of which each rank of a module has d_in + d_out, or ranks.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from gatewise.adapters.files import LoraModule
from gatewise.adapters.lora import rank_settings, target_settings
from gatewise.errors import GatewiseError
from gatewise.inspection import Importance

Unit = Literal["parameters", "ranks"]


def suggest(importance: Importance, budget: int, unit: Unit = "parameters") -> dict[str, Any]:
    """Entries for a stock ``peft.LoraConfig``: ``LoraConfig(**suggest(importance, 2_400_000))``.

    Every module keeps the scaling it has in the adapter. Options such as ``use_dora`` and ``task_type`` are the user's to add,
    but not ``use_rslora``: alpha is written for alpha / r.

    Args:
        budget: parameters (or ranks) in all, as many as the adapter has or not.
        unit: what the budget counts. Biases and DoRA's magnitudes do not count.

    Returns:
        r, lora_alpha, rank_pattern, alpha_pattern and target_modules, the full paths of the modules that get a rank.

    Raises:
        GatewiseError: see ``suggested_ranks``.
    """
    return lora_settings(importance, suggested_ranks(importance, budget, unit))


def suggested_ranks(importance: Importance, budget: int, unit: Unit = "parameters") -> dict[str, int]:
    """Path -> rank, for every module; together exactly ``budget`` ranks, or as many parameters as ranks can be fitted into.

    The ranks are those with the largest sum of total * r / (r + 1) over the modules, where total is the sum of a module's scores
    and r its new rank: the first rank does half of what the module can do, two do two thirds. Ranks then go roughly with the square
    root of the totals, which also keeps chance in a few rows from piling ranks on one module; where parameters count, with the root
    of what a parameter is worth. A module whose total is zero or less gets none, nor does one whose first rank would do less, for
    what it costs, than one more elsewhere.

    Totals decide and not single scores, because how B A is cut into ranks is arbitrary; a total of ``path_integral`` does not
    depend on it at all. No module gets less than one of its size with a lower total unless it is full (min(d_in, d_out)), and
    equals differ by one at most. A larger budget of ranks takes nothing away from any module; one of parameters may take away small
    ranks that filled the rest of the smaller budget.

    Raises:
        GatewiseError: a budget below 1 or above the room of the modules with a total above zero, no such module, one that not
            even one rank fits into, or parameters (``target_parameters``).
    """
    check_budget(budget, unit)
    if parameters := [module.path for module in importance.modules if module.of_parameter]:
        told = (
            "stacked experts (target_parameters), and PEFT gives all experts of a parameter the same rank, so none can be "
            "suggested for each"
            if parameters[0].endswith("]")
            else f"the parameter {parameters[0]} (target_parameters), and suggestions are for modules"
        )
        raise GatewiseError(
            f"the adapter adapts {told}: score an adapter without them, or let RankAllocation move their ranks in training"
        )
    worthy = [module for module in importance.modules if module.total > 0]
    if not worthy:
        raise GatewiseError(
            f"no module has {importance.score} scores that add up to more than zero on these rows, so there is nothing to suggest "
            "ranks by: score more rows or other data"
        )
    costs = [module.cost if unit == "parameters" else 1 for module in worthy]
    room = sum(module.room * cost for module, cost in zip(worthy, costs, strict=True))
    asked = f"a budget of {budget:,} {unit} was asked for, but"
    if budget > room:
        most = "the smaller side of each weight" + (", in parameters" if unit == "parameters" else "")
        raise GatewiseError(
            f"{asked} the {len(worthy):,} modules worth more than nothing have room for {room:,}, {most}: give {room:,} or less"
        )
    if budget < min(costs):
        raise GatewiseError(f"{asked} one rank of the smallest module worth more than nothing has {min(costs):,}: give more")
    shares = divide([module.total for module in worthy], [module.room for module in worthy], budget, costs)
    given = {module.path: share for module, share in zip(worthy, shares, strict=True)}
    return {module.path: given.get(module.path, 0) for module in importance.modules}


def lora_settings(importance: Importance, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The ``LoraConfig`` entries for these ranks (path -> rank, at least one above zero), as ``suggest`` returns them."""
    kept = {path: rank for path, rank in ranks.items() if rank}
    scaling = {module.path: module.scaling for module in importance.modules}
    others = [*ranks, *importance.unscored]
    return {**rank_settings(kept, scaling), "target_modules": target_settings(kept, others)["target_modules"]}


def check_budget(budget: int, unit: Unit = "parameters") -> None:
    """Raises GatewiseError for a unit that there is not, or a budget below 1."""
    if unit not in get_args(Unit):
        raise GatewiseError(f"the unit of a budget is {unit!r}, expected one of {', '.join(get_args(Unit))}")
    if budget < 1:
        raise GatewiseError(f"a budget of {budget} {unit} was asked for: expected the {unit} of all modules together, at least 1")


def check_fits(modules: Sequence[LoraModule], budget: int, unit: Unit = "parameters") -> None:
    """Refuses what ``suggested_ranks`` would refuse whatever the scores are.

    Args:
        modules: those of an adapter's file.

    Raises:
        GatewiseError: a budget below one rank of any module, or above the room of all.
    """
    if not modules or any(module.blocks != 1 for module in modules):  # experts and groups have other rooms
        return
    sides = [(module.rows.shape[2], module.columns.shape[2]) for module in modules]
    costs = [sum(pair) if unit == "parameters" else 1 for pair in sides]
    room = sum(min(pair) * cost for pair, cost in zip(sides, costs, strict=True))
    asked = f"a budget of {budget:,} {unit} was asked for, but"
    if budget > room:
        raise GatewiseError(f"{asked} the {len(modules):,} modules together have room for {room:,}: give {room:,} or less")
    if budget < min(costs):
        raise GatewiseError(f"{asked} one rank of the smallest module has {min(costs):,}: give more")


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
