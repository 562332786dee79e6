"""Tiny base models and adapters whose prompts choose different experts."""

from typing import Any

import torch
from peft import PeftModel
from tiny_models import tiny_base

from gatewise import RoutedLoraConfig

MODES: list[dict[str, Any]] = [
    {},
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 3, "use_cache": False},
    {"num_beams": 3, "num_return_sequences": 2},
    {"cache_implementation": "static"},
]
"""Ways of writing, as arguments of ``generate``."""


def routed_base(family: str) -> Any:
    """A tiny base model with embeddings as large as trained ones, so that prompts differ, and no dropout."""
    base = tiny_base(family)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(30)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return base


def trained_routers(model: PeftModel, scale: float = 1.0) -> PeftModel:
    """Gives routers weights that tell prompts apart, rationals that are no longer GELU, and a centre of prompts seen before."""
    for name, parameter in model.named_parameters():
        if ".prompt_router." in name:
            with torch.no_grad():
                if name.endswith(("numerator", "denominator")):
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
                else:
                    torch.nn.init.normal_(parameter, std=scale)
    for name, buffer in model.named_buffers():
        if ".prompt_router." in name:
            values = {"center": 0.3 * torch.randn_like(buffer), "spread": torch.tensor(0.8), "observed": torch.tensor(70.0)}
            buffer.copy_(values[name.rpartition(".")[2]])
    return model


def routed_config(family: str = "llama", **settings: Any) -> RoutedLoraConfig:
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    return RoutedLoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": task, **settings})
