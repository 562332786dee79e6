"""A round of rank allocation: when it runs and how much it prunes, from scores to what is pruned and what grows. Read it downwards.

ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187, algorithm 1): score every live rank on a validation batch, prune the lowest over
the whole model, and grow as many in the modules that lost none. ``ConstantBudget`` and ``Cubic`` say when; ``run_round`` does it to
a model. What follows it decides, in functions that know no model: modules are names, a module's scores are listed by its live
ranks, and the answer is positions in those lists, or counts. Ties are broken by the order of the modules and then of the ranks: the
same input gives the same answer.

The paper counts ranks. With ``costs``, module -> what one of its ranks costs, the same rules count what ranks cost: a rank is
judged by its score per cost, and budgets and what is to be pruned are in that unit. That is gatewise's own.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from gatewise.allocation import slots
from gatewise.allocation.scoring import Batches, Score, from_nothing, loss_without, parts_of, scoring
from gatewise.checks import is_number, is_whole
from gatewise.errors import DivergedError, GatewiseError, some
from gatewise.losses import mean_loss
from gatewise.processes import summed

# ---------------------------------------------------------------- when rounds run, and how much each prunes


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """When rounds run.

    Attributes:
        rounds: most rounds to run (the paper's N_A). Those that would fall on or after the last step are left out: what they
            grow could not learn any more.
        first_round: when the first round runs: epochs, or steps when an int above 1 (K1).
        recover: training between rounds: epochs, or steps when an int above 1 (K2).

    Raises:
        GatewiseError: a setting that cannot be.
    """

    name: ClassVar[str]
    rounds: int = 8
    first_round: float = 1.0
    recover: float = 0.25

    def __post_init__(self) -> None:
        for name in ("rounds", "first_round", "recover", "grace_rounds"):
            number = getattr(self, name, 0)
            span = name in ("first_round", "recover")
            if not (is_number(number) and number > 0 if span else is_whole(number) and number >= 0):
                expected = "epochs or steps above 0" if span else "a whole number of at least 0"
                raise GatewiseError(f"{name} is {number!r}; expected {expected}")

    def steps(self, steps_per_epoch: int | None) -> list[int]:
        """The steps after which rounds run, if training goes on for so long.

        Args:
            steps_per_epoch: None where the training data has no length.

        Raises:
            GatewiseError: epochs of data that has no length.
        """
        for name, value in (("first_round", self.first_round), ("recover", self.recover)):
            if steps_per_epoch is None and not _is_steps(value):
                raise GatewiseError(f"{name}={value} means epochs, but the training data has no length: give steps, an int above 1")
        first, between = (in_steps(value, steps_per_epoch or 0) for value in (self.first_round, self.recover))
        return [first + between * index for index in range(self.rounds)]


@dataclass(frozen=True, kw_only=True)
class ConstantBudget(Rounds):
    """ALoRA's schedule (arXiv 2403.16187, algorithm 1): what is pruned is given to other modules.

    Attributes:
        prune_fraction: share of the budget pruned in a round (n_A).
        r_max: slots of each layer, the most ranks that it can grow to; None for twice its rank at the start.
        grace_rounds: for so many rounds a new rank is not pruned. It starts with B at zero, so that in a short round it has no
            time to earn a score; 0, the paper's rule, prunes it like any other.
    """

    name: ClassVar[str] = "constant-budget"
    prune_fraction: float = 1 / 8
    r_max: int | None = None
    grace_rounds: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.prune_fraction) or not 0 < self.prune_fraction < 1:
            raise GatewiseError(f"prune_fraction is {self.prune_fraction!r}; expected a share between 0 and 1, such as 1/8")
        if self.r_max is not None and not is_whole(self.r_max):
            raise GatewiseError(f"r_max is {self.r_max!r}; expected a number of ranks, or None for twice as many as at the start")

    def cut(self, start: int, target: int, live: int, done: int, rounds: int) -> tuple[int, int]:
        """What a round prunes at least, and the most that lives after it: the same share in each round.

        Args:
            start: what lived at the start, in the unit of the budget.
            target: what is to live at the end.
            live: what lives before the round.
            done: how many rounds there will have been, this one included.
            rounds: how many there are in all.
        """
        return max(1, round(self.prune_fraction * start)), start


@dataclass(frozen=True, kw_only=True)
class Cubic(Rounds):
    """A budget that comes down from a larger adapter on AdaLoRA's curve (arXiv 2303.10512, eq. 12), fast at first. Nothing grows.

    Attributes:
        target_rank: what is left at the end: so many ranks a module on average, or the parameters of an adapter that has this
            rank everywhere.
    """

    name: ClassVar[str] = "cubic"
    target_rank: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.target_rank) or not 0 < self.target_rank < math.inf:
            raise GatewiseError(
                f"target_rank is {self.target_rank!r}; expected a number above 0, the mean rank of a module at the end"
            )

    def cut(self, start: int, target: int, live: int, done: int, rounds: int) -> tuple[int, int]:
        """As for ``ConstantBudget``: down to target + (start - target) (1 - done / rounds)^3, the target from the last round on."""
        left = max(0.0, 1 - done / rounds) if rounds else 0.0
        budget = target + round((start - target) * left**3)
        return max(0, live - budget), budget


def in_steps(value: float, steps_per_epoch: int) -> int:
    """A span of training, in epochs, or in steps where it is a whole number above 1, as a number of optimiser steps."""
    return int(value) if _is_steps(value) else max(1, round(value * steps_per_epoch))


def _is_steps(value: float) -> bool:
    return isinstance(value, Integral) and value > 1


# ---------------------------------------------------------------- a round

ModuleScores = Mapping[str, Sequence[float]]
Costs = Mapping[str, int]


class Plan(NamedTuple):
    """One round's decision. Your own rule may return any pair of two such mappings.

    Attributes:
        pruned: module -> positions among its live ranks to switch off; only modules that lose some.
        grown: module -> number of new ranks; only modules that get some.
    """

    pruned: Mapping[str, Sequence[int]] = {}
    grown: Mapping[str, int] = {}


@dataclass(frozen=True)
class Limits:
    """What a round is to keep to.

    Attributes:
        count: ranks to prune, or with ``costs`` what their costs must add up to at least.
        budget: most live ranks over the whole model after the round, or the most they may cost.
        capacity: module -> most ranks it can hold.
        costs: module -> what one of its ranks costs; None for 1 each, the paper's rule.
        min_rank: ranks a module keeps whatever their scores.
        spared: module -> positions of ranks that are not pruned this time.
    """

    count: int
    budget: int
    capacity: Mapping[str, int]
    costs: Costs | None = None
    min_rank: int = 0
    spared: Mapping[str, Collection[int]] = field(default_factory=dict)


def cost_of(ranks: Mapping[str, int], costs: Costs | None) -> int:
    """What ranks (module -> how many) cost together: their number without ``costs``."""
    return sum(count * (1 if costs is None else costs[module]) for module, count in ranks.items())


Rule = Callable[[ModuleScores, Limits], tuple[Mapping[str, Sequence[int]], Mapping[str, int]]]
"""Who is pruned and who grows: scores of the live ranks by module, and what to keep to -> a ``Plan``."""


@dataclass(frozen=True)
class Round:
    """What one round saw and did.

    Attributes:
        round: 1 for the first.
        step: the optimiser step after which it ran.
        scores: path -> score of each rank that was live, in the order of ``slots``. Unless the budget counts ranks they are
            counted from a rank that does nothing.
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
    layers: Mapping[str, LoraLinear],
    live: dict[str, list[int]],
    optimizer: torch.optim.Optimizer | None,
    batch: Batches,
    rows: int,
    score: Score,
    rule: Rule,
    limits: Limits,
    history: Sequence[Round],
    step: int,
    from_idle: bool,
    seed: int,
) -> Round:
    """One round on a model in training: its LoRA factors and the optimiser's state of them change, nothing else.

    Args:
        layers: path -> LoRA layer of the adapter.
        live: path -> its slots that live.
        optimizer: of the training; None when there is none any more.
        batch: the validation batch, or several.
        rows: how many rows training takes at once.
        score, rule, seed: see ``RankAllocation``.
        history: the rounds before.
        step: the optimiser step after which it runs.
        from_idle: scores are counted from a rank that does nothing, so that their size means something, and not their order alone.

    Raises:
        GatewiseError: a loss or a score that is not a finite number, scores of other modules or ranks than the live ones, or a
            plan that cannot be carried out.
    """
    began = time.perf_counter()
    # One seed a round, apart from the training's random state: a resumed run and every process draw the same.
    own_seed = seed * 1_000_003 + len(history)
    # Opened once: each opening may convert a half-precision model to float32, and back.
    with scoring(model, score.by_losses, rows):
        # Score every live rank: with AB-LoRA IS(r) = S(M) - S(M\r) + S(M_r), ALoRA's equation 3.
        losses: list[float] = []  # from a score that computes the loss with all ranks on its way
        given = score.of(model, batch, adapter, prune=limits.count, costs=limits.costs, seed=own_seed, on_loss=losses.append)
        parts = parts_of(model, batch)
        loss_before = losses[0] if losses else parts.loss(model)
        if not math.isfinite(loss_before):
            raise DivergedError(
                f"the loss on the validation batch is {loss_before} at step {step}: training has diverged; "
                "begin again with a lower learning rate"
            )
        found = _checked_scores(given, layers, live, score.name)
        if from_idle and not score.idle_is_zero:
            found = from_nothing(found, loss_without(model, parts, adapter) - loss_before)
        if parts.processes > 1:  # the mean, so that every process takes the same decision
            sums = summed([value.cpu() for value in found.values()], parts.device)
            found = {path: total / parts.processes for path, total in zip(found, sums, strict=True)}
        # Rounded as they are stored.
        scores = {path: [float(f"{number:.9g}") for number in value.tolist()] for path, value in found.items()}
        for path, values in scores.items():
            if not all(map(math.isfinite, values)):
                raise DivergedError(
                    f"score {score.name!r} at step {step}: a score of module {path} is not a finite number: {values}; "
                    "the round was not carried out"
                )
        # Prune the lowest n_A over the whole model, and grow as many in the modules that lost none.
        plan = _checked_plan(rule(scores, limits), scores, limits)
        pruned = {path: [live[path][position] for position in positions] for path, positions in plan.pruned.items()}
        for path, dead in pruned.items():
            slots.prune(layers[path], adapter, dead, optimizer)
        generator = torch.Generator().manual_seed(own_seed)
        grown = {path: slots.grow(layers[path], adapter, n, generator, optimizer) for path, n in plan.grown.items()}
        loss_after = mean_loss(model, parts.own, over_all=parts.processes > 1)
    return Round(
        round=len(history) + 1,
        step=step,
        scores=scores,
        slots=live,
        pruned=pruned,
        grown=grown,
        ranks={path: len(live[path]) - len(pruned.get(path, ())) + len(grown.get(path, ())) for path in layers},
        loss_before=loss_before,
        loss_after=loss_after,
        seconds=round(time.perf_counter() - began, 3),
    )


def _checked_scores(given: Any, layers: Mapping[str, Any], live: Mapping[str, list[int]], score: str) -> dict[str, Tensor]:
    """What a score returned, as tensors in module order.

    Raises:
        GatewiseError: it has not one number for each live rank of each module.
    """
    if not isinstance(given, Mapping):
        raise GatewiseError(f"score {score!r} returned {type(given).__name__}; expected path -> one number for each live rank")
    strange = [path for path in layers if path not in given] + [path for path in given if path not in layers]
    found = {path: torch.as_tensor(given[path]) for path in layers if path in given}  # a user's own score may give lists
    strange += [path for path, values in found.items() if values.shape != (len(live[path]),)]
    if strange:
        raise GatewiseError(
            f"score {score!r} does not fit at {some(strange, 3)}: expected an entry for each of the {len(layers)} paths of "
            "gatewise.allocation.slots.lora_layers(model, adapter), with one number for each of its live ranks (live_slots)"
        )
    return found


def grown_lately(history: Sequence[Round], live: Mapping[str, list[int]], rounds: int) -> dict[str, set[int]]:
    """Path -> positions among its live slots of the ranks grown in the last ``rounds`` rounds."""
    young: dict[str, set[int]] = {}
    for one in history[-rounds:] if rounds else []:
        for path, grown in one.grown.items():
            young.setdefault(path, set()).update(grown)
    return {path: {at for at, slot in enumerate(live[path]) if slot in new} for path, new in young.items()}


def _checked_plan(given: Any, scores: ModuleScores, limits: Limits) -> Plan:
    """The plan that a rule returned, in the order of the modules, if it can be carried out.

    Raises:
        GatewiseError: it cannot.
    """
    try:
        lost, gained = (
            {module: one.get(module, nothing) for module in scores} for one, nothing in zip(given, ((), 0), strict=True)
        )
        plan = Plan({m: sorted(map(int, at)) for m, at in lost.items() if len(at)}, {m: int(n) for m, n in gained.items() if n})
        strange = [module for one in given for module in one if module not in scores]
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise GatewiseError(
            f"the rule returned {given!r}; expected a gatewise.budget.Plan: positions and numbers by module"
        ) from error
    left = {module: len(values) - len(plan.pruned.get(module, ())) for module, values in scores.items()}
    after = {module: rank + plan.grown.get(module, 0) for module, rank in left.items()}
    strange += [m for m, at in plan.pruned.items() if not set(at) <= set(range(len(scores[m]))) or len(set(at)) < len(at)]
    strange += [m for m in plan.pruned if left[m] < limits.min_rank]
    strange += [m for m, n in plan.grown.items() if n < 0 or after[m] > limits.capacity[m]]
    cost = cost_of(after, limits.costs)
    if strange or not any(left.values()) or (plan.grown and cost > limits.budget):
        raise GatewiseError(
            f"the plan of the rule cannot be carried out (after it {cost:,} would live{', and see ' if strange else ''}"
            f"{some(strange)}): expected positions of live ranks, new ranks that a module has room for, at least one rank that "
            f"stays ({limits.min_rank} in each module), and at most {limits.budget:,} of the budget"
        )
    return plan


# ---------------------------------------------------------------- the rule of the papers


def plan_round(scores: ModuleScores, limits: Limits, module_pruning: bool = False) -> Plan:
    """One round of ALoRA: prune the ``count`` lowest ranks of the whole model, give as many to modules that lost none.

    If every module lost a rank nothing is given and the budget shrinks; it never grows past ``budget``. One rank is always left.

    With ``costs`` ranks go by score per cost until ``count`` is freed, and new ones are given while what they cost fits into
    ``budget``. What no rank fits into, or no module could take, is left for the next round.

    With ``module_pruning`` (PI-LoRA, arXiv 2510.04655, reconstructed) whole modules go first: those whose scores add up to zero or
    less, the lowest sum first, as far as they fit into ``count``. They get nothing back, and every other module keeps a rank.

    Args:
        scores: module -> score of each live rank; higher is worth more. With ``costs`` zero must be a rank that does nothing.
    """
    each = {module: cost_of({module: 1}, limits.costs) for module in scores}
    live = cost_of({module: len(values) for module, values in scores.items()}, limits.costs)
    # Without any rank left nothing has a gradient and nothing could grow again. The last one pruned may free more than was asked.
    largest = max((each[module] for module, values in scores.items() if values), default=0)
    count = min(limits.count, max(0, live - largest))
    gone = _worthless(scores, replace(limits, count=count)) if module_pruning else {}
    rest = {module: values for module, values in scores.items() if module not in gone}
    freed = cost_of({module: len(positions) for module, positions in gone.items()}, limits.costs)
    lowest = prune_lowest(rest, replace(limits, count=count - freed, min_rank=max(limits.min_rank, int(module_pruning))))
    pruned = {module: gone.get(module) or lowest[module] for module in scores if module in gone or module in lowest}
    lost = cost_of({module: len(positions) for module, positions in pruned.items()}, limits.costs)
    takers = [module for module, values in scores.items() if module not in pruned and (values or not module_pruning)]
    room = {module: limits.capacity[module] - len(scores[module]) for module in takers}
    means = {m: math.fsum(scores[m]) / len(scores[m]) / each[m] if scores[m] else -math.inf for m in room}
    free = max(0, limits.budget - (live - lost))
    return Plan(pruned, spread(min(lost, free) if limits.costs is None else free, room, means, each))


def prune_lowest(scores: ModuleScores, limits: Limits) -> dict[str, list[int]]:
    """Positions of the ``count`` lowest scores over all modules, by module; with ``costs``, of the lowest scores per cost, so many
    that they cost at least ``count``. Where the last of these costs much, those before it that need not go for that stay.

    A module never falls below ``min_rank``, and ranks that are ``spared`` stay; where that protects too many, fewer than
    ``count`` are pruned.
    """
    modules, count = list(scores), limits.count
    each = [cost_of({module: 1}, limits.costs) for module in modules]
    order = sorted(
        (value / each[at], at, position) for at, values in enumerate(scores.values()) for position, value in enumerate(values)
    )
    left = {module: len(values) for module, values in scores.items()}
    chosen: dict[str, list[int]] = {module: [] for module in modules}
    for _, at, position in order:
        module = modules[at]
        if count > 0 and left[module] > limits.min_rank and position not in limits.spared.get(module, ()):
            chosen[module].append(position)
            left[module] -= 1
            count -= each[at]
    for _, at, position in reversed(order):
        if each[at] <= -count and position in chosen[modules[at]]:
            chosen[modules[at]].remove(position)
            count += each[at]
    return {module: sorted(positions) for module, positions in chosen.items() if positions}


def _worthless(scores: ModuleScores, limits: Limits) -> dict[str, list[int]]:
    """All positions (but ``min_rank``) of the modules whose total is not above zero, the lowest totals first, within ``count``."""
    totals = {m: math.fsum(values) for m, values in scores.items() if len(values) > limits.min_rank and not limits.spared.get(m)}
    chosen: dict[str, list[int]] = {}
    count = limits.count
    for module in sorted((m for m, total in totals.items() if total <= 0), key=lambda m: totals[m]):
        size = len(scores[module]) - limits.min_rank
        if (cost := cost_of({module: size}, limits.costs)) <= count:
            chosen[module] = sorted(sorted(range(len(scores[module])), key=lambda at: scores[module][at])[:size])
            count -= cost
    return chosen


def spread(count: int, room: Mapping[str, int], means: Mapping[str, float], each: Costs | None = None) -> dict[str, int]:
    """Spreads ``count`` new ranks evenly over modules, the remainder to those with the highest mean score.

    Eight ranks over m1 > m2 > m3 give 3, 3, 2. A module takes no more than its ``room``; what it cannot take is spread over the
    others in the same way, and what no module can take is not given. With what a rank of ``each`` module costs the ranks given cost
    at most ``count``: in its turn a module takes one if its cost still fits, until none fits any more.
    """
    modules = list(room)
    each = dict.fromkeys(modules, 1) if each is None else each
    order = sorted((m for m in modules if room[m] > 0), key=lambda m: (-means[m], modules.index(m)))
    given = dict.fromkeys(modules, 0)
    while order:
        for module in order:
            if each[module] <= count:
                given[module] += 1
                count -= each[module]
        order = [module for module in order if given[module] < room[module] and each[module] <= count]
    return {module: n for module, n in given.items() if n > 0}
