"""A recipe's training section as what a Trainer wants."""

import math
from pathlib import Path

import torch
from peft import PeftModel
from transformers import TrainingArguments

from gatewise.errors import GatewiseError
from gatewise.losses import base_of
from gatewise.recipe import TrainingSection


def training_arguments(training: TrainingSection, seed: int, steps: int, checkpoints: Path) -> TrainingArguments:
    """The arguments of a Trainer that trains ``steps`` steps and writes checkpoints into a folder.

    Raises:
        GatewiseError: settings that do not work here, or several processes.
    """
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=training.eval_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation,
            learning_rate=training.learning_rate,
            warmup_steps=math.ceil(training.warmup_ratio * steps),
            lr_scheduler_type=training.scheduler,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            bf16=training.bf16,
            use_cpu=training.bf16 and not accelerated,  # else bf16 is refused where there is only a CPU
            logging_steps=training.log_every,
            # The first NaN stops the run; the Trainer would hide it in the log.
            logging_nan_inf_filter=False,
            eval_strategy="no" if training.eval_every is None else "steps",
            eval_steps=training.eval_every,
            save_strategy="steps",
            save_steps=training.checkpoint_steps(steps),
            save_total_limit=2,
            load_best_model_at_end=training.load_best,
            metric_for_best_model="eval_loss" if training.eval_every else None,
            greater_is_better=False,
            seed=seed,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
        )
    except ValueError as error:
        raise GatewiseError(f"training: these settings do not work here: {' '.join(str(error).split())}") from error
    if arguments.world_size > 1:
        raise GatewiseError(
            "gatewise train runs in one process: for several, put gatewise.RankAllocation into your own Trainer script"
        )
    return arguments


def recompute_activations(model: PeftModel) -> None:
    """Turns gradient checkpointing on."""
    base = base_of(model)
    # The name changes with Transformers 6; inputs need a gradient or nothing before the first adapter would be recomputed.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable()
    base.enable_input_require_grads()
    base.config.use_cache = False
