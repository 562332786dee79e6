"""What Transformers' models know of themselves under private names. The names are listed in private_names.py."""

from typing import Any


def attention_implementation(model: Any) -> str:
    """Which attention a model runs: "sdpa", "eager" or another."""
    return str(model.config._attn_implementation)
