"""Writes files and folders whole or not at all: into a temporary folder beside the target, then renamed.

When writing fails, the old file stays; when the power fails, either the old or the new one is there. A new file keeps the mode of
the one that it replaces. Symbolic links are followed. Devices and pipes, such as /dev/stdout, are written into directly.
"""

import glob
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gatewise.errors import GatewiseError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path. When the block ends without an error, the file written there replaces ``path``.

    Raises:
        GatewiseError: the place cannot be written.
    """
    target, special = Path(os.path.realpath(path)), is_special(path)
    with _temporary(path, Path(tempfile.gettempdir()) if special else target.parent) as folder:
        part = folder / target.name
        yield part
        if special:
            with open(path, "wb") as stream:
                stream.write(part.read_bytes())
        else:
            _replace(part, target)


@contextmanager
def whole_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder. When the block ends without an error, it becomes ``path``.

    Args:
        replace: replace an existing folder; otherwise one that is not empty is refused.

    Raises:
        GatewiseError: the place cannot be written, or is taken.
    """
    _check_free(path, replace)
    target = Path(os.path.realpath(path))
    with _temporary(path, target.parent) as folder:
        part = folder / target.name
        part.mkdir()
        yield part
        for place, folders, names in os.walk(part, topdown=False):
            for one in (Path(place, name) for name in (*names, *folders)):
                if not one.is_symlink():
                    sync_to_disk(one)
        old = Path(tempfile.mkdtemp(dir=folder)) / "old"
        if replace and os.path.exists(target):
            shutil.copymode(target, part)
            os.replace(target, old)
        elif sys.platform == "win32" and os.path.isdir(target):  # elsewhere an empty folder is replaced, and only that
            os.rmdir(target)
        try:
            _replace(part, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise


def check_new_file(path: str | Path) -> None:
    """Tries whether :func:`whole_file` could write a path, before long work. Makes the folder above it.

    Raises:
        GatewiseError: the path is a folder's, or nothing can be written there.
    """
    if os.path.isdir(path):
        raise GatewiseError(f"{path} is a folder, expected a file to write: give another path")
    if not is_special(path):
        _try(path)


def check_not_read(path: str | Path, *sources: str | Path) -> None:
    """Refuses to write a file that is read. Sources may be patterns.

    Raises:
        GatewiseError: the path is one of theirs.
    """
    for source in map(str, sources):
        for one in {source, *glob.glob(source)}:
            if is_one_file(one, path):
                raise GatewiseError(
                    f"{path} is a file that is read ({source}), and would be replaced: give what is written another name"
                )


def is_one_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file, which need not be there yet."""
    try:
        return os.path.realpath(one) == os.path.realpath(other) or os.path.samefile(one, other)
    except (OSError, ValueError):  # one is not there, or has a NUL in its name, which is told when it is opened
        return False


def check_new_folder(path: str | Path) -> None:
    """Tries whether :func:`whole_folder` could write a path, before long work. Makes the folder above it.

    Raises:
        GatewiseError: the path is a file's, that of a folder with something in it, or nothing can be written there.
    """
    _check_free(path, replace=False)
    _try(path)


def content_of(path: str | Path) -> bytes:
    """Reads the bytes of a file that a user named.

    Raises:
        GatewiseError: there is no such file, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise GatewiseError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise GatewiseError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """Writes each row as a line of JSON, all or none; what JSON has no form for, such as a date, as text."""
    with whole_file(path) as part, part.open("w", encoding="utf-8", newline="\n", errors="backslashreplace") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by None, anywhere in mappings and lists."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_free(path: str | Path, replace: bool) -> None:
    if os.path.exists(path) and not os.path.isdir(path):
        raise GatewiseError(f"{path} is a file, expected a folder to write into: give another path")
    if not replace and os.path.isdir(path) and os.listdir(path):
        raise GatewiseError(f"{path} is not empty: give a new folder, or remove it first")
    if not replace and os.path.isdir(path) and (os.path.ismount(path) or os.path.samefile(path, os.curdir)):
        raise GatewiseError(f"{path} is the folder you are in, or a disk, which cannot be replaced: give a new folder in it")


def _try(path: str | Path) -> None:
    """Makes an empty file of this name in a temporary folder: the system may refuse the place or the name."""
    target = Path(os.path.realpath(path))
    with _temporary(path, target.parent) as folder:
        (folder / target.name).touch()


def sync_to_disk(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk; not every file system can do so for folders."""
    if sys.platform == "win32" and path.is_dir():  # which has nothing of the kind
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def _replace(part: Path, target: Path) -> None:
    """Puts a file or folder in its place once it is on disk."""
    if target.exists():
        shutil.copymode(target, part)
    sync_to_disk(part)
    os.replace(part, target)
    sync_to_disk(target.parent)


def is_special(path: str | Path) -> bool:
    """True for a device or a pipe, which can be written into but not replaced."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextmanager
def _temporary(path: str | Path, parent: Path) -> Iterator[Path]:
    """Yields a temporary folder in ``parent``, removed at the end. Errors become sentences about ``path``."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".gatewise-", dir=parent))
    except OSError as error:
        raise GatewiseError(f"cannot write {path}: {error.strerror or error}; give a path that can be written") from error
    try:
        yield folder
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise GatewiseError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; nothing was changed") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
