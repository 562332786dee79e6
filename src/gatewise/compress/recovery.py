"""A few more training steps for an adapter that lost ranks, and before them one number a rank, fitted anew."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from gatewise.allocation.scoring import GateBank, gate_gradients, parts_of, scoring
from gatewise.allocation.slots import by_slot, factors, set_slots
from gatewise.errors import GatewiseError
from gatewise.internals.trainer_device import run_on
from gatewise.losses import Batch, rows_of, scored
from gatewise.tasks import PadCollator

RATE_OF_RUN = 0.25
"""Recovery's learning rate in shares of the run's, at which an adapter that is nearly whole would get worse."""


@dataclass(frozen=True)
class Recovery:
    """How an adapter is trained on after it lost ranks.

    Attributes:
        data: rows to train on, as ``gatewise eval --data`` takes them.
        steps: optimiser steps, with a learning rate that falls to zero.
        learning_rate: None for a quarter of that of the run that made the adapter, or 1e-4 where it does not say.
        split: of ``data`` where that is a Hugging Face dataset, such as "train".
    """

    data: str
    steps: int = 60
    learning_rate: float | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise GatewiseError(f"{self.steps} recovery steps were asked for: expected at least 1 (--steps)")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise GatewiseError(f"the learning rate is {self.learning_rate}: expected a number above zero (--learning-rate)")


def refit(model: nn.Module, batch: Batch, steps: int = 8, learning_rate: float = 0.05) -> int:
    """Fits one factor for every live rank, all at once, and multiplies it into B: what is left makes up for what is gone.

    The factors start at one and are trained by Adam on the mean cross-entropy of three quarters of the rows of a batch (b, t).
    Those of the step with the least loss on the last quarter are taken; that may be none, for a few rows are soon learned by heart.
    On MiniLM 8 steps at 0.05 gain what 20 at 0.02 do.

    Returns:
        The steps taken.
    """
    rows = len(batch["labels"])
    if rows < 4:
        return 0
    with scoring(model, float32=False), GateBank(model) as gates:
        parts, check = (parts_of(model, rows_of(batch, part)) for part in (slice(rows - rows // 4), slice(rows - rows // 4, None)))
        leaves = gates.fill(1.0, requires_grad=True)
        optimizer = torch.optim.Adam(leaves.values(), lr=learning_rate)
        best, least, at = gates.fill(1.0), check.loss(model), 0
        for step in range(1, steps + 1):
            gates.gates = dict(leaves)
            gradients, _ = gate_gradients(model, parts, leaves)
            for path, leaf in leaves.items():
                leaf.grad = gradients[path]
            optimizer.step()
            loss = check.loss(model)
            if loss < least:
                best, least, at = {path: leaf.detach().clone() for path, leaf in leaves.items()}, loss, step
        for path, layer in gates.layers.items():
            rows_of_a, columns = by_slot(layer, gates.adapter, *(factor.detach() for factor in factors(layer, gates.adapter)))
            set_slots(layer, gates.adapter, rows_of_a.clone(), columns * best[path][:, None].to(columns.dtype))
    return at


def recover(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[Mapping[str, Any]],
    recovery: Recovery,
    note: Mapping[str, Any],
    seed: int = 0,
) -> None:
    """Trains what is left of an adapter: AdamW with a learning rate that falls to zero. Dead slots stay dead.

    Args:
        features: encoded rows.
        note: the adapter's note, whose ``training`` says how it was trained; what is null there is not said.

    Raises:
        GatewiseError: the loss is not finite.
    """
    run = {name: value for name, value in (note.get("training") or {}).items() if value is not None}
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=recovery.steps,
            per_device_train_batch_size=int(run.get("batch_size", 16)),
            gradient_accumulation_steps=int(run.get("gradient_accumulation", 1)),
            learning_rate=recovery.learning_rate or RATE_OF_RUN * float(run.get("learning_rate", 1e-4 / RATE_OF_RUN)),
            weight_decay=float(run.get("weight_decay", 0.0)),
            max_grad_norm=float(run.get("max_grad_norm", 1.0)),
            warmup_steps=min(5, recovery.steps // 10),
            lr_scheduler_type="linear",
            seed=seed,
            use_cpu=device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
        )
        run_on(arguments, device)
        trainer = _Trainer(model=model, args=arguments, train_dataset=list(features), data_collator=PadCollator(tokenizer))
        trainer.remove_callback(PrinterCallback)
        trainer.model_accepts_loss_kwargs = True
        trainer.train()
    model.eval()


class _Trainer(Trainer):
    """``transformers.Trainer`` with the loss of ``gatewise.losses``: the LM head at labels only, rows of like length together."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        # Of a batch of sentences in random order, a third to a half is padding, and each of it costs what a real token does.
        made = [scored(model, part).losses() for part in parts_of(model, inputs).own]
        loss = torch.cat([sums for sums, _ in made]).sum()
        loss = loss / (sum(counts.sum() for _, counts in made) if num_items_in_batch is None else num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise GatewiseError(
                f"the loss is {float(loss.detach())} at recovery step {self.state.global_step + 1}: take a lower learning rate "
                "(--learning-rate)"
            )
        return (loss, {"loss": loss}) if return_outputs else loss
