"""Which adapters there are: what lies in the folders that a server watches, and in which version.

A version is one state of a folder, known by the names, sizes and times of its files. It is served from a copy that was taken of all
of them while they stayed the same, so that no answer ever mixes old files with new ones. A folder whose files changed a moment ago
is left alone. Whatever is wrong with a folder, its last whole version is served until the folder is gone, and the other folders are
served as ever. Only JSON, templates of chats and safetensors are read.
"""

import glob
import itertools
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatewise.adapters.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ChatTemplate,
    base_of,
    chat_template_of,
    lora_sizes,
    read_config,
    read_note,
    tensor_shapes,
    weights_of,
)
from gatewise.errors import GatewiseError, reason_of
from gatewise.models.embedded import EMBEDDED, hub_name
from gatewise.models.loading import load_config, weight_shapes
from gatewise.serving.engines import NOT_SERVED
from gatewise.serving.server.bodies import RefusedError
from gatewise.serving.server.lanes import Kind

SETTLED = 2.0  # seconds in which the files of a folder must not have changed
RETRY = 10.0  # seconds after which an adapter that could not be loaded is tried again: a want of memory or disk may have passed

_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # of LoRA: the others change the base model, which is shared
MORE = ("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")  # which share no batch
_GONE = (FileNotFoundError, NotADirectoryError)  # other errors of a file system may pass
_numbers = itertools.count(1)

Signature = tuple[tuple[str, int, int, int, int], ...]
"""Of each file: name, bytes, times of its content and of itself, number on its disk."""


class ReplacedError(RefusedError):
    """A version's files are no longer there."""


@dataclass(eq=False)
class Version:
    """One state of an adapter's folder.

    Attributes:
        name: by which clients ask for it.
        kind: with what it can share a batch.
        is_named: the user named the folder itself.
        chat: how it was trained to read a chat; None where nothing is noted.
        key: its name in the model, which no other version ever has.
        created: in seconds since 1970.
        gone: the folder holds something else now, or nothing.
        problem: why the last look refused what the folder holds; None where it did not.
        used, failed, tokenizer_failed: when it was asked for, and it or its tokenizer could not be loaded, the last time, by
            ``time.monotonic``.
        tokenizer: its own, once somebody has asked.
    """

    name: str
    folder: Path
    kind: Kind
    signature: Signature
    is_named: bool = False
    chat: ChatTemplate | None = None
    # All of one length: PEFT takes the weights of "version23" for missing ones of "version2".
    key: str = field(default_factory=lambda: f"version{next(_numbers):012}")
    created: int = field(default_factory=lambda: int(time.time()))
    gone: bool = False
    problem: str | None = None
    used: float = 0.0
    failed: float = -inf
    tokenizer_failed: float = -inf
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def is_given_up(self) -> bool:
        """Whether it could not be loaded a moment ago."""
        return _was_lately(self.failed)

    @property
    def has_no_tokenizer(self) -> bool:
        """Whether its own tokenizer could not be loaded a moment ago."""
        return _was_lately(self.tokenizer_failed)

    @contextmanager
    def copy(self) -> Iterator[Path]:
        """A temporary folder with a copy of its files; the caller may move it away.

        Raises:
            ReplacedError: they are not those of this version any more.
            GatewiseError: nor can those be served that took their place; they cannot be copied, or the caller could not use the
                copy: the error then names the user's folder.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="gatewise-") as place:
                copy = Path(place) / "adapter"
                copy.mkdir()
                try:
                    for name, *_ in self.signature:
                        shutil.copyfile(self.folder / name, copy / name)
                    is_same = _signature(self.folder) == self.signature
                except _GONE:
                    is_same = False
                if not is_same and self.problem is not None:
                    raise GatewiseError(self.problem)
                if not is_same:
                    raise ReplacedError(f"the adapter {self.name!r} is being replaced: ask again in a moment", 503)
                try:
                    yield copy
                except GatewiseError as error:
                    raise GatewiseError(str(error).replace(str(copy), str(self.folder))) from error
        except OSError as error:
            raise GatewiseError(describe_fault(self.folder, error)) from error


class Catalogue:
    """The adapters of a server by name.

    Args:
        places: folders of adapters, folders that hold such folders, patterns of folders ("runs/*/adapter"), or NAME=FOLDER. A
            folder called "adapter" is called by the one that holds it.
        taken: names that no adapter may have, such as the base model's.
        settled: seconds in which the files of a folder must not have changed.
        check: raises GatewiseError where the server cannot serve an adapter of this folder and kind. What it returns is said.
        say: called with a line about folders that are not served, and about the prompts of those that are.

    Attributes:
        versions: those that are served now, by name.

    Raises:
        GatewiseError: a place is not there; two adapters have one name; an adapter that was named itself cannot be served.
    """

    def __init__(
        self,
        places: Sequence[str],
        taken: Sequence[str] = (),
        say: Callable[[str], None] | None = None,
        settled: float = SETTLED,
        check: Callable[[Path, Kind], str | None] = lambda folder, kind: None,
    ) -> None:
        self._places, self._taken, self._settled = list(places), set(taken), settled
        self._say, self._check = say or (lambda text: print(text, file=sys.stderr)), check
        self.versions: dict[str, Version] = {}
        self._said: dict[Path, str] = {}
        self._refused: dict[Path, str] = {}
        self._empty: list[str] = []
        self._ended = threading.Event()
        self._is_starting = True
        for _ in range(20):
            if not self.scan():
                break
            time.sleep(settled / 4)
        self._is_starting = False

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

    def scan(self) -> bool:
        """Looks at all places. Returns whether a folder is still being written.

        At the start, what cannot be served is an error where the user named the adapter itself, or where two have one name. Later,
        a name stays with the folder that is served by it: clients must not get another one's answers.
        """
        there: dict[str, Version] = {}
        is_late = False
        for folder, (name, is_named) in self._folders().items():
            problem = self._refused_name(name, folder, there)
            if problem is not None:
                self._refuse(folder, problem, is_fatal=True)
                continue
            try:
                version = self._version_in(name, folder, is_named)
            except Exception as error:  # whatever it is, the other folders are looked at
                if isinstance(error, _GONE) and not (is_named and self._is_starting):
                    is_late = True  # it changes as we look
                else:
                    self._refuse(folder, describe_fault(folder, error), is_named, error)
                continue
            if version is None:
                is_late = True
            else:
                there[name] = version
        for name, version in self.versions.items():
            if name not in there and not _is_gone(version.folder):
                there[name] = version
            version.gone, version.problem = there.get(name) is not version, self._refused.get(version.folder)
        self.versions = dict(sorted(there.items()))
        self.tell(self._refused)
        self._refused.clear()
        return is_late

    def _refused_name(self, name: str, folder: Path, there: dict[str, Version]) -> str | None:
        if name in self._taken:
            return f"the adapter {folder} is called {name!r} as the base model is: rename its folder, or give it as NAME=FOLDER"
        other = there.get(name) or self.versions.get(name)
        if other is not None and other.folder != folder and not _is_gone(other.folder):
            return f"two adapters are called {name!r}, {other.folder} and {folder}: rename one, or give them as NAME=FOLDER"
        if not name.isprintable():
            return f"the folder {folder!r} has a name that no client can send: rename it"
        return None

    def _refuse(self, folder: Path, problem: str, is_fatal: bool, error: Exception | None = None) -> None:
        if is_fatal and self._is_starting:
            raise GatewiseError(problem) from error
        self._refused[folder] = problem

    def tell_empty(self) -> None:
        """Says which places have no adapter yet: they may be misspelt, or too high."""
        for path in self._empty:
            below = os.path.join(path, "*", "adapter")
            hint = f": did you mean {below!r}?" if glob.glob(os.path.join(below, CONFIG_FILE)) else ""
            self._say(f"note: no adapter at {path} yet{hint}")

    def tell(self, problems: dict[Path, str]) -> None:
        """Prints what is newly wrong with folders, in one line: the same is found at every look."""
        fresh = {folder: problem for folder, problem in problems.items() if self._said.get(folder) != problem}
        self._said |= fresh
        alike: dict[str, list[str]] = {}
        for folder, problem in fresh.items():
            alike.setdefault(problem.removeprefix(f"the adapter {folder} "), []).append(str(folder))
        if len(fresh) > 1:
            self._say("note: not served are " + "; ".join(f"{', '.join(folders)} ({why})" for why, folders in alike.items()))
        elif fresh:
            self._say(f"note: {problem}")

    def _folders(self) -> dict[Path, tuple[str, bool]]:
        """The folder of each adapter -> its name, and whether the user named the very folder."""
        found: dict[Path, tuple[str, bool]] = {}
        names: dict[Path, str] = {}
        self._empty = []
        for place in self._places:
            given, path = split_place(place)
            is_named = given is not None or os.path.isfile(os.path.join(path, CONFIG_FILE))
            try:
                if is_named:
                    listed = [path]
                elif glob.has_magic(path):
                    listed = sorted(glob.glob(path))
                else:
                    listed = [os.path.join(path, name) for name in sorted(os.listdir(path))]
            except OSError as error:
                advice = "give an adapter, a folder of adapters or a pattern of folders that the user of this process may read"
                problem = f"the folder {path} cannot be read ({error.strerror}): {advice}"
                self._refuse(Path(path), problem, is_fatal=True, error=error)
                continue
            folders = list(map(Path.absolute, map(Path, listed)))
            if not is_named:  # one that begins with a dot is still being written
                folders = [one for one in folders if not one.name.startswith(".") and os.path.isfile(one / CONFIG_FILE)]
            if not folders:
                self._empty.append(path)
            for folder in folders:
                if given is not None and names.setdefault(folder, given) != given:
                    both = f"{names[folder]}, {given}"
                    self._refuse(folder, f"the adapter {folder} was given two names, {both}: leave one of them out", is_fatal=True)
                elif given is not None or folder not in found:  # a name of its own, whatever pattern it fits too
                    found[folder] = given or name_of(folder), is_named
        return found

    def _version_in(self, name: str, folder: Path, is_named: bool) -> Version | None:
        """The version that lies in a folder; None while it is being written."""
        before, signature = self.versions.get(name), _signature(folder)
        if before is not None and before.folder == folder and before.signature == signature:
            return before
        newest = max((max(one[2], one[3]) for one in signature), default=0) / 1e9
        if abs(time.time() - newest) < self._settled:  # the clock of another machine may be far ahead
            return None
        kind = kind_of(folder)
        note = self._check(folder, kind)
        version = Version(name, folder, kind, signature, is_named, chat_template_of(folder))
        self._said.pop(folder, None)
        if version.chat is not None:
            self._say(f"{name}: {version.chat.shown}")
        if how := read_note(folder).get("quantization"):
            self._say(f"{name}: trained on the base model in {how}, served on it as it is here")
        if note is not None:
            self._say(f"{name}: {note}")
        return version


class Fit:
    """Whether adapters fit a base model, which is known by its configuration alone.

    Args:
        base: its name, which is looked up once there is an adapter.
        name: what clients call it.
    """

    def __init__(self, base: str, name: str = "") -> None:
        self._base, self._name = base, name

    @cached_property
    def _made_for(self) -> dict[str, Any]:
        config = load_config(self._base)
        text = config.get_text_config()
        sizes = {"layers": "num_hidden_layers", "hidden_size": "hidden_size"}
        return {"model_type": config.model_type, **{name: getattr(text, size, None) for name, size in sizes.items()}}

    @cached_property
    def _sizes(self) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {}
        for name, shape in weight_shapes(self._base).items():
            found.setdefault(_within_model(name.removesuffix(".weight")), []).append(sorted(shape))
        return found

    def check(self, folder: Path) -> str | None:
        """Compares what an adapter's file says of its modules. Returns what to say if another base model with these is named.

        Raises:
            GatewiseError: it was made for another base model, or this one cannot be had.
        """
        problem = None
        made_for: Any = read_config(folder).get("made_for")
        if made_for is not None and made_for != self._made_for:
            problem = f"it was made for {made_for}"
        for path, pair in lora_sizes(folder).items() if self._sizes else ():
            there = self._sizes.get(_within_model(path), [])
            if not any(len(one) != 2 or one == sorted(pair) for one in there) and not self._has_within(path):
                has = f"; there it has {there[0][0]} and {there[0][1]}" if there else ", which is not there"
                problem = f"it has {path} with {pair[0]} inputs and {pair[1]} outputs{has}"
                break
        if problem is not None:
            raise GatewiseError(f"the adapter {folder} does not fit the base model {self._base!r}: {problem}")
        trained = str(base_of(folder) or "")
        return f"trained on {trained}, served on {self._base}" if trained and self._is_another(trained) else None

    def _is_another(self, base: str) -> bool:
        """Whether a base model is another one. Copies, and folders that are elsewhere now, are not; in doubt neither is it."""
        folders = [os.path.expanduser(name) for name in (base, self._base)]
        if all(map(os.path.isdir, folders)):
            try:
                return not os.path.samefile(*folders) and _ends_of(folders[0]) != _ends_of(folders[1])
            except OSError:  # this user may not read it
                return False
        one, here = _called(base), _called(self._base)
        last, known = (
            {name.rstrip("/").rpartition("/")[2].lower() for name in names}
            for names in ((base, one), (self._base, here, self._name))
        )
        return one.lower() != here.lower() and not last & known

    def _has_within(self, path: str) -> bool:
        """Whether there is something in a module, as in one whose parameters are experts, which files stack or do not."""
        if ".experts." in path:
            return any(".experts." in name for name in self._sizes)
        return any(name.startswith(f"{_within_model(path)}.") for name in self._sizes)


def _was_lately(when: float) -> bool:
    return time.monotonic() < when + RETRY


def _called(base: str) -> str:
    """What the hub calls a base model, where its name or path tells; else the real path of its folder, or its name."""
    name = os.path.expanduser(base).rstrip("/")
    path = os.path.realpath(name) if os.path.isdir(name) else name
    if snapshot := re.search(r"/models--([^/]+)/snapshots/[^/]+$", path):
        return snapshot[1].replace("--", "/")
    last = path.rpartition("/")[2]
    return hub_name(last) if last in EMBEDDED else path


def _ends_of(folder: str) -> dict[str, tuple[int, bytes]]:
    """Size and last bytes of the files that tell base models apart: fine-tunes of one model have the same sizes."""
    found = {}
    for path in [*Path(folder).glob("*.safetensors"), *Path(folder).glob("config.json")]:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**16))
            found[path.name] = size, file.read()
    return found


def _within_model(path: str) -> str:
    """A module's path from its layer on: what is before differs where a model is a part of a larger one."""
    found = re.search(r"\w+\.\d+\..+", path)
    return found[0] if found else path.rpartition(".")[2]


def kind_of(folder: Path) -> Kind:
    """What an adapter can share a batch with.

    Raises:
        GatewiseError: it cannot be served.
    """
    config, shapes = read_config(folder), tensor_shapes(weights_of(folder))
    peft_type = str(config.get("peft_type"))
    if peft_type not in ("LORA", "ROUTED_LORA", "SELECTIVE_PROMPT"):
        raise GatewiseError(
            f"the adapter {folder} is of type {peft_type}: expected LORA, ROUTED_LORA or SELECTIVE_PROMPT to be served. "
            "gatewise export writes what changes weights as plain LoRA"
        )
    base_class = str((config.get("auto_mapping") or {}).get("base_model_class"))  # noted where no type of task is
    task = config.get("task_type") or ("SEQ_CLS" if base_class.endswith("ForSequenceClassification") else "CAUSAL_LM")
    if task != "CAUSAL_LM":
        raise GatewiseError(f"the adapter {folder} is for {task}: expected one that writes text (CAUSAL_LM)")
    if peft_type != "LORA":
        return "routed" if peft_type == "ROUTED_LORA" else "alone"
    if config.get("bias") not in (None, "none"):
        raise GatewiseError(
            f"the adapter {folder} was trained with bias={config['bias']!r}, which changes the base model that all adapters share"
        )
    if config.get("init_lora_weights") not in _STARTS:
        raise GatewiseError(
            f"the adapter {folder} has init_lora_weights={config['init_lora_weights']!r}, which changes the base model that all "
            "adapters share: write it as plain LoRA with gatewise export"
        )
    for name in (*NOT_SERVED, "ensure_weight_tying"):
        if config.get(name):
            raise GatewiseError(f"the adapter {folder} was trained with {name}, which is not served")
    is_linear = all(name.endswith((".lora_A.weight", ".lora_B.weight")) and len(shape) == 2 for name, shape in shapes.items())
    return "plain" if is_linear and not any(config.get(name) for name in MORE) else "alone"


def describe_fault(folder: Path, error: Exception) -> str:
    """One sentence for any error that an adapter's folder caused."""
    if isinstance(error, GatewiseError):
        return str(error)
    # Not the file that an OSError names: of each copy it is another one, and a line that changes would be printed each time.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {reason_of(error)}"
    return f"the adapter {folder} cannot be read or copied ({reason})"


def name_of(folder: Path) -> str:
    """What an adapter is called: by its folder or, as runs call all theirs "adapter", by the folder above."""
    return folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name


def split_place(place: str) -> tuple[str | None, str]:
    """The name and the path of NAME=FOLDER; without a name what has an equals sign in the path."""
    name, equals, path = place.partition("=")
    return (name, path) if equals and path and name and "/" not in name and not glob.has_magic(name) else (None, place)


def _is_gone(folder: Path) -> bool:
    """Whether there is no adapter in a folder, for certain."""
    try:
        return not stat.S_ISREG(os.stat(folder / CONFIG_FILE).st_mode)
    except OSError as error:
        return isinstance(error, _GONE)


def _signature(folder: Path) -> Signature:
    with os.scandir(folder) as entries:
        names = sorted(
            one.name for one in entries if (one.name == WEIGHTS_FILE or one.name.endswith((".json", ".jinja"))) and one.is_file()
        )
    stats = [os.stat(folder / name) for name in names]
    return tuple((name, one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino) for name, one in zip(names, stats, strict=True))
