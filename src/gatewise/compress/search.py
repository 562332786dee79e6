"""The search: one order of all that can go, and how far along it one can go."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from gatewise.adapters.files import read_note, read_tensors, weights_of
from gatewise.adapters.loading import Loaded
from gatewise.allocation import slots
from gatewise.allocation.scoring import parts_of
from gatewise.allocation.slots import Expert, carries_more_than_ranks, factors, live_slots, lora_layers, prune
from gatewise.compress.basis import to_singular_basis
from gatewise.compress.order import moves, rank_values
from gatewise.compress.quality import Difference, difference, differences, qualities
from gatewise.compress.recovery import Recovery, recover, refit
from gatewise.compress.rows import Rows
from gatewise.errors import GatewiseError, some
from gatewise.files import whole_file
from gatewise.losses import mean_loss
from gatewise.progress import ConsoleProgress
from gatewise.tasks import PadCollator, Records
from gatewise.tasks.metrics import encoded

Unit = Literal["parameters", "modules"]
ADAPTER = "default"  # what PEFT calls the one adapter of a model that was loaded
LOOKS = 7  # candidates that bisection measures at most


@dataclass(frozen=True)
class Goal:
    """What the smaller adapter is to be.

    Attributes:
        unit: what to have least of, "parameters" or "modules".
        size: so many of them. None: as few as the tolerance allows.
        tolerance: by how much its quality may be worse, with a confidence of 95%: in shares of right answers, or nats a token.
    """

    unit: Unit = "parameters"
    size: int | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise GatewiseError(f"the goal is to have few {self.unit!r}; expected one of {', '.join(get_args(Unit))}")
        if not 0 < self.tolerance < math.inf:
            raise GatewiseError(f"the tolerance is {self.tolerance}: expected a number above zero, such as 0.01 (--tolerance)")


@dataclass(frozen=True)
class Size:
    """How large an adapter is.

    Attributes:
        parameters: numbers that its LoRA modules store; a trained head comes on top.
        modules: modules that it adapts, of stacked experts those with a live rank. ranks: live ranks over all of them.
    """

    parameters: int
    modules: int
    ranks: int


@dataclass(frozen=True)
class Candidate:
    """A smaller adapter that was measured.

    Attributes:
        dropped: steps of the order that were taken.
        recovered: whether it was trained after its ranks went.
        quality: the mean over the held-out rows; difference: to the whole adapter, on the same rows.
    """

    dropped: int
    size: Size
    recovered: bool
    quality: float
    difference: Difference


class Search:
    """An adapter in its singular basis, the order in which its ranks go, and the candidates that were measured."""

    def __init__(
        self,
        source: Path,
        loaded: Loaded,
        rows: Rows,
        goal: Goal,
        recovery: Recovery | None,
        order: str,
        work: Path,
        progress: ConsoleProgress,
    ) -> None:
        """Values all that can be dropped, and measures both ends: the whole adapter, and none.

        Args:
            work: a folder of tensors that took long to make, in which an interrupted search finds them again.
        """
        self.loaded, self.rows, self.goal, self.recovery, self.work, self.progress = loaded, rows, goal, recovery, work, progress
        self.note = read_note(source)
        self.candidates: list[Candidate] = []
        self.candidate_rows: list[Tensor] = []  # what was measured of each
        model: Any = loaded.model
        if (bias := model.peft_config[ADAPTER].bias) != "none":
            raise GatewiseError(f"the adapter trained biases of the base model too (bias={bias!r}), which no smaller LoRA holds")
        self.layers = lora_layers(model, ADAPTER)
        self.rank_cost = slots.costs(self.layers, ADAPTER)
        # Numbers that its LoRA modules store and that no rank takes with it, such as DoRA's magnitudes.
        ranked = {id(factor) for layer in self.layers.values() for factor in factors(layer, ADAPTER)}
        named = [value for name, value in model.named_parameters() if ".lora_" in name]
        self.beside_ranks = sum(value.numel() for value in named if id(value) not in ranked)
        self.trainable = [value for value in model.parameters() if value.requires_grad]
        model.requires_grad_(False)
        # Stored name -> the model's own tensor: the factors and what else the adapter has, such as a head.
        self.tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
        self.file_tensors, self.metadata = read_tensors(weights_of(source))
        if missing := self.tensors.keys() - self.file_tensors.keys():
            raise GatewiseError(
                f"the adapter's file has no {some(sorted(missing))}, as where each expert is stored as a module of its own: "
                "compress the adapter that was trained, and export that"
            )
        to_singular_basis(model)
        self.whole = self._copy()
        self.live = {path: live_slots(layer, ADAPTER) for path, layer in self.layers.items()}
        # What does not fit is found before long work.
        features = self._encode(rows.scored)
        self.training = self._encode(rows.train) if rows.train is not None else []
        if rows.measure == "loss":
            self._encode(rows.held_out)
        # In a file rows may be sorted by label, and fitting fits on the first ones and checks on the last.
        shuffled = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).tolist()
        self.batch = PadCollator(loaded.tokenizer)([features[at] for at in shuffled])
        self._order(order)
        self.whole_rows = self._measure("whole")
        for path, layer in self.layers.items():
            prune(layer, ADAPTER, self.live[path])
        self.base_rows = self._measure("without a rank")
        gap = difference(self.whole_rows, self.base_rows, rows.measure)
        if goal.size is None and gap.within(goal.tolerance):
            raise GatewiseError(
                f"the adapter does nothing on these {gap.rows} rows: without any rank the model is as good "
                f"({float(self.base_rows.mean()):.4f}, with the adapter {float(self.whole_rows.mean()):.4f}); give other "
                "data, or a size (--parameters, --modules)"
            )

    def _encode(self, records: Records) -> list[dict[str, Any]]:
        return encoded(self.loaded.model, self.loaded.tokenizer, records, self.loaded.template, self.loaded.max_length)

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.tensors.items()}

    def _load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.tensors[name].copy_(value)

    def _once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns what ``make`` returns, or what it returned when it was first called for this name."""
        path = self.work / f"{name}.safetensors"
        if path.is_file():
            return read_tensors(path)[0]
        made = make()
        with whole_file(path) as part:
            save_file({key: value.contiguous() for key, value in made.items()}, part)
        return made

    def _order(self, order: str) -> None:
        """Sets the steps in which ranks go, and the size and cost of what is left after each."""

        def value() -> dict[str, Tensor]:
            self.progress.say(f"valuing ranks on {len(self.rows.scored)} rows by {order}")
            with self.progress.counting("valuing") as count:
                return rank_values(self.loaded.model, self.batch, order, count)

        by_parameters, found = self.goal.unit == "parameters", self._once("values", value)
        must_stay = carries_more_than_ranks if by_parameters else _stays
        stays = [path for path, layer in self.layers.items() if must_stay(layer, ADAPTER)]
        values = {path: found[path].tolist() for path in self.layers}
        self.moves = moves(values, self.rank_cost if by_parameters else None, stays)
        left = {path: len(live) for path, live in self.live.items()}
        self.sizes = [self._size(left)]
        for move in self.moves:
            left[move.path] -= len(move.ranks)
            self.sizes.append(self._size(left))
        self.costs = [getattr(size, self.goal.unit) for size in self.sizes]
        self.last = max((at for at, size in enumerate(self.sizes) if size.ranks), default=0)
        if self.last == 0:
            kept = "a module with a magnitude (DoRA) or a bias, and stacked experts, keep a rank"
            raise GatewiseError(
                f"the adapter cannot be made smaller: something has to be left of its {self.sizes[0].ranks} ranks in "
                f"{self.sizes[0].modules} modules, and {kept}" + ("" if by_parameters else "; take --least parameters")
            )

    def _size(self, left: Mapping[str, int]) -> Size:
        """The size of an adapter with so many ranks left in each module, as PEFT stores it.

        PEFT stores a rank for a module that cannot go, and for each expert of a parameter as many as the one with most has.
        """
        stored = {path: max(count, int(_stays(self.layers[path], ADAPTER))) for path, count in left.items()}
        experts: dict[str, int] = {}
        for path, count in stored.items():
            parameter = path.partition("[")[0]
            experts[parameter] = max(count, experts.get(parameter, 0))
        parameters = sum(self.rank_cost[path] * experts[path.partition("[")[0]] for path in stored)
        modules = sum(bool(left[path] if isinstance(self.layers[path], Expert) else count) for path, count in stored.items())
        return Size(self.beside_ranks + parameters, modules, sum(left.values()))

    def _measure(self, key: str) -> Tensor:
        """(n,) qualities of the model's present weights on the rows that measure; read from ``work`` where they are in it."""

        def measure() -> dict[str, Tensor]:
            with self.progress.counting(f"measuring {key}") as count:
                rows = qualities(self.loaded, self.rows.held_out, self.rows.measure, count, self.progress.say)
            if not bool(torch.isfinite(rows).all()):
                raise GatewiseError(
                    f"the loss on {self.rows.held_out.source} is not finite: look for numbers that are not in the adapter and its "
                    "base model, or measure on other data"
                )
            return {"rows": rows}

        return self._once(key, measure)["rows"]

    def find(self) -> Candidate:
        """The candidate that the goal asks for. Afterwards the model has its weights."""
        found = self._smallest() if self.goal.size is None else self._of_size(self.goal.size)
        self._drop(found.dropped)
        if found.recovered:
            self._recover(found.dropped)
        return found

    def _smallest(self) -> Candidate:
        """The smallest adapter that is within the tolerance, as far as bisection finds it.

        Candidates are judged together in the end: one is picked for its bound, so all bounds have to hold at once.
        """
        tolerance = self.goal.tolerance
        furthest(self.costs[: self.last + 1], LOOKS, lambda at: self._try(at).difference.within(tolerance))
        found = differences(self.whole_rows, self.candidate_rows, self.rows.measure)
        self.candidates = [replace(one, difference=gap) for one, gap in zip(self.candidates, found, strict=True)]
        good = [one for one in self.candidates if one.difference.within(tolerance)]
        if not good:
            best = max(self.candidates, key=lambda one: one.size.parameters)
            more = "" if self.recovery else ", rows to train on afterwards (--recover)"
            raise GatewiseError(
                f"no smaller adapter is within {tolerance:g} of the whole one with 95% confidence on these {best.difference.rows} "
                f"rows: one with {best.size.parameters:,} of {self.sizes[0].parameters:,} parameters is {best.difference}; give "
                f"more rows{more} or a larger tolerance, which goes on with what was measured here"
            )
        return max(good, key=lambda one: (one.dropped, one.quality))

    def _of_size(self, asked: int) -> Candidate:
        """The first of the order that is as small as was asked for."""
        at = next((at for at, cost in enumerate(self.costs[: self.last + 1]) if cost <= asked), None)
        if at is None:
            raise GatewiseError(
                f"{asked:,} {self.goal.unit} were asked for, but the smallest adapter of this order has {self.costs[self.last]:,}: "
                "ask for more"
            )
        return self._try(at)

    def _try(self, at: int) -> Candidate:
        """Measures what is left after ``at`` steps of the order. Where it is not as good, trains it and measures again."""
        self._drop(at)
        found = self._judge(at, False)
        good = self.goal.size is None and found.difference.within(self.goal.tolerance)
        return self._judge(at, True) if not good and self._recover(at) else found

    def _judge(self, at: int, recovered: bool) -> Candidate:
        rows = self._measure(f"{at} recovered" if recovered else str(at))
        gap, size = difference(self.whole_rows, rows, self.rows.measure), self.sizes[at]
        self.candidates.append(Candidate(at, size, recovered, float(rows.mean()), gap))
        self.candidate_rows.append(rows)
        how = " after recovery" if recovered else ""
        self.progress.say(f"{size.parameters:,} parameters in {size.modules} modules{how}: {gap}")
        return self.candidates[-1]

    def _drop(self, at: int) -> None:
        """Puts the whole adapter back, drops the first ``at`` steps of the order, and fits one number for every rank left."""
        self._load(self.whole)
        for move in self.moves[:at]:
            prune(self.layers[move.path], ADAPTER, [self.live[move.path][rank] for rank in move.ranks])

        def fit() -> dict[str, Tensor]:
            refit(self.loaded.model, self.batch)
            return self.rounded()

        self._load(self._once(f"{at} fitted", fit) if at else self.rounded())

    def rounded(self) -> dict[str, Tensor]:
        """The adapter's tensors in the number formats of its file, in which the smaller one is measured and written."""
        return {name: value.to(self.file_tensors[name].dtype) for name, value in self.tensors.items()}

    def _recover(self, at: int) -> bool:
        """Trains what is left after ``at`` steps. Returns False, and undoes it, if the rows that valued ranks gain nothing."""
        if self.recovery is None or self.rows.train is None:
            return False
        recovery, rows, model = self.recovery, len(self.rows.train), self.loaded.model

        def train() -> dict[str, Tensor]:
            self.progress.say(f"recovering for {recovery.steps} steps on {rows} rows")
            before, loss = self._copy(), self._scored_loss()
            own = nn.ParameterList(self.trainable).requires_grad_(True)
            recover(model, self.loaded.tokenizer, self.training, recovery, self.note)
            own.requires_grad_(False)
            self._load(self.rounded())
            if self._scored_loss() < loss:
                return self._copy()
            self.progress.say("recovery made it no better on the rows that valued ranks, and is left out")
            self._load(before)
            return {}

        trained = self._once(f"{at} trained", train)
        self._load(trained)
        return bool(trained)

    def _scored_loss(self) -> float:
        model = self.loaded.model.eval()
        return mean_loss(model, parts_of(model, self.batch).own)


def _stays(layer: Any, adapter: str) -> bool:
    """True if a layer cannot go as a whole: it has a trained magnitude or bias, or is an expert, of which PEFT keeps all."""
    return carries_more_than_ranks(layer, adapter) or isinstance(layer, Expert)


def furthest(costs: Sequence[float], looks: int, holds: Callable[[int], bool]) -> int | None:
    """The last step of an order that holds, as far as bisection finds it: what holds at a step is taken to hold at those before.

    Args:
        costs: after each step, from the whole adapter down; all above zero.
        looks: steps that are tried at most.

    Returns:
        The step; None where none holds but the whole adapter.
    """
    good, bad = 0, len(costs)
    for _ in range(looks):
        if bad - good < 2:
            break
        # Half as many times as large: between a few ranks and thousands lie many sizes that are nearly the same.
        wanted = math.sqrt(costs[good] * (costs[bad] if bad < len(costs) else costs[-1] / 2))
        at = min(range(good + 1, bad), key=lambda at: (abs(math.log(costs[at] / wanted)), at))
        if holds(at):
            good = at
        else:
            bad = at
    return good or None
