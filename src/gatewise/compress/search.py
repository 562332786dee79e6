"""The search itself: one order of all that can go, and how far along it one can go."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from gatewise.adapters.loading import Loaded
from gatewise.adapters.lora import takes_out_of_base
from gatewise.allocation import slots
from gatewise.allocation.refusals import refuse_what_cannot_work
from gatewise.allocation.scoring import parts_of
from gatewise.allocation.slots import Expert, factors, live_slots, lora_layers, prune
from gatewise.compress.basis import to_singular_basis
from gatewise.compress.goal import Candidate, Goal, Size
from gatewise.compress.order import above_cap, module_costs, moves, parameter_costs, rank_values, stays_whole
from gatewise.compress.quality import Difference, difference, differences, encoded, qualities
from gatewise.compress.recovery import Recovery, recover, refit
from gatewise.compress.rows import Rows
from gatewise.compress.work import Work
from gatewise.errors import GatewiseError
from gatewise.losses import base_of, mean_loss
from gatewise.progress import ConsoleProgress
from gatewise.tasks import PadCollator, Records

# ---------------------------------------------------------------- models


@contextmanager
def left_as_it_was(model: PeftModel, name: str) -> Iterator[None]:
    """Makes an adapter the active one for a while, and freezes the model.

    Puts back the adapter's weights, what was active and trained, and training modes.
    """
    tuner: Any = model.base_model
    main, active = model.active_adapter, list(model.active_adapters)  # PEFT's model knows one, its layers may have several
    trained = {key: value.requires_grad for key, value in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    if active != [name]:
        model.set_adapter(name)
    before = _copied(model, name)
    model.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        _put(model, name, before)
        if active != [name]:
            model.set_adapter(main)
            tuner.set_adapter(active)
        for key, value in model.named_parameters():
            value.requires_grad_(trained.get(key, False))  # what a failed load left is none of these
        for module, mode in modes:
            module.training = mode


def _own(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """What belongs to the adapter, and is written with it: the factors, and what else it has of its own, such as a head."""
    own = re.compile(rf"\.(?:lora_\w+|modules_to_save|trainable_tokens_delta)\.{re.escape(name)}(?:\.|$)")
    return {key: value for key, value in model.named_parameters() if own.search(key)}


def _copied(model: PeftModel, name: str) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in _own(model, name).items()}


def _put(model: PeftModel, name: str, values: Mapping[str, Tensor]) -> None:
    own = _own(model, name)
    with torch.no_grad():
        for key, value in values.items():
            own[key].copy_(value)


# ---------------------------------------------------------------- the search


@dataclass
class Search:
    """The adapter in its singular basis, the order in which things go, and what was measured so far."""

    loaded: Loaded
    name: str
    rows: Rows
    goal: Goal
    recovery: Recovery | None
    order: str
    seed: int
    note: Mapping[str, Any]
    work: Work
    progress: ConsoleProgress
    dtype: torch.dtype = torch.float32  # of the adapter's file, in which the smaller one is written too
    # Of what else that file has, such as a head, by its name there.
    formats: Mapping[str, torch.dtype] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    candidate_rows: list[Tensor] = field(default_factory=list)  # what was measured of each
    # Of the last candidate that was good enough, or of the size asked for: mostly the one that is taken.
    weights: tuple[Candidate, dict[str, Tensor]] | None = None

    def prepare(self) -> None:
        """Turns the adapter into its singular basis, puts all that can be dropped into an order, and measures both of its ends."""
        model, name = self.loaded.model, self.name
        _refuse(model, name)
        self.layers = lora_layers(model, name)
        self.each = slots.costs(self.layers, name)
        to_singular_basis(model, name)
        self.whole = _copied(model, name)
        self.live = {path: live_slots(layer, name) for path, layer in self.layers.items()}
        self.beside = _beside_ranks(model, name, self.layers)
        self.whole_size = self._size({path: len(live) for path, live in self.live.items()})
        if not any(self.live.values()):
            raise GatewiseError(f"adapter {name!r} has no LoRA with a live rank: there is nothing to make smaller")
        features = self._encoded(self.rows.scored)
        # In a file rows may be sorted by label, and fitting fits on the first ones and checks on the last.
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(self.seed)).tolist()
        self.batch = PadCollator(self.loaded.tokenizer)([features[at] for at in order])
        # What does not fit is found before long work.
        self.training = self._encoded(self.rows.train) if self.rows.train is not None else []
        if self.rows.measure == "loss":
            self._encoded(self.rows.held_out)
        self._make_order()
        self.last = max(at for at, size in enumerate(self.sizes) if size.ranks)
        self._check_something_can_go()
        self.whole_rows = self._measured("whole")
        for path, layer in self.layers.items():
            prune(layer, name, self.live[path])
        self.base_rows = self._measured("without a rank")
        _put(model, name, self.whole)
        gap = self._gap(self.base_rows)
        if not self.goal.has_target and gap.within(self.goal.tolerance):
            raise GatewiseError(
                f"without any rank the model is as good on these {gap.rows} rows ({_mean(self.base_rows):.4f}, with the adapter "
                f"{_mean(self.whole_rows):.4f}): the adapter does nothing here, and the smallest is none; give other data, or a "
                "size (--parameters, --modules)"
            )

    def _encoded(self, records: Records) -> list[dict[str, Any]]:
        return encoded(self.loaded.model, self.loaded.tokenizer, records, self.loaded.template, self.loaded.max_length)

    def _make_order(self) -> None:
        """What goes first, and after each step the size and the cost of what is left."""
        model, by_parameters = self.loaded.model, self.goal.unit == "parameters"
        held = self.work.order()
        if held is None:
            self.progress.say(f"valuing ranks on {len(self.rows.scored)} rows by {self.order}")
            with self.progress.counting("valuing") as count:
                found = rank_values(model, self.batch, self.order, adapter=self.name, progress=count)
            costs = (parameter_costs if by_parameters else module_costs)(model, self.name)
            held = {path: own.tolist() for path, own in found.items()}, costs
            self.work.keep_order(*held)
        values, costs = held
        self.capped = above_cap(values, self.goal.rank_cap) if self.goal.rank_cap else {}
        self.moves = moves(values, costs, self.capped)
        left = {path: len(live) - len(self.capped.get(path, ())) for path, live in self.live.items()}
        self.sizes = [self._size(left)]
        for move in self.moves:
            left[move.path] -= len(move.ranks)
            self.sizes.append(self._size(left))
        self.costs = [size.parameters if by_parameters else size.modules for size in self.sizes]

    def _size(self, left: Mapping[str, int]) -> Size:
        """Of what has so many ranks left, module by module."""
        stored = _stored(left, self.layers, self.name)
        fixed, modules, largest = self.beside
        parameters = fixed + sum(self.each[path] * count for path, count in stored.items())
        modules += sum(bool(left[path] if isinstance(self.layers[path], Expert) else count) for path, count in stored.items())
        return Size(parameters, modules, sum(left.values()), max([largest, *stored.values()]))

    def _check_something_can_go(self) -> None:
        by_parameters, size = self.goal.unit == "parameters", self.whole_size
        if not self.moves and not self.capped:
            kept = "has a magnitude, a bias, stacked experts or a variant of LoRA"
            raise GatewiseError(
                f"nothing can go: every module {kept}, which keep it, and no rank to spare"
                if by_parameters
                else f"no module can go as a whole: every one {kept}, which keep it; take --least parameters or --rank-cap"
            )
        if self.last == 0 and not self.capped and not self.goal.has_target:
            advice = "" if by_parameters or size.ranks == 1 else "; take --least parameters, by which single ranks go"
            raise GatewiseError(
                f"the adapter cannot be made smaller: all of it ({size.ranks} ranks in {size.modules} modules) goes at once{advice}"
            )

    def _measured(self, key: str) -> Tensor:
        """(n,) qualities of the model as it is now, or as they were measured before an interruption."""
        held = self.work.rows(key)
        if held is None:
            with self.progress.counting(f"measuring {key}") as count:
                loaded = self.loaded
                held = qualities(
                    loaded.model, loaded.tokenizer, self.rows.held_out, loaded.template, self.rows.measure,
                    max_length=loaded.max_length, progress=count,
                )  # fmt: skip
            if not bool(torch.isfinite(held).all()):
                raise GatewiseError(
                    f"the loss on {self.rows.held_out.source} is not finite: look for numbers that are not in the adapter and its "
                    "base model, or measure on other data"
                )
            self.work.keep_rows(key, held)
        return held

    def smallest(self, looks: int) -> Candidate:
        """The smallest adapter that is within the tolerance, as far as bisection finds it with ``looks`` candidates.

        Candidates are then judged together: the one that is picked is picked for its bound, so all bounds have to hold at once.
        """
        tolerance = self.goal.tolerance

        def holds(at: int) -> bool:
            return self.measured_at(at).difference.within(tolerance)

        at = furthest(self.costs[: self.last + 1], looks, holds, first=bool(self.capped))
        found = differences(self.whole_rows, self.candidate_rows, self.rows.measure, self.seed)
        self.candidates = [replace(one, difference=gap) for one, gap in zip(self.candidates, found, strict=True)]
        good = [one for one in self.candidates if one.difference.within(tolerance)]
        if not good:
            best = max(self.candidates, key=lambda one: one.size.parameters)
            more = "" if self.recovery else ", rows to train on afterwards (--recover)"
            raise GatewiseError(
                f"no smaller adapter is within {tolerance:g} of the whole one with 95% confidence on these {best.difference.rows} "
                f"rows: one with {best.size.parameters:,} of {self.whole_size.parameters:,} parameters is worse by "
                f"{best.difference.mean:.4f}, at most by {best.difference.high:.4f}; give more rows{more} or a larger tolerance, "
                "which goes on with what was measured here"
            )
        chosen = max(good, key=lambda one: (one.dropped, one.quality))
        if chosen.dropped != at:
            self.progress.say(
                f"of {len(self.candidates)} candidates judged together the smallest within the tolerance has "
                f"{chosen.size.parameters:,} parameters in {chosen.size.modules} modules"
            )
        return chosen

    def of_size(self) -> Candidate:
        """The first of the order that is as small as was asked for."""
        asked = self.goal.parameters or self.goal.modules or 0
        at = next((at for at, cost in enumerate(self.costs[: self.last + 1]) if cost <= asked), None)
        if at is None:
            raise GatewiseError(
                f"{asked:,} {self.goal.unit} were asked for, but the smallest adapter of this order has {self.costs[self.last]:,}: "
                "ask for more"
            )
        return self.measured_at(at)

    def measured_at(self, at: int) -> Candidate:
        """Measures what is left after ``at`` steps of the order, and trains it on where that is not as good."""
        self._cut(at)
        found = self._candidate(at, False, self._measured(str(at)))
        holds = found.difference.within(self.goal.tolerance)
        if self.recovery is not None and not (holds and not self.goal.has_target) and self._recover(at):
            found = self._candidate(at, True, self._measured(f"{at} recovered"))
            holds = found.difference.within(self.goal.tolerance)
        if holds or self.goal.has_target:
            self.weights = (found, _copied(self.loaded.model, self.name))
        size, gap = found.size, found.difference
        judged = "" if self.goal.has_target else "; within the tolerance" if holds else "; not within the tolerance"
        self.progress.say(
            f"{size.parameters:,} parameters in {size.modules} modules{' after recovery' if found.recovered else ''}: worse by "
            f"{gap.mean:.4f}, {gap.at_most}{judged}"
        )
        return found

    def _candidate(self, at: int, recovered: bool, rows: Tensor) -> Candidate:
        found = Candidate(at, self.sizes[at], recovered, _mean(rows), self._gap(rows))
        self.candidates.append(found)
        self.candidate_rows.append(rows)
        return found

    def _gap(self, rows: Tensor) -> Difference:
        return difference(self.whole_rows, rows, self.rows.measure, self.seed)

    def _cut(self, at: int) -> None:
        """Makes the model the whole adapter without what goes in the first ``at`` steps, and fits one number a rank anew."""
        model, name = self.loaded.model, self.name
        _put(model, name, self.whole)
        gone: dict[str, list[int]] = {path: list(ranks) for path, ranks in self.capped.items()}
        for move in self.moves[:at]:
            gone.setdefault(move.path, []).extend(move.ranks)
        for path, ranks in gone.items():
            prune(self.layers[path], name, [self.live[path][rank] for rank in ranks])
        if gone:
            refit(model, self.batch, name)
        self._round()

    def _round(self) -> None:
        """To the numbers that the file will hold, so that what is measured is what is written."""
        with torch.no_grad():
            for key, value in _own(self.loaded.model, self.name).items():
                stored = re.sub(rf"(\.modules_to_save)?\.{re.escape(self.name)}(?=\.|$)", "", key, count=1)
                value.copy_(value.to(self.format_of(stored)))

    def format_of(self, stored: str) -> torch.dtype:
        """The number format in which a tensor of that name is written."""
        return self.formats.get(stored, self.dtype)

    def _recover(self, at: int) -> bool:
        """Trains what is left after ``at`` steps. True if that lowers the loss on the rows that valued ranks.

        Where it does not, all is as before, and no weights are kept.
        """
        assert self.recovery is not None
        assert self.rows.train is not None
        model, name = self.loaded.model, self.name
        before = _copied(model, name)
        held = self.work.weights(at)
        if held is None:
            self.progress.say(f"recovering for {self.recovery.steps} steps on {len(self.rows.train)} rows")
            loss = self._scored_loss()
            own = nn.ParameterList(_own(model, name).values()).requires_grad_(True)
            try:
                recover(model, self.loaded.tokenizer, self.training, self.recovery, self.note, self.seed)
            finally:
                own.requires_grad_(False)
            self._round()
            held = _copied(model, name)
            if not self._scored_loss() < loss:
                self.progress.say("recovery made it no better on the rows that valued ranks, and is left out")
                held = {}
            self.work.keep_weights(at, held)
        _put(model, name, held or before)
        return bool(held)

    def _scored_loss(self) -> float:
        model = self.loaded.model.eval()
        return mean_loss(model, parts_of(model, self.batch).own)

    def take(self, chosen: Candidate) -> None:
        """Makes the model the chosen adapter."""
        if self.weights and (self.weights[0].dropped, self.weights[0].recovered) == (chosen.dropped, chosen.recovered):
            _put(self.loaded.model, self.name, self.weights[1])
            return
        self._cut(chosen.dropped)
        if chosen.recovered:
            self._recover(chosen.dropped)


def _refuse(model: PeftModel, name: str) -> None:
    """Refuses an adapter whose ranks cannot go, before long work."""
    refuse_what_cannot_work(model, name)
    config: Any = model.peft_config[name]
    if takes_out_of_base(config.init_lora_weights):
        raise GatewiseError(
            f"the adapter has init_lora_weights {config.init_lora_weights!r}, for which PEFT changes the base model by the rank "
            "when it loads it: convert it first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    base = base_of(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    tied = base.config.get_text_config().tie_word_embeddings and any(isinstance(one, ModulesToSaveWrapper) for one in ends)
    if config.layer_replication or (config.ensure_weight_tying and tied):
        setting = "layer_replication" if config.layer_replication else "ensure_weight_tying"
        raise GatewiseError(
            f"the adapter was trained with {setting}, with which PEFT cannot load an adapter beside another one to check it: "
            "compress one without"
        )
    if config.bias != "none":
        raise GatewiseError(f"the adapter trained biases of the base model too (bias={config.bias!r}), which no smaller LoRA holds")
    for path, layer in lora_layers(model, name).items():
        if not all(bool(torch.isfinite(factor).all()) for factor in factors(layer, name)):
            raise GatewiseError(f"the LoRA factors of {path} have numbers that are none (NaN or infinite): the adapter is damaged")


def _stored(left: Mapping[str, int], layers: Mapping[str, Any], name: str) -> dict[str, int]:
    """Path -> ranks that PEFT stores: one at least where a module cannot go, and for all experts of a parameter the most of any."""
    stored = {path: max(1, count) if stays_whole(layers[path], name) else count for path, count in left.items()}
    together: dict[str, list[str]] = {}
    for path in left:
        if isinstance(layers[path], Expert):
            together.setdefault(path.rpartition("[")[0], []).append(path)
    for paths in together.values():
        stored |= dict.fromkeys(paths, max(stored[path] for path in paths))
    return stored


def _beside_ranks(model: PeftModel, name: str, layers: Mapping[str, Any]) -> tuple[int, int, int]:
    """What an adapter stores that no rank can be taken from: numbers, modules, and the largest rank of these.

    Magnitudes (DoRA) and biases are such numbers, and modules whose ranks cannot go, such as convolutions in groups.
    """
    held = {id(factor) for layer in layers.values() for factor in factors(layer, name)}
    own = re.compile(rf"(.*)\.lora_\w+\.{re.escape(name)}(\.|$)")
    numbers, with_ranks = 0, set()
    others: dict[str, int] = {}
    for key, value in model.named_parameters():
        if (match := own.match(key)) is None:
            continue
        if id(value) in held:
            with_ranks.add(match[1])
        else:
            module: Any = model.get_submodule(match[1])
            numbers += value.numel()
            others[match[1]] = int(module.r[name])
    largest = [rank for path, rank in others.items() if path not in with_ranks]
    return numbers, len(largest), max(largest, default=0)


def furthest(costs: Sequence[float], looks: int, holds: Callable[[int], bool], first: bool = False) -> int | None:
    """The last step of an order that holds, as far as bisection finds it: what holds at a step is taken to hold at those before.

    Args:
        costs: after each step, from the whole adapter down; all above zero.
        looks: steps that are tried at most.
        first: whether step 0 has to be tried too; otherwise it is the whole adapter.

    Returns:
        The step; None where none holds but the whole adapter.
    """
    good, bad = 0, len(costs)
    found: int | None = None
    if first:
        if not holds(0):
            return None
        found = 0
    for _ in range(looks - first):
        if bad - good < 2:
            break
        # Half as many times as large: between a few ranks and thousands lie many sizes that are nearly the same.
        wanted = math.sqrt(costs[good] * (costs[bad] if bad < len(costs) else costs[-1] / 2))
        at = min(range(good + 1, bad), key=lambda at: (abs(math.log(costs[at] / wanted)), at))
        if holds(at):
            good = found = at
        else:
            bad = at
    return found


def _mean(rows: Tensor) -> float:
    return float(rows.mean())
