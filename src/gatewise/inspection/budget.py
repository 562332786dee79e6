"""Where an adapter's budget went: rank, parameters and size of the update of every module, read from a folder or a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from gatewise.adapters.files import (
    CONFIG_FILE,
    PEFT_PREFIX,
    Allocation,
    LoraModule,
    RoundSummary,
    Scalings,
    lora_modules,
    read_allocation,
    read_lora,
)
from gatewise.errors import GatewiseError
from gatewise.inspection.grid import Grid, grid_of, kind_labels, layer_labels, short_number
from gatewise.sites import Site, sites_in_order

if TYPE_CHECKING:
    from peft import PeftModel

Value = Literal["rank", "norm", "parameters"]
_TITLES: dict[Value, str] = {"rank": "rank", "norm": "Frobenius norm of the update", "parameters": "parameters"}


@dataclass(frozen=True)
class ModuleBudget(Site):
    """What one module of the base model got.

    Attributes:
        path, layer, kind: see ``gatewise.sites.Site``.
        rank: slots in use: a slot whose row of A and column of B are both zero does not count.
        capacity: slots there are. 0: the adapter has no ranks here any more (a later round took the last one).
        parameters: numbers stored for the slots in use, plus DoRA's magnitude and LoRA's bias where there are any.
        allocated: numbers stored, dead slots included.
        scaling: what B @ A is multiplied by: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA.
        norm: Frobenius norm of scaling * B @ A.
    """

    rank: int
    capacity: int
    parameters: int
    allocated: int
    scaling: float
    norm: float


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
        return grid_of(
            self.modules,
            partial(_total, value=value),
            title=_TITLES[value],
            write=partial(short_number, whole=value == "rank"),
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


def read_budget(source: "str | Path | PeftModel", adapter: str | None = None) -> BudgetMap:
    """Reads where the budget of a LoRA adapter went.

    Args:
        source: an adapter folder as PEFT saves it (``adapter_config.json`` and ``adapter_model.safetensors``; the base
            model is not needed), or a model in memory.
        adapter: which adapter: of a model, its name (default: the active one); of a folder, the sub-folder of that name
            where there is one, as PEFT saves adapters not called "default"; "default" is the folder itself.

    Raises:
        GatewiseError: no such folder, adapter or file, a file that cannot be read, or not a LoRA adapter.
    """
    return _of_folder(Path(source), adapter) if isinstance(source, str | Path) else _of_model(source, adapter)


def _of_folder(folder: Path, adapter: str | None) -> BudgetMap:
    if adapter and (folder / adapter / CONFIG_FILE).is_file():
        folder = folder / adapter
    elif adapter and adapter not in ("default", folder.name):
        raise GatewiseError(f"{folder} has no folder {adapter!r} with an adapter: leave the name out for the adapter in {folder}")
    lora = read_lora(folder)
    return _map(lora.config, lora.modules, lora.others, read_allocation(folder))


def _of_model(model: "PeftModel", adapter: str | None) -> BudgetMap:
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise GatewiseError(f"expected an adapter folder or a PeftModel, got {type(model).__name__}")
    name = adapter or str(model.active_adapter)
    if name not in model.peft_config:
        known = ", ".join(map(repr, model.peft_config))
        raise GatewiseError(f"the model has no adapter named {name!r}; it has {known}")
    config = model.peft_config[name].to_dict()
    config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
    # The layers are what the forward pass reads; a config edited in memory may say otherwise.
    scalings: dict[str, float] = {}
    for path, layer in model.named_modules():
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and name in scaling:
            per = float(layer.ranknum[name]) + 1e-5 if hasattr(layer, "ranknum") else 1.0
            path = path.removeprefix(PEFT_PREFIX)
            if (parameter := getattr(layer, "parameter_name", None)) is not None:
                path = f"{path.replace('.base_layer', '')}.{parameter}"
            scalings[path] = float(scaling[name]) / per
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach() for key, tensor in state.items()}
    modules, others = lora_modules(tensors, Scalings(config, f"the config of adapter {name!r}", scalings), f"adapter {name!r}")
    return _map(config, modules, others, Allocation())


def _map(
    config: Mapping[str, Any],
    modules: Sequence[LoraModule],
    others: Mapping[str, Tensor],
    allocation: Allocation,
) -> BudgetMap:
    kind = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "ROUTED_LORA": "routed LoRA"}[config["peft_type"]]
    if kind == "LoRA":
        kind = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else kind
    # A module that lost its last rank is no longer in the adapter; the last round still knows that it was there.
    # Experts of a parameter are modules to an allocation, but stay in the adapter together.
    gone = [path for path, rank in allocation.ranks.items() if rank == 0 and not path.endswith("]")]
    return BudgetMap(
        modules=_budgets({module.path: module for module in modules}, gone),
        base_model=config.get("base_model_name_or_path") or None,
        adapter_type=kind,
        other_parameters=sum(tensor.numel() for tensor in others.values()),
        score=allocation.score,
        rounds=allocation.rounds,
    )


def _budgets(modules: Mapping[str, LoraModule], gone: Sequence[str]) -> tuple[ModuleBudget, ...]:
    """One entry a module, in order: what the adapter holds of it, nothing for those that are ``gone``."""
    budgets = []
    for place in sites_in_order({*modules, *gone}):
        if place.path not in modules:
            budgets.append(ModuleBudget(place.path, place.layer, place.kind, 0, 0, 0, 0, 0.0, 0.0))
            continue
        lora = modules[place.path]
        live = lora.live()
        capacity, rank = live.numel(), int(live.sum())
        slot_numbers = lora.a.numel() + lora.b.numel()
        fixed_numbers = sum(tensor.numel() for tensor in lora.others.values())
        rows, columns = lora.rows.float(), lora.columns.float()
        if lora.diagonal is not None:
            slot_numbers += lora.diagonal.numel()
            rows = rows * lora.diagonal.float().reshape(*rows.shape[:2], 1)
        # |BA|^2 = trace(A^T B^T B A) = sum of (A A^T) * (B^T B): r x r products instead of the full d_out x d_in update.
        square = float(((rows @ rows.mT) * (columns @ columns.mT)).sum())
        budgets.append(
            ModuleBudget(
                path=place.path,
                layer=place.layer,
                kind=place.kind,
                rank=rank,
                capacity=capacity,
                parameters=(slot_numbers * rank // capacity if capacity else 0) + fixed_numbers,
                allocated=slot_numbers + fixed_numbers,
                scaling=lora.scaling,
                # Rounding may leave a tiny negative square; max() with 0 first would also hide a NaN.
                norm=abs(lora.scaling) * (square if math.isnan(square) else math.sqrt(max(square, 0.0))),
            )
        )
    return tuple(budgets)
