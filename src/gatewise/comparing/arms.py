"""The arms of a comparison: recipes that share model, rows and training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gatewise.runs.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Arm:
    """One way to train, and what is worth telling of it.

    Attributes:
        told: lines for the user. parameters: numbers stored in its adapter.
    """

    name: str
    recipe: Recipe
    told: tuple[str, ...] = ()
    parameters: int = 0


def arms_of(recipe: Path, names: Sequence[str], overrides: Sequence[str], say: Callable[[str], None]) -> list[Arm]:
    """Methods by name."""
    return [Arm(name, load_recipe(recipe, [*overrides, f"method={name}"])) for name in names]
