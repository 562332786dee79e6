"""The map of an adapter's importance: the scores of every module's ranks, and their sums over layers, kinds and all of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from gatewise.report.grid import Grid, grid_of, kind_labels, layer_labels, places_of, row_label, short_number

# What a score says of a rank, and its unit. A score that is not listed has neither.
_MEANINGS: dict[str, tuple[str, str]] = {
    "path_integral": ("its share of the loss that the adapter takes away", "nats"),
    "path_moments": ("what it does for an example on average, plus how strongly single ones react to it, each in its spread", ""),
    "ablation": ("the loss without it less the loss with all, plus what it takes away alone", "nats"),
    "taylor": ("the loss without it less the loss with all, plus what it takes away alone, to first order", "nats"),
    "sensitivity": ("AdaLoRA's |weight x gradient|, never below zero", ""),
}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class ModuleImportance:
    """What the ranks of one module are worth.

    Attributes:
        path: the module's path in the base model.
        layer: its Transformer layer, or None outside the stack.
        kind: what it does, see ``gatewise.sites``.
        scores: one number for each live rank, in the order of the slots; zero is a rank that does nothing.
        scaling: what B @ A is multiplied by.
        room: the most ranks that make sense here, min(d_in, d_out).
    """

    path: str
    layer: int | None
    kind: str
    scores: tuple[float, ...]
    scaling: float
    room: int

    @property
    def rank(self) -> int:
        """Live ranks."""
        return len(self.scores)

    @property
    def total(self) -> float:
        """The sum of the scores; 0 for a module without a live rank."""
        return math.fsum(self.scores)


@dataclass(frozen=True)
class Importance:
    """What every linear LoRA module of an adapter is worth on some rows.

    Attributes:
        modules: one entry a module, by layer and then by kind.
        score: how ranks were scored, a name in ``gatewise.scores.SCORES``.
        rows: rows scored on.
        data: where they came from, as the user wrote it.
        base_model: the base model's name.
        loss_base, loss_adapted: mean cross-entropy (nats) on these rows without any rank and with all of them. Path-integral
            scores add up to the difference between the two.
        unscored: paths of the adapter's modules that are not linear layers, which no score reads.
    """

    modules: tuple[ModuleImportance, ...]
    score: str
    rows: int
    loss_base: float
    loss_adapted: float
    base_model: str | None = None
    data: str | None = None
    unscored: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Live ranks over all modules scored."""
        return sum(module.rank for module in self.modules)

    @property
    def total(self) -> float:
        """The sum of all scores."""
        return _total(self.modules)

    @property
    def by_layer(self) -> dict[str, float]:
        """Row label (a layer's index, or "other") -> sum of scores; 0 for a layer without a module."""
        return {label: _total([m for m in self.modules if row_label(m) == label]) for label in layer_labels(self.modules)}

    @property
    def by_kind(self) -> dict[str, float]:
        """Kind -> sum of scores."""
        return {kind: _total([m for m in self.modules if m.kind == kind]) for kind in kind_labels(self.modules)}

    @property
    def unit(self) -> str:
        """The unit of the scores, "nats" or none."""
        return _MEANINGS.get(self.score, ("", ""))[1]

    @property
    def meaning(self) -> str:
        """What a rank's score says, in words."""
        return _MEANINGS.get(self.score, ("higher is worth more", ""))[0]

    @property
    def ranked(self) -> list[ModuleImportance]:
        """The modules, the most important first."""
        return sorted(self.modules, key=lambda module: -module.total)

    @property
    def useless(self) -> list[ModuleImportance]:
        """The modules whose scores add up to zero or less: on these rows the adapter does without them as well."""
        return [module for module in self.modules if module.total <= 0]

    def score_grid(self) -> Grid:
        """Total scores by layer and kind, in a power of ten that makes the cells easy to read."""
        most = max((abs(_total(here)) for here in places_of(self.modules).values()), default=0.0)
        exponent = 3 * math.floor(math.log10(most) / 3) if most else 0
        scaled = "" if exponent == 0 else f"10{str(exponent).translate(_RAISED)}"
        unit = " ".join(part for part in (scaled, self.unit) if part)
        write = partial(_scaled, exponent=exponent, decimals=2 if most < 10.0 ** (exponent + 1) else 1)
        return grid_of(
            self.modules,
            _total_or_none,
            name="score",
            title=f"{self.score} score" + (f" in {unit}" if unit else ""),
            write=write,
            tick=lambda number: f"{number / 10.0**exponent:.3g}",
            whole=False,
            signed=True,
        )

    def rank_grid(self, ranks: Mapping[str, int] | None = None, name: str = "rank") -> Grid:
        """Ranks by layer and kind: the live ones, or those given by path."""
        held = {module.path: module.rank for module in self.modules} if ranks is None else ranks

        def number(modules: Sequence[ModuleImportance]) -> float | None:
            return sum(held[module.path] for module in modules) if modules else None

        return grid_of(self.modules, number, name=name, title=name, write=partial(short_number, whole=True))


def _total(modules: Sequence[ModuleImportance]) -> float:
    return math.fsum(score for module in modules for score in module.scores)


def _total_or_none(modules: Sequence[ModuleImportance]) -> float | None:
    return _total(modules) if modules else None


def _scaled(number: float | None, exponent: int, decimals: int) -> str:
    if number is None:
        return "·"
    return "0" if number == 0 else f"{number / 10.0**exponent:.{decimals}f}"
