"""Files are written whole or not at all: into a temporary sibling, then renamed over the name that was asked for.

``content_of`` reads one that a user named.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gatewise.errors import GatewiseError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path; when the block ends well the file there takes the place of ``path``.

    Raises:
        GatewiseError: the place cannot be written.
    """
    target = Path(path)
    with _sibling(target) as folder:
        part = folder / target.name
        yield part
        os.replace(part, target)


@contextmanager
def whole_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder; when the block ends well it becomes ``path``.

    Args:
        replace: take the place of a folder that is there; otherwise a non-empty one is refused.

    Raises:
        GatewiseError: the place cannot be written, or is taken.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise GatewiseError(f"{target} is a file, expected a folder to write into: give another path")
    if not replace and target.is_dir() and any(target.iterdir()):
        raise GatewiseError(f"{target} is not empty: give a new folder, or remove it first")
    with _sibling(target) as folder:
        part = folder / target.name
        part.mkdir()
        yield part
        if target.exists():
            os.replace(target, folder / "old")
        os.replace(part, target)


def content_of(path: str | Path) -> bytes:
    """The bytes of a file that a user named.

    Raises:
        GatewiseError: there is no such file, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise GatewiseError(f"{path}: there is no such file") from None
    except OSError as error:
        raise GatewiseError(f"{path} cannot be read: {error.strerror or error}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """A value of mappings, lists, numbers and text as JSON can hold it, which has no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _sibling(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``, on the same file system, removed at the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise GatewiseError(f"cannot write {target}: {error.strerror or error}; give a path that can be written") from error
    try:
        yield folder
    except OSError as error:
        raise GatewiseError(f"cannot write {target}: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
