"""Where an adapter's budget went: true ranks, parameters and norms by layer and kind, as table, plot, page or JSON.

Reads any LoRA adapter folder without its base model. Legend of shapes: r rank slots, d_in / d_out the module's sizes,
e experts or groups (1 for an ordinary module).
"""

import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich import box
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gatewise.errors import GatewiseError
from gatewise.files import whole_file
from gatewise.sites import kind_key, site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from peft import PeftModel

Value = Literal["rank", "norm", "parameters"]

OTHER = "other"
"""The row label of modules outside the stack of layers, such as a pooler."""

# A hole in the stack is shown as an empty row; beyond this index a layer number is no longer believed to count layers.
_MOST_LAYERS = 1024

_CONFIG, _WEIGHTS, _PICKLE, _ALLOCATION = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "allocation.json",
)
_TYPES = {"LORA": "LoRA", "ADALORA": "AdaLoRA"}


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
        indices = {module.layer for module in self.modules if module.layer is not None}
        if indices and max(indices) < _MOST_LAYERS:
            indices = set(range(max(indices) + 1))
        labels = [str(index) for index in sorted(indices)]
        return [*labels, OTHER] if any(module.layer is None for module in self.modules) else labels

    @property
    def kinds(self) -> list[str]:
        """Column labels, in the order of ``gatewise.sites.KIND_ORDER``."""
        return sorted({module.kind for module in self.modules}, key=kind_key)

    def matrix(self, value: Value = "rank") -> tuple[list[str], list[str], list[list[float | None]]]:
        """The budget as layers x kinds.

        Modules at the same place (the experts of a mixture, encoder and decoder) are added up; norms add as squares.

        Returns:
            Row labels, column labels and the rows; None where the adapter has no module.

        Raises:
            ValueError: ``value`` is not one of "rank", "norm" and "parameters".
        """
        if value not in get_args(Value):
            raise ValueError(f"value is {value!r}, expected one of {', '.join(get_args(Value))}")
        layers, kinds, places = self.layers, self.kinds, _places(self)
        cells = [[_total(places.get((layer, kind), ()), value) for kind in kinds] for layer in layers]
        return layers, kinds, cells


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
            raise GatewiseError(f"{where}: peft_type is {kind}, expected a LoRA adapter (LORA or ADALORA)")
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
        if isinstance(value, bool) or not isinstance(value, int | float) or (positive and value <= 0):
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


_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<part>[A-Za-z_]+?)(?:\.(?P<leaf>weight|bias))?$")
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


def _places(budget: BudgetMap) -> dict[tuple[str, str], list[ModuleBudget]]:
    places: dict[tuple[str, str], list[ModuleBudget]] = {}
    for module in budget.modules:
        places.setdefault((_row(module), module.kind), []).append(module)
    return places


def _row(module: ModuleBudget) -> str:
    return OTHER if module.layer is None else str(module.layer)


def _total(modules: Sequence[ModuleBudget], value: Value) -> float | None:
    if not modules:
        return None
    if value == "norm":
        return math.sqrt(sum(module.norm**2 for module in modules))
    return sum(getattr(module, value) for module in modules)


def _totals(budget: BudgetMap, value: Value) -> tuple[list[float | None], list[float | None], float]:
    """Totals per row, per column and over all."""
    rows = [_total([m for m in budget.modules if _row(m) == layer], value) for layer in budget.layers]
    columns = [_total([m for m in budget.modules if m.kind == kind], value) for kind in budget.kinds]
    return rows, columns, float(getattr(budget, value))


def _number(number: float | None, value: Value) -> str:
    """At most six characters: a rank in full; norms 0.034, 4e-05; parameters 960, 18.4k, 2.43M. A dot for no module."""
    if number is None:
        return "·"
    if not math.isfinite(number):
        return "nan" if math.isnan(number) else "inf"
    if number == 0 or value == "rank" or (number < 1000 and number == int(number)):
        return str(int(number))
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:#.3g}".rstrip(".") if number >= 1e-3 else f"{number:.0e}"


def _heat(cells: Iterable[Iterable[float | None]]) -> float:
    """The largest finite number, for a scale that starts at zero."""
    return max((c for row in cells for c in row if c is not None and math.isfinite(c)), default=0.0)


# The lower steps stay as the terminal has them. White on the others has a contrast of 4.5 or more, and all are about as
# light as each other, so they show on a dark terminal and on a light one; grey to orange suits every colour vision.
_TABLE_SHADES = ("", "", "#ffffff on #6e6a66", "#ffffff on #87653f", "bold #ffffff on #a8560f")


def ranks_table(budget: BudgetMap, value: Value = "rank") -> Table:
    """The budget as a table for the terminal: layers x kinds with totals, 80 columns wide for a Llama.

    Cells are shaded in five steps from the lowest to the highest number; the numbers say the same without colour.
    A dot marks a place where the adapter has no module.
    """
    layers, kinds, cells = budget.matrix(value)
    rows, columns, all_of_it = _totals(budget, value)
    finite = [c for row in cells for c in row if c is not None and math.isfinite(c)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def cell(number: float | None) -> Text:
        if number is None or number == 0:
            return Text(_number(number, value), style="dim")
        if high == low or not math.isfinite(number):
            return Text(_number(number, value))
        step = min(int((number - low) / (high - low) * len(_TABLE_SHADES)), len(_TABLE_SHADES) - 1)
        return Text(f" {_number(number, value)}", style=_TABLE_SHADES[step])

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, collapse_padding=True)
    table.add_column("layer", Text("total", style="bold"), justify="right", no_wrap=True)
    for kind, total in zip(kinds, columns, strict=True):
        table.add_column(Text(kind), Text(_number(total, value), style="bold"), justify="right", no_wrap=True)
    table.add_column("total", Text(_number(all_of_it, value), style="bold"), justify="right", no_wrap=True)
    for layer, row, total in zip(layers, cells, rows, strict=True):
        table.add_row(Text(layer), *map(cell, row), Text(_number(total, value), style="bold"))
    return table


def to_json(budget: BudgetMap) -> dict[str, Any]:
    """The whole map as plain lists, numbers and text for ``json.dumps``; numbers that are not finite become None."""
    layers, kinds, _ = budget.matrix()
    return _plain(
        {
            "base_model": budget.base_model,
            "adapter_type": budget.adapter_type,
            "totals": {
                "modules": len(budget.modules),
                "rank": budget.rank,
                "capacity": budget.capacity,
                "parameters": budget.parameters,
                "allocated": budget.allocated,
                "other_parameters": budget.other_parameters,
                "norm": budget.norm,
            },
            "layers": layers,
            "kinds": kinds,
            "matrix": {value: budget.matrix(value)[2] for value in get_args(Value)},
            "modules": [asdict(module) for module in budget.modules],
            "score": budget.score,
            "rounds": [asdict(entry) for entry in budget.rounds],
        }
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_lines(budget: BudgetMap) -> list[str]:
    """The map in a few lines of plain text: base model, type, totals, shares by kind, fullest and empty layers."""
    return [f"{name}: {text}" for name, text in _facts(budget)]


def _facts(budget: BudgetMap) -> list[tuple[str, str]]:
    stack = [layer for layer in budget.layers if layer != OTHER]
    rows = dict(zip(budget.layers, _totals(budget, "rank")[0], strict=True))
    held = {layer: int(rows[layer] or 0) for layer in stack}
    fullest = [layer for layer in sorted(stack, key=lambda layer: -held[layer])[:3] if held[layer]]
    slots = f"{budget.rank:,}" + (f" of {budget.capacity:,} slots" if budget.capacity != budget.rank else "")
    unused = budget.allocated - budget.parameters
    stored = f"{budget.parameters:,}" + (f" in use, {unused:,} in dead slots" if unused else "")
    if budget.other_parameters:
        stored += f", and {budget.other_parameters:,} outside LoRA"
    facts = [
        ("base model", budget.base_model or "not named"),
        ("adapter", f"{budget.adapter_type}, {len(budget.modules):,} modules in {len(stack):,} layers"),
        ("total rank", slots),
        ("parameters", stored),
    ]
    if budget.rank:
        shares = ((kind, total or 0) for kind, total in zip(budget.kinds, _totals(budget, "rank")[1], strict=True))
        facts.append(("rank by kind", ", ".join(f"{kind} {100 * total / budget.rank:.0f}%" for kind, total in shares)))
    if fullest:
        facts.append(("most rank", ", ".join(f"layer {layer} ({held[layer]})" for layer in fullest)))
    facts.append(("empty layers", _ranges([int(layer) for layer in stack if held[layer] == 0]) or "none"))
    if budget.rounds:
        facts.append(("rounds", f"{len(budget.rounds)}" + (f", ranks scored by {budget.score}" if budget.score else "")))
    return facts


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> "0-2, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def plot(budget: BudgetMap, out: str | Path, value: Value = "rank", title: str | None = None) -> Path:
    """Draws the map into a file, whole or not at all.

    Args:
        out: ``.png`` and ``.svg`` give a heatmap with totals at its margins; ``.html`` one page that needs no network
            and shows rank, norm and parameters, and the rounds where they are known. Missing folders are made.
        value: what is drawn, or shown first.
        title: the heading; by default says what is shown.

    Returns:
        The path written.

    Raises:
        GatewiseError: another suffix, or a path that cannot be written.
        ValueError: ``value`` is not one of "rank", "norm" and "parameters".
    """
    out = Path(out)
    suffix = out.suffix.lower()
    if suffix not in (".png", ".svg", ".html"):
        raise GatewiseError(f"cannot plot to {out}: expected a name that ends in .png, .svg or .html")
    budget.matrix(value)  # refuses an unknown value before anything is drawn
    title = title or "Where the budget went"
    content = _page(budget, value, title).encode() if suffix == ".html" else _image(budget, value, title, suffix[1:])
    with whole_file(out) as part:
        part.write_bytes(content)
    return out


_VALUE_TITLES: dict[str, str] = {
    "rank": "rank",
    "norm": "Frobenius norm of the update",
    "parameters": "parameters",
}
_INK, _FAINT, _BAR, _ABSENT = "#1b2733", "#5c6b7a", "#9fb4c7", "#eceff2"
# One hue from light to dark: it keeps its order in every kind of colour vision and in grey print.
_RAMP = ("#f1f6fb", "#86b3d6", "#0b3f73")


def _image(budget: BudgetMap, value: Value, title: str, kind_of_file: str) -> bytes:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "gatewise", "font.family": "DejaVu Sans"}):
        figure = _draw(budget, value, title)
        file = io.BytesIO()
        # No date, so that the same map always gives the same bytes.
        figure.savefig(file, format=kind_of_file, dpi=160, metadata={"Date": None} if kind_of_file == "svg" else None)
    return file.getvalue()


def _draw(budget: BudgetMap, value: Value, title: str) -> "Figure":
    """The heatmap, laid out in inches so that a row keeps its height from 6 layers to 80."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, kinds, cells = budget.matrix(value)
    rows, columns, _ = _totals(budget, value)
    row_height = 0.26 if len(layers) <= 40 else 0.21
    heat_width, heat_height = max(0.66 * len(kinds), 3.0), row_height * max(len(layers), 1)
    left, bottom, kinds_height, bars_width, head = 0.85, 0.4, 0.75, 1.7, 0.85
    width = left + heat_width + 0.1 + bars_width + 1.15
    height = bottom + heat_height + 0.1 + kinds_height + head
    figure = Figure(figsize=(width, height), facecolor="white")

    def axes(x: float, y: float, w: float, h: float) -> "Axes":
        made = figure.add_axes((x / width, y / height, w / width, h / height))
        made.tick_params(length=0, labelsize=8, labelcolor=_INK)
        for spine in made.spines.values():
            spine.set_visible(False)
        return made

    room = int((width - left - 0.2) / 0.068)
    for text, size, colour, weight, down in (
        (title, 12, _INK, "bold", 0.3),
        (
            f"{_VALUE_TITLES[value]} by layer and kind · {budget.base_model or budget.adapter_type}",
            8,
            _FAINT,
            "normal",
            0.51,
        ),
        (f"total rank {budget.rank:,} · {budget.parameters:,} parameters", 8, _FAINT, "normal", 0.68),
    ):
        fits = _shorten(text, int(room * 8 / size))
        figure.text(
            left / width,
            1 - down / height,
            fits,
            size=size,
            color=colour,
            weight=weight,
            va="baseline",
            parse_math=False,
        )

    ramp = LinearSegmentedColormap.from_list("gatewise", _RAMP)
    top = _heat(cells) or 1.0
    scale = Normalize(0, top)
    heat = axes(left, bottom, heat_width, heat_height)
    heat.set_xlim(0, max(len(kinds), 1))
    heat.set_ylim(max(len(layers), 1), 0)
    for y, row in enumerate(cells):
        for x, number in enumerate(row):
            known = number is not None and math.isfinite(number)
            face = ramp(number / top) if number is not None and known else _ABSENT
            heat.add_patch(_rectangle(x, y, face, hatch=None if number is not None else "////"))
            if number is not None:
                ink = "white" if known and number > 0.66 * top else _INK
                heat.text(x + 0.5, y + 0.52, _number(number, value), size=7.5, color=ink, ha="center", va="center")
    heat.set_xticks([x + 0.5 for x in range(len(kinds))], [_shorten(kind, 11) for kind in kinds], parse_math=False)
    heat.set_yticks([y + 0.5 for y in range(len(layers))], layers)
    heat.set_ylabel("layer", size=8.5, color=_FAINT)

    small: dict[str, Any] = {"size": 7.5, "color": _INK}
    by_kind = axes(left, bottom + heat_height + 0.1, heat_width, kinds_height)
    tops = [_finite(total) for total in columns]
    by_kind.bar([x + 0.5 for x in range(len(kinds))], tops, width=0.86, color=_BAR)
    by_kind.set_xlim(heat.get_xlim())
    by_kind.set_ylim(0, (max(tops, default=0) or 1) * 1.3)
    by_kind.set_xticks([])
    by_kind.set_yticks([])
    for x, total in enumerate(columns):
        at = (x + 0.5, tops[x])
        by_kind.annotate(_number(total, value), at, (0, 2), textcoords="offset points", ha="center", **small)

    by_layer = axes(left + heat_width + 0.1, bottom, bars_width, heat_height)
    ends = [_finite(total) for total in rows]
    by_layer.barh([y + 0.5 for y in range(len(layers))], ends, height=0.8, color=_BAR)
    by_layer.set_xlim(0, (max(ends, default=0) or 1) * 1.32)
    by_layer.set_ylim(heat.get_ylim())
    by_layer.set_xticks([])
    by_layer.set_yticks([])
    by_layer.set_xlabel("total per layer", size=8.5, color=_FAINT, loc="left")
    for y, total in enumerate(rows):
        at = (ends[y], y + 0.52)
        by_layer.annotate(_number(total, value), at, (3, 0), textcoords="offset points", va="center", **small)

    bar_height = min(heat_height, 2.6)
    colours = axes(left + heat_width + bars_width + 0.3, bottom + heat_height - bar_height, 0.13, bar_height)
    whole = MaxNLocator(nbins=5, integer=value != "norm")
    key = figure.colorbar(ScalarMappable(scale, ramp), cax=colours, ticks=whole)
    key.outline.set_visible(False)
    colours.yaxis.set_major_formatter(
        lambda number, _: f"{number:.3g}" if value == "norm" else re.sub(r"\.0+", "", _number(number, value))
    )
    colours.tick_params(length=0, labelsize=7.5, labelcolor=_INK)
    return figure


def _rectangle(x: float, y: float, face: Any, hatch: str | None) -> Any:
    from matplotlib.patches import Rectangle

    edge = "white" if hatch is None else "#cfd6dc"
    return Rectangle((x + 0.02, y + 0.03), 0.96, 0.94, facecolor=face, edgecolor=edge, linewidth=0, hatch=hatch)


def _finite(number: float | None) -> float:
    return number if number is not None and math.isfinite(number) else 0.0


def _shorten(text: str, room: int) -> str:
    """Cuts text in the middle, where paths and names differ least."""
    room = max(room, 5)
    return text if len(text) <= room else f"{text[: (room - 1) // 2]}…{text[len(text) - room // 2 :]}"


def _page(budget: BudgetMap, value: Value, title: str) -> str:
    facts = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_unbroken(text))}</dd></div>" for name, text in _facts(budget)
    )
    choices = "".join(
        f'<label><input type="radio" name="value" value="{each}"{" checked" if each == value else ""}>{each}</label>'
        for each in get_args(Value)
    )
    return _PAGE.format(
        title=html.escape(title),
        value=value,
        style=_STYLE,
        script=_SCRIPT,
        facts=facts,
        choices=choices,
        most=_by_value({each: _number(_heat(budget.matrix(each)[2]), each) for each in get_args(Value)}),
        heat=_heat_rows(budget),
        rounds=_rounds_section(budget),
        modules=_module_rows(budget),
    )


def _unbroken(text: str) -> str:
    """Keeps a number on the line of the word it belongs to."""
    return re.sub(r" (?=\(?\d)", "\N{NO-BREAK SPACE}", text)


def _by_value(texts: Mapping[str, str]) -> str:
    """One span a value; the style sheet shows the chosen one."""
    return "".join(f'<span class="{value}">{html.escape(text)}</span>' for value, text in texts.items())


def _heat_rows(budget: BudgetMap) -> str:
    values = get_args(Value)
    layers, kinds, _ = budget.matrix()
    cells = {value: budget.matrix(value)[2] for value in values}
    totals = {value: _totals(budget, value) for value in values}
    most = {value: _heat(cells[value]) or 1.0 for value in values}
    places = _places(budget)
    lines = ['<thead><tr><th scope="col">layer</th>']
    lines += [f'<th scope="col">{html.escape(kind)}</th>' for kind in kinds]
    lines.append('<th scope="col" class="sum">total</th></tr></thead><tbody>')
    for y, layer in enumerate(layers):
        lines.append(f'<tr><th scope="row">{layer}</th>')
        for x, kind in enumerate(kinds):
            here = places.get((layer, kind))
            if not here:
                lines.append('<td class="none" tabindex="-1"><span aria-label="no module">·</span></td>')
                continue
            heat = ";".join(f"--{value}:{_finite(cells[value][y][x]) / most[value]:.3f}" for value in values)
            tip = html.escape("\n".join(_tip(module) for module in here))
            shown = _by_value({value: _number(cells[value][y][x], value) for value in values})
            lines.append(f'<td class="cell" tabindex="-1" style="{heat}" data-tip="{tip}">{shown}</td>')
        shown = _by_value({value: _number(totals[value][0][y], value) for value in values})
        lines.append(f'<td class="sum">{shown}</td></tr>')
    lines.append('</tbody><tfoot><tr><th scope="row">total</th>')
    for x in range(len(kinds)):
        shown = _by_value({value: _number(totals[value][1][x], value) for value in values})
        lines.append(f'<td class="sum">{shown}</td>')
    lines.append(f'<td class="sum">{_by_value({value: _number(totals[value][2], value) for value in values})}</td></tr></tfoot>')
    return "".join(lines)


def _tip(module: ModuleBudget) -> str:
    return (
        f"{module.path}\nrank {module.rank} of {module.capacity}\n"
        f"{module.parameters:,} of {module.allocated:,} parameters\n"
        f"norm {_number(module.norm, 'norm')}, scaling {module.scaling:.4g}"
    )


def _rounds_section(budget: BudgetMap) -> str:
    if not budget.rounds:
        return ""
    by = f", ranks scored by {html.escape(budget.score)}" if budget.score else ""
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("round", "step", "budget before", "pruned", "grown", "budget after", "loss before", "loss after")
    )

    def loss(number: float | None) -> str:
        return "·" if number is None else f"{number:.4f}"

    body = ""
    for entry in budget.rounds:
        numbers = [
            "·" if entry.step is None else str(entry.step),
            f"{entry.budget_before:,}",
            f"{entry.pruned:,}",
            f"{entry.grown:,}",
            f"{entry.budget_after:,}",
            loss(entry.loss_before),
            loss(entry.loss_after),
        ]
        cells = "".join(f"<td>{html.escape(number)}</td>" for number in numbers)
        body += f'<tr><th scope="row">{entry.round}</th>{cells}</tr>'
    return (
        f'<section><h2>Rounds</h2><div class="wide"><table class="list"><caption>{len(budget.rounds)} rounds{by}. '
        "Budgets are total ranks; losses are those of the validation batch.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _module_rows(budget: BudgetMap) -> str:
    return "".join(
        f'<tr><th scope="row">{html.escape(m.path)}</th><td>{m.rank}</td><td>{m.capacity}</td><td>{m.parameters:,}</td>'
        f"<td>{m.allocated:,}</td><td>{_number(m.norm, 'norm')}</td><td>{m.scaling:.4g}</td></tr>"
        for m in budget.modules
    )


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b2733;--faint:#5c6b7a;--line:#dde3e9;--cold:#eef4fa;--hot:#0b4a85;
--on-cold:#000;--on-hot:#fff;--turn:.74;--accent:#0b63b0}
@media (prefers-color-scheme:dark){:root{--paper:#12181f;--ink:#e4eaf0;--faint:#98a6b5;--line:#2b3642;--cold:#1b2733;
--hot:#9bd0ff;--on-cold:#fff;--on-hot:#000;--turn:.46;--accent:#7cbcf5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.75rem 1.25rem 4rem}
h1{font-size:1.5rem;line-height:1.2;margin:0 0 1rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2.25rem 0 .5rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(24rem,100%),1fr));gap:.6rem 1.5rem;margin:0 0 1.5rem}
dt{color:var(--faint);font-size:.8rem}dd{margin:0;overflow-wrap:anywhere}
.bar{display:flex;flex-wrap:wrap;gap:.75rem 1.5rem;align-items:center;justify-content:space-between;
margin-bottom:.75rem}
fieldset{border:1px solid var(--line);border-radius:.5rem;margin:0;padding:0;display:flex;overflow:hidden}
fieldset[hidden]{display:none}
legend{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
label{padding:.35rem .9rem;cursor:pointer;border-left:1px solid var(--line)}label:first-of-type{border-left:0}
label:has(:checked){background:var(--accent);color:var(--paper)}label:has(:focus-visible){outline:2px solid var(--ink);
outline-offset:-3px;border-radius:.5rem}
input{position:absolute;opacity:0;pointer-events:none}
.scale{display:flex;gap:.5rem;align-items:center;color:var(--faint);font-size:.85rem}
.scale i{width:9rem;height:.7rem;border-radius:.2rem;background:linear-gradient(90deg,var(--cold),var(--hot))}
table{border-collapse:separate;border-spacing:2px;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--faint);font-size:.85rem;padding-bottom:.4rem}
.heat{table-layout:fixed}.heat th{font-weight:500;color:var(--faint);font-size:.85rem;padding:.1rem .3rem}
.heat thead th{position:sticky;top:0;background:var(--paper);z-index:1;overflow-wrap:anywhere}
.heat th:first-child{width:4rem;text-align:right;padding-right:.6rem;white-space:nowrap}
.heat td{text-align:center;padding:.1rem .2rem;border-radius:3px;font-size:.85rem}
.heat td.sum{font-weight:600}.heat td.none{color:var(--faint)}
.heat td:focus{outline:2px solid var(--ink);outline-offset:1px}
.cell{background:color-mix(in srgb,var(--hot) calc(var(--h)*100%),var(--cold));
color:color-mix(in srgb,var(--on-hot) clamp(0%,calc((var(--h) - var(--turn))*100000%),100%),var(--on-cold))}
[data-value=rank] .cell{--h:var(--rank)}[data-value=norm] .cell{--h:var(--norm)}
[data-value=parameters] .cell{--h:var(--parameters)}
[data-value=rank] :is(span.norm,span.parameters),[data-value=norm] :is(span.rank,span.parameters),
[data-value=parameters] :is(span.rank,span.norm){display:none}
.list{border-collapse:collapse;border-spacing:0;font-size:.85rem}
.list th,.list td{text-align:right;padding:.25rem .6rem;
border-bottom:1px solid var(--line)}.list thead th{color:var(--faint);font-weight:500;vertical-align:bottom}
.list th:first-child{text-align:left;font-weight:400;overflow-wrap:anywhere}
.wide{overflow-x:auto}summary{cursor:pointer;color:var(--accent);margin-top:2.25rem}
#tip{position:fixed;z-index:2;max-width:min(34rem,94vw);padding:.5rem .7rem;border-radius:.4rem;background:var(--ink);
color:var(--paper);font-size:.8rem;white-space:pre-line;overflow-wrap:anywhere;pointer-events:none}
@media (max-width:40rem){.heat td,.heat th{font-size:.7rem}.heat th:first-child{width:2.8rem;
padding-right:.3rem}}
"""

_SCRIPT = """
const main = document.querySelector("main"), heat = document.querySelector(".heat");
const tip = document.getElementById("tip"), choice = document.querySelector("fieldset");
choice.hidden = false;
choice.addEventListener("change", event => { main.dataset.value = event.target.value; });
// A restored page may remember another choice than the one it was written with.
main.dataset.value = choice.querySelector(":checked").value;

function show(cell) {
  if (!cell || !cell.dataset.tip) return hide();
  tip.textContent = cell.dataset.tip;
  tip.hidden = false;
  cell.setAttribute("aria-describedby", "tip");
  const at = cell.getBoundingClientRect(), box = tip.getBoundingClientRect();
  const above = at.top - box.height - 6;
  const left = at.left + at.width / 2 - box.width / 2;
  tip.style.left = Math.max(6, Math.min(left, innerWidth - box.width - 6)) + "px";
  tip.style.top = (above > 6 ? above : at.bottom + 6) + "px";
}
function hide() { tip.hidden = true; }
heat.addEventListener("pointerover", event => show(event.target.closest("td")));
heat.addEventListener("pointerleave", hide);
heat.addEventListener("focusin", event => show(event.target.closest("td")));
heat.addEventListener("focusout", hide);
addEventListener("scroll", hide, {passive: true});

// One stop for the Tab key; the arrow keys walk from cell to cell.
const grid = [...heat.tBodies[0].rows].map(row => [...row.querySelectorAll("td[tabindex]")]);
if (grid.length && grid[0].length) grid[0][0].tabIndex = 0;
const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
heat.addEventListener("keydown", event => {
  if (event.key === "Escape") return hide();
  const step = steps[event.key], y = grid.findIndex(row => row.includes(event.target));
  if (!step || y < 0) return;
  const next = (grid[y + step[0]] || [])[grid[y].indexOf(event.target) + step[1]];
  event.preventDefault();
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';style-src 'unsafe-inline';script-src 'unsafe-inline';img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main data-value="{value}">
<h1>{title}</h1>
<dl>{facts}</dl>
<div class="bar">
<fieldset hidden><legend>Show</legend>{choices}</fieldset>
<div class="scale" aria-hidden="true">0<i></i>{most}</div>
</div>
<table class="heat">
<caption>Layer by kind of module; a dot marks a place without a module.
Totals of norms are roots of summed squares.</caption>
{heat}
</table>
{rounds}
<details>
<summary>All modules</summary>
<div class="wide"><table class="list">
<thead><tr><th scope="col">module</th><th scope="col">rank</th><th scope="col">slots</th><th scope="col">parameters</th>
<th scope="col">allocated</th><th scope="col">norm</th><th scope="col">scaling</th></tr></thead>
<tbody>{modules}</tbody>
</table></div>
</details>
</main>
<div id="tip" role="tooltip" hidden></div>
<script>{script}</script>
</body>
</html>
"""
