"""BilevelTrainer: one Trainer for "weights on one stream of data, gates on another", in alternation.

First-order DARTS (Liu, Simonyan and Yang, ICLR 2019, arXiv 1806.09055, algorithm 1 with xi = 0), as SPT uses it (Zhu and Tan,
EMNLP 2023, arXiv 2310.20127: gates on one half of the data, weights on the other) and MiLoRA (Zhang et al., Findings of EMNLP 2024,
arXiv 2410.18035: the coefficients of its activation on a validation stream). For lower parameters w and upper parameters a:

    lower step   w <- w - lr_w * dL(w, a; train batch)/dw      a held fixed
    upper step   a <- a - lr_a * dL(w, a; upper batch)/da      w held fixed

How the steps interleave is reconstructed: one upper step follows every ``upper_every`` lower steps (DARTS begins with the upper).
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gatewise.adapters.whole import keeps_whole
from gatewise.bilevel.state import CyclicRows, UpperLevel, count_rows, held_fixed, select_upper
from gatewise.errors import DivergedError, GatewiseError, some
from gatewise.processes import average_gradients

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # the mixin goes before whichever Trainer it is mixed with

__all__ = ["STATE_FILE", "BilevelMixin", "BilevelTrainer"]
STATE_FILE = "bilevel.pt"


class BilevelMixin(_AnyTrainer):
    """Adds an upper level to the ``Trainer`` that follows it: ``class Mine(BilevelMixin, SFTTrainer): ...``.

    An upper step comes right after the lower optimiser step it follows, when that step's gradients are cleared and before the
    ``on_step_end`` of all other callbacks: they, evaluation and checkpoints see both levels moved and no gradient left over. It
    takes one batch of ``per_device_train_batch_size`` rows a device. The lower optimiser, its schedule, clipping and ``grad_norm``
    know nothing of the upper parameters, whose gradients from training batches are dropped at once. A resumed run equals one never
    stopped, bit by bit on the CPU.

    The loss of an upper step is its batch's mean, averaged over processes. Training logs gain ``upper_loss`` (the mean over the
    upper steps since the last log), ``upper_grad_norm`` and ``upper_learning_rate`` (both of the last upper step).

    Keep upper parameters in float32: a step of 1e-6 is lost in the rounding of bfloat16.

    Args:
        upper_dataset: the second stream: rows for the Trainer's collator, with a length, read by number. Its order depends on the
            seed (``data_seed``, or else ``seed``) and the pass alone; passes follow without a gap, so that every batch is full.
        upper_parameters: a regular expression, found anywhere in the names (``model.named_parameters()``) of the trainable
            parameters that are the upper level. The others are the lower level.
        upper_learning_rate: of the upper optimiser, AdamW without weight decay. DARTS 3e-4, MiLoRA 1e-6. For another optimiser,
            override ``create_upper_optimizer``.
        upper_every: one upper step after every so many lower optimiser steps.
        Others: those of the Trainer.

    Raises:
        GatewiseError: settings that do not fit the model, the data or the run; a ready optimizer, fp16, or sharded training; while
            training, an upper gradient that is not finite, or that no upper parameter received.
    """

    def __init__(
        self,
        *args: Any,
        upper_dataset: Any,
        upper_parameters: str,
        upper_learning_rate: float,
        upper_every: int = 1,
        **kwargs: Any,
    ) -> None:
        count_rows("upper_dataset", upper_dataset, 1)
        self.upper_dataset, self.upper_parameters = upper_dataset, upper_parameters
        self.upper_learning_rate, self.upper_every = upper_learning_rate, upper_every
        self._upper: UpperLevel | None = None
        self._upper_batches: Iterator[Any] | None = None
        self._upper_log: dict[str, Any] = {}
        super().__init__(*args, **kwargs)
        self._check_run()
        select_upper(self.model, upper_parameters)  # what is wrong with them is said before training
        # First, so that all other callbacks see a step's end with both levels moved.
        self.callback_handler.callbacks.insert(0, _UpperSteps(self))

    # For subclasses.

    def compute_upper_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        """The loss of an upper step: the mean over its batch. By default that of the lower level."""
        loss: Any = self.compute_loss(model, inputs)
        return loss

    def create_upper_optimizer(self, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
        """A new optimiser for exactly the upper parameters."""
        return torch.optim.AdamW(parameters.values(), lr=self.upper_learning_rate, weight_decay=0.0)

    # Lower steps.

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The Trainer's, for the lower parameters alone, beside a new one for the upper ones."""
        upper = select_upper(self.model, self.upper_parameters)
        # The Trainer, and what overrides it, takes all that requires a gradient.
        with held_fixed(upper.values()):
            lower = super().create_optimizer(*args, **kwargs)
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
        loss = super().training_step(model, inputs, num_items_in_batch)
        for parameter in parameters:
            parameter.grad = None
        return loss

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
        norm = self._move_upper(level)
        for parameter in parameters:
            parameter.grad = None
        level.steps += 1
        log = self._upper_log
        log["losses"], log["steps"] = log.get("losses", 0) + loss.detach().float(), log.get("steps", 0) + 1
        log["upper_grad_norm"] = norm

    def _move_upper(self, level: UpperLevel) -> Tensor:
        """Steps, and returns the norm of the gradient."""
        gradients = [p.grad for p in level.parameters.values() if p.grad is not None]
        if not gradients:
            raise GatewiseError(
                f"the loss on upper_dataset gives none of the upper parameters ({some(level.parameters)}) a gradient: they take no "
                "part in it, or reentrant activation checkpointing cuts them off (set use_reentrant=False)"
            )
        norm = nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            raise DivergedError(
                f"the upper gradient has norm {float(norm)} after step {self.state.global_step}, so the run stopped before it "
                "moved the upper parameters: lower upper_learning_rate, or check upper_dataset"
            )
        level.optimizer.step()
        return norm

    def _lower_parameters(self, level: UpperLevel) -> list[nn.Parameter]:
        upper = {id(parameter) for parameter in level.parameters.values()}
        model: Any = self.model
        return [p for p in model.parameters() if p.requires_grad and id(p) not in upper]

    @property
    def _upper_rows(self) -> int:
        """Rows of an upper batch in one process."""
        return self.args.per_device_train_batch_size * max(1, self.args.n_gpu)

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
            logs["upper_loss"], logs["upper_grad_norm"] = float(mean), float(done["upper_grad_norm"])
            logs["upper_learning_rate"] = self.upper_learning_rate
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

    def _check_run(self) -> None:
        if self.optimizer is not None:
            raise GatewiseError("the Trainer was given a ready optimizer, which may have upper parameters: let the Trainer make it")
        if self.args.mixed_precision == "fp16":  # by the launcher, too
            raise GatewiseError("fp16 is on, whose scaled gradients the upper steps do not undo: take bf16")
        # What is trained stays whole where WholeAdapter keeps it so.
        fsdp = (self.is_fsdp_enabled and not keeps_whole(self.callback_handler.callbacks)) or self.is_fsdp_xla_enabled
        by = "FSDP" if fsdp else "DeepSpeed"
        if fsdp or self.is_deepspeed_enabled:
            raise GatewiseError(
                f"this run shards its parameters ({by}), but the two levels are stepped on whole ones: "
                "train on one device or, on several, with DDP or with FSDP2 and WholeAdapter in Trainer(callbacks=[...])"
            )


class BilevelTrainer(BilevelMixin, Trainer):
    """``transformers.Trainer`` in two levels: weights learn on one data set, and chosen parameters, such as gates, on a second one.

        BilevelTrainer(model=model, args=args, train_dataset=weights_half, upper_dataset=gates_half,
                       upper_parameters=r"gate_logits$", upper_learning_rate=3e-4, upper_every=1)

    ``upper_parameters`` is a regular expression that is found in the names of the parameters of the upper level. One step of
    theirs, at ``upper_learning_rate``, follows ``upper_every`` steps of the rest. ``BilevelMixin`` does so to another Trainer.
    """


class _UpperSteps(TrainerCallback):
    """Where the training loop reaches the upper level."""

    def __init__(self, trainer: BilevelMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.upper_every > state.max_steps:
            raise GatewiseError(
                f"upper_every={self.trainer.upper_every} leaves no upper step in a run of {state.max_steps} steps: "
                "lower it or train longer"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.trainer.upper_every == 0:
            self.trainer.upper_step()
