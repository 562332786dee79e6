"""SPT (Zhu and Tan, EMNLP 2023, arXiv 2310.20127) as a PEFT method: soft prompts enter at the layers that deserve them.

config.py what a user sets; generator.py the maths; layer.py a Transformer layer with prompts in it, and what adapters have there;
cache.py prompts in a key-value cache; forward.py one forward; model.py puts them together. darts.py is SPT-DARTS, which chooses
layers, and the training that follows.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatewise.internals.registry import add_peft_method
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.model import SelectivePromptModel

if TYPE_CHECKING:
    from gatewise.prompts.darts import SearchMixin, SearchResult, SearchTrainer, retrain, search

__all__ = [
    "SearchMixin",
    "SearchResult",
    "SearchTrainer",
    "SelectivePromptConfig",
    "SelectivePromptModel",
    "retrain",
    "search",
]


add_peft_method("SELECTIVE_PROMPT", SelectivePromptConfig, SelectivePromptModel, prefix=SelectivePromptModel.prefix)


def __getattr__(name: str) -> Any:
    # Not at the top: it needs Transformers' Trainer, which may be importing PEFT just now (see _HOMES in internals/registry.py).
    if name not in __all__:
        raise AttributeError(f"module 'gatewise.prompts' has no attribute {name!r}")
    return getattr(import_module("gatewise.prompts.darts"), name)
