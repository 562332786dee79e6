"""A finished LoRA adapter -> a smaller one that is as good on some data, checked.

from gatewise.compress import Goal, compress

compress("runs/mine/adapter", "dev.jsonl", "small", Goal(tolerance=0.01))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewise.compress.compressing import Compressed, compress
    from gatewise.compress.recovery import Recovery
    from gatewise.compress.search import Goal

_HOME = {"Compressed": "compressing", "compress": "compressing", "Goal": "search", "Recovery": "recovery"}
__all__ = ["Compressed", "Goal", "Recovery", "compress"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gatewise.compress' has no attribute {name!r}")
    return getattr(import_module(f"gatewise.compress.{_HOME[name]}"), name)
