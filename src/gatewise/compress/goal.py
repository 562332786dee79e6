"""What a compression is asked for, and what comes back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from gatewise.compress.quality import Difference
from gatewise.errors import GatewiseError

Least = Literal["parameters", "modules"]


@dataclass(frozen=True)
class Goal:
    """What the smaller adapter is to be. Without a target it is the smallest within the tolerance.

    Attributes:
        least: what to have least of: "parameters" or "modules".
        tolerance: by how much its quality may be worse, with a confidence of 95%: in shares of right answers, or nats a token.
        parameters, modules: a target in place of the tolerance; at most one of them.
        rank_cap: no module keeps more ranks.
    """

    least: Least = "parameters"
    tolerance: float = 0.01
    parameters: int | None = None
    modules: int | None = None
    rank_cap: int | None = None

    def __post_init__(self) -> None:
        if self.least not in get_args(Least):
            raise GatewiseError(f"least is {self.least!r}; expected one of {', '.join(get_args(Least))}")
        if not 0 < self.tolerance < math.inf:
            raise GatewiseError(f"the tolerance is {self.tolerance}: expected a number above zero, such as 0.01 (--tolerance)")
        if self.parameters is not None and self.modules is not None:
            raise GatewiseError("parameters and modules were both given as targets: give one of them")
        for name in ("parameters", "modules"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise GatewiseError(f"{name} is {value}: expected at least 1")
        if self.rank_cap is not None and self.rank_cap < 1:
            raise GatewiseError(f"the rank cap is {self.rank_cap}: expected at least 1 (--rank-cap)")

    @property
    def unit(self) -> Least:
        """What the order saves."""
        return "modules" if self.modules is not None else "parameters" if self.parameters is not None else self.least

    @property
    def has_target(self) -> bool:
        """True if a size was asked for, not a quality."""
        return self.parameters is not None or self.modules is not None


@dataclass(frozen=True)
class Size:
    """How large an adapter is.

    Attributes:
        parameters: numbers that its LoRA modules store; a trained head comes on top.
        modules: modules that it adapts, of stacked experts those with a live rank. ranks: live ranks over all of them. largest: the
            most of one module.
    """

    parameters: int
    modules: int
    ranks: int
    largest: int


@dataclass(frozen=True)
class Candidate:
    """A smaller adapter that was measured.

    Attributes:
        dropped: steps of the order that were taken.
        recovered: whether it was trained on.
        quality: the mean over the held-out rows; difference: to the whole adapter, on the same rows.
    """

    dropped: int
    size: Size
    recovered: bool
    quality: float
    difference: Difference


@dataclass(frozen=True)
class Compressed:
    """What a compression did.

    Attributes:
        out: the folder written.
        chosen: the smaller adapter; whole_size, whole_quality and base_quality: of the whole one, and quality without any.
        candidates: all that were measured, in order.
        measure: "right" or "loss"; order, goal, rows: how it was searched, and the rows that measured.
        deviation: the largest difference of logits between the adapter as measured and as written: "loaded" again, and "merged".
        merges: whether it is the same model when it is merged into its base; None where that was not tried (a model in memory).
    """

    out: Path
    chosen: Candidate
    whole_size: Size
    whole_quality: float
    base_quality: float
    candidates: tuple[Candidate, ...]
    measure: str
    order: str
    goal: Goal
    rows: int
    deviation: Mapping[str, float] = field(default_factory=dict)
    merges: bool | None = None
