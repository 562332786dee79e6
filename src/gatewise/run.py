"""The run a recipe describes: check everything, load, train, measure, and write a plain LoRA adapter.

What it leaves in its output folder:

    adapter/        plain LoRA: adapter_config.json, adapter_model.safetensors; allocation.json with alora; gatewise.json
    metrics.json    metrics before and after, ranks, parameters, seconds
    ranks.png       where the ranks went
    recipe.yaml     the recipe with every default written out
    checkpoints/    the last two checkpoints, from which --resume goes on
"""

import difflib
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D

from gatewise import report
from gatewise.adalora import STATE_FILE, AdaLoraSchedule, to_plain_lora
from gatewise.allocation import RankAllocation
from gatewise.errors import GatewiseError
from gatewise.files import whole_file, whole_folder, write_json
from gatewise.losses import base_of
from gatewise.measure import Metrics, load_like, metrics_line
from gatewise.models import load_model, load_tokenizer, resolve
from gatewise.models.convert import quiet
from gatewise.progress import RunProgress
from gatewise.recipe import AllocationSection, Recipe, TrainingSection, load_recipe
from gatewise.tasks import (
    PadCollator,
    Records,
    Template,
    default_template,
    encode,
    encode_classification,
    evaluate,
    load_records,
)
from gatewise.training import (
    NOTE_FILE,
    EarlyStopping,
    RecipeTrainer,
    checkpoint_step,
    complete_checkpoints,
)

ADAPTER, CHECKPOINTS, METRICS, RECIPE, PLOT = "adapter", "checkpoints", "metrics.json", "recipe.yaml", "ranks.png"
# Keys that change what is shown, not what is learned: a run may be resumed with others.
_FREE_TO_CHANGE = ("training.log_every",)


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        output: its folder. adapter, metrics_file, plot: what is in it.
        metrics: "dev" (and "test", where the recipe has one) -> {"before": ..., "after": ...}, as ``tasks.evaluate`` gives
            them; "before" is the base model with the adapter at its start, which changes nothing yet.
        ranks: module path -> rank of the adapter written.
        parameters: "base" and "adapter", the numbers stored in each.
        seconds: "evaluation", "training" (rounds included) and "total", of this process.
        steps: optimiser steps taken, those before a resume included.
        resumed_from: the step the run went on from, or None.
    """

    output: Path
    adapter: Path
    metrics_file: Path
    plot: Path
    metrics: dict[str, dict[str, Metrics]]
    ranks: dict[str, int]
    parameters: dict[str, int]
    seconds: dict[str, float]
    steps: int
    resumed_from: int | None


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Carries out a recipe.

    Data, template, base model, modules and the output folder are all checked before training begins. An interrupt or a
    fault leaves complete checkpoints and nothing half written.

    Args:
        output: the folder to write. It must be new or empty, unless resumed or overwritten.
        resume: go on from the latest complete checkpoint in ``output``; on the CPU the result is that of a run never stopped.
        overwrite: first remove what an earlier run left in ``output``.
        console: where progress is shown; stderr by default.

    Raises:
        GatewiseError: anything in recipe, data or folder that a user can put right, or a loss that is not finite.
    """
    started = time.monotonic()
    output = Path(output)
    progress = RunProgress(console or Console(stderr=True))
    checkpoint = _check_output(output, recipe, resume, overwrite)
    with quiet(bars=True):
        prepared = _prepare(recipe, progress)
        if checkpoint is not None and checkpoint_step(checkpoint) >= prepared.steps:
            checkpoint = _before_the_end(output, prepared.steps)
        with _writing(output, recipe, overwrite):
            trainer = _trainer(recipe, prepared, output, checkpoint, progress)
            metrics: dict[str, dict[str, Metrics]] = {name: {} for name in prepared.measured}
            seconds = {"evaluation": 0.0, "training": 0.0}
            _measure(recipe, prepared, trainer.model, "before", metrics, seconds, progress)
            set_seed(recipe.seed)
            begun = time.monotonic()
            with progress.training():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            seconds["training"] = time.monotonic() - begun
            # Without the wrapper that mixed precision puts around forward: both measurements run in the base's dtype.
            model: PeftModel = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            if recipe.method == "adalora":
                model = to_plain_lora(model)
            _measure(recipe, prepared, model, "after", metrics, seconds, progress)
            _save_adapter(model, output / ADAPTER, prepared.note)
            budget = report.read_budget(output / ADAPTER)
            report.plot(budget, output / PLOT)
            seconds["total"] = time.monotonic() - started
            result = RunResult(
                output=output,
                adapter=output / ADAPTER,
                metrics_file=output / METRICS,
                plot=output / PLOT,
                metrics=metrics,
                ranks=budget.ranks,
                parameters={
                    "base": prepared.base_parameters,
                    "adapter": budget.parameters + budget.other_parameters,
                },
                seconds=seconds,
                steps=trainer.state.global_step,
                resumed_from=checkpoint_step(checkpoint) if checkpoint else None,
            )
            write_json(result.metrics_file, _metrics_json(recipe, result, trainer.state.log_history))
    return result


# The output folder ------------------------------------------------------------------------------------------------------


def _check_output(output: Path, recipe: Recipe, resume: bool, overwrite: bool) -> Path | None:
    """Whether the folder may be used; the checkpoint to go on from, if that is asked for."""
    if resume and overwrite:
        raise GatewiseError("--resume and --overwrite exclude each other: go on with the run, or begin it again")
    check_writable(output)
    if output.is_dir() and any(output.iterdir()) and not resume and not overwrite:
        raise GatewiseError(
            f"{output} is not empty: use --resume to go on with the run in it, --overwrite to replace that run, or give "
            "another --output"
        )
    if not resume:
        return None
    if (output / METRICS).is_file():
        raise GatewiseError(f"the run in {output} is finished, there is nothing to resume: use --overwrite to repeat it")
    found = complete_checkpoints(output / CHECKPOINTS, _state_files(recipe))
    if not found:
        raise GatewiseError(f"{output} has no complete checkpoint to resume from: begin again with --overwrite")
    _check_same_recipe(output / RECIPE, recipe)
    return found[-1]


def check_writable(output: Path) -> None:
    """Raises GatewiseError when the folder cannot be made or written into. Leaves no trace."""
    at = output.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir():
        raise GatewiseError(f"cannot write to {output}: {at} is a file, not a folder; give another --output")
    if not os.access(at, os.W_OK | os.X_OK):
        raise GatewiseError(f"cannot write to {output}: no permission to write in {at}; give another --output")


def _check_same_recipe(path: Path, recipe: Recipe) -> None:
    if not path.is_file():
        raise GatewiseError(f"{path} is missing, so the run cannot be resumed: begin again with --overwrite")
    before, now = _flat(load_recipe(path).model_dump()), _flat(recipe.model_dump())
    for key in sorted({*before, *now} - {*_FREE_TO_CHANGE}):
        if before.get(key) != now.get(key):
            raise GatewiseError(
                f"{key} is {now.get(key)!r}, but the run in {path.parent} was started with {before.get(key)!r}: resume it "
                "with that, or begin again with --overwrite"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _before_the_end(output: Path, steps: int) -> Path | None:
    """The last checkpoint that has a step to go: the Trainer cannot resume behind the last step. None: from the start."""
    found = [path for path in complete_checkpoints(output / CHECKPOINTS) if checkpoint_step(path) < steps]
    return found[-1] if found else None


def _state_files(recipe: Recipe) -> tuple[str, ...]:
    return (STATE_FILE,) if recipe.method == "adalora" else ()


@contextmanager
def _writing(output: Path, recipe: Recipe, overwrite: bool) -> Iterator[None]:
    """Opens the output folder, and whatever happens leaves nothing half written in it."""
    try:
        if overwrite:
            _remove_run(output)
        (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        with whole_file(output / RECIPE) as part:
            part.write_text(recipe.as_yaml(), encoding="utf-8")
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise GatewiseError(
            f"{output} could not be written ({reason}): free some space or give another --output; complete checkpoints "
            "are kept for --resume"
        ) from error
    finally:
        _tidy(output, recipe)


def _tidy(output: Path, recipe: Recipe) -> None:
    """Removes checkpoints and files that were cut short, and the whole run when nothing of it is worth keeping."""
    checkpoints = output / CHECKPOINTS
    complete = complete_checkpoints(checkpoints, _state_files(recipe))
    for path in checkpoints.glob("checkpoint-*"):
        if path not in complete and not (path / "trainer_state.json").is_file():
            shutil.rmtree(path, ignore_errors=True)
    if checkpoints.is_dir() and not any(checkpoints.iterdir()) and not (output / METRICS).is_file():
        checkpoints.rmdir()
        (output / RECIPE).unlink(missing_ok=True)
        if not any(output.iterdir()):
            output.rmdir()


def _remove_run(output: Path) -> None:
    """Removes what a run writes, and nothing else that may lie in the folder."""
    for name in (METRICS, PLOT, RECIPE):
        (output / name).unlink(missing_ok=True)
    for name in (ADAPTER, CHECKPOINTS):
        if (output / name).is_dir():
            shutil.rmtree(output / name)


def _save_adapter(model: PeftModel, folder: Path, note: Mapping[str, Any]) -> None:
    with whole_folder(folder, replace=True) as part:
        # save_embedding_layers=False keeps PEFT from asking the hub whether the vocabulary was changed.
        model.save_pretrained(str(part), save_embedding_layers=False)
        write_json(part / NOTE_FILE, note)


# What a run is made of --------------------------------------------------------------------------------------------------


@dataclass
class _Prepared:
    """Everything a run needs, loaded and checked."""

    measured: dict[str, Records]
    template: Template | None
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel
    base_parameters: int
    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    steps: int
    steps_per_epoch: int
    max_length: int
    note: dict[str, Any]
    allocation: RankAllocation | None = field(default=None)


def _prepare(recipe: Recipe, progress: RunProgress) -> _Prepared:
    data, classification = recipe.data, recipe.task == "classification"
    train_rows = load_records(data.train, split=data.train_split, limit=data.limit_train, labels=data.labels)
    measured = {"dev": load_like(data.dev, train_rows.labels, split=data.dev_split, limit=data.limit_dev)}
    if data.test is not None:
        measured["test"] = load_like(data.test, train_rows.labels, split=data.test_split)
    for name, records in measured.items():
        if records.kind != train_rows.kind:
            raise GatewiseError(
                f"data.{name} ({records.source}) holds {records.kind} rows, but data.train ({train_rows.source}) holds "
                f"{train_rows.kind} rows: expected the same kind"
            )
    template = None
    if not classification:
        given = recipe.template
        template = Template(given.prompt, given.labels) if given else default_template(train_rows)
        for records in (train_rows, *measured.values()):
            template.check(records)
    progress.say(f"loading {recipe.model}")
    resolve(recipe.model, progress=progress.say)
    tokenizer = load_tokenizer(recipe.model)
    base = load_model(
        recipe.model,
        task=recipe.task,
        num_labels=len(train_rows.labels or ()) if classification else None,
        dtype=getattr(torch, recipe.dtype),
    )
    # Learned positions end where the table ends.
    max_length = min(data.max_length, getattr(base.config.get_text_config(), "max_position_embeddings", None) or data.max_length)

    def features(records: Records) -> list[dict[str, Any]]:
        if classification:
            return encode_classification(records, tokenizer, max_length=max_length)
        return list(encode(records, tokenizer, template, max_length=max_length))

    train, dev = features(train_rows), features(measured["dev"])
    held_out: list[dict[str, Any]] = []
    if recipe.method == "alora":
        train, held_out = _hold_out(train, (recipe.allocation or AllocationSection()).validation_rows, recipe.seed)
    base_parameters = sum(p.numel() for p in base.parameters())
    steps = recipe.training.total_steps(len(train))
    prepared = _Prepared(
        measured=measured,
        template=template,
        tokenizer=tokenizer,
        model=_adapted(recipe, base, steps),
        base_parameters=base_parameters,
        train=train,
        dev=dev,
        steps=steps,
        steps_per_epoch=recipe.training.steps_per_epoch(len(train)),
        max_length=max_length,
        note={
            "format": 1,
            "base": recipe.model,
            "task": recipe.task,
            "template": template.prompt if template else None,
            "labels": train_rows.labels,
            "dtype": recipe.dtype,
            "label_words": template.labels if template else None,
            "max_length": max_length,
        },
    )
    if recipe.method == "alora":
        prepared.allocation = _allocation(recipe, prepared, held_out, progress)
    return prepared


def _adapted(recipe: Recipe, base: PreTrainedModel, steps: int) -> PeftModel:
    """The base model with a fresh adapter that changes nothing yet."""
    peft = recipe.peft
    _check_modules("peft.target_modules", peft.target_modules, base, recipe.model)
    _check_modules("peft.exclude_modules", peft.exclude_modules, base, recipe.model)
    common: dict[str, Any] = {
        "lora_alpha": peft.lora_alpha,
        "target_modules": peft.target_modules,
        "exclude_modules": peft.exclude_modules,
        "lora_dropout": peft.lora_dropout,
        "init_lora_weights": peft.init_lora_weights,
        "task_type": "SEQ_CLS" if recipe.task == "classification" else "CAUSAL_LM",
    }
    config: LoraConfig
    if recipe.method == "adalora":
        config = AdaLoraConfig(target_r=peft.r, **_adalora_schedule(recipe, steps), **common)
    else:
        config = LoraConfig(r=peft.r, use_rslora=peft.use_rslora, use_dora=recipe.method == "dora", **common)
    set_seed(recipe.seed)
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise GatewiseError(f"PEFT cannot put this adapter on {recipe.model}: {' '.join(str(error).split())}") from error


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


def _hold_out(train: list[dict[str, Any]], rows: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows, and at most ``rows`` (and a quarter) of them set aside to score ranks on: dev only measures."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(rows, max(1, len(train) // 4))
    return [train[i] for i in sorted(order[count:])] or train, [train[i] for i in order[:count]]


def _allocation(recipe: Recipe, prepared: _Prepared, held_out: list[dict[str, Any]], progress: RunProgress) -> RankAllocation:
    section = recipe.allocation or AllocationSection()
    first = section.first_round
    step = first if isinstance(first, int) and first > 1 else max(1, round(first * prepared.steps_per_epoch))
    if step >= prepared.steps:
        raise GatewiseError(
            f"allocation.first_round is {first}, after step {step}, but the run has {prepared.steps} steps and what a round "
            "grows must learn: lower it or train longer"
        )
    batch = PadCollator(prepared.tokenizer)(held_out)
    settings = section.model_dump(exclude={"validation_rows"})
    return RankAllocation(**settings, validation_batch=batch, seed=recipe.seed, on_round=progress.say_round)


def _trainer(recipe: Recipe, prepared: _Prepared, output: Path, checkpoint: Path | None, progress: RunProgress) -> RecipeTrainer:
    training = recipe.training
    callbacks: list[TrainerCallback] = []
    if prepared.allocation is not None:
        callbacks.append(prepared.allocation)
    if recipe.method == "adalora":
        callbacks.append(AdaLoraSchedule(checkpoint))
    if training.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(training.early_stopping_patience))
    if training.gradient_checkpointing:
        _recompute_activations(prepared.model)
    return RecipeTrainer(
        model=prepared.model,
        args=_arguments(training, recipe.seed, prepared.steps, output / CHECKPOINTS),
        train=prepared.train,
        dev=prepared.dev,
        collator=PadCollator(prepared.tokenizer),
        note=prepared.note,
        callbacks=[*callbacks, progress],
        group_by_length=training.group_by_length,
    )


def _arguments(training: TrainingSection, seed: int, steps: int, checkpoints: Path) -> TrainingArguments:
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


def _recompute_activations(model: PeftModel) -> None:
    base = base_of(model)
    # The name changes with Transformers 6; inputs need a gradient or nothing before the first adapter would be recomputed.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable()
    base.enable_input_require_grads()
    base.config.use_cache = False


# Measuring --------------------------------------------------------------------------------------------------------------


def _measure(
    recipe: Recipe,
    prepared: _Prepared,
    model: Any,
    when: str,
    metrics: dict[str, dict[str, Metrics]],
    seconds: dict[str, float],
    progress: RunProgress,
) -> None:
    begun = time.monotonic()
    for name, records in prepared.measured.items():
        with progress.counting(f"measuring on {name} {when} training") as count:
            metrics[name][when] = evaluate(
                model,
                prepared.tokenizer,
                records,
                prepared.template,
                batch_size=recipe.training.eval_batch_size,
                max_length=prepared.max_length,
                progress=count,
            )
        progress.say(f"{name} {when} training: {metrics_line(metrics[name][when])}")
    seconds["evaluation"] += time.monotonic() - begun


def _metrics_json(recipe: Recipe, result: RunResult, log: Sequence[Mapping[str, Any]]) -> Any:
    content = {
        "format": 1,
        "method": recipe.method,
        "model": recipe.model,
        "task": recipe.task,
        "seed": recipe.seed,
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "metrics": result.metrics,
        "parameters": result.parameters,
        "ranks": result.ranks,
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
        "log": [entry for entry in log if "loss" in entry or "eval_loss" in entry],
    }
    return _finite(content)


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
