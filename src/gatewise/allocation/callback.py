"""RankAllocation: the Trainer callback that moves ranks between the LoRA modules of a model while it trains.

ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187, algorithm 1) on stock PEFT LoRA: train, then several times score every live rank
on a validation batch, prune the lowest over the whole model, grow the modules that lost none, and train on. PI-LoRA (Li et al.,
arXiv 2510.04655, reconstructed) is the same with path-integral scores and, if wanted, the pruning of whole modules. Both count
ranks, whatever the size of their module; by default gatewise counts what the user pays for, parameters.
"""

import inspect
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, get_args
from weakref import ref

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from gatewise.adapters.files import ALLOCATION_FILE, WEIGHTS_FILE
from gatewise.adapters.lora import active_adapter
from gatewise.adapters.whole import WholeAdapter
from gatewise.allocation import Unit, load_function, slots
from gatewise.allocation.algorithm import ConstantBudget, Cubic, Limits, Round, Rule, cost_of, grown_lately, plan_round, run_round
from gatewise.allocation.scores import DEFAULT, as_score
from gatewise.allocation.scoring import Batches, Score
from gatewise.errors import GatewiseError, some
from gatewise.files import write_json
from gatewise.internals import callback_handler
from gatewise.internals.quantised import check_gradients, never_pack
from gatewise.internals.zero import Zero
from gatewise.processes import is_sharded

logger = logging.getLogger(__name__)


class RankAllocation(TrainerCallback, ExportableState):
    """Lets the model decide where the ranks of its LoRA adapter go.

    Give it to ``Trainer(callbacks=[...])`` or ``SFTTrainer(callbacks=[...])`` with a ``PeftModel`` on plain ``LoraConfig``. It
    widens every LoRA layer to ``r_max`` slots when the Trainer is made (the added ones dead), runs the rounds during training,
    and at the end compacts the adapter to its true ranks. ``model.save_pretrained`` then writes an ordinary LoRA adapter with
    ``allocation.json`` beside it. Checkpoints are valid adapters too, and ``resume_from_checkpoint`` goes on in mid-rounds. One
    Trainer takes one ``RankAllocation``. What the Trainer reports to (``report_to``) is told of each round: losses, scores and
    every module's rank.

    ALoRA as in its paper is ``score="ablation", budget="ranks"``; PI-LoRA is ``score="path_integral", module_pruning=True,
    budget="ranks"``. LoRA on linear layers, embeddings and stacked experts (``target_parameters``) takes part, in decoders,
    encoders and, with ``Seq2SeqTrainer``, encoder-decoders; the ranks of an expert are listed as
    ``model.layers.0.mlp.experts.down_proj[2]``. In several processes nothing changes: under FSDP2, ZeRO-2 and ZeRO-3 the factors
    are whole in every process, and what DeepSpeed keeps of them is changed with them.

    Args:
        score: "path_moments" (gatewise's own, see docs/reports/scores.md), "ablation" (AB-LoRA, the score of ALoRA), "taylor"
            (the same to first order), "path_integral" (PI-LoRA), "sensitivity" (AdaLoRA), "random"; or your own, as a
            ``gatewise.scores.Score``, as "module:function", or as a function (model, batch, adapter=...) -> path -> one number
            a live rank, higher for ranks worth keeping, and zero for one that does nothing.
        schedule: ``gatewise.ConstantBudget(...)``, ALoRA's: what is pruned is given to other modules; or ``gatewise.Cubic(...)``,
            which starts from an adapter with more ranks than wanted and only prunes. They say when rounds run.
        validation_batch: the batch, or list of batches, that ranks are scored on: tensors for the model with ``labels``. The same
            in every process, which then scores its part of it.
        rule: who is pruned and who grows: a function (scores, ``gatewise.budget.Limits``) -> ``gatewise.budget.Plan``, or its name
            as "module:function". None for the papers' rule, ``gatewise.budget.plan_round``.
        score_options: further arguments of the score. For "ablation" the default is ``{"mode": "screened"}``, for "path_integral"
            ``{"points": 8}``.
        min_rank: ranks every module keeps.
        module_pruning: modules whose scores add up to zero or less lose all their ranks, as far as they fit into the round's
            number, get none back and leave the adapter; all others keep at least one. For scores that are signed and complete.
        budget: what is counted. "parameters": the numbers of live ranks, d_in + d_out a rank of a linear layer; ranks are pruned by
            score per parameter, and what no rank fits into is left for the next round. "ranks" is the rule of the papers, by which
            ranks that move to larger modules make a larger adapter. A LoRA bias and DoRA's magnitude stay and do not count.
        seed: of the values new ranks start from.
        adapter: which adapter; None for the active one.
        on_round: called with each finished ``Round``.

    Attributes:
        history: the rounds so far.
        unit: what ``budget`` and ``target`` count: "parameters" or "ranks".
        budget: how many of them the adapter starts with, which is never exceeded. Of stacked experts all are written at the rank of
            the one that has most, with zeros after their live ranks, which do not count.
        target: the most of them at the end: ``budget``, or what ``Cubic``'s ``target_rank`` makes of it.
    """

    def __init__(
        self,
        score: str | Score | Callable[..., Any] = DEFAULT,
        schedule: ConstantBudget | Cubic = ConstantBudget(),  # noqa: B008 (frozen)
        validation_batch: Batches | None = None,
        *,
        rule: str | Rule | None = None,
        score_options: Mapping[str, Any] | None = None,
        min_rank: int = 0,
        module_pruning: bool = False,
        budget: Unit = "parameters",
        seed: int = 0,
        adapter: str | None = None,
        on_round: Callable[[Round], None] | None = None,
    ) -> None:
        if not isinstance(schedule, ConstantBudget | Cubic):
            raise GatewiseError(
                f"schedule is {schedule!r}; expected gatewise.ConstantBudget(...) or gatewise.Cubic(target_rank=...)"
            )
        if budget not in get_args(Unit):
            raise GatewiseError(f"budget {budget!r} is not known; expected one of {', '.join(get_args(Unit))}")
        if module_pruning and min_rank:
            raise GatewiseError(f"min_rank is {min_rank}, but module_pruning takes all ranks of a module: leave one of them out")
        if module_pruning and rule is not None:
            raise GatewiseError(
                "module_pruning is part of the papers' rule, but a rule of your own was given: leave one of them out"
            )
        if rule is None:
            rule = partial(plan_round, module_pruning=module_pruning)
        if not isinstance(rule, str) and not callable(rule):
            raise GatewiseError(
                f"rule is {rule!r}; expected a function (scores, limits) -> gatewise.budget.Plan, or module:function"
            )
        self.score = as_score(score, score_options)
        self.rule: Rule = load_function(rule) if isinstance(rule, str) else rule
        self.schedule = schedule
        self.validation_batch = validation_batch
        self.min_rank = min_rank
        self.module_pruning = module_pruning
        self.seed = seed
        self.on_round = on_round
        self.unit = budget
        self.history: list[Round] = []
        self.budget = 0
        self.target = 0
        self._name = adapter or ""  # known when the Trainer is made
        self._prepared: ref[PeftModel] | None = None
        self._capacity: dict[str, int] = {}
        self._costs: dict[str, int] | None = None
        self._floor = min_rank
        self._grace_rounds = schedule.grace_rounds if isinstance(schedule, ConstantBudget) else 0
        self._steps: list[int] = []
        self._rows = 1
        self._moves_dead = False
        self._dead: list[tuple[LoraLinear, Tensor]] = []
        self._whole = WholeAdapter()
        self._zero: Zero | None = None
        self._compacted = False

    def prepare(self, model: PeftModel) -> None:
        """Looks whether the ranks of an adapter can be moved, and widens it. A Trainer that makes its optimiser needs no such call.

        It replaces parameters, so call it before an optimiser of your own is made:

            allocation.prepare(model)
            optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-4)
            Trainer(model=model, callbacks=[allocation], optimizers=(optimizer, None), ...)

        Raises:
            GatewiseError: ranks of this adapter cannot be moved, or not with this schedule.
        """
        name = self._name = active_adapter(model, self._name or None)
        never_pack(model)  # or an evaluation would break the training that follows it
        check_gradients(model, name)
        slots.check_movable(model, name)
        layers = slots.layers_of(model, name)
        start = slots.live_ranks(layers, name)
        if not start:
            raise GatewiseError(f"adapter {name!r} has no LoRA layer to place ranks in")
        self._floor = max(self.min_rank, int(slots.keep_a_rank(model, name)))
        self._costs = slots.costs(layers, name) if self.unit == "parameters" else None
        others = slots.left_alone(model, name)
        if isinstance(self.schedule, ConstantBudget):
            self._capacity = slots.widen(model, self.schedule.r_max, name)
        else:  # a budget that only comes down needs no room to grow
            slots.write_config(model, name)
            self._capacity = slots.capacities(layers, name)
        self.budget = self.target = cost_of(start, self._costs)
        if isinstance(self.schedule, Cubic):
            self.target = self._target(self.schedule.target_rank, start)
        elif self.schedule.rounds and max(start.values()) <= self._floor:
            raise GatewiseError(
                f"no module starts with more than {max(start.values())} ranks, and min_rank, DoRA or trained biases keep "
                f"{self._floor} in each: no rank could move; give a smaller min_rank, or start with a larger r"
            )
        if others:
            logger.warning(
                "%s: no ranks of this kind of layer are moved or taken away, and the budget of %d %s does not count them",
                some(others, 3), self.target, self.unit,
            )  # fmt: skip
        self._prepared = ref(model)

    # Trainer events, in the order they come.

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Widens the adapter: the Trainer exists, its optimiser does not, or was made after ``prepare``."""
        model: PeftModel = kwargs["model"]
        stored: Any = state.stateful_callbacks
        if isinstance(stored[type(self).__name__], list):
            raise GatewiseError(
                "the Trainer has two RankAllocations, but the checkpoints of several adapters do not resume: give one"
            )
        name = self._name = active_adapter(model, self._name or None)
        if args.load_best_model_at_end and name != "default":
            raise GatewiseError(
                f"load_best_model_at_end is on, but Transformers loads only an adapter called 'default' of the best checkpoint, "
                f"not {name!r}: turn it off, or make the adapter under that name"
            )
        if self._prepared is None or self._prepared() is not model:
            self.prepare(model)
        if (optimizer := kwargs.get("optimizer")) is not None:
            held = {id(one) for group in optimizer.param_groups for one in group["params"]}
            if any(one.requires_grad and id(one) not in held for one in self._factors(slots.layers_of(model, name))):
                raise GatewiseError(
                    "the Trainer was given a ready optimizer, which does not hold the parameters that RankAllocation puts in the "
                    "place of the adapter's: call allocation.prepare(model) before you make it, or let the Trainer make it "
                    "(TrainingArguments(optim=...), optimizer_cls_and_kwargs=...)"
                )
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
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if self.schedule.rounds or isinstance(self.schedule, Cubic):
            _check_batches(self.validation_batch)
        self._restore(state)
        self._steps = self._plan(args, state, kwargs.get("train_dataloader"))
        # The Trainer may have looked for a number that fits into memory.
        self._rows = (state.train_batch_size or args.train_batch_size) // max(1, args.n_gpu)
        self._whole.on_train_begin(args, state, control, **kwargs)  # first: ZeRO-3 then has the factors whole
        self._zero = self._whole.zero
        layers = slots.layers_of(model, self._name)
        if slots.capacities(layers, self._name) != self._capacity:
            raise GatewiseError(
                "the model is not the one RankAllocation widened when the Trainer was made (model_init makes a new one for "
                "every run): give the Trainer a model, not model_init"
            )
        # An optimiser of torch's computes exactly, and leaves dead ranks, which have no gradient, dead.
        kind = getattr(optimizer, "optimizer", optimizer)
        if hasattr(kind, "eval"):
            raise GatewiseError(
                f"the optimizer is {type(kind).__name__}, which trains beside the average that is its result: no rank can be moved "
                "in that, so take another one, such as optim='adamw_torch'"
            )
        self._moves_dead = not type(kind).__module__.startswith(("torch.optim.", "deepspeed."))
        self._dead = [(layer, slots.dead_slots(layer, self._name)) for layer in layers.values() if self._moves_dead]
        active = all(self._name in layer.active_adapters and not layer.disable_adapters for layer in layers.values())
        factors = [factor for layer in layers.values() for factor in slots.factors(layer, self._name)]
        if not active or not any(factor.requires_grad for factor in factors):
            raise GatewiseError(
                f"adapter {self._name!r} is not active, or frozen, when training begins, so its ranks would not learn: activate it "
                "with model.set_adapter, and make it with inference_mode=False or load it with is_trainable=True"
            )
        other = [path for path, layer in layers.items() if isinstance(layer, slots.Expert) or self._name in layer.lora_embedding_A]
        if other and is_sharded(model):
            raise GatewiseError(
                f"{some(other, 3)}: LoRA on embeddings or experts cannot be trained under FSDP2 and ZeRO-3: take DDP or ZeRO-2"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps dead ranks dead, and runs a round where one is due."""
        for layer, dead in self._dead:
            slots.prune(layer, self._name, dead)
        if state.global_step in self._steps[len(self.history) :]:
            self._run_round(kwargs["model"], kwargs.get("optimizer"), state.global_step)
            callback_handler.log(self, args, state, control, self._logs(self.history[-1]), **kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compacts the adapter to its true ranks."""
        self._whole.on_train_end(args, state, control, **kwargs)
        model = kwargs["model"]
        if self._zero is not None:
            self._zero.gather(self._factors(slots.layers_of(model, self._name)))
        best = Path(state.best_model_checkpoint or "")
        # Where the best checkpoint has gone, the Trainer says so and keeps the last weights.
        if args.load_best_model_at_end and state.best_model_checkpoint and (best / WEIGHTS_FILE).is_file():
            # The weights are those of the best checkpoint again: rounds after it have not happened to them.
            self.history = [one for one in self.history if one.step <= int(best.name.rsplit("-", 1)[-1])]
        missed = len(self.history) < len(self._steps) or not self._steps
        if missed and self._above_target(model):
            logger.warning(
                "training ended (or its best checkpoint lies) before the budget was down to its target of %d %s: the rest is "
                "pruned now, and nothing recovers from it; run the rounds earlier", self.target, self.unit,
            )  # fmt: skip
            self._run_round(model, None, state.global_step, last=True)
        self.finish(model)
        if state.is_world_process_zero and args.output_dir:
            self.save(Path(args.output_dir, "" if self._name == "default" else self._name))

    # The same for your own training loop.

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
                    above, self.unit, self.target, why if self.module_pruning else "",
                )  # fmt: skip
            self._write_beside(model)
            slots.compact(model, self._name)
            self._compacted = True
            if self._zero is not None:
                self._zero.adopt(model)
        return slots.live_ranks(slots.layers_of(model, self._name), self._name)

    def _above_target(self, model: PeftModel) -> int:
        """What lives, if that is more than a cubic budget is to end with, else 0."""
        if not isinstance(self.schedule, Cubic):
            return 0
        live = cost_of(slots.live_ranks(slots.layers_of(model, self._name), self._name), self._costs)
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
            "score": self.score.name,
            "budget": self.budget,
            "target": self.target,
            "unit": self.unit,
            "schedule": self.schedule.name,
            "prune_fraction": float(self.schedule.prune_fraction) if isinstance(self.schedule, ConstantBudget) else None,
            "module_pruning": self.module_pruning,
            "grace_rounds": self._grace_rounds,
            "seed": self.seed,
            "r_max": self._capacity,
            "rounds": [asdict(one) for one in self.history],
        }

    def state(self) -> dict[str, Any]:
        """What a Trainer checkpoint keeps of this callback."""
        return {"args": {}, "attributes": self.to_json()}

    def _restore(self, state: TrainerState) -> None:
        """Takes up the history of the checkpoint that training resumes from, which may have none."""
        stored: Any = state.stateful_callbacks if state.global_step else {}
        kept = stored.get(type(self).__name__, {}).get("attributes", {})
        for name, now in (("unit", self.unit), ("schedule", self.schedule.name)):
            if kept.get(name, now) != now:
                raise GatewiseError(
                    f"the checkpoint's rounds have {name} {kept[name]!r}, but now it is {now!r}: resume with the same budget= and "
                    "schedule=, or train anew"
                )
        self.budget = kept.get("budget", self.budget)
        self.history = [Round(**one) for one in kept.get("rounds", kept.get("history", ()))]  # as it was called before

    def _plan(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> list[int]:
        """The steps after which rounds run: those of the past first, so that a round's number is its place in the list."""
        try:
            steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
        except TypeError:  # data that comes as a stream has no length
            steps_per_epoch = None
        wanted = self.schedule.steps(steps_per_epoch)
        steps = [step for step in wanted if step < state.max_steps]
        if len(steps) < len(wanted):
            logger.warning(
                "training has %d steps, room for %d of %d rounds (after step %s); train longer, or lower first_round or recover",
                state.max_steps, len(steps), len(wanted), some(map(str, wanted), 2),
            )  # fmt: skip
        return [one.step for one in self.history] + [step for step in steps if step > state.global_step]

    def _run_round(self, model: PeftModel, optimizer: torch.optim.Optimizer | None, step: int, last: bool = False) -> None:
        assert self.validation_batch is not None
        constant = isinstance(self.schedule, ConstantBudget)
        layers = slots.layers_of(model, self._name)
        live = {path: slots.live_slots(layer, self._name) for path, layer in layers.items()}
        ranks = {path: len(own) for path, own in live.items()}
        done = len(self._steps) if last else len(self.history) + 1
        count, budget = self.schedule.cut(self.budget, self.target, cost_of(ranks, self._costs), done, len(self._steps))
        # With a cubic budget nothing grows, into what no rank fits of it either.
        spared = grown_lately(self.history, live, self._grace_rounds)
        limits = Limits(count, budget, self._capacity if constant else ranks, self._costs, self._floor, spared)
        # A constant on every score changes no order of ranks, but that by score per parameter, and sums over modules.
        from_idle = self._costs is not None or self.module_pruning
        # ZeRO spreads the optimiser's state over the processes: a round needs that of all ranks.
        state: AbstractContextManager[Any] = nullcontext(optimizer)
        if self._zero is not None and optimizer is not None:
            state = self._zero.whole(self._factors(layers))
        with state as whole:
            one = run_round(
                model,
                self._name,
                layers,
                live,
                whole,
                self.validation_batch,
                self._rows,
                self.score,
                self.rule,
                limits,
                self.history,
                step,
                from_idle,
                self.seed,
            )
        self.history.append(one)
        self._dead = [(layer, slots.dead_slots(layer, self._name)) for layer in layers.values() if self._moves_dead]
        each = self._costs or dict.fromkeys(layers, 1)
        freed, given = (sum(each[path] * len(own) for path, own in changed.items()) for changed in (one.pruned, one.grown))
        if constant and freed - given >= max(each.values()):
            logger.warning(
                "round %d gave back %d of %d %s: too few modules lost none; a smaller prune_fraction or a larger r_max helps",
                one.round, given, freed, self.unit,
            )  # fmt: skip
        logger.info(
            "round %d at step %d: %d ranks pruned, %d grown, %d live; loss %.4f -> %.4f; %.1f s",
            one.round, step, sum(map(len, one.pruned.values())), sum(map(len, one.grown.values())), sum(one.ranks.values()),
            one.loss_before, one.loss_after,
            one.seconds,
        )  # fmt: skip
        if self.on_round:
            self.on_round(one)

    def _logs(self, one: Round) -> dict[str, float]:
        """What reporters are told of a round."""
        scores = [score for own in one.scores.values() for score in own]
        numbers = {
            "round": one.round,
            "ranks": sum(one.ranks.values()),
            "ranks_pruned": sum(map(len, one.pruned.values())),
            "ranks_grown": sum(map(len, one.grown.values())),
            "budget_used": cost_of(one.ranks, self._costs) / self.budget,
            "loss_before": one.loss_before,
            "loss_after": one.loss_after,
            "score_lowest": min(scores),
            "score_median": statistics.median(scores),
            "score_highest": max(scores),
            "seconds": one.seconds,
        }
        ranks = {f"ranks/{path}": rank for path, rank in one.ranks.items()}
        return {**{f"allocation/{name}": value for name, value in numbers.items()}, **ranks}

    def _factors(self, layers: Mapping[str, LoraLinear]) -> list[torch.nn.Parameter]:
        """A and B of all layers, each once: experts share theirs."""
        return list(dict.fromkeys(factor for layer in layers.values() for factor in slots.factors(layer, self._name)))

    def _target(self, target_rank: float, start: Mapping[str, int]) -> int:
        """What a cubic budget comes down to, in its unit."""
        target = round(target_rank * cost_of(dict.fromkeys(start, 1), self._costs))
        # Modules keep some ranks, and the model its last one, whichever it is.
        least = cost_of({path: min(rank, self._floor) for path, rank in start.items()}, self._costs)
        least = max(least, *(cost_of({path: 1}, self._costs) for path, rank in start.items() if rank))
        if not least <= target < self.budget:
            raise GatewiseError(
                f"target_rank is {target_rank} a module, {target} {self.unit} in all, but the adapter starts with {self.budget} "
                f"and keeps {least} (min_rank, DoRA, trained biases, or one rank): expected a number between them"
            )
        return target

    def _write_beside(self, model: PeftModel) -> None:
        """From now on ``model.save_pretrained`` also writes ``allocation.json``, beside the adapter it describes."""
        save, name = type(model).save_pretrained, self._name
        start = "path_initial_model_for_weight_conversion"

        def save_pretrained(it: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(save).bind(it, save_directory, *args, **kwargs).arguments
            ours = name in (given.get("selected_adapters") or it.peft_config)
            if ours and given.get(start):
                raise GatewiseError(
                    f"{start} takes an adapter's start off it, rank by rank, but its ranks have moved: leave it out, and save the "
                    "base as the start changed it (model.unload().save_pretrained)"
                )
            result = save(it, save_directory, *args, **kwargs)
            if ours and given.get("is_main_process", True):
                self.save(Path(save_directory, "" if name == "default" else name))
            return result

        model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[method-assign]


def _check_batches(given: Any) -> None:
    batches = [given] if isinstance(given, Mapping) else given if isinstance(given, Sequence) else []  # an iterator is read once
    if not batches or not all(isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor) for batch in batches):
        raise GatewiseError(
            "RankAllocation needs validation_batch, one or a list: a batch of tensors with 'labels' to score the ranks on"
        )
    for batch in batches:
        rows = {name: len(value) for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        lists = [name for name, value in batch.items() if isinstance(value, (list, tuple))]
        if lists or len(set(rows.values())) > 1:
            raise GatewiseError(
                f"validation_batch has lists ({some(lists)}) or unlike numbers of rows ({rows}): give what the data collator makes "
                "of the rows"
            )
