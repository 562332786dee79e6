"""What PEFT, Transformers, Accelerate and filelock keep in attributes with private names, behind plain functions.

The names are listed in private_names.py.
"""

from typing import Any

SAVED_NAMES = ("_model_name_or_path", "_name_or_path")
"""Under which a configuration of Transformers, as a dictionary, has the name that its model was loaded by."""


def attention_implementation(model: Any) -> str:
    """Which attention a Transformers model runs: "sdpa", "eager" or another."""
    return str(model.config._attn_implementation)


def set_model_name(model: Any, name: str) -> None:
    """Gives a model the name of its base: PEFT writes one attribute to adapter_config.json and the other to the model card."""
    model.name_or_path = model.config._name_or_path = name
