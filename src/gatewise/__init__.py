"""gatewise: fine-tune language models on a small budget that the model places itself.

The public API. Names are imported when first used, so that ``import gatewise`` and the command line's help stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatewise.peft_types import register_with_peft

if TYPE_CHECKING:
    from gatewise import budget, export, importance, models, prompts, scores, suggestion, tasks
    from gatewise.allocation import RankAllocation, Round
    from gatewise.bilevel import BilevelTrainer
    from gatewise.errors import GatewiseError
    from gatewise.fast import fast_lora
    from gatewise.prompts import SelectivePromptConfig
    from gatewise.routed import RoutedLoraConfig
    from gatewise.slots import ranks

__version__ = "0.1.0"
__all__ = [
    "BilevelTrainer",
    "GatewiseError",
    "RankAllocation",
    "Round",
    "RoutedLoraConfig",
    "SelectivePromptConfig",
    "budget",
    "export",
    "fast_lora",
    "importance",
    "models",
    "prompts",
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
    "RoutedLoraConfig": "gatewise.routed",
    "SelectivePromptConfig": "gatewise.prompts",
    "fast_lora": "gatewise.fast",
    "ranks": "gatewise.slots",
}

# With this, PEFT can load adapters of our types, whichever of the two is imported first.
register_with_peft()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gatewise' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name) if name in _HOME else import_module(f"gatewise.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
