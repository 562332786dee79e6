"""Where an adapter's budget went: rank, parameters and size of the update of every module, read from its folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from gatewise.adapters.files import LoraModule, read_allocation, read_lora
from gatewise.inspection.grid import Grid, grid_of, short_number
from gatewise.sites import Site, sites_in_order

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
        rounds: how many rounds that file tells of.
    """

    modules: tuple[ModuleBudget, ...]
    base_model: str | None = None
    adapter_type: str = "LoRA"
    other_parameters: int = 0
    score: str | None = None
    rounds: int = 0

    @property
    def ranks(self) -> dict[str, int]:
        """Path -> true rank."""
        return {module.path: module.rank for module in self.modules}

    @property
    def rank(self) -> int:
        """Slots in use over all modules."""
        return int(self.total("rank"))

    @property
    def parameters(self) -> int:
        """LoRA parameters in use; ``other_parameters`` come on top."""
        return int(self.total("parameters"))

    def total(self, value: str) -> float:
        """The sum over modules of a field of ``ModuleBudget``; of norms the root of the sum of squares."""
        return _total(self.modules, value) or 0

    def notes(self, title: str) -> tuple[str, str]:
        """Two lines below the title of a picture: what its numbers are and whose, and the totals."""
        return (
            f"{title} by layer and kind · {self.base_model or self.adapter_type}",
            f"total rank {self.rank:,} · {self.parameters:,} parameters",
        )

    def grid(self, value: Value = "rank") -> Grid:
        """The budget as layers x kinds, with totals at the margins.

        Modules at the same place (the experts of a mixture, encoder and decoder) are added up; norms add as squares.
        """
        return grid_of(
            self.modules,
            partial(_total, value=value),
            title=_TITLES[value],
            write=partial(short_number, whole=value == "rank"),
        )


def _total(modules: Sequence[ModuleBudget], value: str) -> float | None:
    numbers = [getattr(module, value) for module in modules]
    return None if not numbers else math.hypot(*numbers) if value == "norm" else sum(numbers)


def read_budget(folder: str | Path) -> BudgetMap:
    """Reads where the budget of a LoRA adapter went from its folder, as PEFT saves it; the base model is not needed.

    Raises:
        GatewiseError: no such folder, adapter or file, a file that cannot be read, or not a LoRA adapter.
    """
    lora, allocation = read_lora(folder), read_allocation(folder)
    kind = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "ROUTED_LORA": "routed LoRA"}[lora.config["peft_type"]]
    if kind == "LoRA":
        kind = "DoRA" if lora.config.get("use_dora") else "rsLoRA" if lora.config.get("use_rslora") else kind
    # A module that lost its last rank is no longer in the adapter; the last round still knows that it was there.
    # Experts of a parameter are modules to an allocation, but stay in the adapter together.
    gone = [path for path, rank in allocation.ranks.items() if rank == 0 and not path.endswith("]")]
    return BudgetMap(
        modules=_budgets({module.path: module for module in lora.modules}, gone),
        base_model=lora.config.get("base_model_name_or_path") or None,
        adapter_type=kind,
        other_parameters=sum(tensor.numel() for tensor in lora.others.values()),
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
