"""Base models: a hub id, a local folder, or one embedded in packages of the index, which needs no hub at all."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatewise.models.embedded import EMBEDDED, EmbeddedModel, cache_dir, fetch, fetched

if TYPE_CHECKING:
    from gatewise.adapters.loading import load_adapter
    from gatewise.internals.library_attributes import attention_implementation
    from gatewise.internals.model_around import ModelAround
    from gatewise.models.loading import load_model, load_tokenizer, most_tokens, resolve

__all__ = [
    "EMBEDDED",
    "EmbeddedModel",
    "ModelAround",
    "attention_implementation",
    "cache_dir",
    "fetch",
    "fetched",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "most_tokens",
    "resolve",
]


# Loading brings torch, Transformers and PEFT (seconds), which listing the cache does without.
_HOME = {
    "ModelAround": "gatewise.internals.model_around",
    "attention_implementation": "gatewise.internals.library_attributes",
    "load_adapter": "gatewise.adapters.loading",
    "load_model": "gatewise.models.loading",
    "load_tokenizer": "gatewise.models.loading",
    "most_tokens": "gatewise.models.loading",
    "resolve": "gatewise.models.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
