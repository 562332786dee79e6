"""Carries out a recipe: checks everything, loads, measures, trains, measures again, writes the adapter, and draws.

It knows no method and no task: their verbs are in ``gatewise/parts.py``. What a run leaves is told in ``gatewise/runs/folder.py``.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments, set_seed

from gatewise import processes
from gatewise.adapters.checkpoints import checkpoint_before, checkpoint_step
from gatewise.adapters.files import NOTE_FILE, read_note
from gatewise.errors import GatewiseError
from gatewise.files import whole_folder, write_json
from gatewise.internals.sharding import join, reshard
from gatewise.models import load_tokenizer, resolve
from gatewise.models.device import has_bfloat16, pick_device, pick_dtype, say_slow
from gatewise.models.loading import most_tokens
from gatewise.parts import Features, Method, Report, Run, Task
from gatewise.progress import quiet
from gatewise.runs.folder import (
    ADAPTER,
    CHECKPOINTS,
    RunResult,
    check_output,
    check_same_rows,
    write_metrics,
    writing,
)
from gatewise.runs.progress import RunProgress
from gatewise.runs.recipe import Recipe
from gatewise.runs.trainer import (
    EarlyStopping,
    LossTerm,
    RecipeTrainer,
    has_stopped_early,
    recompute_activations,
    training_arguments,
)
from gatewise.tasks.metrics import metrics_line


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
    task, method = recipe.parts()
    join(pick_device(recipe.device))
    method.check()
    progress = RunProgress((console or Console(stderr=True)) if processes.is_main() else Console(quiet=True))
    checkpoint = processes.by_main(check_output, output, recipe, method, resume, overwrite)
    if resume:
        method.resume(output)
    with quiet(bars=True):
        run = _prepared(recipe, task, method, output, checkpoint, progress)
        rows = check_same_rows(output, {"data.train": [*run.train, *run.aside], "data.dev": run.dev}, resume)
        run.checkpoint = _with_steps_to_go(run)
        if overwrite:
            run.arguments(run.steps)  # refuses what does not work here while the earlier run is still there
        with writing(output, recipe, method, rows, overwrite) if processes.is_main() else nullcontext():
            method.before_training(run)
            trainer: Any = method.trainer(run)
            with method.untrained(trainer.model) as base:
                before = _measured(run, base, "before")
            set_seed(recipe.seed)
            begun = time.monotonic()
            with progress.training():
                trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
            run.seconds["training"] = time.monotonic() - begun
            # Without the wrapper that mixed precision puts around forward: both measurements run in the base's dtype.
            model = method.finish(run, trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
            after = _measured(run, model, "after")
            run.note |= task.note_after(run, model)
            run.seconds["total"] = time.monotonic() - started
            metrics = {name: {"before": before[name], "after": after[name]} for name in after}
            reshard(model)
            result = processes.by_main(_written, run, method, model, metrics, trainer.state)
            # The run is whole from here on: what is drawn of it may fail.
            study = Report()
            with _may_fail("the study of the adapter", progress):
                study = method.study(run, model)
            if processes.is_main():
                result = _drawn(run, result, study, trainer.state)
    return result


@contextmanager
def _may_fail(what: str, progress: RunProgress) -> Iterator[None]:
    """Says what could not be made of a finished run, and goes on: adapter and metrics are written."""
    try:
        yield
    except Exception as error:
        progress.say(f"warning: {what} could not be made ({type(error).__name__}: {error}); adapter and metrics.json are whole")


def _written(run: Run, method: Method, model: Any, metrics: dict[str, Any], state: TrainerState) -> RunResult:
    """Writes the adapter, and what the run came to."""
    with whole_folder(run.output / ADAPTER, replace=True) as part:
        # save_embedding_layers=False keeps PEFT from asking the hub whether the vocabulary was changed.
        model.save_pretrained(str(part), save_embedding_layers=False)
        write_json(part / NOTE_FILE, run.note)
        method.write(part)
    run.report = method.report(run.output / ADAPTER)
    result = RunResult(
        output=run.output,
        metrics=metrics,
        parameters={"base": run.base_parameters, "adapter": run.report.parameters},
        seconds=run.seconds,
        steps=state.global_step,
        dtype=run.note["trained_in"],
        device=str(run.device),
        resumed_from=checkpoint_step(run.checkpoint) if run.checkpoint else None,
        numbers=run.report.numbers,
    )
    write_metrics(run.recipe, result, state.log_history)
    return result


def _drawn(run: Run, result: RunResult, study: Report, state: TrainerState) -> RunResult:
    """The result with what the study of the model says, and with pictures."""
    result = replace(result, numbers={**result.numbers, **study.numbers}, table=run.report.table)
    if study.numbers:
        write_metrics(run.recipe, result, state.log_history)
    for name, draw in {**study.pictures, **run.report.pictures}.items():
        with _may_fail(name, run.progress):
            draw(run.output / name)
            result.pictures[name] = run.output / name
    return result


class _Run(Run):
    """A run with its Trainer."""

    def arguments(self, steps: int, evaluates: bool = True) -> TrainingArguments:
        """The recipe's."""
        training = self.recipe.training
        if not evaluates:
            training = training.model_copy(update={"eval_every": None, "early_stopping_patience": None, "load_best": False})
        return training_arguments(training, self.recipe.seed, steps, self.output / CHECKPOINTS, self.device)

    def trainer(
        self,
        *,
        callbacks: Sequence[TrainerCallback],
        loss_term: LossTerm | None = None,
        mixin: type | None = None,
        **settings: Any,
    ) -> RecipeTrainer:
        """The one Trainer of all runs."""
        training = self.recipe.training
        given = {"model": self.model, "train_dataset": self.train, "eval_dataset": self.dev, **settings}
        args = given.pop("args", None) or self.arguments(self.steps)
        if training.gradient_checkpointing:
            recompute_activations(given["model"])
        if training.early_stopping_patience is not None and args.eval_steps:
            callbacks = [*callbacks, EarlyStopping(training.early_stopping_patience)]
        kind: Any = RecipeTrainer if mixin is None else type(mixin.__name__, (mixin, RecipeTrainer), {})
        return kind(
            args=args,
            collator=self.collate,
            note=self.note,
            callbacks=[*callbacks, self.progress],
            loss_term=loss_term,
            group_by_length=training.group_by_length,
            **given,
        )


def _prepared(recipe: Recipe, task: Task, method: Method, output: Path, checkpoint: Path | None, progress: RunProgress) -> Run:
    """Everything a run needs, loaded and checked."""
    task.read()
    device = pick_device(recipe.device)
    dtype = torch.float32 if task.in_float32 else pick_dtype(recipe.dtype, device, progress.say)
    if recipe.training.bf16 and recipe.dtype != "bfloat16" and not has_bfloat16(device):
        say_slow(progress.say)
    dtype_name = str(dtype).removeprefix("torch.")
    where = f"{device}" if processes.count() == 1 else f"{device}, {processes.count()} processes"
    progress.say(f"loading {recipe.model} in {dtype_name} on {where}")
    processes.by_main(resolve, recipe.model, progress=progress.say)
    tokenizer = load_tokenizer(recipe.model)
    task.settle(None if checkpoint is None else read_note(checkpoint))

    def fresh_base() -> PreTrainedModel:
        set_seed(recipe.seed)
        # What some encoders pool with is in no file.
        return task.base(dtype, tokenizer, ("pooler",) if method.trains_whole else ())

    base = fresh_base()
    # Learned positions end where the table ends.
    max_length = task.most_tokens(most_tokens(base, tokenizer) - method.prompt_tokens)
    if max_length < 1:
        raise GatewiseError(
            f"prompts.num_prompt_tokens leaves none of the {recipe.model}'s positions for the text: lower it by {1 - max_length}"
        )
    train = task.encode(task.train, tokenizer, max_length, key="data.train", say=progress.say)
    dev = task.encode(task.measured["dev"], tokenizer, max_length, key="data.dev", say=progress.say)
    aside: Features = []
    if method.rows_aside:
        train, aside = _set_aside(train, method.rows_aside, recipe.seed)
    whole = tuple(f"{name}." for name in getattr(base, "trained_whole", ()))
    run = _Run(
        recipe=recipe,
        task=task,
        output=output,
        progress=progress,
        device=device,
        tokenizer=tokenizer,
        collate=task.collator(tokenizer),
        fresh_base=fresh_base,
        base_parameters=sum(p.numel() for name, p in base.named_parameters() if not name.startswith(whole)),
        max_length=max_length,
        train=train,
        dev=dev,
        aside=aside,
        steps=recipe.training.total_steps(len(train)),
        steps_per_epoch=recipe.training.steps_per_epoch(len(train)),
        note={
            "format": 1,
            "base": recipe.model,
            "task": recipe.task,
            "dtype": recipe.dtype,
            "trained_in": dtype_name,
            "max_length": max_length,
            "training": recipe.training.model_dump(
                include={"learning_rate", "batch_size", "weight_decay", "max_grad_norm", "gradient_accumulation"}
            ),
            **task.note(base),
            **method.note(base),
        },
        checkpoint=checkpoint,
        seconds={"evaluation": 0.0, "training": 0.0},
    )
    run.model = method.adapt(run, base)
    return run


def _set_aside(rows: Features, count: int, seed: int) -> tuple[Features, Features]:
    """The rows to train on, and at most ``count`` (and a quarter) of them that the method has for itself: dev only measures.

    Of rows that are copies of each other, which have the same ``group``, the first is set aside and the others are not trained on.
    """
    groups: dict[int, Features] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("group", i), []).append(row)
    copies = list(groups.values())
    order = torch.randperm(len(copies), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[: min(count, max(1, len(copies) // 4))]
    kept = [row for i, group in enumerate(copies) if i not in set(chosen) for row in group]
    return kept or rows, [copies[i][0] for i in chosen]


def _with_steps_to_go(run: Run) -> Path | None:
    """The checkpoint to go on from, or an earlier one where it is the last: the Trainer cannot resume behind its last step."""
    checkpoint, patience = run.checkpoint, run.recipe.training.early_stopping_patience
    if checkpoint is None or (checkpoint_step(checkpoint) < run.steps and not has_stopped_early(checkpoint, patience)):
        return checkpoint
    earlier = checkpoint_before(run.output / CHECKPOINTS, checkpoint_step(checkpoint))
    begins = f"from step {checkpoint_step(earlier)}" if earlier else "from the start"
    run.progress.say(
        f"the latest checkpoint is where training ended, from which nothing can be resumed: it is trained again {begins}"
    )
    return earlier


def _measured(run: Run, model: Any, when: str) -> dict[str, dict[str, float | int]]:
    """What the task measures of a model, by the name of the rows."""
    begun, metrics = time.monotonic(), {}
    for name, rows in run.task.measured.items():
        with run.progress.counting(f"measuring on {name} {when} training") as counting:
            metrics[name], remark = run.task.measure(run, model, rows, counting)
        run.progress.say(f"{name} {when} training: {metrics_line(metrics[name])}")
        if when == "after" and remark:
            run.progress.say(remark)
    run.seconds["evaluation"] += time.monotonic() - begun
    return metrics
