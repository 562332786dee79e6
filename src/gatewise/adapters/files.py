"""Adapters on disk: the names of their files, and the one reader of each. Needs neither PEFT nor Transformers.

The folder of an adapter, as PEFT saves it and gatewise adds to it:

    adapter_config.json        PEFT's configuration                          read_config
    adapter_model.safetensors  the weights                                   read_lora, tensor_shapes
    gatewise.json              the note: how the run wrote its prompts       read_note
    allocation.json            the rounds of ALoRA and PI-LoRA               read_allocation
    search.json                the layers that a search chose for prompts    read_selection

What the contents mean is for others to say: export, loading, ``gatewise.inspection``. A file that is missing or damaged is a
``GatewiseError`` that names it.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gatewise.checks import is_number, is_whole
from gatewise.errors import GatewiseError
from gatewise.files import write_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
NOTE_FILE = "gatewise.json"
ALLOCATION_FILE = "allocation.json"
SEARCH_FILE = "search.json"

_PICKLE = "adapter_model.bin"  # never read: a pickle can run code

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before a module's path in the base model."""


# ---------------------------------------------------------------- adapter_config.json


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration in an adapter's folder, of whatever PEFT type.

    Raises:
        GatewiseError: no such folder, no configuration in it, or one that is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "there is no such folder"
        raise GatewiseError(f"{folder} is not an adapter, {what}: give the folder that holds {CONFIG_FILE}")
    path = folder / CONFIG_FILE
    try:
        is_there = path.is_file()
    except OSError as error:  # the folder may not be entered
        raise _unread(path, error) from error
    if not is_there:
        inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG_FILE}"))
        hint = f"give one of its sub-folders {', '.join(inside)}" if inside else "give a folder saved by save_pretrained"
        raise GatewiseError(f"{folder} is not an adapter, it has no {CONFIG_FILE}: {hint}")
    return _object(path, "save the adapter again or repair the file")


def peft_type(folder: str | Path) -> str:
    """The PEFT type of the adapter in a folder, such as "LORA" or "SELECTIVE_PROMPT". Errors are those of ``read_config``."""
    return str(read_config(folder).get("peft_type"))


# ---------------------------------------------------------------- adapter_model.safetensors


def weights_of(folder: str | Path) -> Path:
    """The file with an adapter's weights.

    Raises:
        GatewiseError: it is not there.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    if (folder / _PICKLE).is_file():
        raise GatewiseError(
            f"{folder} has its weights in {_PICKLE}, which is a pickle and is never read, as it may run code: where you trust it, "
            "load it with peft.PeftModel.from_pretrained and call save_pretrained to get safetensors"
        )
    raise GatewiseError(f"{folder} has no {WEIGHTS_FILE}: expected it beside {CONFIG_FILE}")


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of an adapter's weights and configuration, in hexadecimal digits: which adapter it is, wherever it lies.

    Raises:
        GatewiseError: it is no adapter, or a file cannot be read.
    """
    weights = weights_of(folder)
    try:
        return hashlib.sha256(weights.read_bytes() + (Path(folder) / CONFIG_FILE).read_bytes()).hexdigest()
    except OSError as error:
        raise _unread(Path(folder), error) from error


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a safetensors file, from its header; that also tells whether the file is whole.

    Raises:
        GatewiseError: the file is damaged or cut short.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata. Errors are those of ``tensor_shapes``."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def stored_numbers(folder: str | Path) -> int:
    """How many numbers an adapter's file holds."""
    return sum(math.prod(shape) for shape in tensor_shapes(weights_of(folder)).values())


def _damaged(path: Path, error: Exception) -> GatewiseError:
    try:
        path.open("rb").close()
    except OSError as reason:  # of which safetensors says that there is no such file
        return _unread(path, reason)
    return GatewiseError(f"{path} is damaged or cut short ({error}): copy, download or save it again")


# ---------------------------------------------------------------- LoRA in it


@dataclass(frozen=True)
class LoraModule:
    """What a LoRA adapter holds for one module.

    Attributes:
        path: the module's path in the base model, or that of the parameter whose experts are stacked.
        a, b: the factors as they are stored. Linear layers and embeddings: A (r, d_in), B (d_out, r). Convolutions: A (r, d_in,
            *kernel), B (d_out, r / groups, 1, ...). Stacked parameters of e experts: A (e * r, d_in), B (d_out, r * e), ordered
            differently.
        keys: the names of a and b in the file.
        scaling: what PEFT multiplies B A by.
        blocks: how many updates, each with slots of its own, the factors hold: experts or groups, otherwise 1.
        stacked: whether those are experts.
        diagonal: AdaLoRA's singular values, or None.
        others: what else is trained of this module, by name in the file: DoRA's magnitude, B's bias.
    """

    path: str
    a: Tensor
    b: Tensor
    keys: tuple[str, str]
    scaling: float
    blocks: int
    stacked: bool
    diagonal: Tensor | None
    others: dict[str, Tensor]

    @property
    def rows(self) -> Tensor:
        """A as (blocks, r, d_in), whatever the kind of layer."""
        flat = self.a.flatten(1)
        return flat.reshape(self.blocks, len(flat) // self.blocks, flat.shape[1])

    @property
    def columns(self) -> Tensor:
        """B as (blocks, r, d_out), slot by slot as ``rows``."""
        d_out, slots = self.b.shape[:2]
        if self.stacked:
            return self.b.reshape(d_out, slots // self.blocks, self.blocks).permute(2, 1, 0)
        return self.b.reshape(self.blocks, d_out // self.blocks, slots).mT

    def live(self) -> Tensor:
        """(blocks, r) bool: slots that are not zero in both factors."""
        return (self.rows != 0).any(-1) | (self.columns != 0).any(-1)


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter as it lies on disk; ``others`` are the tensors that belong to no LoRA module, such as a classifier."""

    config: dict[str, Any]
    modules: list[LoraModule]
    others: dict[str, Tensor]
    metadata: dict[str, str]


def read_lora(folder: str | Path) -> LoraAdapter:
    """Reads an adapter of type LORA, ADALORA or ROUTED_LORA from its folder, without its base model.

    Raises:
        GatewiseError: a file is missing or damaged, the adapter is of another type, or its configuration makes no sense.
    """
    folder = Path(folder)
    config = read_config(folder)
    scalings = Scalings(config, str(folder / CONFIG_FILE))
    path = weights_of(folder)
    tensors, metadata = read_tensors(path)
    modules, others = lora_modules(tensors, scalings, str(path))
    return LoraAdapter(config, modules, others, metadata)


# PEFT's names of the factors. What else is called lora_... belongs to the module too, but for the routers of routed LoRA.
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?!router\b)(?P<part>[A-Za-z_]+?)(?:\.(?P<leaf>weight|bias))?$")
_FACTORS = {"A": "A", "B": "B", "embedding_A": "A", "embedding_B": "B", "E": "diagonal", "diag": "diagonal"}


def lora_modules(tensors: Mapping[str, Tensor], scalings: "Scalings", where: str) -> tuple[list[LoraModule], dict[str, Tensor]]:
    """Sorts the tensors of a LoRA adapter by module.

    Args:
        tensors: name -> tensor, as PEFT saves them.
        where: what errors call the tensors' place.

    Returns:
        The modules, and the tensors that belong to none.
    """
    keys: dict[str, dict[str, str]] = {}  # module path -> "A", "B", "diagonal" or the name itself -> name
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if match is None:
            others[name] = tensor
        else:
            part = name if match["leaf"] == "bias" else _FACTORS.get(match["part"], name)
            keys.setdefault(match["path"], {})[part] = name
    if not any("A" in parts for parts in keys.values()):
        raise GatewiseError(f"{where} holds no LoRA weights (names that end in lora_A.weight): give a LoRA adapter")
    for path, parts in keys.items():
        for part in ("A", "B"):
            if part not in parts:
                raise GatewiseError(f"{where}: {path} has no lora_{part}, the file is incomplete: save the adapter again")
    parameters = _parameters({path: len(tensors[parts["A"]]) for path, parts in keys.items()}, scalings, where)
    modules = []
    for path, parts in keys.items():
        a, b = tensors[parts["A"]], tensors[parts["B"]]
        blocks = _groups(a, b)
        stacked = path in parameters and blocks is not None
        path, experts = parameters.get(path, (path, 1))
        blocks = experts if stacked else blocks
        if blocks is None:
            raise GatewiseError(
                f"{where}: {path} has lora_A of shape {tuple(a.shape)} and lora_B of shape {tuple(b.shape)}, whose "
                "ranks differ, so the file is damaged: save the adapter again"
            )
        modules.append(
            LoraModule(
                path=path,
                a=a,
                b=b,
                keys=(parts["A"], parts["B"]),
                scaling=scalings[path],
                blocks=blocks,
                stacked=stacked,
                diagonal=tensors[parts["diagonal"]] if "diagonal" in parts else None,
                others={name: tensors[name] for part, name in parts.items() if part == name},
            )
        )
    return modules, others


def _parameters(rows: Mapping[str, int], scalings: "Scalings", where: str) -> dict[str, tuple[str, int]]:
    """The parameters that ``target_parameters`` names: path in the file -> (path of the parameter, its experts).

    PEFT saves the factors of a module's last parameter under the module's path, those of the one before under that path with
    ".base_layer" behind it, and so on, and says nowhere which is which. Their ranks tell them apart where they differ, for all
    parameters of a module have as many experts.

    Args:
        rows: path in the file -> rows of A.
    """
    if not scalings.parameters:
        return {}
    homes: dict[str, list[str]] = {}  # module -> the paths in the file that have its parameters, the outermost first
    for path in sorted(rows, key=len):
        homes.setdefault(path.replace(".base_layer", ""), []).append(path)
    found: dict[str, tuple[str, int]] = {}
    for module, paths in homes.items():
        names = sorted(
            name for owner, _, name in (one.rpartition(".") for one in scalings.parameters) if f".{module}".endswith(f".{owner}")
        )
        for order in itertools.permutations(dict.fromkeys(names), len(paths)):
            ranks = [scalings.rank(f"{module}.{name}") for name in order]
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


def _groups(a: Tensor, b: Tensor) -> int | None:
    """The groups of the convolution whose factors these are, 1 for all other layers; None: they do not belong together."""
    if a.ndim < 2 or b.ndim < 2:
        return None
    slots, (d_out, columns) = len(a), b.shape[:2]
    if slots == columns:
        groups = 1
    elif b.ndim > 2 and columns and slots % columns == 0 and d_out % (slots // columns) == 0:
        groups = slots // columns
    else:
        return None
    return groups if b.numel() == d_out * columns else None


LORA_TYPES = ("LORA", "ADALORA", "ROUTED_LORA")


class Scalings:
    """What PEFT multiplies each module's B A by, from an adapter's configuration: ``Scalings(config, where)[path]``.

    alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA, with the module's own rank and alpha where a pattern has them.

    Args:
        config: the contents of adapter_config.json.
        where: what errors call it.

    Raises:
        GatewiseError: not the configuration of a LoRA adapter, one with factors in blocks, or numbers in it that are none.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        kind = str(config.get("peft_type"))
        if kind not in LORA_TYPES:
            hint = ": its prompts have no ranks" if kind.endswith(("_PROMPT", "_TUNING")) else ""
            raise GatewiseError(f"{where}: peft_type is {kind}, expected a LoRA adapter ({', '.join(LORA_TYPES)}){hint}")
        if config.get("use_bdlora"):
            raise GatewiseError(
                f"{where} has use_bdlora, which stores A or B in blocks that gatewise does not read: use the adapter as it is"
            )
        self._adaptive = kind == "ADALORA"
        self._stabilised = bool(config.get("use_rslora")) and not self._adaptive
        self.parameters = [str(name) for name in config.get("target_parameters") or ()]
        rank = "init_r" if self._adaptive else "r"
        ranks, alphas = {rank: config.get(rank, 8)}, {"lora_alpha": config.get("lora_alpha", 8)}  # PEFT's own defaults
        patterns: dict[str, Mapping[str, Any]] = {}
        for key, numbers in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            # AdaLoRA keeps lists of booleans under rank_pattern, which do not change the scaling.
            given = None if self._adaptive else config.get(key)
            if not isinstance(given, dict | None):
                raise GatewiseError(f"{where}: {key} is {_json_type(given)}, expected an object of module: number")
            patterns[key] = given or {}
            numbers |= {f"{key}[{name!r}]": number for name, number in patterns[key].items()}
        for numbers, wanted in ((ranks, "a positive number"), (alphas, "a number")):
            for key, number in numbers.items():
                if not is_number(number) or (numbers is ranks and number <= 0):
                    raise GatewiseError(f"{where}: {key} is {number!r}, expected {wanted}")
        self._r, self._alpha = float(ranks[rank]), float(alphas["lora_alpha"])
        self._ranks, self._alphas = (_compiled(key, pattern, where) for key, pattern in patterns.items())

    def __getitem__(self, path: str) -> float:
        rank, alpha = _first_match(self._ranks, path, self._r), _first_match(self._alphas, path, self._alpha)
        if self._adaptive:
            return (alpha if alpha > 0 else rank) / (rank + 1e-5)
        return alpha / math.sqrt(rank) if self._stabilised else alpha / rank

    def rank(self, path: str) -> int:
        """The rank that the configuration gives a module."""
        return int(_first_match(self._ranks, path, self._r))


def _compiled(key: str, pattern: Mapping[str, Any], where: str) -> list[tuple[re.Pattern[str], float]]:
    """PEFT's rule (get_pattern_key): the first key that matches at the end of the path wins."""
    compiled = []
    for name, number in pattern.items():
        try:
            # Compiled here, because one pattern a module can outgrow the cache of `re`.
            compiled.append((re.compile(rf"(.*\.)?({name})$"), float(number)))
        except re.error as error:
            raise GatewiseError(f"{where}: {key} has the key {name!r}, which is not a valid regular expression: {error}") from error
    return compiled


def _first_match(patterns: Sequence[tuple[re.Pattern[str], float]], path: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


# ---------------------------------------------------------------- allocation.json


@dataclass(frozen=True)
class RoundSummary:
    """One round of rank allocation in totals over all modules; the losses are of the validation batch."""

    round: int
    step: int | None
    budget_before: int
    budget_after: int
    pruned: int
    grown: int
    loss_before: float | None
    loss_after: float | None


@dataclass(frozen=True)
class Allocation:
    """What ``allocation.json`` tells.

    Attributes:
        score: how ranks were scored.
        rounds: oldest first.
        ranks: path -> rank after the last round, 0 for modules that are no longer in the adapter.
    """

    score: str | None = None
    rounds: tuple[RoundSummary, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)


def read_allocation(folder: str | Path) -> Allocation:
    """The rounds of an adapter from ``allocation.json`` in its folder; none where there is no such file of gatewise's.

    Raises:
        GatewiseError: the file is damaged, or of a newer version.
    """
    path = Path(folder) / ALLOCATION_FILE
    if not path.is_file():
        return Allocation()
    record = _read_json(path, "restore or remove the file")
    if not isinstance(record, dict) or "rounds" not in record or "format" not in record:
        return Allocation()  # a file of that name that somebody else wrote
    if record["format"] != 1:
        raise GatewiseError(f"{path} has format {record['format']!r}, this version reads format 1: upgrade gatewise")
    rounds: list[RoundSummary] = []
    ranks: dict[str, int] = {}
    for index, entry in enumerate(record["rounds"] if isinstance(record["rounds"], list) else [None]):
        try:
            ranks = {str(key): int(rank) for key, rank in entry["ranks"].items()}
            pruned, grown = (sum(len(slots) for slots in entry[key].values()) for key in ("pruned", "grown"))
            after = sum(ranks.values())
            before, loss_after = (None if entry.get(key) is None else float(entry[key]) for key in ("loss_before", "loss_after"))
            number = int(entry.get("round", index))
            step = None if entry.get("step") is None else int(entry["step"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise GatewiseError(
                f"{path}: rounds[{index}] is not a round as gatewise writes it ({error!r}): restore or remove the file"
            ) from error
        rounds.append(RoundSummary(number, step, after + pruned - grown, after, pruned, grown, before, loss_after))
    return Allocation(str(record.get("score") or "") or None, tuple(rounds), ranks)


# ---------------------------------------------------------------- search.json


@dataclass(frozen=True)
class Selection:
    """The layers that a search for prompts chose, and why.

    Attributes:
        layers: the chosen ones, in order.
        gates: the gate of every layer at the end of the search.
        losses: of every layer, the mean loss over subsets of open gates that hold it, where the search chose by these losses.
        steps: optimiser steps of the search.
        seconds: what it took, in the process that ended it.
        resumed_from: the step that process went on from, or None.
        settings: of the search and the prompts.
        log: losses and learning rates over its steps.
    """

    layers: list[int]
    gates: list[float]
    steps: int
    seconds: float
    losses: list[float] | None = None
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
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        layers, gates = [int(layer) for layer in told["layers"]], [float(gate) for gate in told["gates"]]
        losses = None if told.get("losses") is None else [float(loss) for loss in told["losses"]]
        if not layers or sorted(set(layers)) != layers or not 0 <= layers[0] <= layers[-1] < len(gates):
            raise ValueError(f"layers {layers} of {len(gates)}")
        return Selection(
            layers=layers,
            gates=gates,
            losses=losses,
            steps=int(told["steps"]),
            seconds=float(told["seconds"]),
            resumed_from=None if told["resumed_from"] is None else int(told["resumed_from"]),
            settings=dict(told["settings"]),
            log=list(told["log"]),
        )
    except (OSError, ValueError, KeyError, OverflowError, TypeError) as error:
        raise GatewiseError(
            f"{path} is not what a search wrote ({type(error).__name__}: {error}): restore it, or search again with --overwrite"
        ) from error


# ---------------------------------------------------------------- gatewise.json


def read_note(folder: str | Path) -> dict[str, Any]:
    """What a run noted beside its adapter: how it wrote prompts and labels, and more; empty for an adapter from elsewhere.

    Raises:
        GatewiseError: the file is damaged, or one of its values is of another kind than a run writes.
    """
    path = Path(folder) / NOTE_FILE
    advice = "restore it, or remove it and give --template-prompt and --labels where prompts are written"
    note = _object(path, advice) if path.is_file() else {}
    training = note.get("training")
    for found, kinds in ((note, _IN_NOTE), (training if isinstance(training, dict) else {}, _IN_TRAINING)):
        for key, (expected, fits) in kinds.items():
            if (value := found.get(key)) is not None and not fits(value):
                raise GatewiseError(f"{path}: {key} is {value!r}, expected {expected}: {advice}")
    return note


def _text(value: object) -> bool:
    return isinstance(value, str)


# What of a note is read, in words and as a test. Null says nothing.
_COUNT = ("a whole number of at least 1", lambda value: is_whole(value) and value >= 1)
_NOT_NEGATIVE = ("a number of at least 0", lambda value: is_number(value) and 0 <= value < math.inf)
_IN_NOTE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("task", "template", "dtype"), ("text", _text)),
    **dict.fromkeys(("max_length", "max_new_tokens"), _COUNT),
    "labels": ("a list of texts", lambda value: isinstance(value, list) and all(map(_text, value))),
    "label_words": ("a text for each label", lambda value: isinstance(value, dict) and all(map(_text, value.values()))),
    "training": ("an object", lambda value: isinstance(value, dict)),
}
_IN_TRAINING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("batch_size", "gradient_accumulation"), _COUNT),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), _NOT_NEGATIVE),
    "learning_rate": ("a number above 0", lambda value: is_number(value) and 0 < value < math.inf),
}


# ---------------------------------------------------------------- JSON


def _object(path: Path, advice: str) -> dict[str, Any]:
    content = _read_json(path, advice)
    if not isinstance(content, dict):
        raise GatewiseError(f"{path} holds {_json_type(content)}, expected an object: {advice}")
    return content


def _read_json(path: Path, advice: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unread(path, error) from error
    except (ValueError, RecursionError) as error:
        raise GatewiseError(f"{path} is not valid JSON ({error}): {advice}") from error


def _unread(path: Path, error: OSError) -> GatewiseError:
    if isinstance(error, PermissionError):  # safetensors writes files that only their owner can read
        return GatewiseError(f"{path} cannot be read ({error.strerror}): let the user of this process read it")
    return GatewiseError(f"{path} cannot be read: {error.strerror or error}")


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
