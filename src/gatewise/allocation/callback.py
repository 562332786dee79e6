"""RankAllocation: the Trainer callback that moves ranks between the LoRA modules of a model while it trains.

ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187, algorithm 1) on stock PEFT LoRA: train, then up to ``rounds`` times score every
live rank on a validation batch, prune the lowest over the whole model, grow the modules that lost none, and train on. PI-LoRA
(Li et al., arXiv 2510.04655, reconstructed) is the same with path-integral scores and, if wanted, the pruning of whole modules.
Both count ranks, whatever the size of their module; by default gatewise counts what the user pays for, parameters.
"""

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from gatewise.adapters.files import ALLOCATION_FILE, WEIGHTS_FILE
from gatewise.adapters.whole import WholeAdapter
from gatewise.allocation import SCHEDULES, UNITS, Schedule, Unit, slots
from gatewise.allocation.algorithm import Round, Rules, cost_of, cubic_budget, run_round
from gatewise.allocation.growth import DeadSlots, Place, YoungSlots
from gatewise.allocation.refusals import refuse_what_cannot_work
from gatewise.allocation.scores import DEFAULT, SCORES, about, check_score
from gatewise.allocation.scoring import Batches, Scores, as_batches, in_steps_of
from gatewise.checks import is_number, is_whole
from gatewise.errors import GatewiseError, some
from gatewise.files import write_json
from gatewise.internals.quantised import never_pack
from gatewise.internals.several_adapters import folder_of, load_all_active_adapters
from gatewise.internals.zero import Zero, zero_of
from gatewise.losses import loss_kind
from gatewise.processes import is_sharded

logger = logging.getLogger(__name__)
Score = Callable[..., Scores]


class RankAllocation(TrainerCallback, ExportableState):
    """Lets the model decide where the ranks of its LoRA adapter go.

    Give it to ``Trainer(callbacks=[...])`` or ``SFTTrainer(callbacks=[...])`` with a ``PeftModel`` on plain ``LoraConfig``. It
    widens every LoRA layer to ``r_max`` slots when the Trainer is made (the added ones dead), runs the rounds during training,
    and at the end compacts the adapter to its true ranks. ``model.save_pretrained`` then writes an ordinary LoRA adapter with
    ``allocation.json`` beside it. Checkpoints are valid adapters too, and ``resume_from_checkpoint`` goes on in mid-rounds.

    Args:
        score: "path_moments" (gatewise's own, see docs/scores.md), "ablation" (AB-LoRA, the score of ALoRA), "taylor" (the same to
            first order), "path_integral" (PI-LoRA), "sensitivity" (AdaLoRA), or a function (model, batch, adapter=...) -> path ->
            one number a live rank, higher for ranks worth keeping, and zero for one that does nothing.
        rounds: most rounds to run (the paper's N_A). Those that would fall on or after the last step are left out: what they
            grow could not learn any more.
        prune_fraction: share of the budget pruned in a round (n_A).
        first_round: when the first round runs: epochs, or steps when an int above 1 (K1).
        recover: training between rounds: epochs, or steps when an int above 1 (K2).
        validation_batch: the batch, or list of batches, that ranks are scored on: tensors for the model with ``labels``. The same
            in every process, which then scores its part of it.
        r_max: slots of each layer; None for twice its rank.
        score_options: further arguments of the score. For "ablation" the default is ``{"mode": "screened"}``.
        min_rank: ranks every module keeps.
        seed: of the values new ranks start from.
        adapter: which adapter; None for the active one.
        on_round: called with each finished ``Round``.
        schedule: "constant-budget" is ALoRA's: what is pruned is given to other modules. "cubic" starts from an adapter with more
            ranks than wanted and only prunes, down to the target on AdaLoRA's cubic curve; ``prune_fraction`` is not used.
        target_rank: with "cubic", what makes the target: so many ranks a module, or the parameters of an adapter that has this rank
            everywhere.
        smoothing: of the scores over rounds: each round decides by smoothing * (what the last one decided by) + (1 - smoothing) *
            (its own scores). 0 for none. A rank that was not there in the last round starts with its own score.
        module_pruning: modules whose scores add up to zero or less lose all their ranks, as far as they fit into the round's
            number, get none back and leave the adapter; all others keep at least one. For scores that are signed and complete.
        grace_rounds: for so many rounds a new rank is not pruned. It starts with B at zero, so that in a short round it has no
            time to earn a score; 0, the paper's rule, prunes it like any other.
        budget: what is counted. "parameters": the numbers of live ranks, d_in + d_out a rank of a linear layer; ranks are pruned by
            score per parameter, and what no rank fits into is left for the next round. "ranks" is the rule of the papers, by which
            ranks that move to larger modules make a larger adapter. "modules", with "cubic" only: whole modules go, those whose
            scores add up to least, until ``target_modules`` are left, which keep their ranks. A LoRA bias and DoRA's magnitude stay
            and do not count.
        target_modules: with budget "modules", how many are left at the end.

    Attributes:
        history: the rounds so far.
        unit: what ``budget`` and ``target`` count: "parameters", "ranks" or "modules".
        budget: how many of them the adapter starts with, which is never exceeded. Of stacked experts all are written at the rank of
            the one that has most, with zeros after their live ranks, which do not count.
        target: the most of them at the end: ``budget``, or with "cubic" what ``target_rank`` or ``target_modules`` makes of it.
    """

    def __init__(
        self,
        score: str | Score = DEFAULT,
        rounds: int = 8,
        prune_fraction: float = 1 / 8,
        first_round: float = 1.0,
        recover: float = 0.25,
        validation_batch: Batches | None = None,
        r_max: int | None = None,
        score_options: Mapping[str, Any] | None = None,
        min_rank: int = 0,
        seed: int = 0,
        adapter: str | None = None,
        on_round: Callable[[Round], None] | None = None,
        schedule: Schedule = "constant-budget",
        target_rank: float | None = None,
        smoothing: float = 0.0,
        module_pruning: bool = False,
        grace_rounds: int = 0,
        budget: Unit = "parameters",
        target_modules: int | None = None,
    ) -> None:
        if isinstance(score, str):
            check_score(score, score_options)
        if not 0 < prune_fraction < 1:
            raise GatewiseError(f"prune_fraction is {prune_fraction}; expected a share between 0 and 1, such as 1/8")
        for name, number in (("rounds", rounds), ("min_rank", min_rank), ("grace_rounds", grace_rounds)):
            if not is_whole(number) or number < 0:
                raise GatewiseError(f"{name} is {number!r}; expected a whole number of at least 0")
        if first_round <= 0 or recover <= 0:
            raise GatewiseError(f"first_round is {first_round} and recover {recover}; expected epochs or steps above 0")
        _check_schedule(schedule, r_max)
        _check_budget(budget, schedule, target_rank, target_modules, min_rank)
        if not 0 <= smoothing < 1:
            raise GatewiseError(f"smoothing is {smoothing}; expected a number from 0 (none) to below 1, such as 0.5")
        if grace_rounds and schedule == "cubic":
            raise GatewiseError(f"grace_rounds is {grace_rounds}, but schedule 'cubic' grows no ranks: leave it out")
        if module_pruning and budget == "modules":
            raise GatewiseError("module_pruning was given with budget 'modules', which takes whole modules anyway: leave it out")
        if module_pruning and min_rank:
            raise GatewiseError(f"min_rank is {min_rank}, but module_pruning takes all ranks of a module: leave one of them out")
        self.score_name = score if isinstance(score, str) else getattr(score, "__name__", "custom")
        function = SCORES[score] if isinstance(score, str) else score
        self.rules = Rules(
            score=function,
            score_name=self.score_name,
            score_options={**(about(score).in_rounds if isinstance(score, str) else {}), **(score_options or {})},
            min_rank=min_rank,
            smoothing=smoothing,
            module_pruning=module_pruning,
            grace_rounds=grace_rounds,
            seed=seed,
            unit=budget,
            from_base=SCORES.get(self.score_name) is function and about(self.score_name).from_base,
        )
        self.rounds = rounds
        self.prune_fraction = prune_fraction
        self.first_round = first_round
        self.recover = recover
        self.validation_batch = validation_batch
        self.r_max = r_max
        self.on_round = on_round
        self.schedule = schedule
        self.target_rank = target_rank
        self.target_modules = target_modules
        self.unit = budget
        self.history: list[Round] = []
        self.budget = 0
        self.target = 0
        self._adapter = adapter
        self._capacity: dict[str, int] = {}
        self._costs: dict[str, int] | None = None
        self._steps: list[int] = []
        self._rows = 1
        self._young = YoungSlots()
        self._dead = DeadSlots()
        self._whole = WholeAdapter()
        self._zero: Zero | None = None
        self._unhook: Callable[[], None] | None = None
        self._compacted = False

    # Trainer events, in the order they come.

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Widens the adapter: the Trainer exists, its optimiser does not."""
        model: PeftModel = kwargs["model"]
        if kwargs.get("optimizer") is not None:
            raise GatewiseError(
                "the Trainer was given a ready optimizer, but RankAllocation replaces the parameters it holds: "
                "let the Trainer make the optimizer, or choose it with TrainingArguments(optim=...)"
            )
        self._adapter = slots.active_adapter(model, self._adapter)
        never_pack(model)  # or an evaluation would break the training that follows it
        refuse_what_cannot_work(model, self._adapter)
        # Two callbacks in one Trainer are told of the same state.
        taken = state.__dict__.setdefault("_adapters_allocated", set())
        if self._name in taken:
            raise GatewiseError(
                f"two RankAllocations in one Trainer move the ranks of adapter {self._name!r}: give one of them, or name another "
                "adapter with adapter="
            )
        taken.add(self._name)
        start = slots.ranks(model, self._adapter)
        if not start:
            raise GatewiseError(f"adapter {self._adapter!r} has no LoRA layer to place ranks in")
        self._costs = slots.costs(model, self._adapter) if self.unit == "parameters" else None
        self.budget = self.target = self._counted(start)
        self._set_target(model, start)
        if others := slots.left_alone(model, self._adapter):
            logger.warning(
                "%s: no ranks of this kind of layer are moved or taken away, and the budget of %d %s does not count them",
                some(others, 3), self.target, self.unit,
            )  # fmt: skip
        # A budget that only comes down needs no room to grow.
        as_it_is = slots.capacities(slots.lora_layers(model, self._adapter), self._adapter)
        room = self.r_max if self.schedule == "constant-budget" else as_it_is
        self._capacity = slots.widen(model, room, self._adapter)
        self._write_beside(model)
        load_all_active_adapters()
        self._whole.on_init_end(args, state, control, **kwargs)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Plans the rounds and, when training resumes, takes up the history of the checkpoint."""
        if not self._capacity:
            raise GatewiseError(
                "RankAllocation must be there when the Trainer is made: pass it in Trainer(callbacks=[...]), and leave "
                "restore_callback_states_from_checkpoint off, it takes up its history by itself"
            )
        if self._compacted:
            raise GatewiseError("this RankAllocation has finished and compacted its adapter: make a new Trainer and a new callback")
        if self.rounds or self.schedule == "cubic":
            _check_batches(self.validation_batch)
        self._whole.on_train_begin(args, state, control, **kwargs)
        layers = slots.lora_layers(kwargs["model"], self._adapter)
        if slots.capacities(layers, self._name) != self._capacity:
            raise GatewiseError(
                "the model is not the one RankAllocation widened when the Trainer was made (model_init makes a new one for "
                "every run): give the Trainer a model, not model_init"
            )
        _check_trained(kwargs["model"], self._name)
        self._restore(state)
        self._zero = zero_of(kwargs.get("optimizer"))
        if is_sharded(kwargs["model"]):
            _check_sharded(layers, self._name, zero=self._zero is not None)
        self._follow(kwargs["model"], kwargs.get("optimizer"))
        if self._zero is not None:
            zero = self._zero.optimizer
            self._unhook = self._zero.after_each_step(lambda: self._young.correct(zero, state.global_step + 1))
        self._steps = self._plan(args, state, kwargs.get("train_dataloader"))
        # The Trainer may have looked for a number that fits into memory.
        self._rows = (state.train_batch_size or args.train_batch_size) // max(1, args.n_gpu)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Makes the step of ranks that were grown not long ago that of a new adapter, and that of dead ones none."""
        if self._zero is None:  # else it is done before ZeRO copies the step into the model
            self._young.correct(kwargs["optimizer"], state.global_step + 1)
            self._dead.keep(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Runs a round where one is due."""
        if state.global_step in self._steps[len(self.history) :]:
            self._run_round(kwargs["model"], kwargs.get("optimizer"), state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compacts the adapter to its true ranks."""
        self._whole.on_train_end(args, state, control, **kwargs)
        optimizer: Any = kwargs.get("optimizer")
        # Schedule-free optimisers train beside the average that is their result. A best checkpoint has that average already.
        if hasattr(optimizer, "eval") and not (args.load_best_model_at_end and state.best_model_checkpoint):
            optimizer.eval()
        if self._zero is not None:
            self._zero.gather(self._factors(kwargs["model"]))
        if self._unhook is not None:
            self._unhook()
            self._unhook = None
        best_folder = folder_of(state.best_model_checkpoint or "", self._name)
        # Where that has gone, the Trainer says so and keeps the last weights.
        if args.load_best_model_at_end and state.best_model_checkpoint and (best_folder / WEIGHTS_FILE).is_file():
            # The weights are those of the best checkpoint again: rounds after it have not happened to them.
            best = int(state.best_model_checkpoint.rsplit("-", 1)[-1])
            self.history = [one for one in self.history if one.step <= best]
        missed = len(self.history) < len(self._steps) or not self._steps
        if missed and self._above_target(kwargs["model"]):
            logger.warning(
                "training ended (or its best checkpoint lies) before the budget was down to its target of %d %s: the rest is "
                "pruned now, and nothing recovers from it; run the rounds earlier", self.target, self.unit,
            )  # fmt: skip
            self._run_round(kwargs["model"], None, state.global_step, last=True)
        self.finish(kwargs["model"])
        if state.is_world_process_zero and args.output_dir:
            self.save(folder_of(args.output_dir, self._name))

    # The same for training loops of one's own.

    def finish(self, model: PeftModel) -> dict[str, int]:
        """Compacts the adapter to its true ranks, once. Call it yourself if training was interrupted.

        A cubic budget does not come down to its target here; a warning says what is left.

        Returns:
            Path -> rank of the modules that are left.
        """
        if not self._compacted:
            if above := self._above_target(model):
                why = ", or modules that module_pruning does not take out as a whole each keep a rank"
                logger.warning(
                    "the adapter has %d %s, where the target was %d: not all rounds ran%s",
                    above, self.unit, self.target, why if self.rules.module_pruning else "",
                )  # fmt: skip
            slots.compact(model, self._adapter)
            self._compacted = True
            if self._zero is not None:
                self._zero.adopt(model)
        return slots.ranks(model, self._adapter)

    def _above_target(self, model: PeftModel) -> int:
        """What lives, if that is more than a cubic budget is to end with, else 0."""
        live = self._counted(slots.ranks(model, self._adapter)) if self.schedule == "cubic" else 0
        return live if live > self.target else 0

    def save(self, folder: str | Path) -> Path:
        """Writes ``allocation.json`` into a folder and returns its path."""
        path = Path(folder) / ALLOCATION_FILE
        write_json(path, self.to_json())
        return path

    def to_json(self) -> dict[str, Any]:
        """Everything decided so far, for ``allocation.json``."""
        return {
            "format": 1,
            "score": self.score_name,
            "budget": self.budget,
            "target": self.target,
            "unit": self.unit,
            "schedule": self.schedule,
            "prune_fraction": self.prune_fraction,
            "smoothing": self.rules.smoothing,
            "module_pruning": self.rules.module_pruning,
            "grace_rounds": self.rules.grace_rounds,
            "seed": self.rules.seed,
            "r_max": self._capacity,
            "rounds": [asdict(one) for one in self.history],
        }

    def state(self) -> dict[str, Any]:
        """What a Trainer checkpoint keeps of this callback."""
        history = [asdict(one) for one in self.history]
        kept = {"adapter": self._adapter, "budget": self.budget, "unit": self.unit, "schedule": self.schedule, "history": history}
        return {"args": {}, "attributes": kept}

    def _restore(self, state: TrainerState) -> None:
        self.history = []
        if state.global_step == 0:
            return
        callbacks: Any = state.stateful_callbacks
        stored = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        # Several callbacks of a kind are stored as a list, to which each checkpoint adds: the last entry of an adapter counts.
        entries = [one["attributes"] for one in (stored if isinstance(stored, list) else [stored]) if isinstance(one, dict)]
        for entry in entries:
            if entry.get("adapter", self._adapter) == self._adapter:
                unit = entry.get("unit", "ranks")  # which all counted before there were others
                if unit != self.unit:
                    raise GatewiseError(
                        f"the checkpoint's budget counts {unit}, but budget is {self.unit!r}: resume with budget={unit!r} "
                        f"(allocation.budget: {unit} in a recipe)"
                    )
                schedule = entry.get("schedule", self.schedule)  # which they did not say at first
                if schedule != self.schedule:
                    raise GatewiseError(
                        f"the checkpoint's schedule is {schedule!r}, but schedule is {self.schedule!r}: resume with "
                        f"schedule={schedule!r} (allocation.schedule: {schedule} in a recipe)"
                    )
                self.budget = entry["budget"]
                self.history = [Round(**one) for one in entry["history"]]

    def _plan(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> list[int]:
        """The steps after which rounds run: those of the past first, so that a round's number is its place in the list."""
        first = self._in_steps("first_round", self.first_round, args, dataloader)
        between = self._in_steps("recover", self.recover, args, dataloader)
        wanted = [first + between * index for index in range(self.rounds)]
        steps = [step for step in wanted if step < state.max_steps]
        if len(steps) < len(wanted):
            logger.warning(
                "training has %d steps, room for %d of %d rounds (the first after step %d, then every %d); "
                "train longer, or lower first_round or recover",
                state.max_steps, len(steps), len(wanted), first, between,
            )  # fmt: skip
        return [one.step for one in self.history] + [step for step in steps if step > state.global_step]

    def _in_steps(self, name: str, value: float, args: TrainingArguments, dataloader: Any) -> int:
        try:
            # Steps need no length: data may come as a stream.
            steps_per_epoch = 0 if is_steps(value) else math.ceil(len(dataloader) / args.gradient_accumulation_steps)
        except TypeError as error:
            raise GatewiseError(
                f"{name}={value} means epochs, but the training data has no length: give steps, an int above 1"
            ) from error
        return in_steps(value, steps_per_epoch)

    def _run_round(self, model: PeftModel, optimizer: torch.optim.Optimizer | None, step: int, last: bool = False) -> None:
        assert self.validation_batch is not None
        capacity = self._capacity
        if self.schedule == "cubic":
            capacity = slots.ranks(model, self._name)  # so that nothing grows into what no rank fits of the budget
            rounds_done = len(self._steps) if last else len(self.history) + 1
            budget = cubic_budget(self.budget, self.target, rounds_done, len(self._steps))
            count = max(0, self._counted(capacity) - budget)
        else:
            budget, count = self.budget, max(1, round(self.prune_fraction * self.budget))
        limit = in_steps_of(self._rows, self.validation_batch, loss_kind(model))
        with self._whole_state(model, optimizer) as whole, limit:
            done = run_round(
                model,
                self._name,
                whole,
                self.validation_batch,
                self.rules,
                self.history,
                step,
                count,
                budget,
                capacity,
                self._costs,
            )
        self.history.append(done)
        self._follow(model, optimizer)
        pruned, grown = (sum(map(len, changed.values())) for changed in (done.pruned, done.grown))
        freed, given = (
            cost_of({path: len(some) for path, some in changed.items()}, self._costs) for changed in (done.pruned, done.grown)
        )
        if self.schedule == "constant-budget" and freed - given >= max((self._costs or {"": 1}).values()):
            logger.warning(
                "round %d gave back %d of %d %s: too few modules lost none; a smaller prune_fraction or a larger r_max helps",
                done.round, given, freed, self.unit,
            )  # fmt: skip
        logger.info(
            "round %d at step %d: %d ranks pruned, %d grown, %d live; loss %.4f -> %.4f; %.1f s",
            done.round, step, pruned, grown, sum(done.ranks.values()), done.loss_before, done.loss_after, done.seconds,
        )  # fmt: skip
        if self.on_round:
            self.on_round(done)

    def _whole_state(self, model: PeftModel, optimizer: torch.optim.Optimizer | None) -> AbstractContextManager[Any]:
        """The optimiser with the state of all ranks, which ZeRO spreads over the processes."""
        return nullcontext(optimizer) if self._zero is None or optimizer is None else self._zero.whole(self._factors(model))

    def _follow(self, model: PeftModel, optimizer: torch.optim.Optimizer | None) -> None:
        """Has the steps of ranks grown so far corrected, and dead ranks kept dead. With ZeRO none comes to life."""
        places, zero = slots.all_places(model, self._adapter), self._zero
        if zero is None:
            self._young.follow(places, self.history, optimizer)
            self._dead.follow(slots.dead_places(model, self._adapter))
            return

        def here(where: Callable[[Sequence[int]], Sequence[Place]], chosen: Sequence[int]) -> list[Place]:
            return [Place(*one) for one in zero.places(where(chosen))]

        self._young.follow({path: partial(here, where) for path, where in places.items()}, self.history, zero.optimizer)

    def _factors(self, model: PeftModel) -> list[torch.nn.Parameter]:
        """A and B of all layers, each once."""
        pairs = slots.all_factors(slots.lora_layers(model, self._adapter), self._name)
        return list(dict.fromkeys(factor for pair in pairs.values() for factor in pair))

    def _counted(self, ranks: Mapping[str, int]) -> int:
        """What live ranks, by path, come to in the unit of the budget."""
        return sum(rank > 0 for rank in ranks.values()) if self.unit == "modules" else cost_of(ranks, self._costs)

    def _set_target(self, model: PeftModel, start: Mapping[str, int]) -> None:
        if self.target_modules is not None:
            self.target = self.target_modules
            if self.target >= self.budget:
                raise GatewiseError(
                    f"target_modules is {self.target}, but the adapter starts with ranks in {self.budget}: give a smaller number"
                )
            if staying := slots.stay_without_ranks(model, self._name):
                raise GatewiseError(
                    f"budget 'modules' takes whole modules out of the adapter, but {staying[0]} cannot go, because it has more "
                    "than ranks (DoRA's magnitude, a bias) or is an adapted parameter: leave that out, or take another budget"
                )
        if self.target_rank is None:
            return
        self.target = round(self.target_rank * self._counted(dict.fromkeys(start, 1)))
        told = f"target_rank is {self.target_rank} a module, {self.target} {self.unit} in all, but"
        if not 0 < self.target < self.budget:
            raise GatewiseError(
                f"{told} the adapter starts with {self.budget}: schedule 'cubic' comes down, so start with a larger r or give a "
                "smaller target_rank"
            )
        floor = max(self.rules.min_rank, int(slots.keep_a_rank(model, self._name)))
        least = self._counted({path: min(rank, floor) for path, rank in start.items()})
        if self.target < least:
            raise GatewiseError(
                f"{told} min_rank, DoRA or trained biases keep {least}: give a larger target_rank or a smaller min_rank"
            )
        # The last rank of the model stays, whichever it is.
        largest = max(self._counted({path: 1}) for path, rank in start.items() if rank)
        if self.target < largest:
            raise GatewiseError(f"{told} one rank of the largest module has {largest}: give a larger target_rank")

    @property
    def _name(self) -> str:
        assert self._adapter is not None
        return self._adapter

    def _write_beside(self, model: PeftModel) -> None:
        """From now on ``model.save_pretrained`` also writes ``allocation.json``, beside the adapter it describes."""
        original = model.save_pretrained
        parameters = inspect.signature(type(model).save_pretrained)

        def save_pretrained(it: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> Any:
            # Through the function, not the bound method: a deep copy of the model must save itself.
            result = getattr(original, "__func__", type(it).save_pretrained)(it, save_directory, *args, **kwargs)
            given = parameters.bind(it, save_directory, *args, **kwargs).arguments
            if given.get("is_main_process", True) and self._name in (given.get("selected_adapters") or it.peft_config):
                self.save(folder_of(save_directory, self._name))
            return result

        model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[method-assign]


def is_steps(value: float) -> bool:
    """Whether a span of training is given in steps: an int above 1. Otherwise it is in epochs."""
    return isinstance(value, int) and value > 1


def in_steps(value: float, steps_per_epoch: int) -> int:
    """A span of training, in epochs or steps, as a number of optimiser steps."""
    return int(value) if is_steps(value) else max(1, round(value * steps_per_epoch))


def _check_batches(given: Any) -> None:
    batches = [] if given is None else as_batches(given)
    if not batches or not all(isinstance(batch, Mapping) and batch.get("labels") is not None for batch in batches):
        raise GatewiseError("RankAllocation needs validation_batch: a batch of tensors with 'labels' to score the ranks on")
    for batch in batches:
        for name, value in batch.items():
            if isinstance(value, (list, tuple)):
                raise GatewiseError(
                    f"validation_batch has {name!r} as a {type(value).__name__}, but models take tensors: give what the data "
                    "collator makes of the rows"
                )
            if isinstance(value, Tensor) and value.ndim and len(value) != len(batch["labels"]):
                raise GatewiseError(
                    f"validation_batch has {len(value)} rows of {name!r} and {len(batch['labels'])} of labels: give as many of both"
                )


def _check_trained(model: PeftModel, name: str) -> None:
    """Refuses an adapter that training would pass by: of several on a model, those that are active are trained."""
    layers = slots.lora_layers(model, name).values()
    if any(name not in layer.active_adapters or layer.disable_adapters for layer in layers):
        active = ", ".join(map(repr, model.active_adapters)) or "none"
        raise GatewiseError(
            f"adapter {name!r} is not active when training begins ({active} is), so it would not be trained: activate it with "
            "model.set_adapter, or several with model.base_model.set_adapter"
        )
    if not any(factor.requires_grad for layer in layers for factor in slots.factors(layer, name)):
        raise GatewiseError(
            f"adapter {name!r} is frozen (none of its factors has requires_grad), so its new ranks would not learn: make it with "
            "inference_mode=False, or load it with is_trainable=True"
        )


def _check_sharded(layers: Mapping[str, LoraLinear], name: str, zero: bool) -> None:
    """Refuses layers that PEFT and what shards the base model do not bring through training together."""
    for path, layer in layers.items():
        if zero and isinstance(layer, slots.Expert):
            raise GatewiseError(
                f"{path} is an adapted parameter (target_parameters), which DeepSpeed's ZeRO-3 cannot train: take ZeRO-2, FSDP2 "
                "or DDP"
            )
        if not zero and name in layer.lora_embedding_A:
            raise GatewiseError(
                f"{path} is an adapted embedding, whose base weights PEFT saves with the adapter, which FSDP2 has cut up: take DDP "
                "or ZeRO, or leave it out of target_modules"
            )


def _check_schedule(schedule: str, r_max: int | None) -> None:
    if schedule not in SCHEDULES:
        raise GatewiseError(f"schedule {schedule!r} is not known; expected one of {', '.join(SCHEDULES)}")
    if schedule == "cubic" and r_max is not None:
        raise GatewiseError(f"r_max is {r_max}, but schedule 'cubic' grows no ranks: leave it out")


def _check_budget(unit: str, schedule: str, target_rank: float | None, target_modules: int | None, min_rank: int) -> None:
    if unit not in UNITS:
        raise GatewiseError(f"budget {unit!r} is not known; expected one of {', '.join(UNITS)}")
    if schedule != "cubic" and target_rank is not None:
        raise GatewiseError(f"target_rank is {target_rank}, but schedule {schedule!r} keeps the budget: give schedule='cubic'")
    if target_rank is not None and (not is_number(target_rank) or not 0 < target_rank < math.inf):
        raise GatewiseError(f"target_rank is {target_rank!r}; expected a number above 0, the mean rank of a module at the end")
    if unit != "modules":
        if target_modules is not None:
            raise GatewiseError(f"target_modules is {target_modules}, but budget {unit!r} counts {unit}: give budget='modules'")
        if schedule == "cubic" and target_rank is None:
            raise GatewiseError("schedule 'cubic' needs target_rank: the mean rank of a module at the end")
        return
    if schedule != "cubic":
        raise GatewiseError(f"budget 'modules' only comes down, but schedule {schedule!r} keeps the budget: give schedule='cubic'")
    if not is_whole(target_modules) or target_modules < 1:
        raise GatewiseError(
            f"target_modules is {target_modules}, but budget 'modules' needs how many modules are left at the end, at least 1"
        )
    if target_rank is not None or min_rank:
        name, value = ("min_rank", min_rank) if target_rank is None else ("target_rank", target_rank)
        raise GatewiseError(f"{name} is {value}, but with budget 'modules' a module keeps all of its ranks or none: leave it out")
