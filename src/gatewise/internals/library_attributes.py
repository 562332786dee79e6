"""What PEFT, Transformers, Accelerate and filelock keep in attributes with private names, behind plain functions.

The names are listed in private_names.py.
"""

from collections.abc import Callable
from typing import Any

SAVED_NAMES = ("_model_name_or_path", "_name_or_path")
"""Under which a configuration of Transformers, as a dictionary, has the name that its model was loaded by."""


def attention_implementation(model: Any) -> str:
    """Which attention a Transformers model runs: "sdpa", "eager" or another."""
    return str(model.config._attn_implementation)


def set_model_name(model: Any, name: str) -> None:
    """Gives a model the name of its base: PEFT writes one attribute to adapter_config.json and the other to the model card."""
    model.name_or_path = model.config._name_or_path = name


def is_as_it_was(layer: Any) -> Callable[[], bool]:
    """Whether a PEFT layer has the adapters in use that it has now, none of them merged, in evaluation mode.

    Asked in every decoding step of every layer, so the attributes are read without the properties in front of them.
    """
    state = layer.__dict__
    active, disabled = state["_active_adapter"], state["_disable_adapters"]

    def is_so() -> bool:
        return (
            state["_active_adapter"] is active
            and state["_disable_adapters"] is disabled
            and not state["merged_adapters"]
            and not state["training"]
        )

    return is_so
