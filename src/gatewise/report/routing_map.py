"""Which modules the prompts of some data chose: a routed adapter's shares by layer and kind."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gatewise.report.grid import Grid, grid_of


@dataclass(frozen=True)
class ModuleUse:
    """How much one module is used.

    Attributes:
        path: the module's path in the base model.
        layer: its Transformer layer.
        kind: what it does, see ``gatewise.sites``.
        share: the share of prompts that keep it, 0 to 1.
        gate: its mean gate over all prompts, zero where it is not kept; these add up to 1 in a layer with normalised gates.
    """

    path: str
    layer: int | None
    kind: str
    share: float
    gate: float


@dataclass(frozen=True)
class RoutingMap:
    """What a routed adapter's routers chose on some prompts.

    Attributes:
        modules: one entry a module that is an expert.
        prompts: how many prompts were routed.
        top_k: experts kept a layer.
        distinct: how many different sets of modules the prompts chose in a layer, the mean over layers; 1 is the same for all.
        agreement: of the modules that a prompt keeps in a layer, the share that another prompt keeps too: the mean over layers and
            pairs of prompts. 1 is the same for all, top_k / experts is chance.
        base_model, data: where adapter and prompts come from, as far as known.
    """

    modules: tuple[ModuleUse, ...]
    prompts: int
    top_k: int
    distinct: float
    agreement: float
    base_model: str | None = None
    data: str | None = None

    @property
    def by_kind(self) -> dict[str, float]:
        """Kind -> the mean over layers of the share of prompts that keep a module of this kind."""
        return {kind: share or 0.0 for kind, share in zip(self.grid().kinds, self.grid().columns, strict=True)}

    def grid(self) -> Grid:
        """Shares by layer and kind, with means at the margins."""
        return grid_of(
            self.modules,
            _mean_share,
            name="share",
            title="share of prompts that keep a module",
            write=_percent,
            whole=False,
        )


def _mean_share(modules: Sequence[ModuleUse]) -> float | None:
    return math.fsum(module.share for module in modules) / len(modules) if modules else None


def _percent(share: float | None) -> str:
    return "·" if share is None else f"{100 * share:.0f}%"


def routing_lines(routing: RoutingMap) -> list[str]:
    """The map in a few lines of plain text."""
    kinds = ", ".join(f"{kind} {_percent(share)}" for kind, share in routing.by_kind.items())
    k = routing.top_k
    experts = len(routing.modules) / max(1, len({module.layer for module in routing.modules}))
    return [
        f"base model: {routing.base_model or 'not named'}",
        f"prompts: {routing.prompts:,}" + (f" of {routing.data}" if routing.data else ""),
        f"kept: {k} of {experts:.3g} modules a layer; by kind {kinds}",
        f"different choices in a layer: {routing.distinct:.1f} on average",
        f"agreement of two prompts: {routing.agreement:.2f} (1 is the same modules for all, {k / experts:.2f} is chance)",
    ]


def routing_json(routing: RoutingMap) -> dict[str, Any]:
    """The whole map as plain lists, numbers and text for ``json.dumps``."""
    return {**asdict(routing), "modules": [asdict(module) for module in routing.modules], "by_kind": routing.by_kind}
