"""What an interrupted compression goes on with: the order, what was measured, and the weights of what was trained on."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from gatewise.adapters.files import read_tensors, weights_of
from gatewise.compress.order import Cost
from gatewise.errors import GatewiseError
from gatewise.files import whole_file, write_json

_STATE_FILE = "state.json"
_WEIGHTS = (".safetensors", ".bin")
_READ = (".json", ".txt", ".model", ".jinja", ".py")  # configurations, and what tokenizers are made of


def fingerprint_of(asked: Mapping[str, Any], adapter: Path) -> str:
    """Of everything that measurements rest on: a call with another fingerprint does not go on with them.

    Args:
        asked: settings, rows, and how they are read, as JSON can hold them.
        adapter: its folder.
    """
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode())
    digest.update(weights_of(adapter).read_bytes())
    digest.update(json.dumps(files_of(adapter, weights=False)).encode())  # with its tokenizer's, if it brings one
    return digest.hexdigest()


def files_of(folder: str | Path, weights: bool = True) -> dict[str, str]:
    """File name -> what tells a change of it, for what is loaded from a model's folder.

    Args:
        weights: also those, by their size and the time of their last change, as they may be large. Other files are read.
    """
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in _READ and path.is_file():
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif weights and path.suffix in _WEIGHTS and path.is_file():
            found[path.name] = f"{path.stat().st_size} bytes of {path.stat().st_mtime_ns}"
    return found


def work_folder(out: str | Path) -> Path:
    """OUT.work."""
    out = Path(out).resolve()
    return out.with_name(f"{out.name}.work")


@contextmanager
def locked_work(out: str | Path, fingerprint: str | None) -> Iterator["Work"]:
    """The work on OUT, which nobody else does meanwhile. Where the block ends well, nothing of it is left.

    Args:
        fingerprint: None keeps nothing for later, as for a model in memory.

    Raises:
        GatewiseError: another process is at work, or the folder cannot be made.
    """
    if fingerprint is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Work(Path(temporary))
        return
    place = work_folder(out)
    lock = FileLock(str(place / "lock"))
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise GatewiseError(f"another command is compressing to {out} now: wait for it, or give another --out") from None
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        raise GatewiseError(
            f"{place} cannot be made ({error.strerror or error}): give a shorter --out, or one in another folder"
        ) from error
    try:
        work = Work(place / fingerprint[:16])
        yield work
        # With what other commands for the same place have left: it is taken now.
        for folder in place.glob("[0-9a-f]" * 16):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
        if not any(place.glob("[0-9a-f]" * 16)):
            with suppress(OSError):
                (place / "lock").unlink(missing_ok=True)
                place.rmdir()


class Work:
    """A folder of one command. Whatever in it cannot be read is made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state: dict[str, Any] = {"order": None, "rows": {}}
        with suppress(OSError, ValueError):
            self._state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))

    def order(self) -> tuple[dict[str, list[float]], dict[str, Cost]] | None:
        """Values of ranks and costs of modules; None where they were not found yet."""
        held = self._state["order"]
        return None if held is None else (held["values"], {path: Cost(**cost) for path, cost in held["costs"].items()})

    def keep_order(self, values: Mapping[str, Sequence[float]], costs: Mapping[str, Cost]) -> None:
        """Keeps what ``order`` gives."""
        self._state["order"] = {"values": dict(values), "costs": {path: asdict(cost) for path, cost in costs.items()}}
        write_json(self.folder / _STATE_FILE, self._state)

    def rows(self, key: str) -> Tensor | None:
        """(n,) qualities that were measured under a key; None where none were."""
        held = self._state["rows"].get(key)
        return None if held is None else torch.tensor(held, dtype=torch.float64)

    def keep_rows(self, key: str, rows: Tensor) -> None:
        """Keeps what ``rows`` gives."""
        self._state["rows"][key] = rows.tolist()
        write_json(self.folder / _STATE_FILE, self._state)

    def weights(self, at: int) -> dict[str, Tensor] | None:
        """Weights that were trained on after ``at`` steps of the order; None where none were."""
        with suppress(GatewiseError):
            return read_tensors(self.folder / f"trained-{at}.safetensors")[0]
        return None

    def keep_weights(self, at: int, weights: Mapping[str, Tensor]) -> None:
        """Keeps what ``weights`` gives."""
        with whole_file(self.folder / f"trained-{at}.safetensors") as part:
            save_file({key: value.contiguous() for key, value in weights.items()}, part)

    def remove(self) -> None:
        """Removes what was kept: no other call can go on with it."""
        shutil.rmtree(self.folder, ignore_errors=True)
