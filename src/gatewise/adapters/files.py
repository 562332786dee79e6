"""Adapters on disk: the names of their files, and the one reader of each. Needs neither PEFT nor Transformers.

The folder of an adapter, as PEFT saves it and gatewise adds to it:

    adapter_config.json        PEFT's configuration                          read_config
    adapter_model.safetensors  the weights                                   read_lora, tensor_shapes
    gatewise.json              the note: how the run wrote its prompts       read_note, chat_template_of
    allocation.json            the rounds of ALoRA and PI-LoRA               read_allocation
    search.json                the layers that a search chose for prompts    read_selection

An adapter may also be named by its id on the hub: ``local_folder``. What the contents mean is told where they are used: export,
loading, ``gatewise.inspection``. A file that is missing or damaged is a ``GatewiseError`` that names it.
"""

import hashlib
import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gatewise.errors import GatewiseError, reason_of
from gatewise.files import content_of, write_json
from gatewise.models.embedded import EMBEDDED

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
VOCABULARY = ("tokenizer.json", "*.model", "*.tiktoken", "vocab*", "merges.txt", "bpe.codes")
"""The files, one of which a tokenizer cannot be without."""
NOTE_FILE = "gatewise.json"
UNFINISHED_START = "unfinished_start"
"""In the note of a checkpoint: by which start its ranks took a part of the base weights, see ``gatewise.adapters.starts``."""
ALLOCATION_FILE = "allocation.json"
SEARCH_FILE = "search.json"

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before a module's path in the base model."""


# ---------------------------------------------------------------- the folder


_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def local_folder(adapter: str | Path) -> Path:
    """The folder of an adapter that is named by its folder, or by its id on the hub ("user/adapter"), from which it is fetched.

    Only JSON, the adapter's safetensors and chat templates are fetched, and neither checkpoints nor the base model.

    Raises:
        GatewiseError: it is no folder here, and no adapter that can be had from the hub.
    """
    name = str(adapter)
    if Path(name).exists() or not _HUB_ID.fullmatch(name):
        return Path(name)
    try:
        wanted = ["*.json", WEIGHTS_FILE, "*.jinja", *VOCABULARY]
        found = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if not (found / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"it has no {CONFIG_FILE} there")
    except Exception as error:  # its libraries raise their own kinds: no network, no such id, a gate
        reason = reason_of(error.__cause__ or error, 160)  # without what the hub's library advises for its own functions
        advice = "give the folder of an adapter, or its id on the hub"
        raise GatewiseError(f"{name} is no folder here, and cannot be had from the hub ({reason}): {advice}") from error
    return found


# ---------------------------------------------------------------- adapter_config.json


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration in an adapter's folder, of whatever PEFT type.

    Raises:
        GatewiseError: no such folder, no configuration in it, or one that is not a JSON object; or a checkpoint whose base weights
            are in no file.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        inside = sorted(found.parent.name for found in Path(folder).glob(f"*/{CONFIG_FILE}"))
        hint = f"one of its sub-folders {', '.join(inside)}" if inside else "a folder saved by save_pretrained"
        raise GatewiseError(f"{folder} is not an adapter, it has no {CONFIG_FILE}: give {hint}")
    if start := read_note(folder).get(UNFINISHED_START):
        raise GatewiseError(
            f"{folder} is a checkpoint of a run with init_lora_weights {start}, which trains on base weights of its own: end the "
            "run (gatewise train --resume), and give the adapter that it writes"
        )
    return _read_json(path)


def peft_type(folder: str | Path) -> str:
    """The PEFT type of the adapter in a folder, such as "LORA" or "SELECTIVE_PROMPT". Errors are those of ``read_config``."""
    return str(read_config(folder).get("peft_type"))


# ---------------------------------------------------------------- adapter_model.safetensors


def weights_of(folder: str | Path) -> Path:
    """The file with an adapter's weights.

    Raises:
        GatewiseError: it is not there.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        read_config(folder)  # raises where the folder is no adapter at all
        raise GatewiseError(
            f"{folder} has no {WEIGHTS_FILE}, and a pickle (adapter_model.bin) is never read, as it may run code: save the adapter "
            "again with save_pretrained"
        )
    return path


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of an adapter's weights and configuration, in hexadecimal digits: which adapter it is, wherever it lies.

    Raises:
        GatewiseError: it is no adapter, or a file cannot be read.
    """
    return hashlib.sha256(content_of(weights_of(folder)) + content_of(Path(folder) / CONFIG_FILE)).hexdigest()


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a safetensors file, from its header; that also tells whether the file is whole.

    Raises:
        GatewiseError: the file cannot be read.
    """
    with _opened(path) as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a mapping)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata. Errors are those of ``tensor_shapes``."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def stored_numbers(folder: str | Path) -> int:
    """How many numbers an adapter's file holds."""
    return sum(math.prod(shape) for shape in tensor_shapes(weights_of(folder)).values())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise GatewiseError(
            f"{path} is damaged or cut short, or this user may not read it ({error}): copy, download or save it again"
        ) from error


# ---------------------------------------------------------------- LoRA in it


@dataclass(frozen=True)
class LoraModule:
    """What a LoRA adapter holds for one module.

    Attributes:
        path: the module's path in the base model, or that of the parameter whose experts are stacked.
        a, b: the factors as they are stored, A (r, d_in) and B (d_out, r); of convolutions with further dimensions. Stacked
            parameters of e experts: A (e * r, d_in), B (d_out, r * e), ordered differently.
        keys: the names of a and b in the file.
        scaling: what PEFT multiplies B A by.
        experts: how many updates, each with slots of its own, the factors of a stacked parameter hold; None for a module.
        diagonal: AdaLoRA's singular values, or None.
        others: what else is trained of this module, by name in the file: DoRA's magnitude, B's bias.
    """

    path: str
    a: Tensor
    b: Tensor
    keys: tuple[str, str]
    scaling: float
    experts: int | None
    diagonal: Tensor | None
    others: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """The rank of the module, or of each expert, dead slots included."""
        return len(self.a) // (self.experts or 1)

    @property
    def rows(self) -> Tensor:
        """A as (experts or 1, r, d_in)."""
        return self.a.flatten(1).unflatten(0, (self.experts or 1, self.rank))

    @property
    def columns(self) -> Tensor:
        """B as (experts or 1, r, d_out), slot by slot as ``rows``."""
        return self.b.flatten(1).unflatten(1, (self.rank, self.experts or 1)).permute(2, 1, 0)

    def live(self) -> Tensor:
        """(experts or 1, r) bool: slots that are not zero in both factors."""
        return (self.rows != 0).any(-1) | (self.columns != 0).any(-1)


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter on disk; ``others`` are the tensors that belong to no LoRA module, such as a classifier."""

    config: dict[str, Any]
    modules: list[LoraModule]
    others: dict[str, Tensor]
    metadata: dict[str, str]


# PEFT's names of the factors. What else is called lora_... belongs to the module too, but for the routers of routed LoRA.
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?!router\b)(?P<part>[A-Za-z_]+?)(?:\.(?P<leaf>weight|bias))?$")
_FACTORS = {"A": "A", "B": "B", "embedding_A": "A", "embedding_B": "B", "E": "diagonal", "diag": "diagonal"}


def read_lora(folder: str | Path) -> LoraAdapter:
    """Reads an adapter of type LORA, ADALORA or ROUTED_LORA from its folder, without its base model.

    Raises:
        GatewiseError: a file is missing or damaged, the adapter is of another type, or its configuration makes no sense.
    """
    config, where = read_config(folder), str(folder)
    settings = _Settings(config, where)
    tensors, metadata = read_tensors(weights_of(folder))
    keys: dict[str, dict[str, str]] = {}  # module path -> "A", "B", "diagonal" or the name itself -> name
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if match is None:
            others[name] = tensor
        else:
            part = name if match["leaf"] == "bias" else _FACTORS.get(match["part"], name)
            keys.setdefault(match["path"], {})[part] = name
    if not keys:
        raise GatewiseError(f"{where} holds no LoRA weights (names that end in lora_A.weight): give a LoRA adapter")
    for path, parts in keys.items():
        if not {"A", "B"} <= parts.keys() or len(tensors[parts["A"]]) != tensors[parts["B"]].shape[1]:
            raise GatewiseError(
                f"{where}: lora_A and lora_B of {path} are not both there or do not fit each other, as in grouped convolutions, "
                "which are not read: save the adapter again"
            )
    experts = _stacked_experts({path: len(tensors[parts["A"]]) for path, parts in keys.items()}, settings, where)
    modules = []
    for name, parts in keys.items():
        path, count = experts.get(name, (name, None))
        modules.append(
            LoraModule(
                path=path,
                a=tensors[parts["A"]],
                b=tensors[parts["B"]],
                keys=(parts["A"], parts["B"]),
                scaling=settings.scaling(path),
                experts=count,
                diagonal=tensors[parts["diagonal"]] if "diagonal" in parts else None,
                others={name: tensors[name] for part, name in parts.items() if part == name},
            )
        )
    return LoraAdapter(config, modules, others, metadata)


def lora_sizes(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Module path -> (inputs, outputs) of each pair of matrices A and B, from the header of the file alone.

    Raises:
        GatewiseError: there is no such file, or it is damaged.
    """
    found: dict[str, dict[str, int]] = {}
    for name, shape in tensor_shapes(weights_of(folder)).items():
        match = _KEY.match(name)
        factor = match and match["leaf"] != "bias" and _FACTORS.get(match["part"])
        if match and factor in ("A", "B") and len(shape) == 2:
            found.setdefault(match["path"].replace(".base_layer", ""), {})[factor] = shape[factor == "A"]
    return {path: (sizes["A"], sizes["B"]) for path, sizes in found.items() if len(sizes) == 2}


def _stacked_experts(rows: Mapping[str, int], settings: "_Settings", where: str) -> dict[str, tuple[str, int]]:
    """The parameters that ``target_parameters`` names: path in the file -> (path of the parameter, its experts).

    PEFT saves the factors of a module's last parameter under the module's path, those of the one before under that path with
    ".base_layer" behind it, and so on, and says nowhere which is which. Their ranks tell them apart where they differ, for all
    parameters of a module have as many experts.

    Args:
        rows: path in the file -> rows of A.
    """
    if not settings.parameters:
        return {}
    homes: dict[str, list[str]] = {}  # module -> the paths in the file that have its parameters, the outermost first
    for path in sorted(rows, key=len):
        homes.setdefault(path.replace(".base_layer", ""), []).append(path)
    found: dict[str, tuple[str, int]] = {}
    for module, paths in homes.items():
        names = sorted(
            name for owner, _, name in (one.rpartition(".") for one in settings.parameters) if f".{module}".endswith(f".{owner}")
        )
        for order in itertools.permutations(dict.fromkeys(names), len(paths)):
            ranks = [settings.rank(f"{module}.{name}") for name in order]
            experts = {rows[path] / rank for path, rank in zip(paths, ranks, strict=True)}
            if len(experts) == 1 and (count := experts.pop()).is_integer():
                found |= {path: (f"{module}.{name}", int(count)) for path, name in zip(paths, order, strict=True)}
                break
        else:
            if names:
                raise GatewiseError(
                    f"{where}: the factors of {module} have {' and '.join(str(rows[path]) for path in paths)} rows, which the "
                    f"ranks of {', '.join(names)} do not divide into experts: save the adapter again"
                )
    return found


class _Settings:
    """Rank and scaling of each module, from an adapter's configuration.

    PEFT multiplies B A by alpha / r, or by alpha / sqrt(r) with rank-stabilised LoRA, with the module's own rank and alpha where a
    pattern has them.

    Args:
        config: the contents of adapter_config.json.
        where: what errors call the adapter.

    Raises:
        GatewiseError: not LoRA, LoRA with factors in blocks, or ranks and alphas that are no numbers.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        kind = str(config.get("peft_type"))
        if kind not in ("LORA", "ADALORA", "ROUTED_LORA") or config.get("use_bdlora"):  # bdlora stores A or B in blocks
            raise GatewiseError(
                f"{where}: peft_type is {kind}, expected a LoRA adapter (LORA, ADALORA, ROUTED_LORA) without use_bdlora"
            )
        self._adaptive = kind == "ADALORA"
        self._stabilised = bool(config.get("use_rslora")) and not self._adaptive
        self.parameters = [str(name) for name in config.get("target_parameters") or ()]
        # AdaLoRA keeps lists of booleans under rank_pattern, which do not change the scaling.
        patterns = [{} if self._adaptive else config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
        try:
            self._r, self._alpha = float(config.get("init_r" if self._adaptive else "r", 8)), float(config.get("lora_alpha", 8))
            # PEFT's rule (get_pattern_key): the first key that matches at the end of the path wins. Compiled here, because one
            # pattern a module can outgrow the cache of `re`.
            self._ranks, self._alphas = (
                [(re.compile(rf"(.*\.)?({name})$"), float(number)) for name, number in pattern.items()] for pattern in patterns
            )
            if min([self._r, *(rank for _, rank in self._ranks)]) <= 0:
                raise ValueError("a rank is at least 1")
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise GatewiseError(f"{where}: {CONFIG_FILE} has ranks or alphas that PEFT cannot use ({error})") from error

    def rank(self, path: str) -> int:
        """The rank that the configuration gives a module."""
        return int(_first_match(self._ranks, path, self._r))

    def scaling(self, path: str) -> float:
        """What PEFT multiplies the module's B A by."""
        rank, alpha = _first_match(self._ranks, path, self._r), _first_match(self._alphas, path, self._alpha)
        if self._adaptive:
            return (alpha if alpha > 0 else rank) / (rank + 1e-5)
        return alpha / math.sqrt(rank) if self._stabilised else alpha / rank


def _first_match(patterns: Sequence[tuple[re.Pattern[str], float]], path: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


# ---------------------------------------------------------------- allocation.json


@dataclass(frozen=True)
class Allocation:
    """What ``allocation.json`` says.

    Attributes:
        score: how ranks were scored.
        rounds: how many there were.
        ranks: path -> rank after the last round, 0 for modules that are no longer in the adapter.
    """

    score: str | None = None
    rounds: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)


def read_allocation(folder: str | Path) -> Allocation:
    """The rounds of an adapter from ``allocation.json`` in its folder; none where there is no such file.

    Raises:
        GatewiseError: the file is damaged, or of a newer version.
    """
    path = Path(folder) / ALLOCATION_FILE
    if not path.is_file():
        return Allocation()
    record = _read_json(path)
    rounds = record.get("rounds")
    last = rounds[-1] if isinstance(rounds, list) and rounds else {"ranks": {}}
    ranks = last.get("ranks") if isinstance(last, dict) else None
    if record.get("format") != 1 or not isinstance(rounds, list) or not isinstance(ranks, dict):
        raise GatewiseError(f"{path} is not what this version of gatewise writes: restore or remove the file, or upgrade gatewise")
    return Allocation(record.get("score"), len(rounds), ranks)


# ---------------------------------------------------------------- search.json


@dataclass(frozen=True)
class Selection:
    """The layers that a search for prompts chose, and why.

    Attributes:
        layers: the chosen ones, in order.
        gates: the gate of every layer at the end of the search.
        steps: optimiser steps of the search.
        seconds: how long it took, in the last of its processes if it was resumed.
        resumed_from: the step that this process went on from, or None.
        settings: of the search and the prompts.
        log: losses and learning rates over its steps.
    """

    layers: list[int]
    gates: list[float]
    steps: int
    seconds: float
    resumed_from: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()

    def write(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all."""
        write_json(path, {"format": 1, **asdict(self)})


def read_selection(path: Path) -> Selection:
    """Reads what ``Selection.write`` wrote: into the folder of an adapter, or of a run.

    Raises:
        GatewiseError: no such file, or one that does not hold a selection.
    """
    record = _read_json(path)
    record.pop("format", None)
    try:
        return Selection(**record)
    except TypeError as error:
        raise GatewiseError(f"{path} is not what a search wrote ({error}): restore it, or search again with --overwrite") from error


def files_of(folder: str | Path) -> list[Path]:
    """The files that an adapter is, whether they are there or not."""
    return [Path(folder) / name for name in (CONFIG_FILE, WEIGHTS_FILE, NOTE_FILE)]


# ---------------------------------------------------------------- gatewise.json


def read_note(folder: str | Path) -> dict[str, Any]:
    """What a run noted beside its adapter: how it wrote prompts and labels, and more; empty for an adapter from elsewhere.

    Raises:
        GatewiseError: the file is damaged, or was changed to something else.
    """
    path = Path(folder) / NOTE_FILE
    note = _read_json(path) if path.is_file() else {}
    for key, value in note.items():
        if value is not None and not _is_as_written(key, value):
            raise GatewiseError(f"{path}: {key} is {reprlib.repr(value)}, which no run writes there: restore the file")
    return note


def _is_as_written(key: str, value: Any) -> bool:
    """Whether a note's value is of the type that a run writes, for the keys that commands read."""
    match key:
        case "base" | "template" | "chat_template" | "group":
            return isinstance(value, str)
        case "labels" | "shown":
            return isinstance(value, list) and all(isinstance(one, str) for one in value)
        case "label_words" | "columns":
            return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
        case "max_length" | "max_new_tokens":
            return isinstance(value, int)
        case "parts":
            return isinstance(value, dict)
    return True


@dataclass(frozen=True)
class ChatTemplate:
    """How the messages of a chat become the prompt that an adapter was trained on.

    Attributes:
        text: Jinja, as tokenizers have it: it reads ``messages``.
        special_tokens: the tokenizer's own, such as bos, go before what it writes, as before any text. Otherwise it writes them.
        shown: what prompts have to look like, in words.
        before_answer: what the answers of training begin with, which an answer to a chat leaves out.
    """

    text: str
    special_tokens: bool = False
    shown: str = "prompts are chats, as /v1/chat/completions writes them"
    before_answer: str = ""


def chat_template_of(folder: str | Path) -> ChatTemplate | None:
    """The note's ``chat_template``, or one made of its ``template``, whose field a user's message fills; without a note that of a
    tokenizer that was saved with the adapter, as TRL does.

    The one that is made refuses what the adapter was not trained on: all but one message, which is a user's, and any chat if there
    are several fields.

    Returns:
        None where there is none of these: the base model's chat template is then the best guess.

    Raises:
        GatewiseError: the note, or the tokenizer's configuration, is damaged.
    """
    note = read_note(folder)
    chat, prompt = note.get("chat_template"), note.get("template")
    if isinstance(chat, str):
        return ChatTemplate(chat)
    if not isinstance(prompt, str):
        path, settings = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
        if path.is_file():
            return ChatTemplate(path.read_text(encoding="utf-8"))
        text: Any = _read_json(settings).get("chat_template") if settings.is_file() else None
        if isinstance(text, list):
            text = next((one.get("template") for one in text if isinstance(one, dict) and one.get("name") == "default"), None)
        return ChatTemplate(text) if isinstance(text, str) else None
    try:
        parts = [(literal, field) for literal, field, *_ in Formatter().parse(prompt)]
    except ValueError as error:
        raise GatewiseError(f"{Path(folder) / NOTE_FILE}: template has unmatched braces ({error}): restore the file") from error
    fields, looks = dict.fromkeys(field for _, field in parts if field is not None), f"prompts look like {prompt!r}"
    if len(fields) != 1:
        shown = ", ".join(fields) or "none"
        said = f"this model was trained on prompts with the fields {shown}: send the whole prompt to /v1/completions, as {prompt!r}"
        return ChatTemplate(f"{{{{ raise_exception({_jinja(said)}) }}}}", True, looks)
    said = "this model was trained on single texts: send one message, which has the role user, and no others"
    written = " ~ ".join(_jinja(literal) + (" ~ text" if field is not None else "") for literal, field in parts)
    return ChatTemplate(
        "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
        f"{{{{ raise_exception({_jinja(said)}) }}}}"
        "{%- endif -%}"
        "{%- set text = messages[0]['content'] -%}"
        f"{{{{ ({written}).rstrip(' ') }}}}",
        True,
        looks,
        " ",
    )


def _jinja(text: str) -> str:
    """A text as Jinja writes one; JSON's escapes are among its own."""
    return json.dumps(text, ensure_ascii=False)


# ---------------------------------------------------------------- JSON


def base_of(folder: str | Path) -> str | None:
    """The base model that an adapter names. One that was trained on an embedded model names it as the hub does, for everybody
    else, and its note says whose weights they were.

    Raises:
        GatewiseError: those of ``read_config``; a note that is damaged.
    """
    named, noted = read_config(folder).get("base_model_name_or_path"), read_note(folder).get("base")
    return noted if noted in EMBEDDED and EMBEDDED[noted].hub == named else named or None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise GatewiseError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise GatewiseError(f"{path} is not valid JSON ({error}): restore the file") from error
    if not isinstance(content, dict):
        raise GatewiseError(f"{path} holds no JSON object: restore the file")
    return content
