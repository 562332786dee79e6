"""The map of an adapter's budget: one entry a module, and the sums over layers, kinds and all of it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from gatewise.report.grid import Grid, grid_of, kind_labels, layer_labels, short_number

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
