"""gatewise: fine-tune language models on a small budget that the model places itself.

The public API. Names are imported when first used, so that ``import gatewise`` and the command line's help stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatewise.errors import needs
from gatewise.internals.registry import register_with_peft

if TYPE_CHECKING:
    from gatewise import models, prompts, scores, tasks
    from gatewise.adapters import export
    from gatewise.allocation import algorithm as budget
    from gatewise.allocation.algorithm import ConstantBudget, Cubic, Round
    from gatewise.allocation.callback import RankAllocation
    from gatewise.allocation.slots import ranks
    from gatewise.bilevel import BilevelTrainer
    from gatewise.comparing.running import compare
    from gatewise.errors import GatewiseError
    from gatewise.inspection import importance, suggestion
    from gatewise.prompts import SelectivePromptConfig
    from gatewise.routed import RoutedLoraConfig
    from gatewise.serving.lora import fast_lora
    from gatewise.tasks.held_out import hold_out

__version__ = "0.1.0"
# Public name -> where it is: a module, or (module, name).
_HOME: dict[str, str | tuple[str, str]] = {
    "BilevelTrainer": ("gatewise.bilevel", "BilevelTrainer"),
    "ConstantBudget": ("gatewise.allocation.algorithm", "ConstantBudget"),
    "Cubic": ("gatewise.allocation.algorithm", "Cubic"),
    "GatewiseError": ("gatewise.errors", "GatewiseError"),
    "RankAllocation": ("gatewise.allocation.callback", "RankAllocation"),
    "Round": ("gatewise.allocation.algorithm", "Round"),
    "RoutedLoraConfig": ("gatewise.routed", "RoutedLoraConfig"),
    "SelectivePromptConfig": ("gatewise.prompts", "SelectivePromptConfig"),
    "WholeAdapter": ("gatewise.adapters.whole", "WholeAdapter"),
    "budget": "gatewise.allocation.algorithm",
    "compare": ("gatewise.comparing.running", "compare"),
    "export": "gatewise.adapters.export",
    "fast_lora": ("gatewise.serving.lora", "fast_lora"),
    "hold_out": ("gatewise.tasks.held_out", "hold_out"),
    "importance": "gatewise.inspection.importance",
    "models": "gatewise.models",
    "prompts": "gatewise.prompts",
    "ranks": ("gatewise.allocation.slots", "ranks"),
    "scores": "gatewise.scores",
    "suggestion": "gatewise.inspection.suggestion",
    "tasks": "gatewise.tasks",
}
__all__ = [
    "BilevelTrainer",
    "ConstantBudget",
    "Cubic",
    "GatewiseError",
    "RankAllocation",
    "Round",
    "RoutedLoraConfig",
    "SelectivePromptConfig",
    "WholeAdapter",
    "budget",
    "compare",
    "export",
    "fast_lora",
    "hold_out",
    "importance",
    "models",
    "prompts",
    "ranks",
    "scores",
    "suggestion",
    "tasks",
]

# With this, PEFT can load adapters of our types, whichever of the two is imported first.
register_with_peft()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gatewise' has no attribute {name!r}")
    home = _HOME[name]
    with needs("cli", f"gatewise.{name}"):
        value = import_module(home) if isinstance(home, str) else getattr(import_module(home[0]), home[1])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
