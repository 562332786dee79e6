"""The folder of a run: whether a run may use it, which checkpoint to resume from, and what is written at the end.

What a run leaves in it:

    adapter/        what was trained, as PEFT saves it, with gatewise.json; more beside it from some methods
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
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gatewise.adapters.checkpoints import checkpoint_step, complete_checkpoints
from gatewise.errors import GatewiseError, reason_of
from gatewise.files import finite, whole_file, write_json
from gatewise.parts import METHODS, Method
from gatewise.runs.recipe import Recipe
from gatewise.runs.recipe_file import load_recipe, recipe_as_yaml

ADAPTER, CHECKPOINTS, METRICS, RECIPE, ROWS = "adapter", "checkpoints", "metrics.json", "recipe.yaml", "rows.json"
WRITTEN_BY = "# Written by gatewise train: the recipe of the run in this folder, with every default.\n"
LOCK = ".gatewise.lock"

# What trains nothing: a run whose measuring ran out of memory can be resumed with smaller batches.
_FREE_TO_CHANGE = ("device", "launch", "training.log_every", "training.eval_batch_size", "data.max_new_tokens")


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        output: its folder.
        metrics: "dev" (and "test", where the recipe has one) -> {"before": ..., "after": ...}, as the task measures them; "before"
            is the base model.
        parameters: "base" and "adapter", the numbers stored in each.
        seconds: "evaluation", "training" (rounds included) and "total", of this process, and those of a stage of the method's own.
        steps: optimiser steps taken, those before a resume included.
        dtype, device: what the base model's weights were in and where it ran, in this process.
        resumed_from: the step the run went on from, or None.
        numbers: what the method says of the adapter, as in ``metrics.json``: "ranks" by module, "prompt_layers" and so on.
        table: makes the same for a terminal, in the main process; None where there is none.
        pictures: file name -> path of what was drawn.
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


def check_output(output: Path, recipe: Recipe, method: Method, resume: bool, overwrite: bool) -> Path | None:
    """Whether the folder may be used; the training's checkpoint to go on from, if that is asked for and there is one.

    There may be none when only the stage before the training is done or under way.
    """
    if resume and overwrite:
        raise GatewiseError("--resume and --overwrite exclude each other: go on with the run, or begin it again")
    check_writable(output)
    if (output / LOCK).exists():
        with _alone(output):
            pass
    used = output.is_dir() and any(output.iterdir())
    if used and overwrite and not _is_run(output):
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
    if not used:
        raise GatewiseError(
            f"there is no run in {output} to resume: leave --resume out to begin one, or give the folder of the run"
        )
    if (output / METRICS).is_file():
        raise GatewiseError(f"the run in {output} is finished, there is nothing to resume: use --overwrite to repeat it")
    found = complete_checkpoints(output / CHECKPOINTS, method.checkpoint_files)
    if not found and what_is_kept(output, method) is None:
        raise GatewiseError(f"{output} has no complete checkpoint to resume from: begin again with --overwrite")
    _check_same_recipe(output / RECIPE, recipe)
    return found[-1] if found else None


def _is_run(output: Path) -> bool:
    """True if a run wrote the folder: its recipe says so, or its metrics do."""
    try:
        if (output / RECIPE).read_text(encoding="utf-8").startswith(WRITTEN_BY):
            return True
    except (OSError, UnicodeDecodeError):
        pass
    try:
        content = json.loads((output / METRICS).read_text(encoding="utf-8"))
        return isinstance(content, dict) and {"format", "method", "parameters"} <= content.keys()
    except (OSError, ValueError):
        return False


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keeps other processes from training into the folder.

    Raises:
        GatewiseError: another one does.
    """
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise GatewiseError(f"another process is training into {output}: wait until it ends, or give another --output") from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # another process that came just now has it open, or already took it away
            (output / LOCK).unlink()


def what_is_kept(output: Path, method: Method) -> str | None:
    """What of an interrupted run --resume goes on from, in words; None for nothing."""
    if kept := complete_checkpoints(output / CHECKPOINTS, method.checkpoint_files):
        return f"step {checkpoint_step(kept[-1])}"
    if method.stage is None:
        return None
    if (output / f"{method.stage}.json").is_file():
        return f"the {method.stage}"
    kept = complete_checkpoints(output / CHECKPOINTS / method.stage)
    return f"step {checkpoint_step(kept[-1])} of the {method.stage}" if kept else None


def check_writable(output: Path) -> None:
    """Raises GatewiseError when the folder cannot be made or written into. Leaves no trace."""
    at = output.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir():
        raise GatewiseError(f"cannot write to {output}: {at} is a file, not a folder; give another --output")
    try:
        # Trying is the only sure test: root may write anywhere, and some file systems take no folders from anybody.
        os.rmdir(tempfile.mkdtemp(prefix=".gatewise-", dir=at))
    except OSError as error:
        raise GatewiseError(f"cannot write to {output}: {error.strerror or error} in {at}; give another --output") from error


def _check_same_recipe(path: Path, recipe: Recipe) -> None:
    if not path.is_file():
        raise GatewiseError(f"{path} is missing, so the run cannot be resumed: begin again with --overwrite")
    try:
        before, now = _flat(load_recipe(path).model_dump()), _flat(recipe.model_dump())
    except GatewiseError as error:
        raise GatewiseError(
            f"the run in {path.parent} cannot be resumed, as its recipe is not one of this version of gatewise: go on with the "
            f"version that began it, or begin again with --overwrite ({error})"
        ) from error
    for key in {**now, **before}:
        if key not in _FREE_TO_CHANGE and not key.startswith("launch.") and before.get(key) != now.get(key):
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


def check_same_rows(output: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]], resume: bool) -> dict[str, str]:
    """Fingerprints of encoded rows, by the key of the recipe that they come from.

    Raises:
        GatewiseError: the run that is to be resumed began with other rows.
    """

    def content(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)  # str leaves out most of a large tensor

    found = {key: hashlib.sha256(json.dumps(one, default=content).encode()).hexdigest() for key, one in rows.items()}
    if not resume or not (output / ROWS).is_file():
        return found
    try:
        before = dict(json.loads((output / ROWS).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise GatewiseError(
            f"{output / ROWS} is damaged ({reason_of(error)}): remove it to resume with the rows as they are, or begin again with "
            "--overwrite"
        ) from error
    for key, value in found.items():
        if before.get(key) != value:
            raise GatewiseError(
                f"the rows of {key} are not those that the run in {output} was started with: resume it with those, or begin again "
                "with --overwrite"
            )
    return found


@contextmanager
def writing(output: Path, recipe: Recipe, method: Method, rows: Mapping[str, str], overwrite: bool) -> Iterator[None]:
    """Opens the output folder for this process alone, and whatever happens leaves nothing half written in it.

    Args:
        rows: their fingerprints.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _alone(output):
            try:
                if overwrite:
                    _remove_run(output)
                (output / CHECKPOINTS).mkdir(exist_ok=True)
                with whole_file(output / RECIPE) as part:
                    part.write_text(WRITTEN_BY + recipe_as_yaml(recipe), encoding="utf-8")
                write_json(output / ROWS, rows)
                yield
            finally:
                _tidy(output, method)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise GatewiseError(f"{output} could not be written ({reason}): free some space or give another --output") from error
    finally:
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _tidy(output: Path, method: Method) -> None:
    """Removes checkpoints and files that were cut short, and the whole run when nothing of it is worth keeping."""
    for folder, also in ((CHECKPOINTS + f"/{method.stage}", ()), (CHECKPOINTS, method.checkpoint_files)):
        checkpoints = output / folder
        complete = complete_checkpoints(checkpoints, also)
        for path in checkpoints.glob("checkpoint-*"):
            if path not in complete and not (path / "trainer_state.json").is_file():
                shutil.rmtree(path, ignore_errors=True)
        if checkpoints.is_dir() and not any(checkpoints.iterdir()) and not (output / METRICS).is_file():
            checkpoints.rmdir()
    if not checkpoints.is_dir() and what_is_kept(output, method) is None:
        for name in (RECIPE, ROWS):
            (output / name).unlink(missing_ok=True)


def _remove_run(output: Path) -> None:
    """Removes what a run of any method writes, and nothing else that may lie in the folder."""
    for name in (METRICS, RECIPE, ROWS, *(name for method in METHODS.usable().values() for name in method.files)):
        (output / name).unlink(missing_ok=True)
    for name in (ADAPTER, CHECKPOINTS):
        if (output / name).is_dir():
            shutil.rmtree(output / name)


def write_metrics(recipe: Recipe, result: RunResult, log: Sequence[Mapping[str, Any]]) -> None:
    """Writes what the run came to into ``metrics.json``."""
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
