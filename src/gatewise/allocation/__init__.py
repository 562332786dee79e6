"""ALoRA and PI-LoRA: ranks that move between the LoRA modules of a model while it trains.

``callback.py`` is ``RankAllocation``, what a Trainer calls. ``algorithm.py`` says when rounds run and is a round, from scores to
what is pruned and grown. ``slots.py`` has the live and dead ranks of stock LoRA layers and what the optimiser keeps of them,
``scoring.py`` what all scores share, ``scores/`` one file a score, and ``method.py`` ALoRA and PI-LoRA as parts of a recipe.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

from gatewise.errors import GatewiseError

Unit = Literal["parameters", "ranks"]
"""What a budget counts: the numbers of live ranks, or live ranks (ALoRA's)."""


def load_function(name: str) -> Callable[..., Any]:
    """The function that a text such as "my_scores:by_norm" names: a module that can be imported, and what it has.

    Raises:
        GatewiseError: there is no such module or function, or importing it fails.
    """
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the module does when it is imported
        raise GatewiseError(
            f"{name!r} names no function ({type(error).__name__}: {error}): expected module:function, of a module that Python can "
            "import (its folder on PYTHONPATH)"
        ) from error
    if not callable(function):
        raise GatewiseError(f"{name!r} is no function but a {type(function).__name__}: expected module:function")
    return function
