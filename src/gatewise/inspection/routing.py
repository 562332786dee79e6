"""Which modules a routed adapter chooses for the prompts of some data: the share of prompts for every module."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.loading import load_with_data
from gatewise.errors import GatewiseError
from gatewise.inspection.grid import Grid, grid_of, percent
from gatewise.losses import row_losses
from gatewise.processes import device_of
from gatewise.progress import ConsoleProgress, quiet
from gatewise.routed import RoutedLoraConfig, RoutedLoraModel
from gatewise.sites import Site, sites_in_order
from gatewise.tasks import PadCollator
from gatewise.tasks.metrics import encoded


@dataclass(frozen=True)
class ModuleUse(Site):
    """How much one module is used.

    Attributes:
        path, layer, kind: see ``gatewise.sites.Site``.
        share: the share of prompts that keep it, 0 to 1.
        gate: its mean gate over all prompts, zero where it is not kept; these add up to 1 in a layer with normalised gates.
    """

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
        """Shares by layer and kind, with means at the margins, and for modules at the same place (in encoder and decoder)."""
        return grid_of(
            self.modules,
            _mean_share,
            title="share of prompts that keep a module",
            write=percent,
            margin="mean",
        )


def _mean_share(modules: Sequence[ModuleUse]) -> float | None:
    return math.fsum(module.share for module in modules) / len(modules) if modules else None


def route_data(
    adapter: str | Path,
    data: str,
    options: DataOptions = DataOptions(),
    *,
    batch_size: int = 16,
    console: Console | None = None,
) -> RoutingMap:
    """Routes the prompts of data by a saved routed adapter. They are written and encoded as ``gatewise eval`` does.

    Args:
        data, options: as for ``gatewise.adapters.loading.load_with_data``.

    Raises:
        GatewiseError: not a routed adapter, or adapter, base model and data cannot be read or do not fit each other.
    """
    progress = ConsoleProgress(console or Console(stderr=True))
    with quiet(bars=True):
        loaded = load_with_data(adapter, data, options, say=progress.say)
        features = encoded(loaded.model, loaded.tokenizer, loaded.records, loaded.template, loaded.max_length)
        with progress.counting("routing") as count:
            return routing_of_rows(
                loaded.model, loaded.tokenizer, features, batch_size, progress=count, base_model=loaded.base, data=data
            )


def routing_of_rows(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
    *,
    progress: Callable[[int, int], None] | None = None,
    base_model: str | None = None,
    data: str | None = None,
    collate: Callable[..., dict[str, Tensor]] | None = None,
) -> RoutingMap:
    """``route_data`` for a model in memory, with its active adapter, and encoded rows with labels.

    Raises:
        GatewiseError: the active adapter is not a routed one, or there are no rows, or gates are not finite.
    """
    config = model.peft_config[str(model.active_adapter)]
    if not isinstance(model.base_model, RoutedLoraModel) or not isinstance(config, RoutedLoraConfig):
        raise GatewiseError(
            f"the adapter is of type {str(config.peft_type).rpartition('.')[2]}, expected ROUTED_LORA (method milora): adapters of "
            "other types use all of their modules for every prompt"
        )
    if not features:
        raise GatewiseError("there are no rows to route: give at least one")
    collate, was_training = collate or PadCollator(tokenizer), model.training
    model.eval()
    device = device_of(model)

    found = []
    try:
        for start in range(0, len(features), batch_size):
            batch = collate(list(features[start : start + batch_size]))
            with torch.no_grad():
                row_losses(model, {key: tensor.to(device) for key, tensor in batch.items()})  # which tells prompts from answers
            found.append(model.base_model.routing())
            if progress:
                progress(min(start + batch_size, len(features)), len(features))
    finally:
        model.train(was_training)
    routing, every = found[0], torch.cat([one.gates for one in found])  # (rows, l, m)
    broken = [layer for layer, own in zip(routing.layers, every.unbind(dim=1), strict=True) if not bool(own.isfinite().all())]
    if broken:
        raise GatewiseError(
            f"the gates of {broken[0]} are not finite: look for numbers that are not in the adapter and its base model, or route "
            "other prompts"
        )
    kept = every > 0
    experts = {
        f"{layer}.{name}": (i, j)
        for i, (layer, names) in enumerate(zip(routing.layers, routing.modules, strict=True))
        for j, name in enumerate(names)
    }
    modules = []
    for place in sites_in_order(experts):
        i, j = experts[place.path]
        share, gate = float(kept[:, i, j].float().mean()), float(every[:, i, j].mean())
        modules.append(ModuleUse(place.path, place.layer, place.kind, share, gate))
    return RoutingMap(
        modules=tuple(modules),
        prompts=len(every),
        top_k=config.top_k,
        distinct=sum(len(layer.unique(dim=0)) for layer in kept.unbind(dim=1)) / kept.shape[1],
        agreement=_agreement(kept, config.top_k),
        base_model=base_model,
        data=data,
    )


def _agreement(kept: Tensor, top_k: int) -> float:
    """Of (rows, l, m): over all pairs of different rows, the mean share of a row's modules that the other chose too."""
    rows = len(kept)
    if rows == 1:
        return 1.0
    # |both| summed over ordered pairs is, module by module, n (n - 1) for a module that n rows keep.
    counts = kept.double().sum(dim=0)
    return float((counts * (counts - 1)).sum(dim=1).mean() / (rows * (rows - 1) * top_k))
