"""A file of a JSON object a line that only grows: the journal of an extraction, the history of a review."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gatewise.errors import GatewiseError
from gatewise.files import content_of, finite, sync_to_disk


class JsonLines:
    """A file of a JSON object a line that only grows: when :meth:`append` has returned, its rows are on disk. For one process.

    What an interruption or a full disk left of a row is cut off; rows that were appended before stay as they are.

    Attributes:
        cut: what :meth:`read` cut off, 0 bytes mostly.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.cut = Path(path), 0
        self._end, self._torn = 0, False  # bytes that are whole; whether something torn may stand behind them

    def read(self) -> list[dict[str, Any]]:
        """The rows, none where there is no file.

        Raises:
            GatewiseError: the file cannot be read, or a row before the last is no JSON object.
        """
        content = content_of(self.path) if self.path.exists() else b""
        lines = content.split(b"\n")
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
                if not isinstance(row, dict):
                    raise ValueError(f"found a {type(row).__name__}, expected an object")
            except (ValueError, RecursionError) as error:
                if any(map(bytes.strip, lines[number:])):
                    raise GatewiseError(
                        f"{self.path}, line {number}: not a line of JSON ({error}): mend it, or move the file"
                    ) from error
                self.cut = len(content) - sum(len(whole) + 1 for whole in lines[: number - 1])
                break  # the last, which an interruption tore
            rows += [row] if row else []
        self._end, self._torn = len(content) - self.cut, self.cut > 0
        return rows

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, all or none, and returns when they are on disk. A killed process may leave the first of several.

        Raises:
            GatewiseError: they cannot be written, or another program has changed the file.
        """
        added = "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            new = not self.path.exists()
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "rb+", buffering=0) as stream:
                if new:
                    sync_to_disk(self.path.parent)
                self._append(stream.fileno(), added)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            said = getattr(error, "strerror", None) or error
            raise GatewiseError(f"cannot write {self.path}: {said}; nothing was changed") from error

    def _append(self, file: int, added: bytes) -> None:
        size = os.fstat(file).st_size
        if size < self._end or (size > self._end and not self._torn):
            raise GatewiseError(f"{self.path} was changed by another program, so it is left alone: start again")
        os.ftruncate(file, self._end)
        if self._end:
            os.lseek(file, self._end - 1, os.SEEK_SET)
            added = added if os.read(file, 1) == b"\n" else b"\n" + added
        self._torn = True
        try:
            at = 0
            while at < len(added):
                os.lseek(file, self._end + at, os.SEEK_SET)
                at += os.write(file, added[at:])
            os.fsync(file)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file, self._end)
            raise
        self._end, self._torn = self._end + at, False
