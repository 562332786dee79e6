"""gatewise: fine-tune language models on a small budget that the model places itself.

The public API. Names are imported when first used, so that ``import gatewise`` and the command line's help stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewise import budget, export, importance, models, scores, suggestion, tasks
    from gatewise.allocation import RankAllocation, Round
    from gatewise.bilevel import BilevelTrainer
    from gatewise.errors import GatewiseError
    from gatewise.slots import ranks

__version__ = "0.1.0"
__all__ = [
    "BilevelTrainer",
    "GatewiseError",
    "RankAllocation",
    "Round",
    "budget",
    "export",
    "importance",
    "models",
    "ranks",
    "scores",
    "suggestion",
    "tasks",
]

_HOME = {
    "BilevelTrainer": "gatewise.bilevel",
    "GatewiseError": "gatewise.errors",
    "RankAllocation": "gatewise.allocation",
    "Round": "gatewise.allocation",
    "ranks": "gatewise.slots",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gatewise' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name) if name in _HOME else import_module(f"gatewise.{name}")
    globals()[name] = value
    return value
