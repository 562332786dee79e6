"""English guideline-style passages with their trees, written for this project: for demonstration, not medical advice."""

from importlib import resources

from gatewise.errors import GatewiseError
from gatewise_mdt.records import TreeRecord, trees_of

NAME = "sample:guidelines"
SIDES = {"sample:guideline-trees-train": False, "sample:guideline-trees-dev": True}
"""Its two sides, for recipes that anybody can run: every fifth passage is dev's."""
NOTE = "for demonstration, not medical advice"


def sample() -> list[TreeRecord]:
    """The passages that ship with the package, with their trees. Each record's ``more`` has its specialty and the note.

    For demonstration, not medical advice. Subjects and objects are verbatim pieces of the passages.
    """
    file = resources.files("gatewise_mdt.samples") / "guidelines.json"
    return list(trees_of(file.read_bytes(), NAME, ".json").records)


def sample_of(name: str) -> list[TreeRecord]:
    """The sample, or one of its :data:`SIDES`, by the name that stands in the place of a file.

    Raises:
        GatewiseError: there is none of that name.
    """
    if name != NAME and name not in SIDES:
        raise GatewiseError(f"there is no sample {name!r} of trees: expected {', '.join((NAME, *SIDES))}")
    return [one for one in sample() if SIDES.get(name) in (None, one.number % 5 == 0)]
