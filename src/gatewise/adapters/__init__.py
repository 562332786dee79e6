"""Adapters on disk: their files and the one reader (``files.py``), loading, the factors of LoRA layers, export as plain LoRA."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewise.adapters.files import NOTE_FILE, fingerprint, read_note
    from gatewise.adapters.loading import load_adapter, load_as_trained

__all__ = ["NOTE_FILE", "fingerprint", "load_adapter", "load_as_trained", "read_note"]


def __getattr__(name: str) -> Any:
    # Loading brings Transformers and PEFT (seconds), which reading files does without.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "loading" if name.startswith("load") else "files"
    return getattr(import_module(f"{__name__}.{home}"), name)
