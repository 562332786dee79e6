"""The Trainer of a run: computes the loss at labelled positions only, stops at the first NaN, writes checkpoints to resume from.

Shapes: b batch, t tokens.
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from gatewise.adapters.checkpoints import DIVERGED_FILE, complete_checkpoints
from gatewise.adapters.files import NOTE_FILE, WEIGHTS_FILE, read_tensors
from gatewise.errors import DivergedError, GatewiseError, reason_of
from gatewise.files import write_json
from gatewise.internals.sharding import reshard
from gatewise.internals.trainer_device import run_on
from gatewise.internals.zero import is_asked_for, zero_of
from gatewise.losses import base_of, mean_loss, scored, soft_prompt
from gatewise.parts import Run
from gatewise.processes import count, is_sharded, own_share
from gatewise.runs.recipe import TrainingSection

# A chunk this many batches long is sorted by length: long enough to save padding, short enough to keep rows well mixed.
_BATCHES_A_CHUNK = 32
TENSORBOARD = "tensorboard"  # folder of a run's event files
LossTerm = Callable[[Any, Any], Tensor]


class RecipeTrainer(Trainer):
    """``transformers.Trainer`` with the loss of ``gatewise.losses``: the same number, the head only where it is read.

    Args:
        note: what ``gatewise eval`` needs to know of the run, written into every checkpoint as ``gatewise.json``.
        loss_term: what a batch's loss gains while training, see ``gatewise.parts.Method.loss_term``.
        group_by_length: draw batches of rows of like length.
        lora_plus_ratio: how many times faster LoRA's B learns than all else; None for the same rate.
        patience: end the run after so many evaluations that are no better than an earlier one, by ``args.metric_for_best_model``.
            It reads the log, which checkpoints keep, so a resumed run stops where an uninterrupted one does.
        measure: (model) -> what an evaluation gives beside the loss, by name.
        Others: as for ``Trainer``; datasets are lists of features for ``collator``.

    Raises:
        DivergedError: while training, a loss or a gradient that is not finite.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        train_dataset: Sequence[Mapping[str, Any]],
        eval_dataset: Sequence[Mapping[str, Any]],
        collator: Callable[..., dict[str, Tensor]],
        note: Mapping[str, Any],
        callbacks: list[TrainerCallback],
        loss_term: LossTerm | None = None,
        group_by_length: bool = False,
        lora_plus_ratio: float | None = None,
        patience: int | None = None,
        measure: Callable[[Any], Mapping[str, float]] | None = None,
        watched: str = "dev",
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # So that the Trainer counts the labels of all batches of a step and leaves the division to compute_loss.
        self.model_accepts_loss_kwargs = True
        self.note = dict(note)
        self.loss_term = loss_term
        self.group_by_length = group_by_length
        self.lora_plus_ratio = lora_plus_ratio
        self.patience, self.watched = patience, watched
        self.measure = measure

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross-entropy over the labels of an optimiser step, or of the batch when their number is not given.

        ``loss_term`` comes on top. Outputs are the loss and the logits of ``gatewise.losses.scored``: those that the loss reads.
        """
        made = scored(model, inputs)
        sums, counts = made.losses()
        share: float | Tensor = 1.0
        loss = sums.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None:
            # The labels are counted over all processes, and the gradient will be the mean over them.
            processes = self.accelerator.num_processes
            loss, share = loss * processes, processes * counts.sum() / num_items_in_batch
        if not bool(torch.isfinite(loss)):
            self._stop_diverged(f"the loss is {float(loss)} at step {self.state.global_step + 1}")
        if self.loss_term is not None:
            loss = loss + self.loss_term(model, share)
        return (loss, {"loss": loss, "logits": made.logits}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss over all labels of the dev rows, as ``eval_loss``, and what ``measure`` gives. Draws no random numbers."""
        rows = sorted(self.eval_dataset, key=row_length)  # type: ignore[arg-type]
        size = self.args.per_device_eval_batch_size
        model: Any = self.model
        own, _ = own_share([rows[start : start + size] for start in range(0, len(rows), size)], even=is_sharded(model))
        batches = [self._prepare_inputs(self.data_collator(batch)) for batch in own]
        loss = mean_loss(model.eval(), batches, over_all=True)
        if not math.isfinite(loss):
            self._stop_diverged(f"the loss on {self.watched} is {loss} after step {self.state.global_step}")
        found = {"loss": loss, **(self.measure(model) if self.measure is not None else {})}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if has_stopped_early(self.state.log_history, self.patience, self.args):
            self.control.should_training_stop = True
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, or with ``lora_plus_ratio`` PEFT's of the same kind."""
        if self.lora_plus_ratio is not None and self.optimizer is None:
            adapted, (kind, settings) = cast(Any, model or self.model), self.get_optimizer_cls_and_kwargs(self.args)
            decay, ratio = self.args.weight_decay, self.lora_plus_ratio
            self.optimizer = create_loraplus_optimizer(
                adapted, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, **settings
            )
            # PEFT counts every vector among the Bs: biases of heads, and what routers learn.
            names = {parameter: name for name, parameter in adapted.named_parameters()}
            slow, _, *fast = self.optimizer.param_groups
            vectors = [one for group in fast for one in group["params"] if "lora_B" not in names[one]]
            for group in fast:
                group["params"] = [one for one in group["params"] if "lora_B" in names[one]]
            if vectors:
                self.optimizer.add_param_group({**slow, "params": vectors, "weight_decay": 0.0})
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that depends on seed and epoch alone: a resumed run goes on with the same rows."""
        order = RowOrder(
            [row_length(row) for row in self.train_dataset],  # type: ignore[union-attr]
            self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
            # Accelerate deals the batches out to the processes in turn.
            batch_size=self._train_batch_size * self.accelerator.num_processes if self.group_by_length else None,
        )
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self.train_dataset),
            batch_size=self._train_batch_size,
            sampler=order,
            collate_fn=self.data_collator,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's. Stops before an optimiser step that would write NaN into the adapter, and so into the next checkpoint."""
        loss = super().training_step(*args, **kwargs)
        if not self.accelerator.sync_gradients:
            return loss
        if self.is_deepspeed_enabled:  # the step is over before anybody can see the gradients, but for their norm
            norm = cast(Any, self.deepspeed).get_global_grad_norm()  # infinite, or below 0, where the gradients are not finite
            finite = norm is None or 0 <= float(norm) < math.inf
        else:
            # The Trainer clips without this check, and where max_grad_norm is 0 not at all.
            gradients = [p.grad for p in cast(nn.Module, self.model).parameters() if p.grad is not None]
            finite = bool(torch.isfinite(nn.utils.get_total_norm(gradients)))
        if not finite:
            self._stop_diverged(f"the gradient is not finite at step {self.state.global_step + 1}")
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Adapter and note, nothing pickled. PEFT is kept from asking the hub whether embeddings changed."""
        folder, model = output_dir or str(self._folder), cast(PeftModel, self.model)
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        write_json(Path(folder) / NOTE_FILE, self.note)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The Trainer's, and PEFT's own soft prompts, which PEFT refuses to load into an adapter in training."""
        whole = cast(Any, model or self.model)
        if soft_prompt(whole) is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        tensors = read_tensors(Path(resume_from_checkpoint) / WEIGHTS_FILE)[0]
        set_peft_model_state_dict(whole, tensors, adapter_name=str(whole.active_adapter))

    def _stop_diverged(self, what: str) -> None:
        """Ends a run whose numbers are no longer finite.

        A checkpoint of this step has the very weights that gave no finite number: it is marked, so that no resume takes it.
        """
        suspect = self._folder / f"checkpoint-{self.state.global_step}"
        if suspect.is_dir():
            (suspect / DIVERGED_FILE).touch()
        good = complete_checkpoints(self._folder)
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint before it"
        raise DivergedError(
            f"{what}, so the run stopped: {kept}; lower training.learning_rate or check the data and the base model, and train anew"
        )

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or "")


class ShardedTrainer(RecipeTrainer):
    """RecipeTrainer under FSDP and DeepSpeed's ZeRO, which leave the adapter whole.

    The adapter is saved and loaded as without them: no process gathers the base model, and a run may be resumed with another
    strategy.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.is_deepspeed_enabled:
            config: Any = self.accelerator.state.deepspeed_plugin.hf_ds_config
            if {"optimizer", "scheduler"} & config.config.keys():
                raise GatewiseError("DeepSpeed's settings have an optimizer or scheduler, which the recipe sets: leave them out")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's; its groups are noted before DeepSpeed puts tensors of its own into them."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # DeepSpeed copies the weights when it takes the model.
        self._load_from_checkpoint(resume_from_checkpoint)
        made = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return made

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's."""
        if self.is_fsdp_enabled:
            reshard(cast(nn.Module, self.model))
        with self._not_sharding():
            super().save_model(output_dir, _internal_call=_internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        zero = zero_of(self.optimizer) if self.is_deepspeed_enabled else None
        if zero is None:
            with self._not_sharding():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        state, schedule = zero.state_dict(self._groups), cast(Any, self.lr_scheduler).state_dict()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(_of_groups(schedule, len(self._groups)), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        zero = zero_of(self.optimizer) if self.is_deepspeed_enabled else None
        if zero is None or checkpoint is None:
            with self._not_sharding():
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        zero.load_state_dict(state, self._groups)
        cast(Any, self.lr_scheduler).load_state_dict(_of_groups(schedule, len(zero.optimizer.param_groups)))

    def _load_best_model(self) -> None:
        with self._not_sharding():
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._not_sharding():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @contextmanager
    def _not_sharding(self) -> Iterator[None]:
        sharding = self.is_fsdp_enabled, self.is_deepspeed_enabled
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False
        try:
            yield
        finally:
            self.is_fsdp_enabled, self.is_deepspeed_enabled = sharding


def _of_groups(schedule: Mapping[str, Any], groups: int) -> dict[str, Any]:
    """The state of a scheduler, for an optimiser with so many groups: DeepSpeed leaves out those without parameters.

    All groups of a recipe have one learning rate.
    """
    each = ("base_lrs", "lr_lambdas", "_last_lr")
    return {name: value[:1] * groups if name in each else value for name, value in schedule.items()}


class RowOrder(Sampler[int]):
    """Row indices in an order drawn from seed and epoch; with ``batch_size``, batches have rows of like length.

    Not the Trainer's own grouping by length: that draws from torch's random state, which a resumed epoch does not begin with.
    """

    def __init__(self, lengths: Sequence[int], seed: int, epoch: Callable[[], int], batch_size: int | None = None) -> None:
        self.lengths, self.seed, self.epoch, self.batch_size = lengths, seed, epoch, batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}/{self.epoch()}")
        rows = list(range(len(self.lengths)))
        draw.shuffle(rows)
        if self.batch_size is None:
            return iter(rows)
        chunk = self.batch_size * _BATCHES_A_CHUNK
        batches: list[list[int]] = []
        for start in range(0, len(rows), chunk):
            part = sorted(rows[start : start + chunk], key=lambda row: self.lengths[row], reverse=True)
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        # The one batch that may be short has to come last, or all after it would be cut in two.
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        draw.shuffle(batches)
        return iter([row for batch in [*batches, *last] for row in batch])


def has_stopped_early(log: Sequence[Mapping[str, Any]], patience: int | None, args: TrainingArguments) -> bool:
    """True where a log ends with ``patience`` evaluations that are no better than an earlier one, by ``metric_for_best_model``."""
    name = args.metric_for_best_model or "eval_loss"
    values = [entry[name] for entry in log if name in entry]
    best = max if args.greater_is_better else min
    return patience is not None and bool(values) and len(values) - 1 - values.index(best(values)) >= patience


def row_length(row: Mapping[str, Any]) -> int:
    """Tokens of an encoded row."""
    return len(row["input_ids"])


def share_of(training: TrainingSection, processes: int) -> int:
    """How many rows of a batch each process reads.

    Raises:
        GatewiseError: they cannot all read the same number.
    """
    if training.batch_size % processes:
        raise GatewiseError(
            f"training.batch_size is {training.batch_size}, which {processes} processes "
            f"cannot share: give a multiple of {processes}"
        )
    return training.batch_size // processes


def arguments_of(run: Run, steps: int, evaluates: bool = True) -> TrainingArguments:
    """The arguments of a Trainer that trains a run's model for some steps; without ``evaluates`` it measures nothing meanwhile.

    Raises:
        GatewiseError: settings that do not work here, or a batch that the processes cannot share.
    """
    training, on_cpu, processes, deepspeed = run.recipe.training, run.device.type == "cpu", count(), is_asked_for()
    eval_every, load_best = (training.eval_every, training.load_best) if evaluates else (None, False)
    chooses = load_best or (eval_every is not None and training.early_stopping_patience is not None)
    try:
        arguments = TrainingArguments(
            output_dir=str(run.output / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=share_of(training, processes),
            per_device_eval_batch_size=training.eval_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation,
            optim=training.optim,
            learning_rate=training.learning_rate,
            warmup_steps=min(math.ceil(training.warmup_ratio * steps), steps - 1),  # the first has the rate zero
            lr_scheduler_type=training.scheduler,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            bf16=training.bf16,
            use_cpu=on_cpu and not deepspeed,  # or Accelerate would pass DeepSpeed by
            logging_steps=training.log_every,
            # The first NaN stops the run; the Trainer would hide it in the log.
            logging_nan_inf_filter=False,
            eval_strategy="no" if eval_every is None else "steps",
            eval_steps=eval_every,
            save_strategy="steps",
            save_steps=training.save_every or (eval_every if load_best else None) or max(1, math.ceil(steps / 5)),
            save_total_limit=2,
            load_best_model_at_end=load_best,
            # Else Transformers would keep the best checkpoint in place of the one before the last.
            metric_for_best_model=f"eval_{training.best_by}" if chooses else None,
            greater_is_better=training.best_by not in ("loss", *run.task.lower_is_better),
            seed=run.recipe.seed,
            report_to=training.reporters if evaluates else [],
            run_name=run.output.resolve().name,
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
            ddp_backend="gloo" if (processes > 1 or deepspeed) and on_cpu else None,
        )
    except ValueError as error:
        raise GatewiseError(f"training: these settings do not work here: {reason_of(error)}") from error
    if processes == 1 and not deepspeed:  # of several, each has the device that its launcher gave it
        run_on(arguments, run.device)
    return arguments


def trainer_of(
    run: Run,
    *,
    callbacks: Sequence[TrainerCallback],
    loss_term: LossTerm | None = None,
    mixin: type | None = None,
    **settings: Any,
) -> RecipeTrainer:
    """The one Trainer of all runs.

    Args:
        mixin: a class of which the Trainer is to be too, such as ``gatewise.bilevel.BilevelMixin``.
        settings: further arguments, and others than the run's: ``model``, ``args``, ``train_dataset``, ``eval_dataset``.
    """
    training = run.recipe.training
    given = {"model": run.model, "train_dataset": run.train, "eval_dataset": run.dev, **settings}
    if training.gradient_checkpointing:
        recompute_activations(given["model"])
    kind: Any = ShardedTrainer if "LOCAL_RANK" in os.environ else RecipeTrainer  # which every launcher sets
    kind = kind if mixin is None else type(mixin.__name__, (mixin, kind), {})
    trainer: RecipeTrainer = kind(
        args=given.pop("args", None) or arguments_of(run, run.steps),
        collator=run.collate,
        note=run.note,
        callbacks=[*callbacks, run.progress],
        loss_term=loss_term,
        group_by_length=training.group_by_length,
        lora_plus_ratio=training.lora_plus_ratio,
        patience=training.early_stopping_patience,
        measure=partial(_measured, run) if training.eval_metric else None,
        watched=run.watched,
        **given,
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(run.output / TENSORBOARD)
    return trainer


def _measured(run: Run, model: Any) -> dict[str, float | int]:
    """What the task measures, beside the loss, on the rows that are looked at while it trains."""
    with run.progress.counting(f"measuring on {run.watched}") as counting:
        found = run.task.measure(run, model, run.task.measured[run.watched], counting)
    return {name: found.metrics[name] for name in run.task.metrics}


def recompute_activations(model: PeftModel) -> None:
    """Turns gradient checkpointing on."""
    base = base_of(model)
    # The name changes with Transformers 6; inputs need a gradient or nothing before the first adapter would be recomputed.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable()
    base.enable_input_require_grads()
    base.config.use_cache = False
