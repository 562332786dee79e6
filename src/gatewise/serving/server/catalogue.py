"""Which adapters there are: what lies in the folders that a server watches, and in which version.

A version is known by the names, sizes and times of its files. It is served from a copy that was taken of all of them while they
stayed the same, so that no answer ever mixes old files with new ones. A folder that somebody still writes into is left alone until
it has not changed for a moment. A name stays with the folder that was served by it, as long as that is there. Whatever is wrong
with a folder that is watched is no reason to pass over others. Only JSON, templates of chats and safetensors are read.
"""

import glob
import itertools
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from gatewise.adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_config, tensor_shapes, weights_of
from gatewise.checks import has_half_a_pair
from gatewise.errors import GatewiseError, reason_of, some
from gatewise.serving.engines import NOT_SERVED
from gatewise.serving.server.lanes import Kind

SETTLED = 2.0  # seconds in which the files of a folder must not have changed
RETRY = 10.0  # seconds after which an adapter that could not be loaded is tried again: a want of memory or disk may have passed
_PATIENCE = 60.0  # seconds, at the start, for adapters that somebody still writes

_SUFFIXES = (".json", ".jinja")
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # of LoRA: the others change the base model, which is shared
_MORE = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")  # which share no batch
_GONE = (FileNotFoundError, NotADirectoryError)  # which is known then; other faults of a file system may pass
_numbers = itertools.count(1)

Signature = tuple[tuple[str, int, int, int, int], ...]
"""Of each file: name, bytes, times of its content and of itself, number on its disk."""


class ReplacedError(Exception):
    """A version's files are no longer there."""


@dataclass(eq=False)
class Version:
    """One state of an adapter's folder.

    Attributes:
        name: by which clients ask for it.
        kind: with what it can share a batch.
        is_named: the user named the folder itself.
        key: its name in the model, which no other version ever has.
        created: in seconds since 1970.
        gone: the folder holds something else now, or nothing.
        failed: when it could not be loaded the last time, by ``time.monotonic``.
    """

    name: str
    folder: Path
    kind: Kind
    signature: Signature
    is_named: bool = False
    # All of one length: PEFT takes the weights of "version23" for missing ones of "version2".
    key: str = field(default_factory=lambda: f"version{next(_numbers):012}")
    created: int = field(default_factory=lambda: int(time.time()))
    gone: bool = False
    failed: float = -inf

    @property
    def is_given_up(self) -> bool:
        """Whether it could not be loaded a moment ago."""
        return time.monotonic() < self.failed + RETRY

    @contextmanager
    def copy(self) -> Iterator[Path]:
        """A folder with a copy of its files, which nobody changes; it may be moved away.

        What is raised of the copy meanwhile is said of the folder that the user knows.

        Raises:
            ReplacedError: they are not those of this version any more.
            GatewiseError: they cannot be copied.
        """
        with ExitStack() as stack:
            try:
                copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gatewise-"))) / "adapter"
                copy.mkdir()
                for name, *_ in self.signature:
                    shutil.copyfile(self.folder / name, copy / name)
                is_whole = _signature(self.folder) == self.signature
            except OSError as error:
                if self._is_replaced():
                    raise self._replaced() from error
                raise self.not_copied(error) from error
            if not is_whole:
                raise self._replaced()
            try:
                yield copy
            except GatewiseError as error:
                raise GatewiseError(str(error).replace(str(copy), str(self.folder))) from error

    def _is_replaced(self) -> bool:
        try:
            return _signature(self.folder) != self.signature
        except OSError as error:
            return isinstance(error, _GONE)

    def _replaced(self) -> ReplacedError:
        return ReplacedError(f"the adapter {self.name!r} is being replaced: ask again in a moment")

    def not_copied(self, error: OSError) -> GatewiseError:
        """What is said where there is no copy: it is tried again when somebody asks."""
        # Of the file that is read. Each copy's own path is another one, and a line that changes is printed each time.
        is_read = error.filename2 is None and str(error.filename).startswith(str(self.folder))
        reason = f"{error.strerror or type(error).__name__}{f', {error.filename}' if is_read else ''}"
        return GatewiseError(
            f"the adapter {self.folder} cannot be copied ({reason}): if that does not pass, see that the temporary folder (TMPDIR) "
            "has room, and that the user of this process may read its files"
        )


class Catalogue:
    """The adapters of a server by name.

    Args:
        places: folders of adapters, folders that hold such folders, patterns of folders ("runs/*/adapter"), or NAME=FOLDER. A
            folder called "adapter" is called by the one that holds it.
        taken: names that no adapter may have, such as the base model's.
        settled: seconds in which the files of a folder must not have changed.
        say: told in a line of what is passed over.

    Raises:
        GatewiseError: a place is not there; two adapters have one name; an adapter that was named itself cannot be served.
    """

    def __init__(
        self, places: Sequence[str], taken: Sequence[str] = (), say: Callable[[str], None] | None = None, settled: float = SETTLED
    ) -> None:
        self._places, self._taken, self._settled = list(places), set(taken), settled
        self._say = say or (lambda text: print(text, file=sys.stderr))
        self._versions: dict[str, Version] = {}
        self._homes: dict[str, Path] = {}  # the folder that a name was served from, until it is gone
        self._seen: dict[Path, tuple[Signature, float]] = {}  # and since when it has been so
        self._said: dict[Path, str] = {}
        self._ended = threading.Event()
        limit = time.monotonic() + max(_PATIENCE, 2 * settled)
        self._is_starting = True
        while late := self.scan():
            if time.monotonic() > limit:
                self._say(f"note: {some(sorted(map(str, late)))} changes all the time, and is served once it does not")
                break
            time.sleep(settled / 4)
        self._is_starting = False

    def __getitem__(self, name: str) -> Version:
        """The version of a name that is served now; KeyError where there is none."""
        return self._versions[name]

    def all(self) -> list[Version]:
        return sorted(self._versions.values(), key=lambda one: one.name)

    def watch(self, every: float) -> None:
        """Looks again every so many seconds, in a thread of its own, until :meth:`end`."""

        def look() -> None:
            while not self._ended.wait(every):
                try:
                    self.scan()
                except Exception as error:  # whatever lies there must not end the watch
                    traceback.print_exception(error, file=sys.stderr)

        threading.Thread(target=look, name="gatewise-watch", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def scan(self) -> list[Path]:
        """Looks at all places. Returns the folders that are still being written.

        At the start, what cannot be served is an error where the user named the adapter itself, or where two have one name. Later,
        the one that was served keeps its name, even while it cannot be: clients must not get another one's answers.
        """
        there: dict[str, Version] = {}
        late: list[Path] = []
        folders = self._folders()
        homes = {name: folder for name, folder in self._homes.items() if folder in folders}
        kept = dict(homes)
        for folder, (name, is_named) in folders.items():
            problem = self._refused_name(name, folder, homes)
            if problem is not None:
                self._refuse(folder, problem, is_fatal=True)
                continue
            if self._is_starting:
                homes[name] = folder
            try:
                version = self._version_in(name, folder, is_named)
            except Exception as error:
                self._refuse(folder, f"{describe_fault(folder, error)}; it is not served", is_named, error)
                continue
            if version is None:
                late.append(folder)
            else:
                there[name] = version
                homes[name] = kept[name] = folder
        for name, version in self._versions.items():
            version.gone = there.get(name) is not version
        self._versions, self._homes = there, kept
        self._seen = {folder: seen for folder, seen in self._seen.items() if folder in folders}
        return late

    def _refused_name(self, name: str, folder: Path, homes: dict[str, Path]) -> str | None:
        if name in self._taken:
            return f"the adapter {folder} is called {name!r} as the base model is: rename its folder, or give it as NAME=FOLDER"
        if homes.get(name, folder) != folder:
            return f"two adapters are called {name!r}, {homes[name]} and {folder}: rename one, or give them as NAME=FOLDER"
        if has_half_a_pair(name) or not name.isprintable():
            return f"the folder {folder!r} has a name that no client can send: rename it"
        return None

    def _refuse(self, folder: Path, problem: str, is_fatal: bool, error: Exception | None = None) -> None:
        if is_fatal and self._is_starting:
            raise GatewiseError(problem) from error
        self.note(folder, problem)

    def note(self, folder: Path, text: str) -> None:
        """Says what is wrong with a folder, unless that was the last that was said of it: it is tried again and again."""
        if self._said.get(folder) != text:
            self._said[folder] = text
            self._say(f"note: {text}")

    def _folders(self) -> dict[Path, tuple[str, bool]]:
        """The folder of each adapter -> its name, and whether the user named the very folder.

        What was served is there until it is known to be gone: file systems have faults that pass, and ``glob`` tells of none.
        """
        found: dict[Path, tuple[str, bool]] = {}
        for place in self._places:
            given, path = _split(place)
            listed: list[str] = []
            is_named = False
            try:
                if glob.has_magic(path):
                    listed = sorted(glob.glob(path))
                elif is_named := given is not None or _has_config(Path(path)):
                    listed = [path]
                else:
                    listed = [os.path.join(path, name) for name in sorted(os.listdir(path))]
            except OSError as error:
                self._pass_over(Path(path), error, is_fatal=True)
            for folder in map(Path.absolute, map(Path, listed)):
                if folder.name.startswith(".") and not is_named:  # which is still being written
                    continue
                try:
                    is_one = _has_config(folder)
                except OSError as error:
                    self._pass_over(folder, error, is_named)
                    continue
                if self._is_starting and is_named and not is_one:
                    read_config(folder)  # whose error says what is there instead
                if is_one:
                    found.setdefault(folder, (given or name_of(folder), is_named))
        for name, folder in self._homes.items():
            if folder not in found and _may_have_config(folder):
                found[folder] = (name, False)
        return found

    def _pass_over(self, folder: Path, error: OSError, is_fatal: bool) -> None:
        if self._is_starting or not (isinstance(error, _GONE) or folder in self._homes.values()):
            advice = "give an adapter, a folder of adapters or a pattern of folders that the user of this process may read"
            self._refuse(folder, f"the folder {folder} cannot be read ({error.strerror or error}): {advice}", is_fatal, error)

    def _version_in(self, name: str, folder: Path, is_named: bool) -> Version | None:
        """The version that is served now: the one from before as long as the next one is not whole; None while there is none."""
        before = self._versions.get(name)
        before = before if before is not None and before.folder == folder else None
        try:
            signature = _signature(folder)
        except OSError as error:
            if before is None and not isinstance(error, _GONE):
                raise
            return before  # what changes as we look is looked at again
        if not signature or (before is not None and before.signature == signature):
            return before
        newest = max(max(one[2], one[3]) for one in signature) / 1e9
        now = time.monotonic()
        seen = self._seen.get(folder)
        since = seen[1] if seen is not None and seen[0] == signature else now
        self._seen[folder] = (signature, since)
        if time.time() - newest < self._settled and now - since < self._settled:  # clocks of other machines may be ahead
            return before
        version = Version(name, folder, kind_of(folder), signature, is_named)
        self._said.pop(folder, None)
        return version


def kind_of(folder: Path) -> Kind:
    """What an adapter can share a batch with.

    Raises:
        GatewiseError: it cannot be served.
    """
    config, shapes = read_config(folder), tensor_shapes(weights_of(folder))
    peft_type = str(config.get("peft_type"))
    if peft_type == "ROUTED_LORA":
        return "routed"
    if peft_type == "SELECTIVE_PROMPT":
        return "alone"
    if peft_type != "LORA":
        hint = ": write it as plain LoRA with gatewise export" if peft_type == "ADALORA" else ""
        raise GatewiseError(
            f"the adapter {folder} is of type {peft_type}: expected LORA, ROUTED_LORA or SELECTIVE_PROMPT to be served{hint}"
        )
    if config.get("bias") not in (None, "none"):
        raise GatewiseError(
            f"the adapter {folder} was trained with bias={config['bias']!r}, which changes the base model that all adapters share"
        )
    if config.get("init_lora_weights") not in _STARTS:
        raise GatewiseError(
            f"the adapter {folder} has init_lora_weights={config['init_lora_weights']!r}, which changes the base model that all "
            "adapters share: save it with path_initial_model_for_weight_conversion"
        )
    for name in (*NOT_SERVED, "ensure_weight_tying"):
        if config.get(name):
            raise GatewiseError(f"the adapter {folder} was trained with {name}, which is not served")
    is_linear = all(name.endswith((".lora_A.weight", ".lora_B.weight")) and len(shape) == 2 for name, shape in shapes.items())
    return "plain" if is_linear and not any(config.get(name) for name in _MORE) else "alone"


def describe_fault(folder: Path, error: Exception) -> str:
    """What is said of an error that came of an adapter's folder, whatever raised it."""
    return (
        str(error)
        if isinstance(error, GatewiseError)
        else f"the adapter {folder} cannot be read ({type(error).__name__}: {reason_of(error)})"
    )


def name_of(folder: Path) -> str:
    """What an adapter is called: by its folder or, as runs call all theirs "adapter", by the folder above."""
    return folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name


def _split(place: str) -> tuple[str | None, str]:
    name, equals, path = place.partition("=")
    return (name, path) if equals and path and name and "/" not in name and not glob.has_magic(name) else (None, place)


def _has_config(folder: Path) -> bool:
    """Whether it is an adapter; OSError where nobody can tell."""
    try:
        return stat.S_ISREG(os.stat(folder / CONFIG_FILE).st_mode)
    except _GONE:
        return False


def _may_have_config(folder: Path) -> bool:
    try:
        return _has_config(folder)
    except OSError:
        return True


def _signature(folder: Path) -> Signature:
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name for entry in entries if (entry.name == WEIGHTS_FILE or entry.name.endswith(_SUFFIXES)) and entry.is_file()
        )
    found: list[tuple[str, int, int, int, int]] = []
    for name in names:
        told: Any = os.stat(folder / name)
        found.append((name, told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino))
    return tuple(found)
