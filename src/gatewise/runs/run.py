"""Carries out a recipe: checks everything, loads, measures, trains, measures again, writes the adapter, and draws.

It knows no method and no task: their verbs are in ``gatewise/parts.py``. What a run leaves in its folder:

    adapter/        what was trained, as PEFT saves it, with gatewise.json and a model card; more beside it from some methods
    metrics.json    metrics before and after, parameters, seconds, and the method's numbers
    *.png           the method's pictures: ranks, layers, routing
    recipe.yaml     the recipe with every default written out
    rows.json       fingerprints of the rows, by which --resume sees that they are the same
    checkpoints/    the last two checkpoints, from which --resume goes on

A method with a stage of its own before the training, such as SPT's search, has the checkpoints of it in ``checkpoints/STAGE`` and
writes ``STAGE.json`` when it is done: the run is then in its second stage.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import SafetensorError
from transformers import TrainerState, set_seed

from gatewise import processes
from gatewise.adapters.checkpoints import checkpoint_before, checkpoint_step, complete_checkpoints
from gatewise.adapters.files import NOTE_FILE, read_note
from gatewise.errors import GatewiseError, reason_of, some
from gatewise.files import finite, whole_file, whole_folder, write_json
from gatewise.inspection.report import report_of, study_of
from gatewise.internals.sharding import join, reshard, shared_by
from gatewise.models.device import PeakMemory, pick_device, pick_dtype
from gatewise.models.loading import embedded_for, load_tokenizer, most_tokens
from gatewise.parts import METHODS, TASKS, Features, Measured, Method, Report, Run, Task
from gatewise.progress import ConsoleProgress, quiet
from gatewise.runs.card import write_card_of
from gatewise.runs.hub import check_upload, upload
from gatewise.runs.recipe import Recipe, TorchOptimizer, by_key, load_recipe, recipe_as_yaml
from gatewise.runs.trainer import TENSORBOARD, arguments_of, has_stopped_early, trainer_of
from gatewise.tasks.metrics import metrics_line
from gatewise.tasks.splitting import selected, set_aside

ADAPTER, CHECKPOINTS, METRICS, RECIPE, ROWS = "adapter", "checkpoints", "metrics.json", "recipe.yaml", "rows.json"
MEASURED = ("tuning", "dev", "test")
WRITTEN_BY = "# Written by gatewise train: the recipe of the run in this folder, with every default.\n"
LOCK = ".gatewise.lock"

# What trains nothing: a run whose measuring ran out of memory can be resumed with smaller batches.
_FREE_TO_CHANGE = (
    *("device", "push_to_hub", "hub_private", "training.log_every", "training.report_to", "training.eval_batch_size"),
    "data.max_new_tokens",
)


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        output: its folder.
        metrics: "dev" (and "test", where the recipe has one) -> {"before": ..., "after": ...}, as the task measures them; "before"
            is the base model. Of what was asked for, see ``train``.
        parameters: "base" and "adapter", the numbers stored in each.
        seconds: "evaluation", "training" (rounds included) and "total", of this process, and those of a stage of the method's own.
        steps: optimiser steps taken, those before a resume included.
        dtype, device: what the base model's weights were in and where it ran, in this process.
        resumed_from: the step the run went on from, or None.
        numbers: what the method says of the adapter, as in ``metrics.json``: "ranks" by module, "prompt_layers" and so on.
        table: makes the same for a terminal, in the main process; None where there is none.
        pictures: file name -> path of what was drawn.
        rows: "dev" and so on -> a number for each row after the training, in their order; see ``gatewise.parts.Measured``. Not in
            ``metrics.json``.
        remarks: what is worth telling of what was measured after the training. Not in ``metrics.json``.
        peak_memory: bytes that were in use at most while it trained: on the GPU, or of this process where there is none. None
            where that cannot be told, as on a CPU without Linux.
    """

    output: Path
    metrics: dict[str, dict[str, dict[str, float | int]]]
    parameters: dict[str, int]
    seconds: dict[str, float]
    steps: int
    dtype: str
    device: str
    resumed_from: int | None
    numbers: dict[str, Any]
    table: Callable[[], Any] | None = None
    pictures: dict[str, Path] = field(default_factory=dict)
    rows: dict[str, list[float]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    peak_memory: int | None = None

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return self.output / ADAPTER

    @property
    def metrics_file(self) -> Path:
        """The file that holds the numbers of this result."""
        return self.output / METRICS

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank of the adapter written; empty where it has none."""
        return self.numbers.get("ranks", {})


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    measured: Sequence[str] = ("dev", "test"),
    before: bool = True,
) -> RunResult:
    """Carries out a recipe.

    Data, template, base model, modules and the output folder are all checked before training begins. An interrupt or a
    fault leaves complete checkpoints, and no adapter that is half written.

    Args:
        output: the folder to write. It must be new or empty, unless resumed or overwritten.
        resume: go on from the latest complete checkpoint in ``output``; on the CPU the result is that of a run never stopped.
        overwrite: first remove what an earlier run left in ``output``.
        console: where progress is shown; stderr by default.
        measured: of the rows that the recipe has beside those to train on, "tuning", "dev" and "test", those to measure on.
        before: measure the base model too, before the training. The adapter is the same without.

    Raises:
        GatewiseError: anything in recipe, data or folder that a user can put right, or a loss that is not finite.
    """
    started, output = time.monotonic(), Path(output)
    if unknown := set(measured) - set(MEASURED):
        raise GatewiseError(f"measured names {some(sorted(unknown))}: expected any of {', '.join(MEASURED)}")
    check_services(recipe)
    task, method = TASKS[recipe.task](recipe), METHODS[recipe.method](recipe)
    slow: list[str] = []
    device = pick_device(recipe.device)
    dtype = torch.float32 if task.in_float32 else pick_dtype(recipe.dtype, device, slow.append)
    join(device)
    check_sharing(recipe, method, shared_by())
    is_main, count = processes.is_main(), processes.count()
    checkpoint = processes.by_main(_checkpoint_to_resume, output, recipe, method, resume, overwrite)
    progress = ConsoleProgress((console or Console(stderr=True)) if is_main else Console(quiet=True))
    where = f"{device}, {count} processes" if count > 1 else str(device)
    in_what = recipe.quantization or str(dtype).removeprefix("torch.")
    for line in (*slow, f"loading {recipe.model} in {in_what} on {where}"):
        progress.say(line)
    if resume:
        method.resume(output)
    with quiet(bars=True):
        run = prepared(recipe, task, method, output, device, dtype, checkpoint, progress)
        rows = _fingerprints(run, resume)
        run.checkpoint = _with_steps_to_go(run)
        if overwrite:
            run.arguments(run.steps)  # refuses what does not work here while the earlier run is still there
        with _writing(run, method, rows, overwrite) if is_main else nullcontext():
            memory = PeakMemory(device)
            with memory:
                method.before_training(run)
            trainer: Any = method.trainer(run)
            base_metrics = {}
            if before and shared_by() is not None and device.type != "cpu":
                progress.say(f"the base model is not measured before the training: {shared_by()} moves it to the GPUs with it")
                before = False
            if before:
                # FSDP has moved the adapter alone by now, which changes nothing yet.
                off = trainer.model.disable_adapter() if shared_by() == "FSDP" else nullcontext()
                with method.untrained(trainer.model) as base, off:
                    base_metrics = _measured(run, base, "before", measured)
            set_seed(recipe.seed)
            begun = time.monotonic()
            with _reporting(recipe.training.reporters), memory:
                trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
            run.seconds["training"] = time.monotonic() - begun
            # Without the wrapper that mixed precision puts around forward: both measurements run in the base's dtype.
            model = method.finish(run, trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
            after = _measured(run, model, "after", measured)
            run.note |= task.note_after(run, model)
            run.seconds["total"] = time.monotonic() - started
            metrics = {
                name: {**({"before": base_metrics[name].metrics} if before else {}), "after": one.metrics}
                for name, one in after.items()
            }
            if count > 1:
                reshard(model)
            result = processes.by_main(_written, run, method, model, metrics, trainer.state)
            # The run is whole from here on: what is drawn of it may fail.
            study = Report()
            with _may_fail("the study of the adapter", progress):
                study = study_of(run, model)
            rows_after = {name: [*one.rows] for name, one in after.items()}
            remarks = [f"{name}: {one.remark}" for name, one in after.items() if one.remark]
            result = replace(result, rows=rows_after, remarks=remarks, peak_memory=memory.most)
            if is_main:
                result = _drawn(run, result, study, trainer.state)
    if is_main and recipe.push_to_hub:
        upload(result.adapter, recipe.push_to_hub, recipe.hub_private, progress.say)
    return result


# Before training ------------------------------------------------------------------------------------------------------


def check_services(recipe: Recipe) -> None:
    """Looks for what a run needs beside its rows and its model, before anything is done.

    Raises:
        GatewiseError: it is not there.
    """
    for name in recipe.training.reporters:
        if find_spec(name) is None:
            raise GatewiseError(f"training.report_to names {name}, which is not installed: pip install {name}, or take it out")
    if recipe.push_to_hub:
        check_upload(recipe.push_to_hub)


def check_sharing(recipe: Recipe, method: Method, by: str | None) -> None:
    """Refuses what cannot be trained where processes share out the base model or what the optimiser keeps.

    Args:
        recipe: of the run.
        method: its method.
        by: what shares it out, if anything does: "DeepSpeed" or "FSDP".

    Raises:
        GatewiseError: the recipe asks for such a thing.
    """
    training = recipe.training
    torch_alone = by == "DeepSpeed" and training.optim not in get_args(TorchOptimizer)
    wants = {
        f"quantization {recipe.quantization}": recipe.quantization is not None,
        "peft.init_lora_weights that changes the base model": method.changes_base,
        "training.lora_plus_ratio": training.lora_plus_ratio is not None,
        f"training.optim {training.optim}": torch_alone,
    }
    for what, is_wanted in wants.items():
        if by and is_wanted:
            raise GatewiseError(f"{what} does not go with {by}: take launch.strategy ddp, or leave it out")


def _checkpoint_to_resume(output: Path, recipe: Recipe, method: Method, resume: bool, overwrite: bool) -> Path | None:
    """Refuses a folder that may not be used. Returns the training's checkpoint to go on from, if that is asked for.

    There may be none when only the stage before the training is done or under way.
    """
    if resume and overwrite:
        raise GatewiseError("--resume and --overwrite exclude each other: go on with the run, or begin it again")
    used = output.is_dir() and any(output.iterdir())
    ours = (output / RECIPE).is_file() and (output / RECIPE).read_bytes().startswith(WRITTEN_BY.encode())
    if used and overwrite and not ours:
        raise GatewiseError(
            f"{output} was not written by gatewise train, so --overwrite leaves it alone: give another --output, or remove the "
            "folder yourself"
        )
    if used and not resume and not overwrite:
        raise GatewiseError(
            f"{output} is not empty: use --resume to go on with the run in it, --overwrite to replace that run, or give "
            "another --output"
        )
    if not resume:
        return None
    if (output / METRICS).is_file():
        raise GatewiseError(f"the run in {output} is finished, there is nothing to resume: use --overwrite to repeat it")
    if not ours or what_is_kept(output, method) is None:
        advice = "take --overwrite to begin it again" if ours else "leave --resume out to begin a run, in a folder of its own"
        raise GatewiseError(f"there is no complete checkpoint in {output} to resume from: {advice}")
    before, now = _fixed(load_recipe(output / RECIPE)), _fixed(recipe)
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            raise GatewiseError(
                f"{key} is {now.get(key)!r}, but the run in {output} was started with {before.get(key)!r}: resume it "
                "with that, or begin again with --overwrite"
            )
    found = complete_checkpoints(output / CHECKPOINTS)
    return found[-1] if found else None


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """What a resumed run may not change, by key."""
    return {key: value for key, value in by_key(recipe.model_dump(exclude={"launch"})).items() if key not in _FREE_TO_CHANGE}


def what_is_kept(output: Path, method: Method) -> str | None:
    """What of an interrupted run --resume goes on from, in words; None for nothing."""
    if kept := complete_checkpoints(output / CHECKPOINTS):
        return f"step {checkpoint_step(kept[-1])}"
    if method.stage is None:
        return None
    if (output / f"{method.stage}.json").is_file():
        return f"the {method.stage}"
    kept = complete_checkpoints(output / CHECKPOINTS / method.stage)
    return f"step {checkpoint_step(kept[-1])} of the {method.stage}" if kept else None


def prepared(
    recipe: Recipe,
    task: Task,
    method: Method,
    output: Path,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: Path | None,
    progress: ConsoleProgress,
) -> Run:
    """Everything a run needs, loaded and checked."""
    task.read(None if checkpoint is None else read_note(checkpoint))
    if recipe.data.tuning is not None:
        _set_aside(task, recipe.data.tuning, progress)
    if (best_by := recipe.training.best_by) not in (known := ("loss", *task.metrics)):
        raise GatewiseError(
            f"training.best_by is {best_by!r}: expected one of {', '.join(known)}, by which these rows are measured"
        )
    tokenizer = load_tokenizer(recipe.model, progress.say)
    # What some encoders pool with is in no file.
    fresh_base = partial(task.base, dtype, tokenizer, ("pooler",) if method.trains_whole else ())
    set_seed(recipe.seed)
    base = fresh_base()
    # Learned positions end where the table ends.
    max_length = min(recipe.data.max_length, most_tokens(base, tokenizer) - method.prompt_tokens)
    if max_length < 1:
        raise GatewiseError(
            f"prompts.num_prompt_tokens leaves none of the {recipe.model}'s positions for the text: lower it by {1 - max_length}"
        )
    train = task.encode(task.train, tokenizer, max_length, key="data.train", say=progress.say)
    watched = progress.watched = "dev" if recipe.data.tuning is None else "tuning"
    dev = task.encode(task.measured[watched], tokenizer, max_length, key=f"data.{watched}", say=progress.say)
    if watched != "dev":  # rows that do not fit are told now, and not at the end of a comparison
        task.encode(task.measured["dev"], tokenizer, max_length, key="data.dev", say=progress.say)
    collate = task.collator(tokenizer)
    count = len(train)
    train, held_out = _hold_out(train, recipe.data.held_out, recipe.seed)
    if gone := count - len(train) - len(held_out):
        progress.say(f"data.held_out: {gone} rows of data.train are left out, which ask what held out ones ask")
    whole = tuple(f"{name}." for name in getattr(base, "trained_whole", ()))
    run = Run(
        recipe=recipe,
        task=task,
        output=output,
        progress=progress,
        device=device,
        tokenizer=tokenizer,
        collate=collate,
        fresh_base=fresh_base,
        base_parameters=base.num_parameters() - sum(p.numel() for name, p in base.named_parameters() if name.startswith(whole)),
        max_length=max_length,
        train=train,
        dev=dev,
        watched=watched,
        held_out=held_out,
        steps=recipe.training.total_steps(len(train)),
        steps_per_epoch=recipe.training.steps_per_epoch(len(train)),
        note={
            "format": 1,
            "base": embedded.name if (embedded := embedded_for(recipe.model)) else recipe.model,
            "base_quantised": embedded.quantised if embedded else None,
            "task": recipe.task,
            "dtype": recipe.dtype,
            "quantization": recipe.quantization,
            "trained_in": str(dtype).removeprefix("torch."),
            "max_length": max_length,
            "training": recipe.training.model_dump(
                include={"learning_rate", "batch_size", "weight_decay", "max_grad_norm", "gradient_accumulation"}
            ),
            **task.note(base),
        },
        checkpoint=checkpoint,
        seconds={"evaluation": 0.0, "training": 0.0},
    )
    run.arguments, run.trainer = partial(arguments_of, run), partial(trainer_of, run)
    run.model = method.adapt(run, base)
    return run


def _set_aside(task: Task, count: int, progress: ConsoleProgress) -> None:
    """Rows of ``train`` become those to tune on, which follow from their own content alone."""
    rows: Any = task.train
    parts = set_aside(task.units(rows), task.asks(rows), count)
    if not parts[1]:
        raise GatewiseError(
            f"data.tuning is {count}, but none of the {len(rows)} rows of data.train can be taken out, of which a quarter is the "
            "most: give more rows, or leave the key out (in a comparison, --rates 1)"
        )
    task.train, tuning = (selected(rows, at) for at in parts)
    task.measured = {"tuning": tuning, **task.measured}
    progress.say(f"data.tuning: {len(rows) - len(parts[0])} of the {len(rows)} rows of data.train are not trained on")


def _hold_out(rows: Features, count: int, seed: int) -> tuple[Features, Features]:
    """The rows to train on, the same for every method, and at most ``count`` of them (and a quarter) held out.

    Of rows that are copies of each other, which have the same ``group``, the first is held out and the others are not trained on.
    """
    if not count:
        return rows, []
    groups: dict[int, Features] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("group", i), []).append(row)
    copies = list(groups.values())
    order = torch.randperm(len(copies), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[: min(count, max(1, len(copies) // 4))]
    gone = set(chosen)
    kept = [row for i, group in enumerate(copies) if i not in gone for row in group]
    return kept or rows, [copies[i][0] for i in chosen]


def _fingerprints(run: Run, resume: bool) -> dict[str, str]:
    """Fingerprints of the encoded rows, by the key of the recipe that they come from.

    Raises:
        GatewiseError: the run that is to be resumed began with other rows.
    """

    def content(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)  # str leaves out most of a large tensor

    rows = {"data.train": [*run.train, *run.held_out], f"data.{run.watched}": run.dev}
    found = {key: hashlib.sha256(json.dumps(one, default=content).encode()).hexdigest() for key, one in rows.items()}
    path = run.output / ROWS
    before = json.loads(path.read_text(encoding="utf-8")) if resume and path.is_file() else found
    for key in found:
        if before.get(key, found[key]) != found[key]:
            raise GatewiseError(
                f"the rows of {key} are not those that the run in {run.output} was started with: resume it with those, or begin "
                "again with --overwrite"
            )
    return found


def _with_steps_to_go(run: Run) -> Path | None:
    """The checkpoint to go on from, or an earlier one where it is the last: the Trainer cannot resume behind its last step."""
    checkpoint = run.checkpoint
    if checkpoint is None:
        return None
    step, state = checkpoint_step(checkpoint), TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    patience = run.recipe.training.early_stopping_patience
    if step < run.steps and not has_stopped_early(state.log_history, patience, run.arguments(run.steps)):
        return checkpoint
    earlier = checkpoint_before(run.output / CHECKPOINTS, step)
    begins = f"from step {checkpoint_step(earlier)}" if earlier else "from the start"
    run.progress.say(
        f"the latest checkpoint is where training ended, from which nothing can be resumed: it is trained again {begins}"
    )
    return earlier


# While the folder is open ---------------------------------------------------------------------------------------------


@contextmanager
def _writing(run: Run, method: Method, rows: Mapping[str, str], overwrite: bool) -> Iterator[None]:
    """Opens the output folder for this process alone. Where nothing came of the run that can be resumed, nothing of it stays.

    Args:
        rows: their fingerprints.
    """
    output = run.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(output / LOCK).acquire(timeout=0):
            try:
                if overwrite:
                    _remove_run(output)
                text = WRITTEN_BY + recipe_as_yaml(run.recipe)
                with whole_file(output / RECIPE) as part:
                    part.write_text(text, encoding="utf-8")
                write_json(output / ROWS, rows)
                yield
            finally:
                if not (output / METRICS).is_file() and what_is_kept(output, method) is None:
                    _remove_run(output)
                with suppress(OSError):  # another process that came just now has it open
                    (output / LOCK).unlink()
    except Timeout:
        raise GatewiseError(f"another process is training into {output}: wait until it ends, or give another --output") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        of_torch_save = ("inline_container", "iostream")  # on a full disk
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in of_torch_save):
            raise
        reason = getattr(error, "strerror", None) or error
        raise GatewiseError(f"{output} could not be written ({reason}): free some space or give another --output") from error
    finally:
        with suppress(OSError):  # it is not empty, or is the folder that this process works in
            output.rmdir()


@contextmanager
def _reporting(reporters: Sequence[str]) -> Iterator[None]:
    """Says in a sentence what a reporter raises, such as that nobody is logged in."""
    try:
        yield
    except Exception as error:
        name = type(error).__module__.partition(".")[0]
        if name not in reporters:
            raise
        raise GatewiseError(f"training.report_to: {name} says: {reason_of(error)} Put that right, or take it out") from error


def _remove_run(output: Path) -> None:
    """Removes what a run of any method writes, and nothing else that may lie in the folder."""
    for name in (METRICS, RECIPE, ROWS, *(name for method in METHODS.values() for name in method.files)):
        (output / name).unlink(missing_ok=True)
    for name in (ADAPTER, CHECKPOINTS, TENSORBOARD):
        shutil.rmtree(output / name, ignore_errors=True)


def _measured(run: Run, model: Any, when: str, names: Sequence[str]) -> dict[str, Measured]:
    """What the task measures of a model, by the name of the rows."""
    begun, found = time.monotonic(), {}
    for name, rows in run.task.measured.items():
        if name not in names:
            continue
        with run.progress.counting(f"measuring on {name} {when} training") as counting:
            found[name] = run.task.measure(run, model, rows, counting)
        run.progress.say(f"{name} {when} training: {metrics_line(found[name].metrics)}")
        if when == "after" and (remark := found[name].remark):
            run.progress.say(remark)
    run.seconds["evaluation"] += time.monotonic() - begun
    return found


def _written(run: Run, method: Method, model: Any, metrics: dict[str, Any], state: TrainerState) -> RunResult:
    """Writes the adapter, and what the run came to."""
    with whole_folder(run.output / ADAPTER, replace=True) as part:
        # save_embedding_layers=False keeps PEFT from asking the hub whether the vocabulary was changed.
        model.save_pretrained(str(part), save_embedding_layers=False)
        write_json(part / NOTE_FILE, run.note)
    own, found = method.report(run.output / ADAPTER), report_of(run.output / ADAPTER)
    numbers, pictures = {**found.numbers, **own.numbers}, {**found.pictures, **own.pictures}
    run.report = Report(found.parameters, numbers, own.table or found.table, pictures)
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
    _write_metrics(run.recipe, result, state.log_history)
    return result


def _write_metrics(recipe: Recipe, result: RunResult, log: Sequence[Mapping[str, Any]]) -> None:
    content = {
        "format": 1,
        "method": recipe.method,
        "model": recipe.model,
        "task": recipe.task,
        "seed": recipe.seed,
        "dtype": result.dtype,
        "device": result.device,
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "metrics": result.metrics,
        "parameters": result.parameters,
        **result.numbers,
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
        "log": [entry for entry in log if "loss" in entry or "eval_loss" in entry],
    }
    write_json(result.metrics_file, finite(content))


@contextmanager
def _may_fail(what: str, progress: ConsoleProgress) -> Iterator[None]:
    """Says what could not be made of a finished run, and goes on: adapter and metrics are written."""
    try:
        yield
    except Exception as error:
        progress.say(f"warning: {what} could not be made ({type(error).__name__}: {error}); adapter and metrics.json are whole")


def _drawn(run: Run, result: RunResult, study: Report, state: TrainerState) -> RunResult:
    """The result with what the study of the model says, and with pictures."""
    assert run.report is not None
    result = replace(result, numbers={**result.numbers, **study.numbers}, table=run.report.table)
    if study.numbers:
        _write_metrics(run.recipe, result, state.log_history)
    for name, draw in {**study.pictures, **run.report.pictures}.items():
        with _may_fail(name, run.progress):
            draw(run.output / name)
            result.pictures[name] = run.output / name
    with _may_fail("the model card", run.progress):
        write_card_of(run, run.output / ADAPTER, result)
    return result
