"""BilevelTrainer: one Trainer for "weights on one stream of data, gates on another", in alternation.

First-order DARTS (Liu, Simonyan and Yang, ICLR 2019, arXiv 1806.09055, algorithm 1 with xi = 0), as SPT uses it (Zhu and Tan,
EMNLP 2023, arXiv 2310.20127: gates on one half of the data, weights on the other) and MiLoRA (Zhang et al., Findings of EMNLP 2024,
arXiv 2410.18035: the coefficients of its activation on a validation stream). For lower parameters w and upper parameters a:

    lower step   w <- w - lr_w * dL(w, a; train batch)/dw      a held fixed
    upper step   a <- a - lr_a * dL(w, a; upper batch)/da      w held fixed

How the steps interleave is reconstructed: one upper step follows every ``upper_every`` lower steps (DARTS begins with the upper).
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gatewise.adapters.whole import keeps_whole
from gatewise.bilevel.state import Chosen, CyclicRows, UpperLevel, count_rows, held_fixed, select_upper, split_in_half
from gatewise.errors import GatewiseError, some
from gatewise.processes import average_gradients

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # the mixin goes before whichever Trainer it is mixed with

__all__ = ["STATE_FILE", "BilevelMixin", "BilevelTrainer", "split_in_half"]
logger = logging.getLogger(__name__)
STATE_FILE = "bilevel.safetensors"


class BilevelMixin(_AnyTrainer):
    """Adds an upper level to the ``Trainer`` that follows it: ``class Mine(BilevelMixin, RecipeTrainer): ...``.

    An upper step comes right after the lower optimiser step it follows, when that step's gradients are cleared and before the
    ``on_step_end`` of all other callbacks: they, evaluation and checkpoints see both levels moved and no gradient left over. It
    takes one batch. The lower optimiser, its schedule, clipping and ``grad_norm`` know nothing of the upper parameters, whose
    gradients from training batches are dropped at once. A resumed run equals one never stopped, bit by bit on the CPU.

    The loss of an upper step is its batch's mean, averaged over processes. Training logs gain ``upper_loss`` (the mean over the
    upper steps since the last log), ``upper_grad_norm`` and ``upper_learning_rate`` (both of the last upper step).

    Keep upper parameters in float32: a step of 1e-6 is lost in the rounding of bfloat16.

    Args:
        upper_dataset: the second stream: rows for the Trainer's collator, with a length, read by number. Its order depends on the
            seed (``data_seed``, or else ``seed``) and the pass alone; passes follow without a gap, so that every batch is full.
        upper_parameters: which trainable parameters are the upper level: a name or regular expression (found anywhere in the name
            that ``model.named_parameters()`` gives), several, or a function (name, parameter) -> bool. The others are the
            lower level.
        upper_learning_rate: of the upper optimiser. DARTS 3e-4, MiLoRA 1e-6.
        upper_weight_decay: of all upper parameters, biases too. DARTS 1e-3 (with "adam").
        upper_betas: of "adamw" and "adam". DARTS (0.5, 0.999).
        upper_optim: "adamw", "adam" (whose weight decay is an L2 penalty, as in DARTS) or "sgd" (without momentum). For any other,
            override ``create_upper_optimizer``.
        upper_schedule: "constant", or "lower": the share of its peak at which the last lower step's learning rate stood.
        upper_every: one upper step after every so many lower optimiser steps.
        upper_start: lower optimiser steps before the first such cycle begins or, below 1, a share of the run.
        upper_batch_size: rows a device; ``per_device_train_batch_size`` by default.
        upper_max_grad_norm: clips the upper gradient, on its own; None leaves it as it is.
        Others: those of the Trainer.

    Raises:
        GatewiseError: settings that do not fit the model, the data or the run; sharded training (DeepSpeed, FSDP, tensor parallel);
            while training, an upper gradient that is not finite, or that no upper parameter received.
    """

    def __init__(
        self,
        *args: Any,
        upper_dataset: Any,
        upper_parameters: Chosen,
        upper_learning_rate: float,
        upper_weight_decay: float = 0.0,
        upper_betas: tuple[float, float] = (0.9, 0.999),
        upper_optim: Literal["adamw", "adam", "sgd"] = "adamw",
        upper_schedule: Literal["constant", "lower"] = "constant",
        upper_every: int = 1,
        upper_start: float = 0,
        upper_batch_size: int | None = None,
        upper_max_grad_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.upper_dataset = upper_dataset
        self.upper_parameters = upper_parameters
        self.upper_learning_rate = upper_learning_rate
        self.upper_weight_decay = upper_weight_decay
        self.upper_betas = upper_betas
        self.upper_optim = upper_optim
        self.upper_schedule = upper_schedule
        self.upper_every = upper_every
        self.upper_start = upper_start
        self.upper_batch_size = upper_batch_size
        self.upper_max_grad_norm = upper_max_grad_norm
        self._check_settings()
        self._upper: UpperLevel | None = None
        self._upper_batches: Iterator[Any] | None = None
        self._upper_log: dict[str, Any] = {}
        self._lower_lr_share = 1.0
        self._in_lower_step = False
        super().__init__(*args, **kwargs)
        self._refuse_sharding()
        self._check_columns()
        upper = select_upper(self.model, upper_parameters)
        if self.optimizer is not None:
            _check_lower(self.optimizer, upper)
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in upper.values()):
            logger.warning("some upper parameters are in half precision, which loses small steps: keep them in float32")
        # First, so that all other callbacks see a step's end with both levels moved.
        self.callback_handler.callbacks.insert(0, _UpperSteps(self))

    # For subclasses.

    def compute_upper_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        """The loss of an upper step: the mean over its batch. By default that of the lower level, without ``extra_lower_loss``."""
        return self.compute_loss(model, inputs)

    def extra_lower_loss(self, model: nn.Module, inputs: Any, outputs: Any) -> Tensor | None:
        """What a lower step adds to its loss, such as SPT's consistency: a mean over the batch, or None for nothing.

        Args:
            outputs: what ``compute_loss`` of the Trainer returned beside the loss: the model's outputs of the pass made for it.
        """
        return None

    def create_upper_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
        """A new optimiser for exactly the upper parameters. Its state must be made of tensors and numbers, to be saved."""
        values, lr, decay = list(parameters.values()), self.upper_learning_rate, self.upper_weight_decay
        if self.upper_optim == "sgd":
            return torch.optim.SGD(values, lr=lr, weight_decay=decay)
        kind = torch.optim.AdamW if self.upper_optim == "adamw" else torch.optim.Adam
        return kind(values, lr=lr, betas=self.upper_betas, weight_decay=decay)

    # The state of the upper level.

    @property
    def upper_steps(self) -> int:
        """Upper steps so far, those before a resume included."""
        return self._upper.steps if self._upper else 0

    @property
    def upper_optimizer(self) -> Optimizer | None:
        """The optimiser of the upper level, once training has begun."""
        return self._upper.optimizer if self._upper else None

    # Lower steps: the Trainer's own, kept away from the upper parameters.

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The lower optimiser, as the Trainer makes it but without the upper parameters; and beside it the upper one."""
        upper = select_upper(self.model, self.upper_parameters)
        # The Trainer, and what overrides it, takes all that requires a gradient.
        with held_fixed(upper.values()):
            lower = super().create_optimizer(*args, **kwargs)
        _check_lower(lower, upper)
        before = self._upper
        if before is not None and [*map(id, before.parameters.values())] == [*map(id, upper.values())]:
            # Training anew with the same Trainer goes on with its optimiser, so the upper level does likewise.
            self._upper = UpperLevel(upper, before.optimizer)
        else:
            self._upper = UpperLevel(upper, self.create_upper_optimizer(upper))
        self._upper_batches, self._upper_log = None, {}
        return lower

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The Trainer's, after which the upper parameters have no gradient."""
        assert self._upper is not None
        parameters = self._upper.parameters.values()
        if self.accelerator.num_processes > 1:
            # DDP waits for every parameter it was given, so upper gradients are computed and dropped, not left uncomputed. And
            # it remembers which parameters had one in passes it did not average, upper steps too, and fails where that is gone.
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        self._in_lower_step = True
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._in_lower_step = False
        for parameter in parameters:
            parameter.grad = None
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The Trainer's, and in a lower step ``extra_lower_loss`` on top."""
        base = super().compute_loss
        if not self._in_lower_step or type(self).extra_lower_loss is BilevelMixin.extra_lower_loss:
            return base(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        # A copy, because label smoothing takes the labels out.
        loss, outputs = base(model, {**inputs}, return_outputs=True, num_items_in_batch=num_items_in_batch)
        extra = self.extra_lower_loss(model, inputs, outputs)
        if extra is not None:
            # A loss that is divided by the labels of all batches of the step already will not be divided by their number.
            loss = loss + (extra / self.current_gradient_accumulation_steps if self._is_scaled(num_items_in_batch) else extra)
        return (loss, outputs) if return_outputs else loss

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer takes the loss of a batch to be divided for accumulation already."""
        given = getattr(self, "loss_is_scaled_for_ga", None)  # older versions have no such switch
        if given is not None:
            return bool(given)
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    # Upper steps.

    def upper_step(self) -> None:
        """One batch of the upper stream and one step of the upper optimiser. The training loop calls it."""
        assert self._upper is not None
        level, model = self._upper, self.model_wrapped
        parameters = list(level.parameters.values())
        if self._upper_batches is None:
            seed, turn = self._upper_seed, (self.args.process_index, self.args.world_size)
            order = CyclicRows(len(self.upper_dataset), self._upper_rows, seed, level.rows_seen, *turn)
            self._upper_batches = iter(self._upper_dataloader(order))
        model.train()
        inputs = self._prepare_inputs(next(self._upper_batches))
        level.rows_seen += self._upper_rows * self.args.world_size
        # Without DDP's own averaging, which would wait for the lower parameters too.
        with held_fixed(self._lower_parameters(level)), self.accelerator.no_sync(model):
            with self.compute_loss_context_manager():
                loss = self.compute_upper_loss(model, inputs).mean()  # DataParallel gives one number a device
            if loss.requires_grad:
                self.accelerator.backward(loss)
        average_gradients(parameters, self.accelerator.device)
        self._upper_log["grad_norm"] = self._move_upper(level)
        for parameter in parameters:
            parameter.grad = None
        level.steps += 1
        self._upper_log["learning_rate"] = level.optimizer.param_groups[0]["lr"]
        self._upper_log["losses"] = self._upper_log.get("losses", 0) + loss.detach().float()
        self._upper_log["steps"] = self._upper_log.get("steps", 0) + 1

    def _move_upper(self, level: UpperLevel) -> Tensor:
        """Clips, steps, and returns the norm of the gradient before clipping."""
        parameters = [p for p in level.parameters.values() if p.grad is not None]
        if not parameters:
            raise GatewiseError(
                f"the loss on upper_dataset gives none of the upper parameters ({some(level.parameters)}) a gradient: they take no "
                "part in it, or reentrant activation checkpointing cuts them off (set use_reentrant=False)"
            )
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            scaler.unscale_(level.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.upper_max_grad_norm or math.inf)
        for group in level.optimizer.param_groups:
            # Set at each step rather than by a scheduler, so that there is no further state to save.
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self._lower_lr_share
        if scaler is not None:
            # Infinite gradients are the scaler's business: it leaves the step out and lowers its scale.
            scaler.step(level.optimizer)
            scaler.update()
        elif bool(torch.isfinite(norm)):
            level.optimizer.step()
        else:
            raise GatewiseError(
                f"the upper gradient has norm {float(norm)} after step {self.state.global_step}, so the run stopped before it "
                "moved the upper parameters: lower upper_learning_rate, or check upper_dataset"
            )
        return norm

    def _lower_parameters(self, level: UpperLevel) -> list[nn.Parameter]:
        upper = {id(parameter) for parameter in level.parameters.values()}
        model: Any = self.model
        return [p for p in model.parameters() if p.requires_grad and id(p) not in upper]

    @property
    def _upper_rows(self) -> int:
        """Rows of an upper batch in one process."""
        return (self.upper_batch_size or self.args.per_device_train_batch_size) * max(1, self.args.n_gpu)

    @property
    def _upper_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _upper_dataloader(self, batches: Iterable[list[int]]) -> DataLoader[Any]:
        """These batches of row numbers. Not prepared by Accelerate, which reckons with one open training loader."""
        args, dataset, collate = self.args, self.upper_dataset, self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="upper")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="upper")
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            # A loader draws a number whenever it is opened, as a resumed run does once more: not from the dropout's generator.
            generator=torch.Generator().manual_seed(self._upper_seed),
        )

    # Logs and checkpoints.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's; a log of the training loss gains that of the upper level."""
        if "loss" in logs and self._upper_log:
            done, self._upper_log = self._upper_log, {}
            mean: Any = self.accelerator.reduce(done["losses"] / done["steps"], reduction="mean")
            logs["upper_loss"] = float(mean)
            logs["upper_grad_norm"] = float(done["grad_norm"])
            logs["upper_learning_rate"] = float(done["learning_rate"])
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self._upper is not None:
            self._upper.save(Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Ours first: it can say in a sentence that the checkpoint is of other levels.
        if checkpoint is not None and self._upper is not None:
            self._upper.load(Path(checkpoint) / STATE_FILE)
        super()._load_optimizer_and_scheduler(checkpoint)

    # Called by _UpperSteps.

    def _first_cycle(self, steps: int) -> int:
        """The lower step after which the first cycle begins, in a run of ``steps``."""
        return round(self.upper_start * steps) if self.upper_start < 1 else int(self.upper_start)

    def _begin(self, steps: int) -> None:
        if (steps - self._first_cycle(steps)) // self.upper_every < 1:
            raise GatewiseError(
                f"upper_start={self.upper_start} and upper_every={self.upper_every} leave no upper step in a run of {steps} steps: "
                "lower them or train longer"
            )

    def _note_lower_rate(self) -> None:
        if self.upper_schedule == "lower":
            optimizer: Any = self.optimizer
            group = optimizer.param_groups[0]
            peak = float(group.get("initial_lr", self.args.learning_rate))
            self._lower_lr_share = float(group["lr"]) / peak if peak else 1.0

    def _end_step(self, step: int, steps: int) -> None:
        since = step - self._first_cycle(steps)
        if since > 0 and since % self.upper_every == 0:
            self.upper_step()

    # Refusals.

    def _check_settings(self) -> None:
        count_rows("upper_dataset", self.upper_dataset, 1)
        rate, start, clip, betas = self.upper_learning_rate, self.upper_start, self.upper_max_grad_norm, self.upper_betas
        rules = (
            ("upper_learning_rate", isinstance(rate, int | float) and 0 < rate < math.inf, "a number above 0, such as 3e-4"),
            ("upper_weight_decay", 0 <= self.upper_weight_decay < math.inf, "a number of at least 0"),
            ("upper_betas", len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers from 0 to below 1"),
            ("upper_optim", self.upper_optim in ("adamw", "adam", "sgd"), "one of 'adamw', 'adam', 'sgd'"),
            ("upper_schedule", self.upper_schedule in ("constant", "lower"), "'constant' or 'lower'"),
            ("upper_every", self.upper_every >= 1 and self.upper_every % 1 == 0, "a whole number of lower steps, at least 1"),
            ("upper_start", 0 <= start < 1 or (start >= 1 and start % 1 == 0), "a number of steps, or a share of the run below 1"),
            ("upper_batch_size", self.upper_batch_size is None or self.upper_batch_size >= 1, "a number of rows, at least 1"),
            ("upper_max_grad_norm", clip is None or 0 < clip < math.inf, "a number above 0, or None for no clipping"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise GatewiseError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    def _check_columns(self) -> None:
        """Before the first step, and not at its end: some Trainers tokenise the rows of ``train_dataset`` alone."""
        names = getattr(self.upper_dataset, "column_names", None)
        if names is None:
            return
        try:
            self._remove_unused_columns(self.upper_dataset, description="upper")
        except ValueError as error:
            raise GatewiseError(
                f"upper_dataset has the columns {', '.join(map(repr, names))}, none of which the model takes: give rows that are "
                "tokenised already"
            ) from error

    def _refuse_sharding(self) -> None:
        by = {
            "DeepSpeed": self.is_deepspeed_enabled,
            # What is trained stays whole where WholeAdapter keeps it so.
            "FSDP": (self.is_fsdp_enabled and not keeps_whole(self.callback_handler.callbacks)) or self.is_fsdp_xla_enabled,
            "parallelism_config": getattr(self.accelerator, "parallelism_config", None) is not None,
            "the model's distributed_config": getattr(self, "is_distributed_loading_by_transformers", False),
        }
        for name, active in by.items():
            if active:
                raise GatewiseError(
                    f"this run shards its parameters ({name}), but the two levels are stepped on whole ones: train on one "
                    "device or, on several, with DDP or with FSDP2 and WholeAdapter in Trainer(callbacks=[...])"
                )


class BilevelTrainer(BilevelMixin, Trainer):
    """``transformers.Trainer`` with an upper level: see ``BilevelMixin`` for what happens when, and for the ``upper_`` arguments.

    BilevelTrainer(model=model, args=args, train_dataset=weights_half, upper_dataset=gates_half,
                   upper_parameters=r"gate_logits$", upper_learning_rate=3e-4)
    """


class _UpperSteps(TrainerCallback):
    """Where the training loop reaches the upper level."""

    def __init__(self, trainer: BilevelMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._begin(state.max_steps)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._note_lower_rate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._end_step(state.global_step, state.max_steps)


def _check_lower(optimizer: Any, upper: Mapping[str, nn.Parameter]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    both = [name for name, parameter in upper.items() if id(parameter) in held]
    if both:
        raise GatewiseError(
            f"the Trainer's optimizer holds upper parameters ({some(both)}), which only upper steps may move: give it the others "
            "alone, or let the Trainer make it"
        )
