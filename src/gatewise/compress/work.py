"""What an interrupted compression goes on with."""

import hashlib
import json
import shutil
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
from gatewise.files import check_new_folder, whole_file, write_json
from gatewise.internals.library_attributes import locked_file_is_at

STATE_FILE = "state.json"
_FORMAT = 1
_WEIGHTS = (".safetensors", ".bin")
_READ = (".json", ".txt", ".model", ".jinja", ".py")  # configurations, and what tokenizers are made of


def fingerprint_of(asked: Mapping[str, Any], adapter: Path) -> str:
    """Of everything that measurements rest on: a call with another fingerprint must not go on with them.

    Args:
        asked: settings, rows, and how they are read, as JSON can hold them.
        adapter: its folder.
    """
    told = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode())
    told.update(weights_of(adapter).read_bytes())
    told.update(json.dumps(files_of(adapter, weights=False)).encode())  # with its tokenizer's, if it brings one
    return told.hexdigest()


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


def beside(out: str | Path) -> Path:
    """OUT.work."""
    out = Path(out).resolve()
    return out.with_name(f"{out.name}.work")


def check_place(out: str | Path) -> None:
    """Refuses a folder that cannot be written, and names the folder beside it that a compression killed at its very end left.

    Raises:
        GatewiseError: as ``check_new_folder``.
    """
    try:
        check_new_folder(out)
    except GatewiseError as error:
        if not (Path(out).is_dir() and beside(out).is_dir()):
            raise
        raise GatewiseError(
            f"{error}; if {out} is what a compression wrote that was stopped at its very end, {beside(out)} is left over and "
            "may be removed"
        ) from None


@contextmanager
def alone(out: str | Path) -> Iterator[None]:
    """Keeps other compressions away that would write to the same place, and go on with what this one trains.

    Raises:
        GatewiseError: another one is at work.
    """
    path = beside(out).with_name(f".{beside(out).name}.lock")
    lock = FileLock(str(path))
    held = False
    while not held:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise GatewiseError(f"another command is compressing to {out} now: wait for it, or give another --out") from None
        except NotImplementedError:  # a file system without locks
            yield
            return
        except OSError as error:
            raise GatewiseError(
                f"{path} cannot be made ({error.strerror or error}): give a shorter --out, or one in another folder"
            ) from error
        held = locked_file_is_at(lock, path)
        if not held:
            lock.release()
    try:
        yield
    finally:
        # Before it is released: another process could lock it before it is removed, and a third one make a new one.
        with suppress(PermissionError):  # Windows removes no file that is open
            path.unlink(missing_ok=True)
        lock.release()


class Work:
    """The folder OUT.work: the order, qualities of what was measured, weights of what was trained on. Removed at the end.

    Args:
        folder: None for a model in memory, of which all is kept in memory.

    Raises:
        GatewiseError: something else is there, or what another compression left.
    """

    def __init__(self, folder: Path | None, fingerprint: str = "") -> None:
        self.folder = folder
        self._state: dict[str, Any] = {"format": _FORMAT, "fingerprint": fingerprint, "order": None, "rows": {}}
        self._weights: dict[int, dict[str, Tensor]] = {}
        if folder is None or not folder.exists():
            return
        try:
            if all(path.name.startswith(f".{STATE_FILE}.") for path in folder.iterdir()):
                return  # of a run that was killed before anything was kept
            found = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            if found["format"] != _FORMAT or not isinstance(found["rows"], dict) or "order" not in found:
                raise ValueError("unknown format")
            other = found["fingerprint"] != fingerprint
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GatewiseError(
                f"{folder} is in the way, and is not what an interrupted compression left: move it, or give another --out"
            ) from error
        if other:
            raise GatewiseError(
                f"{folder} is what an interrupted compression with other settings, data, adapter or base model left: give the same "
                "command again to go on with it, or remove the folder"
            )
        self._state = found

    def order(self) -> tuple[dict[str, list[float]], dict[str, Cost], float] | None:
        """Values of ranks, costs of modules, and the seconds of a step, which would not be measured alike again."""
        held = self._state["order"]
        if held is None:
            return None
        return held["values"], {path: Cost(**cost) for path, cost in held["costs"].items()}, held["seconds"]

    def keep_order(self, values: Mapping[str, Sequence[float]], costs: Mapping[str, Cost], seconds: float) -> None:
        """Keeps what ``order`` gives."""
        told = {path: asdict(cost) for path, cost in costs.items()}
        self._keep(order={"values": dict(values), "costs": told, "seconds": seconds})

    def rows(self, key: str) -> Tensor | None:
        """(n,) qualities that were measured under a key; None where none were."""
        held = self._state["rows"].get(key)
        return None if held is None else torch.tensor(held, dtype=torch.float64)

    def keep_rows(self, key: str, rows: Tensor) -> None:
        """Keeps what ``rows`` gives."""
        self._keep(rows=self._state["rows"] | {key: rows.tolist()})

    def weights(self, at: int) -> dict[str, Tensor] | None:
        """Weights that were trained on after ``at`` steps of the order; None where none were."""
        if self.folder is None:
            return self._weights.get(at)
        path = self._weights_file(at)
        try:
            return read_tensors(path)[0] if path.is_file() else None
        except GatewiseError as error:
            raise GatewiseError(f"{error}; as it is of an interrupted compression, remove {self.folder} and start again") from error

    def keep_weights(self, at: int, weights: dict[str, Tensor]) -> None:
        """Keeps what ``weights`` gives."""
        if self.folder is None:
            self._weights[at] = weights
            return
        with whole_file(self._weights_file(at)) as part:
            save_file({key: value.contiguous() for key, value in weights.items()}, part)

    def _weights_file(self, at: int) -> Path:
        assert self.folder is not None
        return self.folder / f"trained-{at}.safetensors"

    def _keep(self, **changes: Any) -> None:
        self._state |= changes
        if self.folder is not None:
            write_json(self.folder / STATE_FILE, self._state)

    def remove(self) -> None:
        """Removes what was kept, and the folder if nothing else is in it."""
        if self.folder is None:
            return
        for path in [self.folder / STATE_FILE, *self.folder.glob("trained-*.safetensors")]:
            path.unlink(missing_ok=True)
        for pattern in (f".{STATE_FILE}.*", ".trained-*"):  # what a run that was killed had begun to write
            for part in self.folder.glob(pattern):
                shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            self.folder.rmdir()


@contextmanager
def removed_if_refused(works: Sequence[Work]) -> Iterator[None]:
    """Around a search: removes what was kept where the search refuses, as it would again, and as no other call may go on with it.

    An interruption leaves all as it is, and so does what others refuse, such as a full disk.
    """
    try:
        yield
    except GatewiseError as error:
        if error.__cause__ is None:
            for work in works:
                work.remove()
        raise
