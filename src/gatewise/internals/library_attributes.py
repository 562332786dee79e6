"""What PEFT, Transformers, Accelerate and filelock keep in attributes with private names, behind plain functions.

The names are listed in private_names.py.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

SAVED_NAMES = ("_model_name_or_path", "_name_or_path")
"""Under which a configuration of Transformers, as a dictionary, has the name that its model was loaded by."""


def attention_implementation(model: Any) -> str:
    """Which attention a Transformers model runs: "sdpa", "eager" or another."""
    return str(model.config._attn_implementation)


def set_model_name(model: Any, name: str) -> None:
    """Gives a model the name of its base: PEFT writes one attribute to adapter_config.json and the other to the model card."""
    model.name_or_path = model.config._name_or_path = name


def original_forward(model: Any) -> Callable[..., Any] | None:
    """A model's forward without the autocast that Accelerate put into it; None where it put none."""
    kept: Callable[..., Any] | None = model.__dict__.get("_original_forward")
    return kept


def recomputed_layers(model: Any) -> list[torch.nn.Module]:
    """The layers in training whose activations are computed again in the backward pass, and that drop nothing out themselves.

    Not those of re-entrant checkpointing, which takes no gradients by ``torch.autograd.grad``, and not those whose own code, unlike
    that of the modules inside them, asks whether it is training: it drops out.
    """
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        and layer.training
        and layer.gradient_checkpointing
        and not getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
        and not _asks_for_mode(type(layer))
    ]


def _asks_for_mode(kind: type) -> bool:
    """Whether a method of a layer's class reads ``self.training``."""
    between = kind.__mro__[: kind.__mro__.index(GradientCheckpointingLayer)]
    own = (inspect.unwrap(one) for cls in between for one in vars(cls).values() if inspect.isfunction(one))
    return any("training" in one.__code__.co_names for one in own)
