"""The map of an adapter's budget: one entry a module, and the sums over layers, kinds and all of it."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gatewise.checks import is_number
from gatewise.errors import GatewiseError
from gatewise.inspection.grid import Grid, grid_of, kind_labels, layer_labels, short_number
from gatewise.sites import kind_key, site

if TYPE_CHECKING:
    from peft import PeftModel

Value = Literal["rank", "norm", "parameters"]
_TITLES: dict[Value, str] = {"rank": "rank", "norm": "Frobenius norm of the update", "parameters": "parameters"}


@dataclass(frozen=True)
class ModuleBudget:
    """What one module of the base model got.

    Attributes:
        path: the module's path in the base model.
        layer: its Transformer layer, or None outside the stack.
        kind: what it does, see ``gatewise.sites``.
        rank: slots in use: a slot whose row of A and column of B are both zero does not count.
        capacity: slots there are. 0: the adapter has no ranks here any more (a later round took the last one).
        parameters: numbers stored for the slots in use, plus DoRA's magnitude and LoRA's bias where there are any.
        allocated: numbers stored, dead slots included.
        scaling: what B @ A is multiplied by: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA.
        norm: Frobenius norm of scaling * B @ A.
    """

    path: str
    layer: int | None
    kind: str
    rank: int
    capacity: int
    parameters: int
    allocated: int
    scaling: float
    norm: float


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
class BudgetMap:
    """Where the budget of one adapter went.

    Attributes:
        modules: one entry a module, by layer and then by kind.
        base_model: the base model's name as the adapter's config has it.
        adapter_type: such as "LoRA", "DoRA" or "AdaLoRA".
        other_parameters: numbers the adapter stores outside LoRA (a trained classifier head, embeddings, biases).
        score: how the rounds scored ranks, where ``allocation.json`` lies beside the adapter.
        rounds: the rounds of that file, oldest first.
    """

    modules: tuple[ModuleBudget, ...]
    base_model: str | None = None
    adapter_type: str = "LoRA"
    other_parameters: int = 0
    score: str | None = None
    rounds: tuple[RoundSummary, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        """Path -> true rank."""
        return {module.path: module.rank for module in self.modules}

    @property
    def rank(self) -> int:
        """Slots in use over all modules."""
        return sum(module.rank for module in self.modules)

    @property
    def capacity(self) -> int:
        """Slots there are over all modules."""
        return sum(module.capacity for module in self.modules)

    @property
    def parameters(self) -> int:
        """LoRA parameters in use; ``other_parameters`` come on top."""
        return sum(module.parameters for module in self.modules)

    @property
    def allocated(self) -> int:
        """LoRA parameters stored, those of dead slots included."""
        return sum(module.allocated for module in self.modules)

    @property
    def norm(self) -> float:
        """Frobenius norm of all updates together: the root of the sum of the modules' squared norms."""
        return math.sqrt(sum(module.norm**2 for module in self.modules))

    @property
    def layers(self) -> list[str]:
        """Row labels: every layer index from 0 to the last one that has a module, then "other" if it is needed."""
        return layer_labels(self.modules)

    @property
    def kinds(self) -> list[str]:
        """Column labels, in the order of ``gatewise.sites.KIND_ORDER``."""
        return kind_labels(self.modules)

    def grid(self, value: Value = "rank") -> Grid:
        """The budget as layers x kinds, with totals at the margins.

        Modules at the same place (the experts of a mixture, encoder and decoder) are added up; norms add as squares.

        Raises:
            ValueError: ``value`` is not one of "rank", "norm" and "parameters".
        """
        if value not in get_args(Value):
            raise ValueError(f"value is {value!r}, expected one of {', '.join(get_args(Value))}")
        write = partial(short_number, whole=value == "rank")
        return grid_of(
            self.modules,
            partial(_total, value=value),
            name=value,
            title=_TITLES[value],
            write=write,
            tick=(lambda number: f"{number:.3g}") if value == "norm" else (lambda number: re.sub(r"\.0+", "", write(number))),
            whole=value != "norm",
        )

    def matrix(self, value: Value = "rank") -> tuple[list[str], list[str], list[list[float | None]]]:
        """Row labels, column labels and the rows of ``grid``; None where the adapter has no module."""
        grid = self.grid(value)
        return list(grid.layers), list(grid.kinds), [list(row) for row in grid.cells]


def _total(modules: Sequence[ModuleBudget], value: Value) -> float | None:
    if not modules:
        return None
    if value == "norm":
        return math.sqrt(sum(module.norm**2 for module in modules))
    return sum(getattr(module, value) for module in modules)


_CONFIG, _WEIGHTS, _PICKLE, _ALLOCATION = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "allocation.json",
)

_TYPES = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "ROUTED_LORA": "routed LoRA"}


def rank_map(source: "str | Path | PeftModel", adapter: str | None = None) -> dict[str, int]:
    """Module path -> true rank. Arguments and errors are those of ``read_budget``."""
    return read_budget(source, adapter).ranks


def read_budget(source: "str | Path | PeftModel", adapter: str | None = None) -> BudgetMap:
    """Reads where the budget of a LoRA adapter went.

    Args:
        source: an adapter folder as PEFT saves it (``adapter_config.json`` and ``adapter_model.safetensors``; the base
            model is not needed), or a model in memory.
        adapter: which adapter: of a model, its name (default: the active one); of a folder, the sub-folder of that name
            where there is one, as PEFT saves adapters not called "default".

    Raises:
        GatewiseError: no such folder, adapter or file, a file that cannot be read, or not a LoRA adapter.
    """
    if isinstance(source, str | Path):
        return _read_folder(Path(source), adapter)
    return _read_model(source, adapter)


def _read_folder(folder: Path, adapter: str | None) -> BudgetMap:
    if adapter and (folder / adapter / _CONFIG).is_file():
        folder = folder / adapter
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise GatewiseError(f"adapter folder {folder} {what}: give the folder that holds {_CONFIG}")
    if not (folder / _CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
        hint = f"give one of its sub-folders {', '.join(inside)}" if inside else "give a folder saved by save_pretrained"
        raise GatewiseError(f"{folder} is not an adapter folder, it has no {_CONFIG}: {hint}")
    config = _read_json(folder / _CONFIG)
    if not isinstance(config, dict):
        raise GatewiseError(f"{folder / _CONFIG} holds {_json_type(config)}, expected an object: save the adapter again")
    scalings = _Scalings(config, str(folder / _CONFIG))
    weights = folder / _WEIGHTS
    if not weights.is_file():
        if (folder / _PICKLE).is_file():
            raise GatewiseError(
                f"{folder} has its weights in {_PICKLE}, a pickle, which may run code and is not read: where you trust "
                "it, load it with peft.PeftModel.from_pretrained and call save_pretrained to get safetensors"
            )
        raise GatewiseError(f"{folder} has no {_WEIGHTS}: expected it beside {_CONFIG}")
    try:
        with safe_open(str(weights), framework="pt") as file:
            modules, other = _read_modules(_Tensors(file.keys(), file.get_tensor, str(weights)), scalings)
    except (SafetensorError, OSError) as error:
        raise GatewiseError(f"{weights} cannot be read, it may be cut short: copy or save it again ({error})") from error
    score, rounds, last_ranks = _read_allocation(folder / _ALLOCATION)
    present = {module.path for module in modules}
    # A module that lost its last rank is no longer in the adapter; the last round still knows that it was there.
    for path, rank in last_ranks.items():
        if rank == 0 and path not in present:
            place = site(path)
            modules.append(ModuleBudget(path, place.layer, place.kind, 0, 0, 0, 0, 0.0, 0.0))
    return BudgetMap(_in_order(modules), config.get("base_model_name_or_path") or None, scalings.adapter_type, other, score, rounds)


def _read_model(model: "PeftModel", adapter: str | None) -> BudgetMap:
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise GatewiseError(f"expected an adapter folder or a PeftModel, got {type(model).__name__}")
    name = adapter or str(model.active_adapter)
    if name not in model.peft_config:
        known = ", ".join(map(repr, model.peft_config))
        raise GatewiseError(f"the model has no adapter named {name!r}; it has {known}")
    config = model.peft_config[name]
    plain = config.to_dict()
    plain["peft_type"] = str(getattr(config.peft_type, "value", config.peft_type))
    scalings = _Scalings(plain, f"the config of adapter {name!r}")
    # The layers are what the forward pass reads; a config edited in memory may say otherwise.
    for path, layer in model.named_modules():
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and name in scaling:
            per = float(layer.ranknum[name]) + 1e-5 if hasattr(layer, "ranknum") else 1.0
            scalings.known[path.removeprefix("base_model.model.")] = float(scaling[name]) / per
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = _Tensors(state, lambda key: state[key].detach(), f"adapter {name!r}")
    modules, other = _read_modules(tensors, scalings)
    return BudgetMap(_in_order(modules), config.base_model_name_or_path or None, scalings.adapter_type, other)


@dataclass(frozen=True)
class _Tensors:
    keys: Iterable[str]
    get: Any  # key -> Tensor
    where: str


class _Scalings:
    """The scaling of each module as PEFT works it out from an adapter's config."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.known: dict[str, float] = {}
        kind = str(config.get("peft_type"))
        if kind not in _TYPES:
            hint = ": its prompts have no ranks to show" if kind in ("PROMPT_TUNING", "PREFIX_TUNING") else ""
            raise GatewiseError(
                f"{where}: peft_type is {kind}, expected a LoRA adapter ({', '.join(_TYPES)}) or selective prompts{hint}"
            )
        self.adaptive = kind == "ADALORA"
        self.stabilised = bool(config.get("use_rslora")) and not self.adaptive
        self.adapter_type = "DoRA" if config.get("use_dora") else "rsLoRA" if self.stabilised else _TYPES[kind]
        self.experts = bool(config.get("target_parameters"))
        self._r = self._expect("init_r" if self.adaptive else "r", config.get("init_r" if self.adaptive else "r", 8))
        self._alpha = self._expect("lora_alpha", config.get("lora_alpha", 8), positive=False)
        # AdaLoRA keeps lists of booleans under rank_pattern, which do not change the scaling.
        self._ranks = [] if self.adaptive else self._pattern("rank_pattern", config.get("rank_pattern"))
        self._alphas = [] if self.adaptive else self._pattern("alpha_pattern", config.get("alpha_pattern"))

    def rank(self, path: str) -> int:
        return int(_first_match(self._ranks, path, self._r))

    def __getitem__(self, path: str) -> float:
        if path in self.known:
            return self.known[path]
        rank, alpha = _first_match(self._ranks, path, self._r), _first_match(self._alphas, path, self._alpha)
        if self.adaptive:
            return (alpha if alpha > 0 else rank) / (rank + 1e-5)
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank

    def _expect(self, key: str, value: object, positive: bool = True) -> float:
        if not is_number(value) or (positive and value <= 0):
            wanted = "a positive number" if positive else "a number"
            raise GatewiseError(f"{self.where}: {key} is {value!r}, expected {wanted}")
        return float(value)

    def _pattern(self, key: str, pattern: object) -> list[tuple[re.Pattern[str], float]]:
        if not isinstance(pattern, dict | None):
            raise GatewiseError(f"{self.where}: {key} is {_json_type(pattern)}, expected an object of module: number")
        compiled = []
        for name, value in (pattern or {}).items():
            number = self._expect(f"{key}[{name!r}]", value, positive=key == "rank_pattern")
            try:
                # PEFT's rule (get_pattern_key): the first key that matches at the end of the path wins. Compiled here,
                # because one pattern a module can outgrow the cache of `re`.
                compiled.append((re.compile(rf"(.*\.)?({name})$"), number))
            except re.error as error:
                raise GatewiseError(
                    f"{self.where}: {key} has the key {name!r}, which is not a valid regular expression: {error}"
                ) from error
        return compiled


def _first_match(patterns: Sequence[tuple[re.Pattern[str], float]], path: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?!router\b)(?P<part>[A-Za-z_]+?)(?:\.(?P<leaf>weight|bias))?$")
_FACTORS = {"A": "A", "B": "B", "embedding_A": "A", "embedding_B": "B", "E": "diagonal", "diag": "diagonal"}


def _read_modules(tensors: _Tensors, scalings: _Scalings) -> tuple[list[ModuleBudget], int]:
    """Every module of an adapter, and how many numbers it stores outside LoRA."""
    parts: dict[str, dict[str, str]] = {}
    other = 0
    for key in tensors.keys:
        match = _KEY.match(key)
        if match is None:
            other += int(tensors.get(key).numel())
            continue
        part = _FACTORS.get(match["part"], key) if match["leaf"] != "bias" else key
        parts.setdefault(match["path"], {})[part] = key
    if not any("A" in keys for keys in parts.values()):
        raise GatewiseError(f"{tensors.where} holds no LoRA weights (keys that end in lora_A.weight): give a LoRA adapter")
    return [_read_module(path, keys, tensors, scalings) for path, keys in parts.items()], other


def _read_module(path: str, keys: Mapping[str, str], tensors: _Tensors, scalings: _Scalings) -> ModuleBudget:
    for part in ("A", "B"):
        if part not in keys:
            raise GatewiseError(f"{tensors.where}: {path} has no lora_{part}, the file is incomplete: save it again")
    a, b = tensors.get(keys["A"]), tensors.get(keys["B"])
    factors = _factors(a, b, scalings.rank(path) if scalings.experts else None)
    if factors is None:
        raise GatewiseError(
            f"{tensors.where}: {path} has lora_A of shape {tuple(a.shape)} and lora_B of shape {tuple(b.shape)}, whose "
            "ranks differ, so the file is damaged: save the adapter again"
        )
    rows, columns = factors
    live = (rows != 0).any(-1) | (columns != 0).any(-1)
    capacity, rank = live.numel(), int(live.sum())
    slot_numbers, fixed_numbers = a.numel() + b.numel(), 0
    rows, columns = rows.float(), columns.float()
    for part, key in keys.items():
        if part in ("A", "B"):
            continue
        extra = tensors.get(key)
        if part == "diagonal":
            slot_numbers += extra.numel()
            rows = rows * extra.float().reshape(*rows.shape[:2], 1)
        else:
            fixed_numbers += extra.numel()
    # |BA|^2 = trace(A^T B^T B A) = sum of (A A^T) * (B^T B): r x r products instead of the full d_out x d_in update.
    square = float(((rows @ rows.mT) * (columns @ columns.mT)).sum())
    scaling = scalings[path]
    place = site(path)
    return ModuleBudget(
        path=path,
        layer=place.layer,
        kind=place.kind,
        rank=rank,
        capacity=capacity,
        parameters=(slot_numbers * rank // capacity if capacity else 0) + fixed_numbers,
        allocated=slot_numbers + fixed_numbers,
        scaling=scaling,
        # Rounding may leave a tiny negative square; max() with 0 first would also hide a NaN.
        norm=abs(scaling) * (square if math.isnan(square) else math.sqrt(max(square, 0.0))),
    )


def _factors(a: Tensor, b: Tensor, expert_rank: int | None) -> tuple[Tensor, Tensor] | None:
    """Brings the factors of any LoRA layer to rows of A (e, r, d_in) and columns of B (e, r, d_out), or None.

    The layers are linear (A (r, d_in), B (d_out, r)), embeddings (the same), convolutions (A (r, d_in, *kernel), B
    (d_out, r / groups, 1, ..)), and parameters of e experts (A (e * r, d_in), B (d_out, r * e), ordered differently).
    None: the two factors do not belong together.
    """
    if a.ndim < 2 or b.ndim < 2:
        return None
    slots, (d_out, columns) = a.shape[0], b.shape[:2]
    if slots == 0:
        return (a.reshape(1, 0, a.shape[1]), b.reshape(1, 0, d_out)) if columns == 0 else None
    if b.ndim == 2 and expert_rank and columns == slots > expert_rank and slots % expert_rank == 0:
        experts = slots // expert_rank
        return a.reshape(experts, expert_rank, -1), b.reshape(d_out, expert_rank, experts).permute(2, 1, 0)
    if columns == 0 or slots % columns or (b.ndim == 2 and columns != slots):
        return None
    groups = slots // columns
    if d_out % groups or b.numel() != d_out * columns:
        return None
    return a.reshape(groups, columns, -1), b.reshape(groups, d_out // groups, columns).mT


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GatewiseError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise GatewiseError(f"{path} is not valid JSON ({error}): save the adapter again or repair the file") from error


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _read_allocation(path: Path) -> tuple[str | None, tuple[RoundSummary, ...], dict[str, int]]:
    """Score, rounds and the last round's ranks from ``allocation.json``; nothing where there is none of ours."""
    if not path.is_file():
        return None, (), {}
    record = _read_json(path)
    if not isinstance(record, dict) or "rounds" not in record or "format" not in record:
        return None, (), {}  # a file of that name that somebody else wrote
    if record["format"] != 1:
        raise GatewiseError(f"{path} has format {record['format']!r}, this version reads format 1: upgrade gatewise")
    rounds: list[RoundSummary] = []
    ranks: dict[str, int] = {}
    for index, entry in enumerate(record["rounds"] if isinstance(record["rounds"], list) else [None]):
        try:
            ranks = {str(key): int(rank) for key, rank in entry["ranks"].items()}
            pruned, grown = (sum(len(slots) for slots in entry[key].values()) for key in ("pruned", "grown"))
            after = sum(ranks.values())
            loss_before, loss_after = (
                None if entry.get(key) is None else float(entry[key]) for key in ("loss_before", "loss_after")
            )
            number = int(entry.get("round", index))
            step = None if entry.get("step") is None else int(entry["step"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise GatewiseError(
                f"{path}: rounds[{index}] is not a round as gatewise writes it ({error!r}): restore or remove the file"
            ) from error
        before = after + pruned - grown
        rounds.append(RoundSummary(number, step, before, after, pruned, grown, loss_before, loss_after))
    return str(record.get("score") or "") or None, tuple(rounds), ranks


def _in_order(modules: Iterable[ModuleBudget]) -> tuple[ModuleBudget, ...]:
    return tuple(sorted(modules, key=lambda m: (m.layer is None, m.layer or 0, kind_key(m.kind), m.path)))
