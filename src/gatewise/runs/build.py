"""The fresh adapter that a recipe describes, on its base model."""

import difflib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D

from gatewise.errors import GatewiseError
from gatewise.internals.trainer_device import run_on
from gatewise.internals.zero import is_asked_for
from gatewise.losses import base_of
from gatewise.processes import count
from gatewise.prompts import SelectivePromptConfig
from gatewise.routed import RoutedLoraConfig
from gatewise.runs.recipe import (
    PROMPTING,
    AllocationSection,
    PromptsSection,
    Recipe,
    RoutingSection,
    SearchSection,
    TrainingSection,
)


def adapted(recipe: Recipe, base: PreTrainedModel, steps: int, prompt_layers: Sequence[int] | None = None) -> PeftModel:
    """The base model with a fresh adapter. One of LoRA's kind changes nothing yet; prompts do from the start.

    Args:
        steps: of the whole run, for schedules.
        prompt_layers: what a search chose; None, where the recipe leaves the layers to a search, for the network to be searched.

    Raises:
        GatewiseError: modules or layers that the base model lacks, or settings that do not go with it.
    """
    config = _prompts(recipe, base, prompt_layers) if recipe.method in PROMPTING else _lora(recipe, base, steps)
    set_seed(recipe.seed)
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise GatewiseError(f"PEFT cannot put this adapter on {recipe.model}: {' '.join(str(error).split())}") from error


def fixed_layers(choice: str, keep: int, layers: int, seed: int = 0) -> list[int]:
    """The baselines of a search: ``keep`` of ``layers`` layers, in order.

    "first", "last"; "spread": every layers/keep-th, that is ⌊i · layers / keep⌋; "random": a set drawn from ``seed`` alone.
    """
    if choice == "random":
        return sorted(random.Random(f"prompt layers/{seed}").sample(range(layers), keep))
    if choice == "spread":
        return [i * layers // keep for i in range(keep)]
    return list(range(keep)) if choice == "first" else list(range(layers - keep, layers))


def _prompts(recipe: Recipe, base: PreTrainedModel, chosen: Sequence[int] | None) -> PeftConfig:
    section = recipe.prompts or PromptsSection()
    task_type = _task_type(recipe)
    if recipe.method == "prefix-tuning":
        return PrefixTuningConfig(num_virtual_tokens=section.num_prompt_tokens, task_type=task_type)
    if recipe.method == "prompt-tuning":
        if recipe.task == "classification" and hasattr(base, "score"):
            raise GatewiseError(
                f"{recipe.model} is a decoder, which classifies by the last token that is no padding, and does not see it "
                "with prompt tuning: take task causal, or method prefix-tuning or spt"
            )
        init = "SAMPLE_VOCAB" if section.init == "vocabulary" else "RANDOM"
        return PromptTuningConfig(num_virtual_tokens=section.num_prompt_tokens, prompt_tuning_init=init, task_type=task_type)
    layers = section.prompt_layers
    count = int(base.config.get_text_config().num_hidden_layers)
    key, keep = ("prompts.keep", section.keep)
    if recipe.searched:
        key, keep, layers = "search.keep", (recipe.search or SearchSection()).keep, chosen
    if keep is not None and keep > count:
        raise GatewiseError(f"{key} is {keep}, expected at most {count}, the layers of {recipe.model}")
    if isinstance(layers, str):
        assert keep is not None
        layers = fixed_layers(layers, keep, count, recipe.seed)
    return SelectivePromptConfig(
        prompt_layers=None if layers is None else list(layers),
        task_type=task_type,
        **_whole(recipe, base),
        **section.model_dump(include=section.keys_of("spt") - {"prompt_layers", "keep"}),
    )


def _task_type(recipe: Recipe) -> str:
    return {"classification": "SEQ_CLS", "text2mdt": "FEATURE_EXTRACTION"}.get(recipe.task, "CAUSAL_LM")


def _whole(recipe: Recipe, base: nn.Module) -> dict[str, Any]:
    """What PEFT is to train whole, and to put no adapter on; of a classifier's head it knows by itself."""
    heads = getattr(base, "trained_whole", ())
    if not heads:
        return {}
    own = tuple(f"{name}." for name in heads)
    linear = [path for path, module in base.named_modules() if isinstance(module, nn.Linear) and f"{path}.".startswith(own)]
    excluded = {} if recipe.method in PROMPTING else {"exclude_modules": [*(recipe.peft.exclude_modules or ()), *linear]}
    return {"modules_to_save": list(heads), **excluded}


def _lora(recipe: Recipe, base: PreTrainedModel, steps: int) -> LoraConfig:
    peft = recipe.peft
    _check_modules("peft.target_modules", peft.target_modules, base, recipe.model)
    _check_modules("peft.exclude_modules", peft.exclude_modules, base, recipe.model)
    common: dict[str, Any] = {
        "lora_alpha": peft.lora_alpha,
        "target_modules": peft.target_modules,
        "exclude_modules": peft.exclude_modules,
        "lora_dropout": peft.lora_dropout,
        "init_lora_weights": peft.init_lora_weights,
        "task_type": _task_type(recipe),
        **_whole(recipe, base),
    }
    r = peft.r
    allocation = recipe.allocation
    if allocation is not None and allocation.schedule == "cubic" and allocation.budget != "modules":
        # More ranks at the start, the scale of those wanted at the end.
        r = _initial_rank(allocation, peft.r)
        common["lora_alpha"] = peft.lora_alpha * ((r / peft.r) ** 0.5 if peft.use_rslora else r / peft.r)
    if recipe.method == "adalora":
        return AdaLoraConfig(target_r=peft.r, **_adalora_schedule(recipe, steps), **common)
    if recipe.method == "milora":
        section = recipe.routing or RoutingSection()
        settings = section.model_dump(exclude={"validation_rows", "activation_learning_rate", "activation_every"})
        return RoutedLoraConfig(r=r, use_rslora=peft.use_rslora, **settings, **common)
    return LoraConfig(r=r, use_rslora=peft.use_rslora, use_dora=recipe.method == "dora", **common)


def _initial_rank(section: AllocationSection, r: int) -> int:
    return section.init_r or max(r + 1, round(1.5 * r))


def _check_modules(key: str, names: Any, base: PreTrainedModel, model: str) -> None:
    """PEFT passes over a name that fits no module as long as another one does."""
    if names is None or (isinstance(names, str) and names == "all-linear"):
        return
    linear = {path for path, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for name in [names] if isinstance(names, str) else names:
        if not any(path == name or path.endswith(f".{name}") for path in linear):
            endings = sorted({path.rpartition(".")[2] for path in linear})
            near = difflib.get_close_matches(name, endings, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise GatewiseError(
                f"{key}: {name!r} is no linear module of {model}, expected 'all-linear' or of {', '.join(endings)}{hint}"
            )


def _adalora_schedule(recipe: Recipe, steps: int) -> dict[str, Any]:
    given = recipe.adalora.model_dump(exclude_none=True) if recipe.adalora else {}
    schedule = {
        "init_r": max(recipe.peft.r + 1, round(1.5 * recipe.peft.r)),
        "tinit": steps // 10,
        "tfinal": round(0.3 * steps),
        **given,
        "total_step": steps,
    }
    if schedule["tinit"] >= steps - schedule["tfinal"]:
        raise GatewiseError(
            f"adalora: tinit ({schedule['tinit']}) and tfinal ({schedule['tfinal']}) leave no step of the run's {steps} in "
            "which ranks can be taken away: lower them or train longer"
        )
    return schedule


def training_arguments(
    training: TrainingSection, seed: int, steps: int, checkpoints: Path, device: torch.device
) -> TrainingArguments:
    """The arguments of a Trainer that trains ``steps`` steps on a device and writes checkpoints into a folder.

    Raises:
        GatewiseError: settings that do not work here, or a batch that the processes cannot share.
    """
    processes, deepspeed = count(), is_asked_for()
    if deepspeed and training.bf16 and device.type == "cpu":
        raise GatewiseError("training.bf16 does not work under DeepSpeed on a CPU: take dtype bfloat16, or launch.strategy fsdp2")
    if training.batch_size % processes:
        raise GatewiseError(
            f"training.batch_size is {training.batch_size}, which {processes} processes cannot share: give a multiple of that"
        )
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=training.batch_size // processes,
            per_device_eval_batch_size=training.eval_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation,
            learning_rate=training.learning_rate,
            warmup_steps=min(math.ceil(training.warmup_ratio * steps), steps - 1),  # the first has the rate zero
            lr_scheduler_type=training.scheduler,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            bf16=training.bf16,
            use_cpu=device.type == "cpu" and not deepspeed,  # or Accelerate would pass DeepSpeed by
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
            ddp_backend="gloo" if (processes > 1 or deepspeed) and device.type == "cpu" else None,
        )
    except ValueError as error:
        raise GatewiseError(f"training: these settings do not work here: {' '.join(str(error).split())}") from error
    if processes == 1 and not deepspeed:  # of several, each has the device that its launcher gave it
        run_on(arguments, device)
    return arguments


def recompute_activations(model: PeftModel) -> None:
    """Turns gradient checkpointing on."""
    base = base_of(model)
    # The name changes with Transformers 6; inputs need a gradient or nothing before the first adapter would be recomputed.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable()
    base.enable_input_require_grads()
    base.config.use_cache = False
