"""A finished LoRA adapter -> a smaller one that is as good on some data, checked.

from gatewise.compress import Goal, compress

compress("runs/mine/adapter", "dev.jsonl", "small", Goal(tolerance=0.01))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewise.compress.compressing import compress
    from gatewise.compress.goal import Candidate, Compressed, Goal, Size
    from gatewise.compress.quality import Difference
    from gatewise.compress.recovery import Recovery

_HOME = {
    **dict.fromkeys(("Candidate", "Compressed", "Goal", "Size"), "goal"),
    "compress": "compressing",
    "Difference": "quality",
    "Recovery": "recovery",
}
__all__ = [
    "Candidate",
    "Compressed",
    "Difference",
    "Goal",
    "Recovery",
    "Size",
    "compress",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gatewise.compress' has no attribute {name!r}")
    return getattr(import_module(f"gatewise.compress.{_HOME[name]}"), name)
