"""Base models: a hub id, a local folder, or one embedded in packages of the index, which needs no hub at all."""

from typing import TYPE_CHECKING, Any

from gatewise.models.cache import EmbeddedStatus, cache_dir, fetch, list_embedded, resolve
from gatewise.models.embedded import EMBEDDED, EmbeddedModel

if TYPE_CHECKING:
    from gatewise.adapters.loading import load_adapter
    from gatewise.internals.library_attributes import attention_implementation
    from gatewise.models.loading import load_model, load_tokenizer, most_tokens

__all__ = [
    "EMBEDDED",
    "EmbeddedModel",
    "EmbeddedStatus",
    "attention_implementation",
    "cache_dir",
    "fetch",
    "list_embedded",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "most_tokens",
    "resolve",
]


def __getattr__(name: str) -> Any:
    # Loading brings torch, Transformers and PEFT (seconds), which listing and looking up the cache do without.
    if name == "load_adapter":
        from gatewise.adapters.loading import load_adapter

        return load_adapter
    if name == "attention_implementation":
        from gatewise.internals.library_attributes import attention_implementation

        return attention_implementation
    if name in {"load_model", "load_tokenizer", "most_tokens"}:
        from gatewise.models import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
