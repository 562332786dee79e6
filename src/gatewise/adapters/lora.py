"""The LoRA layers of a PEFT model, and their two factors: what slots, gates and scores all work on."""

import re
from collections.abc import Mapping
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from gatewise.errors import GatewiseError

PEFT_PREFIX = "base_model.model."


def active_adapter(model: nn.Module, adapter: str | None = None) -> str:
    """The adapter to work on: the one named, or the active one.

    Raises:
        GatewiseError: the model is not a ``PeftModel``, or the adapter does not exist or is not LoRA.
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
    if str(config.peft_type).split(".")[-1] != "LORA":
        raise GatewiseError(f"adapter {name!r} is of type {config.peft_type}; only plain LoRA has ranks to score and move")
    return str(name)


def lora_layers(model: nn.Module, adapter: str | None = None) -> dict[str, LoraLinear]:
    """Every linear LoRA layer of an adapter, by its path in the base model, in module order.

    Linear and GPT-2's ``Conv1D`` bases count, quantised ones too. Embedding and convolution layers and the stacked experts of
    mixtures (``target_parameters``) have no rank rows of this kind and are left as they are. The type is nominal: layers on
    quantised bases have the same attributes.
    """
    name = active_adapter(model, adapter)
    return {
        path.removeprefix(PEFT_PREFIX): cast(LoraLinear, module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)
        and isinstance(getattr(module.lora_A[name], "weight", None) if name in module.lora_A else None, nn.Parameter)
        and module.lora_A[name].weight.ndim == 2
    }


def factors(layer: LoraLinear, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r_max, d_in) and B (d_out, r_max) of a layer, the parameters themselves."""
    return cast(nn.Parameter, layer.lora_A[adapter].weight), cast(nn.Parameter, layer.lora_B[adapter].weight)


def carries_more_than_ranks(layer: LoraLinear, adapter: str) -> bool:
    """Whether a LoRA layer changes its base module even without ranks: DoRA's magnitude, or a bias on B."""
    return adapter in layer.lora_variant or layer.lora_B[adapter].bias is not None


def rank_settings(rank: Mapping[str, int], scaling: Mapping[str, float]) -> dict[str, Any]:
    """The four ``LoraConfig`` entries that describe these ranks and scalings: r, lora_alpha, rank_pattern, alpha_pattern.

    ``r`` is the largest rank, so that engines that reserve room by it reserve enough, and ``lora_alpha`` keeps alpha / r, so that
    engines that read only these two scale right. Modules that differ get a pattern keyed by their full path: PEFT (and vLLM)
    read the keys as regular expressions that may match at the end of a longer path, hence escaped and anchored.

    Args:
        rank: path -> rank, at least one.
        scaling: path -> the factor alpha / r that the module's B A is multiplied by.
    """
    alpha = {path: int_if_whole(scaling[path] * r) for path, r in rank.items()}
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


def int_if_whole(value: float) -> int | float:
    """A float as an int where it is one, up to rounding: configs are read by people and by engines that expect integers."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value
