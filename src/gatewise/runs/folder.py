"""The folder of a run: whether a run may use it, which checkpoint to resume from, and what is written at the end.

What a run leaves in it:

    adapter/        plain LoRA (with milora: routed LoRA; with spt, prompt-tuning and prefix-tuning: prompts): adapter_config.json,
                    adapter_model.safetensors; allocation.json with alora and pi-lora; search.json after a search; gatewise.json
    metrics.json    metrics before and after, ranks or prompt layers, parameters, seconds
    ranks.png       where the ranks went
    routing.png     with milora, which modules the prompts of dev chose
    layers.png      with spt, the layers that take a prompt; after a search gates.png, its gates over the steps
    search.json     after a search, what it chose: the run is then in its second stage
    recipe.yaml     the recipe with every default written out
    checkpoints/    the last two checkpoints, from which --resume goes on; those of a search in search/
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from peft import PeftModel
from safetensors import SafetensorError

from gatewise.adapters.files import NOTE_FILE, SEARCH_FILE, Selection
from gatewise.errors import GatewiseError
from gatewise.files import finite, whole_file, whole_folder, write_json
from gatewise.inspection import BudgetMap, PromptMap, RoutingMap, routing_json
from gatewise.prompts.stages import SEARCH_FOLDER
from gatewise.runs.baselines import STATE_FILE
from gatewise.runs.recipe import Recipe
from gatewise.runs.recipe_file import load_recipe, recipe_as_yaml
from gatewise.runs.trainer import checkpoint_step, complete_checkpoints
from gatewise.tasks.metrics import Metrics

ADAPTER, CHECKPOINTS, METRICS, RECIPE, PLOT, ROUTING = (
    "adapter",
    "checkpoints",
    "metrics.json",
    "recipe.yaml",
    "ranks.png",
    "routing.png",
)

GATES, LAYERS = "gates.png", "layers.png"
SEARCH_CHECKPOINTS = f"{CHECKPOINTS}/{SEARCH_FOLDER}"


# Keys that change what is shown, not what is learned: a run may be resumed with others.
WRITTEN_BY = "# Written by gatewise train: the recipe of the run in this folder, with every default.\n"
LOCK = ".gatewise.lock"


# What trains nothing: a run whose measuring ran out of memory can be resumed with smaller batches.
_FREE_TO_CHANGE = ("device", "launch", "training.log_every", "training.eval_batch_size", "data.max_new_tokens")


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        output: its folder. adapter, metrics_file, plot: what is in it; no plot with prompt-tuning and prefix-tuning.
        metrics: "dev" (and "test", where the recipe has one) -> {"before": ..., "after": ...}, as ``tasks.evaluate`` gives
            them; "before" is the base model.
        budget: the ranks of the adapter written, and what more it holds; None for prompts.
        parameters: "base" and "adapter", the numbers stored in each.
        seconds: "evaluation", "training" (rounds included) and "total", of this process; "search", of the one that ended it.
        steps: optimiser steps taken, those before a resume included.
        dtype, device: what the base model's weights were in and where it ran, in this process.
        resumed_from: the step the run went on from, or None.
        routing: with milora, which modules the prompts of dev chose.
        prompts: with spt, the layers that take a prompt.
        selection: with spt, what the search came to; None where there was none.
    """

    output: Path
    adapter: Path
    metrics_file: Path
    metrics: dict[str, dict[str, Metrics]]
    parameters: dict[str, int]
    seconds: dict[str, float]
    steps: int
    dtype: str
    device: str
    resumed_from: int | None
    plot: Path | None = None
    budget: BudgetMap | None = None
    routing: RoutingMap | None = None
    prompts: PromptMap | None = None
    selection: Selection | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank of the adapter written; empty for prompts."""
        return {} if self.budget is None else self.budget.ranks


def check_output(output: Path, recipe: Recipe, resume: bool, overwrite: bool) -> Path | None:
    """Whether the folder may be used; the training's checkpoint to go on from, if that is asked for and there is one.

    There may be none when only the search of the run is done or under way.
    """
    if resume and overwrite:
        raise GatewiseError("--resume and --overwrite exclude each other: go on with the run, or begin it again")
    check_writable(output)
    if (output / LOCK).exists():
        with _alone(output):
            pass
    if overwrite and output.is_dir() and any(output.iterdir()) and not _is_run(output):
        raise GatewiseError(
            f"{output} was not written by gatewise train, so --overwrite leaves it alone: give another --output, or remove the "
            "folder yourself"
        )
    if output.is_dir() and any(output.iterdir()) and not resume and not overwrite:
        raise GatewiseError(
            f"{output} is not empty: use --resume to go on with the run in it, --overwrite to replace that run, or give "
            "another --output"
        )
    if not resume:
        return None
    if not output.is_dir() or not any(output.iterdir()):
        raise GatewiseError(
            f"there is no run in {output} to resume: leave --resume out to begin one, or give the folder of the run"
        )
    if (output / METRICS).is_file():
        raise GatewiseError(f"the run in {output} is finished, there is nothing to resume: use --overwrite to repeat it")
    found = complete_checkpoints(output / CHECKPOINTS, _state_files(recipe))
    if not found and not search_begun(output):
        raise GatewiseError(f"{output} has no complete checkpoint to resume from: begin again with --overwrite")
    _check_same_recipe(output / RECIPE, recipe)
    return found[-1] if found else None


def _is_run(output: Path) -> bool:
    """Whether a run wrote the folder: its recipe says so, or its metrics do."""
    try:
        if (output / RECIPE).read_text(encoding="utf-8").startswith(WRITTEN_BY):
            return True
    except (OSError, UnicodeDecodeError):
        pass
    try:
        told = json.loads((output / METRICS).read_text(encoding="utf-8"))
        return isinstance(told, dict) and {"format", "method", "parameters"} <= told.keys()
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


def search_begun(output: Path) -> bool:
    """Whether a search in the folder is done, or has a checkpoint to go on from."""
    return (output / SEARCH_FILE).is_file() or bool(complete_checkpoints(output / SEARCH_CHECKPOINTS))


def what_is_kept(output: Path) -> str | None:
    """What of an interrupted run --resume goes on from, in words; None for nothing."""
    for folder, of in ((CHECKPOINTS, ""), (SEARCH_CHECKPOINTS, " of the search")):
        if of and (output / SEARCH_FILE).is_file():
            return "the search"
        if kept := complete_checkpoints(output / folder):
            return f"step {checkpoint_step(kept[-1])}{of}"
    return None


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
    before, now = _flat(load_recipe(path).model_dump()), _flat(recipe.model_dump())
    for key in sorted({*before, *now} - {*_FREE_TO_CHANGE}):
        if not key.startswith("launch.") and before.get(key) != now.get(key):
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


def before_the_end(checkpoints: Path, steps: int) -> Path | None:
    """The last checkpoint that has a step to go: the Trainer cannot resume behind the last step. None: from the start."""
    found = [path for path in complete_checkpoints(checkpoints) if checkpoint_step(path) < steps]
    return found[-1] if found else None


def _state_files(recipe: Recipe) -> tuple[str, ...]:
    return (STATE_FILE,) if recipe.method == "adalora" else ()


@contextmanager
def writing(output: Path, recipe: Recipe, overwrite: bool) -> Iterator[None]:
    """Opens the output folder for this process alone, and whatever happens leaves nothing half written in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _alone(output):
            try:
                if overwrite:
                    _remove_run(output)
                (output / CHECKPOINTS).mkdir(exist_ok=True)
                with whole_file(output / RECIPE) as part:
                    part.write_text(WRITTEN_BY + recipe_as_yaml(recipe), encoding="utf-8")
                yield
            finally:
                _tidy(output, recipe)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise GatewiseError(
            f"{output} could not be written ({reason}): free some space or give another --output; complete checkpoints "
            "are kept for --resume"
        ) from error
    finally:
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _tidy(output: Path, recipe: Recipe) -> None:
    """Removes checkpoints and files that were cut short, and the whole run when nothing of it is worth keeping."""
    for folder, also in ((SEARCH_CHECKPOINTS, ()), (CHECKPOINTS, _state_files(recipe))):
        checkpoints = output / folder
        complete = complete_checkpoints(checkpoints, also)
        for path in checkpoints.glob("checkpoint-*"):
            if path not in complete and not (path / "trainer_state.json").is_file():
                shutil.rmtree(path, ignore_errors=True)
        if checkpoints.is_dir() and not any(checkpoints.iterdir()) and not (output / METRICS).is_file():
            checkpoints.rmdir()
    if not checkpoints.is_dir() and not (output / SEARCH_FILE).is_file():
        (output / RECIPE).unlink(missing_ok=True)


def _remove_run(output: Path) -> None:
    """Removes what a run writes, and nothing else that may lie in the folder."""
    for name in (METRICS, PLOT, RECIPE, ROUTING, LAYERS, GATES, SEARCH_FILE):
        (output / name).unlink(missing_ok=True)
    for name in (ADAPTER, CHECKPOINTS):
        if (output / name).is_dir():
            shutil.rmtree(output / name)


def save_adapter(model: PeftModel, folder: Path, note: Mapping[str, Any], selection: Selection | None = None) -> None:
    """Writes an adapter with what ``gatewise eval`` and ``inspect`` want to know of its run, whole or not at all."""
    with whole_folder(folder, replace=True) as part:
        # save_embedding_layers=False keeps PEFT from asking the hub whether the vocabulary was changed.
        model.save_pretrained(str(part), save_embedding_layers=False)
        write_json(part / NOTE_FILE, note)
        if selection is not None:
            selection.write(part / SEARCH_FILE)


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
        "ranks": result.ranks,
        **({} if result.routing is None else {"routing": routing_json(result.routing)}),
        **({} if result.prompts is None else {"prompt_layers": list(result.prompts.chosen)}),
        **({} if result.selection is None else _searched(result.selection)),
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
        "log": [entry for entry in log if "loss" in entry or "eval_loss" in entry],
    }
    write_json(result.metrics_file, finite(content))


def _searched(selection: Selection) -> dict[str, Any]:
    by_loss = {} if selection.losses is None else {"losses_by_layer": selection.losses}
    return {"gates": selection.gates, **by_loss, "search_steps": selection.steps}
