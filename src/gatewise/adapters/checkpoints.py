"""Checkpoints in a run's folder: which of them are whole and good, oldest first."""

import json
from pathlib import Path
from zipfile import is_zipfile

from gatewise.adapters.files import CONFIG_FILE, WEIGHTS_FILE, tensor_shapes
from gatewise.errors import GatewiseError

DIVERGED_FILE = "diverged"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end and not marked as diverged, oldest first.

    The first process writes ``trainer_state.json`` last, so where it can be read the rest is there, but for the random states of
    other processes: what PyTorch saves is a zip file, whose directory is at its end.
    """
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return [path for path in sorted(numbered, key=checkpoint_step) if _is_complete(path)]


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser steps a checkpoint had behind it."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_before(folder: Path, steps: int) -> Path | None:
    """The last complete checkpoint that has a step to go: the Trainer cannot resume behind the last step. None: from the start."""
    return next((path for path in reversed(complete_checkpoints(folder)) if checkpoint_step(path) < steps), None)


def _is_complete(path: Path) -> bool:
    # Several processes have a random state each.
    needed = ("optimizer.pt", "scheduler.pt", CONFIG_FILE, "rng_state*")
    if (path / DIVERGED_FILE).exists() or not all(any(path.glob(name)) for name in needed):
        return False
    if not all(map(is_zipfile, path.glob("*.pt*"))):
        return False
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        tensor_shapes(path / WEIGHTS_FILE)
    except (OSError, ValueError, GatewiseError):
        return False
    return True
