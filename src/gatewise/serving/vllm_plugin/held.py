"""The files of the adapters that a worker has loaded, kept open.

vLLM puts adapters aside where there are more than --max-cpu-loras, and loads one again in the step that has a request for it. Where
its folder was removed meanwhile, that ends the engine, with the requests of everybody. An open file can still be read, and takes no
memory: an adapter costs two of the files that a process may open. The disk gets its space back when the adapter is let go.
"""

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OPENED = Path("/proc/self/fd")  # of Linux: under its number here, a removed file can be opened once more
MOST = 1024  # adapters, where the process may open enough files; the one that was loaded longest ago goes first


class OpenFiles:
    """Files of one folder by their names, open."""

    def __init__(self, folder: str | Path) -> None:
        self._numbers: dict[str, int] = {}
        if not _OPENED.is_dir():
            return
        with suppress(OSError):  # it is gone, or this process may not open more
            for path in sorted(Path(folder).glob("adapter_*")):
                if path.is_file():
                    self._numbers[path.name] = os.open(path, os.O_RDONLY)

    def __bool__(self) -> bool:
        return bool(self._numbers)

    @contextmanager
    def as_folder(self) -> Iterator[str]:
        """A folder that has these files, as long as the context lasts."""
        with tempfile.TemporaryDirectory(prefix="gatewise-held-") as folder:
            for name, number in self._numbers.items():
                (Path(folder) / name).symlink_to(_OPENED / str(number))
            yield folder

    def close(self) -> None:
        """Lets go of them."""
        for number in self._numbers.values():
            os.close(number)
        self._numbers = {}


class Held(dict[int, OpenFiles]):
    """The open files of each loaded adapter, by vLLM's number for it."""

    def keep(self, number: int, files: OpenFiles) -> None:
        """Keeps an adapter's files in place of those that it had. At most ``MOST`` adapters', and a quarter of the files that this
        process may open: vLLM opens those of the next adapter itself."""
        self.let_go(number)
        self[number] = files
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # asked now: a server raises it after it has started
        most = MOST if limit == resource.RLIM_INFINITY else min(MOST, max(1, limit // 8))
        while len(self) > most:
            self.let_go(next(iter(self)))

    def let_go(self, number: int) -> None:
        """Closes an adapter's files, if some are kept."""
        if files := self.pop(number, None):
            files.close()
