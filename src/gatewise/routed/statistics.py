"""What was routed where: the decision of the last call, and its statistics.

Shapes: b batch, l layers that have experts, m experts of the layer that has most.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gatewise.losses import Batch, row_losses
from gatewise.routed.request import LayerDecision, Request
from gatewise.routed.router import balance


@dataclass(frozen=True)
class Routing:
    """The decision of one call. In packed rows b counts their texts.

    Attributes:
        gates: (b, l, m), float32 and without a graph; zero where a row does not keep an expert, or a layer has none.
        layers: paths of the layers in the base model, in order.
        modules: for each layer, the paths of its experts within it, in order.
    """

    gates: Tensor
    layers: tuple[str, ...]
    modules: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class RoutingStatistics:
    """Of one batch.

    Attributes:
        share: layer path -> module path -> the share of prompts that keep the module, 0 to 1; they sum to k in a layer.
        balance_loss: L_lb, the mean over layers; without its weight. 1 is even, m a single expert for everything.
        entropy: of the probabilities in nats, the mean over prompts and layers; log m is even.
    """

    share: dict[str, dict[str, float]]
    balance_loss: float
    entropy: float

    def as_logs(self, per_layer: bool = True) -> dict[str, float]:
        """Numbers by name, for loggers: ``routing/balance_loss``, ``routing/entropy``, ``routing/share/LAYER.MODULE``."""
        logs = {"routing/balance_loss": self.balance_loss, "routing/entropy": self.entropy}
        if per_layer:
            logs |= {f"routing/share/{layer}.{name}": value for layer, row in self.share.items() for name, value in row.items()}
        return logs


def routing_of(request: Request) -> Routing:
    """A request's decisions as one tensor, those that were made for its encoder repeated for each of its rows."""
    batch, made = len(request.prompt), request.all_decided()
    modules = {path: _experts(decision) for path, decision in made.items() if decision.decisions}
    gates = torch.zeros(batch, len(modules), max(map(len, modules.values()), default=0))
    for index, (path, names) in enumerate(modules.items()):
        decided_by = request if path in request.decided or request.source is None else request.source
        own = torch.zeros(len(decided_by.prompt), gates.shape[-1])
        for one in made[path].decisions:
            rows = torch.arange(len(own)) if one.rows is None else one.rows.cpu()
            at = torch.tensor([names.index(name) for name in one.experts])
            own[rows[:, None], at] = one.gates.detach().float().cpu()
        gates[:, index] = own.repeat_interleave(batch // len(own), dim=0)
    return Routing(gates, tuple(modules), tuple(modules.values()))


@torch.no_grad()
def routing_of_batches(model: Any, batches: Iterable[Batch]) -> Routing:
    """The decisions for the prompts of all batches, row by row.

    Args:
        model: a ``PeftModel`` in evaluation mode, with a routed adapter active.
        batches: at least one, with labels, which tell prompts from answers.
    """
    made = []
    for batch in batches:
        row_losses(model, batch)
        made.append(model.base_model.routing())
    return replace(made[0], gates=torch.cat([one.gates for one in made]))


def _experts(made: LayerDecision) -> tuple[str, ...]:
    """The modules that any of the decisions is about, in the layer's order."""
    return tuple(name for name in made.shares if any(name in one.experts for one in made.decisions))


def statistics_of(request: Request) -> RoutingStatistics:
    """The statistics of a request's decisions."""
    routing = routing_of(request)
    shares = (routing.gates > 0).float().mean(dim=0).tolist()
    probabilities = [
        one.probabilities.detach().float() for decision in request.all_decided().values() for one in decision.decisions
    ]
    entropies = [torch.special.entr(p).sum(dim=-1).cpu() for p in probabilities]
    return RoutingStatistics(
        share={
            layer: dict(zip(names, row, strict=False))
            for layer, names, row in zip(routing.layers, routing.modules, shares, strict=True)
        },
        balance_loss=float(torch.stack([balance(p).cpu() for p in probabilities]).mean()),
        entropy=float(torch.cat(entropies).mean()),
    )
