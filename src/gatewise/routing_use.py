"""Which modules a routed adapter's routers choose for the prompts of some data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.losses import row_losses
from gatewise.measure import load_with_data
from gatewise.models.convert import quiet
from gatewise.progress import RunProgress
from gatewise.report import ModuleUse, RoutingMap
from gatewise.routed import RoutedLoraConfig, RoutedLoraModel
from gatewise.sites import kind_key, site
from gatewise.tasks import PadCollator, encode, encode_classification


def route_data(
    adapter: str | Path,
    data: str,
    *,
    base: str | None = None,
    split: str | None = None,
    prompt: str | None = None,
    labels: str | None = None,
    rows: int | None = None,
    batch_size: int = 16,
    console: Console | None = None,
) -> RoutingMap:
    """Routes the prompts of data by a saved routed adapter. They are written and encoded as ``gatewise eval`` does.

    Args:
        data, base, split, prompt, labels: as for ``gatewise.measure.measure_adapter``.
        rows: only the first rows.

    Raises:
        GatewiseError: not a routed adapter, or adapter, base model and data cannot be read or do not fit each other.
    """
    progress = RunProgress(console or Console(stderr=True))
    with quiet(bars=True):
        loaded = load_with_data(adapter, data, base=base, split=split, prompt=prompt, labels=labels, limit=rows, say=progress.say)
        if loaded.template is None:
            features = encode_classification(loaded.records, loaded.tokenizer, max_length=loaded.max_length)
        else:
            features = list(encode(loaded.records, loaded.tokenizer, loaded.template, max_length=loaded.max_length))
        with progress.counting("routing") as count:
            return routing_of_rows(
                loaded.model, loaded.tokenizer, features, batch_size, progress=count, base_model=loaded.base, data=data
            )


@torch.no_grad()
def routing_of_rows(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
    *,
    progress: Callable[[int, int], None] | None = None,
    base_model: str | None = None,
    data: str | None = None,
) -> RoutingMap:
    """The same for a model in memory, with its active adapter, and encoded rows with labels.

    Raises:
        GatewiseError: the active adapter is not a routed one, or there are no rows.
    """
    tuner, config = model.base_model, model.peft_config[str(model.active_adapter)]
    if not isinstance(tuner, RoutedLoraModel) or not isinstance(config, RoutedLoraConfig):
        raise GatewiseError(
            f"the adapter is of type {str(config.peft_type).rpartition('.')[2]}, expected ROUTED_LORA (method milora): adapters of "
            "other types use all of their modules for every prompt"
        )
    if not features:
        raise GatewiseError("there are no rows to route: give at least one")
    collate, was_training = PadCollator(tokenizer), model.training
    model.eval()
    gates: list[Tensor] = []
    try:
        for start in range(0, len(features), batch_size):
            row_losses(model, collate(list(features[start : start + batch_size])))
            routing = tuner.routing()
            gates.append(routing.gates)
            if progress:
                progress(min(start + batch_size, len(features)), len(features))
    finally:
        model.train(was_training)
    every = torch.cat(gates)  # (rows, l, m)
    kept = every > 0
    modules = [
        ModuleUse(path, place.layer, place.kind, float(kept[:, i, j].float().mean()), float(every[:, i, j].mean()))
        for i, (layer, names) in enumerate(zip(routing.layers, routing.modules, strict=True))
        for j, name in enumerate(names)
        for path in [f"{layer}.{name}"]
        for place in [site(path)]
    ]
    return RoutingMap(
        modules=tuple(sorted(modules, key=lambda m: (m.layer is None, m.layer or 0, kind_key(m.kind), m.path))),
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
