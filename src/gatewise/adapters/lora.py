"""Which LoRA adapter of a model to work on, and how an adapter's configuration writes down ranks, scalings and modules."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from gatewise.errors import GatewiseError


def active_adapter(model: nn.Module, adapter: str | None = None, any_kind: bool = False) -> str:
    """The adapter to work on: the one named, or the active one.

    Raises:
        GatewiseError: the model is not a ``PeftModel``, or the adapter does not exist or is not LoRA (of ``any_kind``: or is none).
    """
    if not isinstance(model, PeftModel):
        raise GatewiseError(
            f"expected a PeftModel with a LoRA adapter, got {type(model).__name__}: wrap the model with "
            "peft.get_peft_model(model, LoraConfig(...)) first"
        )
    name = adapter or model.active_adapter
    config = model.peft_config.get(name)
    if config is None:
        raise GatewiseError(f"the model has no adapter named {name!r}; it has {', '.join(map(repr, model.peft_config))}")
    if not any_kind and str(config.peft_type).split(".")[-1] != "LORA":
        raise GatewiseError(f"adapter {name!r} is of type {config.peft_type}; only plain LoRA has ranks to score and move")
    return str(name)


def takes_out_of_base(init_lora_weights: object) -> bool:
    """True for a start of A and B that PEFT subtracts from the base weights each time it makes or loads an adapter.

    These are PiSSA, OLoRA, CorDA and LoftQ. What is subtracted depends on the rank: at another rank such an adapter would not find
    the base weights that it was trained on.
    """
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(("pissa", "olora", "corda", "loftq"))


def start_at_any_rank(init_lora_weights: Any) -> Any:
    """Returns the setting, or True for a setting with which loading would change the base weights again or need an even rank."""
    return init_lora_weights if init_lora_weights in (True, False, None, "gaussian", "eva") else True


def rank_settings(rank: Mapping[str, int], scaling: Mapping[str, float]) -> dict[str, Any]:
    """The four ``LoraConfig`` entries that describe these ranks and scalings: r, lora_alpha, rank_pattern, alpha_pattern.

    ``r`` is the largest rank, so that engines that reserve room by it reserve enough, and ``lora_alpha`` keeps alpha / r, so that
    engines that read only these two scale right. Modules that differ get a pattern keyed by their full path: PEFT (and vLLM)
    read the keys as regular expressions that may match at the end of a longer path, hence escaped and anchored.

    Args:
        rank: path -> rank, at least one.
        scaling: path -> the factor alpha / r that the module's B A is multiplied by.
    """
    alpha = alphas(rank, scaling)
    largest = max(rank, key=lambda path: rank[path])
    return {
        "r": rank[largest],
        "lora_alpha": alpha[largest],
        "rank_pattern": {pattern_key(path): r for path, r in rank.items() if r != rank[largest]},
        "alpha_pattern": {pattern_key(path): a for path, a in alpha.items() if a != alpha[largest]},
    }


def pattern_key(path: str) -> str:
    """The ``rank_pattern`` / ``alpha_pattern`` key that matches this module path and no other."""
    return "^" + re.escape(path)


def target_settings(paths: Collection[str], others: Iterable[str], whole: bool = False) -> dict[str, Any]:
    """The ``LoraConfig`` entries that target these modules and none of ``others``.

    PEFT also adapts every module whose path ends in a listed one: "layers.0.fc" in the list matches "tower.layers.0.fc". If one of
    ``others`` would be matched so, the entry is a regular expression, which matches whole paths and allows no choice of layers.

    Args:
        whole: write a regular expression in any case, for base models whose modules are not all known.
    """
    ends = tuple(f".{path}" for path in paths)
    if whole or any(other.endswith(ends) and other not in paths for other in others):
        return {"target_modules": "|".join(map(re.escape, sorted(paths))), "layers_to_transform": None, "layers_pattern": None}
    return {"target_modules": sorted(paths)}


def alphas(rank: Mapping[str, int], scaling: Mapping[str, float]) -> dict[str, int | float]:
    """Path -> alpha, for which alpha / r is the module's scaling.

    An integer where it is one, up to rounding: configs are read by people, and by engines that expect integers.
    """
    exact = {path: scaling[path] * r for path, r in rank.items()}
    return {path: round(a) if abs(a - round(a)) < 1e-9 * max(1.0, abs(a)) else a for path, a in exact.items()}
