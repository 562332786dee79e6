"""English guideline-style passages with their trees, written for this project: for demonstration, not medical advice."""

from importlib import resources

from gatewise_mdt.records import TreeRecord, trees_of

NAME = "sample:guidelines"
NOTE = "for demonstration, not medical advice"


def sample() -> list[TreeRecord]:
    """The passages that ship with the package, with their trees. Each record's ``more`` has its specialty and the note.

    For demonstration, not medical advice. Subjects and objects are verbatim pieces of the passages.
    """
    file = resources.files("gatewise_mdt.samples") / "guidelines.json"
    return list(trees_of(file.read_bytes(), NAME, ".json").records)
