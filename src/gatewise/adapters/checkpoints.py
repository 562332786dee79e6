"""Checkpoints in a run's folder: which of them are whole and good, oldest first."""

import json
import re
from pathlib import Path

from gatewise.adapters.files import CONFIG_FILE, WEIGHTS_FILE, tensor_shapes
from gatewise.errors import GatewiseError

DIVERGED_FILE = "diverged"
_NAME = re.compile(r"checkpoint-(\d+)")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end and not marked as diverged, oldest first.

    The Trainer writes ``trainer_state.json`` last, so where it can be read the rest is there.
    """
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if _is_complete(path)]


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser steps a checkpoint had behind it."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def checkpoint_before(folder: Path, steps: int) -> Path | None:
    """The last complete checkpoint that has a step to go: the Trainer cannot resume behind the last step. None: from the start."""
    found = [path for path in complete_checkpoints(folder) if checkpoint_step(path) < steps]
    return found[-1] if found else None


def _is_complete(path: Path) -> bool:
    needed = ("optimizer.pt", "scheduler.pt", CONFIG_FILE)
    # Several processes have a random state each.
    if (path / DIVERGED_FILE).exists() or not all((path / name).is_file() for name in needed) or not any(path.glob("rng_state*")):
        return False
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        tensor_shapes(path / WEIGHTS_FILE)
    except (OSError, ValueError, GatewiseError):
        return False
    return True
