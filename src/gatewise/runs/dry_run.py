"""``gatewise train --dry-run``: the rows of a run, what is trained of them, the size of its adapter, and what it would take.

Everything is loaded and checked as for the run itself, and nothing is written.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gatewise.checks import printable
from gatewise.losses import IGNORED, scored
from gatewise.models.device import peak_memory, pick_device, pick_dtype
from gatewise.parts import Features, Method, Run
from gatewise.progress import ConsoleProgress, quiet
from gatewise.runs.launch import SHARED_BY, environment
from gatewise.runs.recipe import Recipe
from gatewise.runs.run import check_services, check_sharing, prepared
from gatewise.runs.trainer import RowOrder, recompute_activations, row_length, share_of

_WHOLE = 10**9  # tokens: longer than any row
_SHOWN, _MOST = 2, 600  # rows that are shown, and characters of one span of them
_ADAM = 8  # bytes that it keeps for each number; other optimisers keep fewer


def dry_run(recipe: Recipe, output: str | Path, console: Console, stderr: Console) -> None:
    """Prints what ``train`` would do. In one process, whatever the recipe says.

    Raises:
        GatewiseError: as ``train``, for all but the output folder.
    """
    check_services(recipe)
    share_of(recipe.training, recipe.launch.processes)
    check_sharing(recipe, recipe.parts()[1], SHARED_BY.get(recipe.launch.strategy))
    environment(recipe.launch)  # refuses what the launcher would
    with quiet(bars=True):
        run, method = ready(recipe, Path(output), ConsoleProgress(stderr))
        console.print(_rows(run))
        is_plain = console.color_system is None or console.no_color
        how = "stands in [[ ]]" if is_plain else "is green"
        console.print(f"The first rows as the model reads them; what it learns to write {how}:", highlight=False, markup=False)
        for row in run.train[:_SHOWN]:
            console.print(Text.assemble(("| ", "dim"), _shown(run, row, is_plain)), soft_wrap=True, highlight=False)
        for name, fact in _facts(run, method):
            console.print(f"{name:<12}{fact}", soft_wrap=True, highlight=False, markup=False)


def ready(recipe: Recipe, output: Path, progress: ConsoleProgress) -> tuple[Run, Method]:
    """A run whose model stands where it will train, and its method. Nothing is written.

    Raises:
        GatewiseError: as ``train``, for all but the output folder.
    """
    task, method = recipe.parts()
    device = pick_device(recipe.device)
    dtype = torch.float32 if task.in_float32 else pick_dtype(recipe.dtype, device, progress.say)
    run = prepared(recipe, task, method, output, device, dtype, None, progress)
    run.arguments(run.steps)  # refuses what does not work here
    if next(run.model.parameters()).device.type != device.type:
        run.model.to(device)
    return run, method


def _rows(run: Run) -> Table:
    """How many rows there are, and how long they are before they are cut."""
    table = Table(*("rows", "n", "shortest", "median", "90%", "longest", f"over {run.max_length}"), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    counts = {"train": len(run.train), **{name: len(rows) for name, rows in run.task.measured.items()}}
    for name, rows in {"train": run.task.train, **run.task.measured}.items():
        lengths = sorted(map(row_length, _uncut(run, rows, name)))
        at = [lengths[round(share * (len(lengths) - 1))] for share in (0, 0.5, 0.9, 1)]
        table.add_row(name, *map(str, (counts[name], *at, sum(length > run.max_length for length in lengths))))
        if name == "train":
            table.add_row("held out", str(len(run.held_out)))
    return table


def _uncut(run: Run, rows: Any, name: str) -> Features:
    limit, run.tokenizer.model_max_length = run.tokenizer.model_max_length, _WHOLE
    try:
        return run.task.encode(rows, run.tokenizer, _WHOLE, key=f"data.{name}", say=lambda _: None)
    finally:
        run.tokenizer.model_max_length = limit


def _shown(run: Run, row: dict[str, Any], is_plain: bool) -> Text:
    """A row as the model reads it, in which what is trained stands out, the ends of texts and turns among it."""
    ids, labels = row["input_ids"], row["labels"]
    text = Text()
    if not isinstance(labels, list) or len(labels) != len(ids):
        text.append(_decoded(run, ids))
        names = getattr(run.task.train, "labels", None)
        if isinstance(labels, int) and names:  # of a classifier
            text.append(f" [[{names[labels]}]]" if is_plain else f" {names[labels]}", "bold green")
        return text
    for is_trained, span in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED):
        part = _decoded(run, [token for token, _ in span])
        text.append(f"[[{part}]]" if is_trained and is_plain else part, "bold green" if is_trained else "dim")
    return text


def _decoded(run: Run, ids: list[int]) -> str:
    text = printable(str(run.tokenizer.decode(ids)))
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"


def _facts(run: Run, method: Method) -> Iterator[tuple[str, str]]:
    training, trained = run.recipe.training, sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    yield "adapter", f"{trained:,} trained parameters, {trained / run.base_parameters:.2%} of the base model"
    epochs = run.steps / run.steps_per_epoch
    yield "steps", f"{run.steps}, which are {epochs:.3g} epochs of {run.steps_per_epoch}"
    seconds, usual, largest = timed_step(run, method)
    took = f"a step of {training.gradient_accumulation} x {_size(usual)} took {seconds:.2f} s on {run.device}"
    rest = "measuring, and what a method does beside its steps, comes on top"
    yield "time", f"about {duration(seconds * run.steps)} of training: {took}, tried once; {rest}"
    peak = peak_memory(run.device)
    if peak is not None:
        what = "on the GPU" if run.device.type == "cuda" else "of this process, loading included"
        why = f"the peak {what}, with a batch of {_size(largest)}, was {peak / 1e9:.1f} GB, and the optimiser adds its state"
        yield "memory", f"about {(peak + _ADAM * trained) / 1e9:.1f} GB: {why}"


def timed_step(run: Run, method: Method) -> tuple[float, Features, Features]:
    """Seconds of an optimiser step, tried once; the batch that it was tried with, which is of usual size, and the largest one."""
    largest, usual = _batches(run)
    run.progress.say("running three batches, to see what a step takes")
    if run.recipe.training.gradient_checkpointing:
        recompute_activations(run.model)
    seconds = [_pass(run, method, batch) for batch in (largest, usual, usual)]
    return seconds[-1] * run.recipe.training.gradient_accumulation, usual, largest


def _batches(run: Run) -> tuple[Features, Features]:
    """Of the batches of an epoch, as one process gets them: the one with most tokens, and one with as many as the mean."""
    training = run.recipe.training
    order = RowOrder(
        [row_length(row) for row in run.train],
        run.recipe.seed,
        lambda: 0,
        training.batch_size if training.group_by_length else None,
    )
    size = share_of(training, run.recipe.launch.processes)
    rows = [run.train[index] for index in order]
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    mean = statistics.mean(map(_tokens, batches))
    return max(batches, key=_tokens), min(batches, key=lambda batch: abs(_tokens(batch) - mean))


def _pass(run: Run, method: Method, rows: Features) -> float:
    """Seconds of a forward and backward pass."""
    wait: Callable[[], Any] = torch.accelerator.synchronize if run.device.type != "cpu" else lambda: None
    model = run.model.train()
    batch = {name: value.to(run.device) for name, value in run.collate(rows).items()}
    wait()
    begun = time.monotonic()
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.recipe.training.bf16):
        sums, counts = scored(model, batch).losses()
        loss = sums.sum() / counts.sum()
        if method.loss_term is not None:
            loss = loss + method.loss_term(model, 1.0)
    loss.backward()
    wait()
    seconds = time.monotonic() - begun
    model.zero_grad()
    return seconds


def _tokens(batch: Features) -> int:
    """Of a batch, padding included."""
    return len(batch) * max(map(row_length, batch))


def _size(batch: Features) -> str:
    return f"{len(batch)} rows of {max(map(row_length, batch))} tokens"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
