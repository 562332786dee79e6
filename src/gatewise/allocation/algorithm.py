"""A round of rank allocation, from scores to what is pruned and what grows. Read it downwards.

ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187, algorithm 1): score every live rank on a validation batch, prune the lowest over
the whole model, and grow as many in the modules that lost none. ``run_round`` does that to a model. What follows it decides, in
functions that know no model: modules are names, a module's scores are listed by its live ranks, and the answer is positions in
those lists, or counts. Ties are broken by the order of the modules and then of the ranks: the same input gives the same answer.

The paper counts ranks. With ``costs``, module -> what one of its ranks costs, the same rules count what ranks cost: a rank is
judged by its score per cost, and budgets and what is to be pruned are in that unit. That is gatewise's own.
"""

import inspect
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from gatewise.allocation import Unit, slots
from gatewise.allocation.gates import GateBank
from gatewise.allocation.scoring import Batches, Scores, from_nothing, parts_of, scoring
from gatewise.errors import GatewiseError
from gatewise.processes import count as processes
from gatewise.processes import summed

ModuleScores = Mapping[str, Sequence[float]]
Costs = Mapping[str, int]


@dataclass(frozen=True)
class Rules:
    """How rounds score and decide: see ``RankAllocation``, which has the same settings; ``unit`` is its ``budget``.

    ``from_base`` says that a rank which does nothing does not score zero: see ``gatewise.allocation.scores``.
    """

    score: Callable[..., Scores]
    score_name: str
    score_options: Mapping[str, Any]
    min_rank: int = 0
    smoothing: float = 0.0
    module_pruning: bool = False
    grace_rounds: int = 0
    seed: int = 0
    unit: Unit = "ranks"
    from_base: bool = False


@dataclass(frozen=True)
class Round:
    """What one round saw and did.

    Attributes:
        round: 1 for the first.
        step: the optimiser step after which it ran.
        scores: path -> score of each rank that was live, in the order of ``slots``, before any smoothing. Unless the budget counts
            ranks they are counted from a rank that does nothing.
        slots: path -> the slots that were live.
        pruned: path -> slots switched off.
        grown: path -> slots brought to life.
        ranks: path -> live ranks after the round.
        loss_before, loss_after: cross-entropy (nats) on the validation batch before and right after pruning.
        seconds: what the round cost.
    """

    round: int
    step: int
    scores: dict[str, list[float]]
    slots: dict[str, list[int]]
    pruned: dict[str, list[int]]
    grown: dict[str, list[int]]
    ranks: dict[str, int]
    loss_before: float
    loss_after: float
    seconds: float


def run_round(
    model: PeftModel,
    adapter: str,
    optimizer: torch.optim.Optimizer | None,
    batch: Batches,
    rules: Rules,
    history: Sequence[Round],
    step: int,
    count: int,
    budget: int,
    capacity: Mapping[str, int],
    costs: Costs | None = None,
) -> Round:
    """One round on a model in training: its LoRA factors and the optimiser's state of them change, nothing else.

    Args:
        optimizer: of the training; None when there is none any more.
        batch: the validation batch, or several.
        history: the rounds before.
        step: the optimiser step after which it runs.
        count: what to prune, in the unit of ``rules``.
        budget: the most that lives after the round, in that unit.
        capacity: path -> slots.
        costs: path -> what one of its ranks costs; None for 1 each.

    Raises:
        GatewiseError: a loss or a score that is not a finite number, or scores of other modules or ranks than the live ones.
    """
    began = time.perf_counter()
    layers = slots.lora_layers(model, adapter)
    live = {path: slots.live_slots(layer, adapter) for path, layer in layers.items()}
    keeps_one = slots.keep_a_rank(model, adapter)
    # Opened once: each opening may convert a half-precision model to float32, and back.
    with scoring(model, _float32(rules)):
        parts = parts_of(model, batch)
        options, takes = dict(rules.score_options), inspect.signature(rules.score).parameters
        if "prune" in takes and rules.unit != "modules":
            options.setdefault("prune", count)
            if costs is not None and "costs" in takes:
                options.setdefault("costs", costs)
        told: list[float] = []  # by a score that meets the loss with all ranks on its way
        if "on_loss" in takes:
            options["on_loss"] = told.append
        found = rules.score(model, batch, adapter=adapter, **options)
        loss_before = told[0] if told else parts.loss(model)
        if not math.isfinite(loss_before):
            raise GatewiseError(
                f"the loss on the validation batch is {loss_before} at step {step}: training has diverged; "
                "lower the learning rate and resume from the last checkpoint"
            )
        if rules.from_base and rules.unit != "ranks":
            # A constant on every rank changes no order of ranks, but that by score per cost, and sums over modules.
            with GateBank(model, adapter) as gates, gates.only(set()):
                found = from_nothing(found, parts.loss(model) - loss_before)
        scores = _agreed(found, layers, live, rules.score_name)
        try:
            decided_by = smoothed(history, live, scores, rules.smoothing)
            plan = (
                plan_modules(decided_by, count)
                if rules.unit == "modules"
                else plan_round(
                    decided_by,
                    count,
                    capacity,
                    budget,
                    max(rules.min_rank, int(keeps_one)),
                    spared(history, live, rules.grace_rounds),
                    rules.module_pruning,
                    costs,
                )
            )
        except ValueError as error:
            raise GatewiseError(f"score {rules.score_name!r} at step {step}: {error}; the round was not carried out") from error
        pruned = {path: [live[path][position] for position in positions] for path, positions in plan.pruned.items()}
        for path, dead in pruned.items():
            slots.prune(layers[path], adapter, dead, optimizer)
        # One seed a round, drawn apart from the training's random state: a resumed run and every process draw the same.
        generator = torch.Generator().manual_seed(rules.seed * 1_000_003 + len(history))
        grown = {path: slots.grow(layers[path], adapter, n, generator, optimizer) for path, n in plan.grown.items()}
        loss_after = parts.loss(model)
    return Round(
        round=len(history) + 1,
        step=step,
        scores=scores,
        slots=live,
        pruned=pruned,
        grown=grown,
        ranks=slots.ranks(model, adapter),
        loss_before=loss_before,
        loss_after=loss_after,
        seconds=round(time.perf_counter() - began, 3),
    )


def _float32(rules: Rules) -> bool | None:
    """Whether the score wants half-precision weights in float32: see ``scoring``."""
    takes = inspect.signature(rules.score).parameters.get("float32")
    wanted: bool | None = rules.score_options.get("float32", True if takes is None else takes.default)
    return wanted


def _agreed(scores: Scores, layers: Mapping[str, Any], live: Mapping[str, list[int]], score: str) -> dict[str, list[float]]:
    """Scores in module order, the mean over all processes, so that every process takes the same decision.

    They are rounded as they are stored, so that a resumed run smooths the same numbers.
    """
    if set(scores) != set(layers):
        raise GatewiseError(
            f"score {score!r} named {len(scores)} modules, expected one entry for each of {len(layers)} LoRA layers"
        )
    values: list[Tensor] = [torch.as_tensor(scores[path]) for path in layers]  # a score of the user's own may give lists
    for path, value in zip(layers, values, strict=True):
        if value.shape != (len(live[path]),):
            raise GatewiseError(
                f"score {score!r} gave {path} numbers of shape {tuple(value.shape)}, expected one for each of its "
                f"{len(live[path])} live ranks: gatewise.allocation.slots.live_slots(layer, adapter) has their places"
            )
    if processes() > 1:
        # On the device of the factors, where the processes' backend can reduce it.
        device = next(next(iter(layers.values())).parameters()).device
        values = [total / processes() for total in summed([value.cpu() for value in values], device)]
    return {path: [float(f"{number:.9g}") for number in value.tolist()] for path, value in zip(layers, values, strict=True)}


@dataclass(frozen=True)
class Plan:
    """One round's decision.

    Attributes:
        pruned: module -> positions among its live ranks to switch off, ascending; only modules that lose some.
        grown: module -> number of new ranks; only modules that get some.
    """

    pruned: dict[str, list[int]] = field(default_factory=dict)
    grown: dict[str, int] = field(default_factory=dict)


def plan_round(
    scores: ModuleScores,
    count: int,
    capacity: Mapping[str, int],
    budget: int,
    min_rank: int = 0,
    spared: Mapping[str, Collection[int]] | None = None,
    module_pruning: bool = False,
    costs: Costs | None = None,
) -> Plan:
    """One round of ALoRA: prune the ``count`` lowest ranks of the whole model, give as many to modules that lost none.

    If every module lost a rank nothing is given and the budget shrinks; it never grows past ``budget``. One rank is always left.

    With ``costs`` ranks go by score per cost until ``count`` is freed, and new ones are given while what they cost fits into
    ``budget``. What no rank fits into, or no module could take, is left for the next round.

    With ``module_pruning`` (PI-LoRA, arXiv 2510.04655, reconstructed) whole modules go first: those whose scores add up to zero or
    less, the lowest sum first, as far as they fit into ``count``. They get nothing back, and every other module keeps a rank.

    Args:
        scores: module -> score of each live rank; higher is worth more. With ``costs`` zero must be a rank that does nothing.
        count: ranks to prune, or what their costs must add up to at least.
        capacity: module -> most ranks it can hold.
        budget: most live ranks over the whole model after the round, or the most they may cost.
        min_rank: ranks a module keeps whatever their scores.
        spared: module -> positions of ranks that are not pruned this time.
        costs: module -> what one of its ranks costs; None for 1 each, the paper's rule.

    Raises:
        ValueError: a score is not a finite number.
    """
    live = cost_of({module: len(values) for module, values in scores.items()}, costs)
    # Without any rank left nothing has a gradient and nothing could grow again. The last one pruned may free more than was asked.
    largest = max((cost_of({module: 1}, costs) for module, values in scores.items() if values), default=0)
    count = min(count, max(0, live - largest))
    spared = spared or {}
    gone = _worthless(scores, count, min_rank, spared, costs) if module_pruning else {}
    rest = {module: values for module, values in scores.items() if module not in gone}
    floor = max(min_rank, 1) if module_pruning else min_rank
    freed = cost_of({module: len(positions) for module, positions in gone.items()}, costs)
    some = prune_lowest(rest, count - freed, floor, spared, costs)
    pruned = {module: gone.get(module) or some[module] for module in scores if module in gone or module in some}
    lost = cost_of({module: len(positions) for module, positions in pruned.items()}, costs)
    takers = [module for module, values in scores.items() if module not in pruned and (values or not module_pruning)]
    room = {module: capacity[module] - len(scores[module]) for module in takers}
    means = {
        module: math.fsum(scores[module]) / len(scores[module]) / cost_of({module: 1}, costs) if scores[module] else -math.inf
        for module in room
    }
    free = max(0, budget - (live - lost))
    return Plan(pruned, spread(min(lost, free) if costs is None else free, room, means, costs))


def plan_modules(scores: ModuleScores, count: int) -> Plan:
    """Prunes all ranks of ``count`` modules, those with the lowest sums of scores; one module is always left, and nothing grows.

    Gatewise's own, for budgets that count modules. Zero must be a rank that does nothing.

    Raises:
        ValueError: a score is not a finite number.
    """
    _check_finite(scores)
    totals = {module: math.fsum(values) for module, values in scores.items() if values}
    gone = sorted(totals, key=lambda module: totals[module])[: max(0, min(count, len(totals) - 1))]
    return Plan({module: list(range(len(values))) for module, values in scores.items() if module in gone})


def cost_of(ranks: Mapping[str, int], costs: Costs | None) -> int:
    """What ranks (module -> how many) cost together: their number without ``costs``."""
    return sum(ranks.values()) if costs is None else sum(count * costs[module] for module, count in ranks.items())


def cubic_budget(start: int, target: int, done: int, rounds: int) -> int:
    """The budget after ``done`` of ``rounds`` rounds: from ``start`` down to ``target``, fast at first (AdaLoRA's cubic schedule).

    The same in any unit.

    target + (start - target) (1 - done / rounds)^3, the target itself from the last round on.
    """
    left = max(0.0, 1 - done / rounds) if rounds else 0.0
    return target + round((start - target) * left**3)


def prune_lowest(
    scores: ModuleScores,
    count: int,
    min_rank: int = 0,
    spared: Mapping[str, Collection[int]] | None = None,
    costs: Costs | None = None,
) -> dict[str, list[int]]:
    """Positions of the ``count`` lowest scores over all modules, by module; with ``costs``, of the lowest scores per cost, so many
    that they cost at least ``count``. Where the last of these costs much, those before it that need not go for that stay.

    A module never falls below ``min_rank``, and ranks that are ``spared`` stay; where that protects too many, fewer than
    ``count`` are pruned.

    Raises:
        ValueError: a score is not a finite number, or ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"cannot prune {count} ranks")
    _check_finite(scores)
    spared = spared or {}
    modules = list(scores)
    each = [cost_of({module: 1}, costs) for module in modules]
    order = sorted(
        (value / each[at], at, position) for at, values in enumerate(scores.values()) for position, value in enumerate(values)
    )
    left = {module: len(values) for module, values in scores.items()}
    chosen: dict[str, list[int]] = {}
    for _, at, position in order:
        module = modules[at]
        if count > 0 and left[module] > min_rank and position not in spared.get(module, ()):
            chosen.setdefault(module, []).append(position)
            left[module] -= 1
            count -= each[at]
    for _, at, position in reversed(order):
        if each[at] <= -count and position in chosen.get(modules[at], ()):
            chosen[modules[at]].remove(position)
            count += each[at]
    return {module: sorted(chosen[module]) for module in modules if chosen.get(module)}


def _worthless(
    scores: ModuleScores, count: int, min_rank: int, spared: Mapping[str, Collection[int]], costs: Costs | None
) -> dict[str, list[int]]:
    """All positions (but ``min_rank``) of the modules whose total is not above zero, the lowest totals first, at most ``count``."""
    _check_finite(scores)
    totals = {module: math.fsum(values) for module, values in scores.items() if len(values) > min_rank}
    chosen: dict[str, list[int]] = {}
    for module in sorted((m for m in totals if totals[m] <= 0 and not spared.get(m)), key=lambda m: totals[m]):
        size = len(scores[module]) - min_rank
        if (cost := cost_of({module: size}, costs)) <= count:
            lowest = sorted(range(len(scores[module])), key=lambda position: scores[module][position])[:size]
            chosen[module] = sorted(lowest)
            count -= cost
    return chosen


def _check_finite(scores: ModuleScores) -> None:
    for module, values in scores.items():
        if not all(map(math.isfinite, values)):
            raise ValueError(f"a score of module {module} is not a finite number: {list(values)}")


def spread(count: int, room: Mapping[str, int], means: Mapping[str, float], costs: Costs | None = None) -> dict[str, int]:
    """Spreads ``count`` new ranks evenly over modules, the remainder to those with the highest mean score.

    Eight ranks over m1 > m2 > m3 give 3, 3, 2. A module takes no more than its ``room``; what it cannot take is spread over the
    others in the same way, and what no module can take is not given. With ``costs`` the ranks given cost at most ``count``: in its
    turn a module takes one if its cost still fits, until none fits any more.
    """
    modules = list(room)
    each = {module: cost_of({module: 1}, costs) for module in modules}
    order = sorted((m for m in modules if room[m] > 0), key=lambda m: (-means[m], modules.index(m)))
    given = dict.fromkeys(modules, 0)
    while order:
        for module in order:
            if each[module] <= count:
                given[module] += 1
                count -= each[module]
        order = [module for module in order if given[module] < room[module] and each[module] <= count]
    return {module: n for module, n in given.items() if n > 0}


def smoothed(
    history: Sequence[Round], live: Mapping[str, list[int]], scores: Mapping[str, list[float]], smoothing: float
) -> dict[str, list[float]]:
    """The scores a round decides by: an exponential mean over the rounds each rank has lived through.

    smoothing * (the mean so far) + (1 - smoothing) * (its score now); a rank that was not live in the round before starts with
    its score. Computed from the history alone, so that a resumed run needs nothing else.

    Args:
        live: path -> live slots now, in the order of ``scores``.
    """
    if not smoothing:
        return dict(scores)
    mean: dict[tuple[str, int], float] = {}
    for one in history:
        mean = _mixed(mean, one.slots, one.scores, smoothing)
        for path, dead in one.pruned.items():
            for slot in dead:
                del mean[path, slot]  # should the slot come to life again it holds another rank
    mean = _mixed(mean, live, scores, smoothing)
    return {path: [mean[path, slot] for slot in live[path]] for path in scores}


def _mixed(
    mean: Mapping[tuple[str, int], float],
    live: Mapping[str, list[int]],
    scores: Mapping[str, list[float]],
    smoothing: float,
) -> dict[tuple[str, int], float]:
    now = {(path, slot): value for path in scores for slot, value in zip(live[path], scores[path], strict=True)}
    return {rank: smoothing * mean[rank] + (1 - smoothing) * value if rank in mean else value for rank, value in now.items()}


def spared(history: Sequence[Round], live: Mapping[str, list[int]], grace_rounds: int) -> dict[str, set[int]]:
    """Path -> positions among its live slots of the ranks grown in the last ``grace_rounds`` rounds."""
    young: dict[str, set[int]] = {}
    for one in history[-grace_rounds:] if grace_rounds else []:
        for path, grown in one.grown.items():
            young.setdefault(path, set()).update(grown)
    return {path: {at for at, slot in enumerate(live[path]) if slot in new} for path, new in young.items()}
