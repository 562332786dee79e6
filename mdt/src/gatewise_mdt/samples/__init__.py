"""English guideline-style passages with their trees, written for this project: for demonstration, not medical advice."""

import json
from functools import cache
from importlib import resources

from gatewise.errors import GatewiseError
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.tree import DecisionTree

NAME = "sample:guidelines"
NOTE = "for demonstration, not medical advice"


def sample() -> list[TreeRecord]:
    """The passages that ship with the package, with their trees. Each record's ``more`` has its specialty and the note.

    For demonstration, not medical advice. Subjects and objects are verbatim pieces of the passages.
    """
    return list(_records())


@cache
def _records() -> tuple[TreeRecord, ...]:
    file = resources.files("gatewise_mdt.samples") / "guidelines.json"
    if not file.is_file():
        raise GatewiseError("the sample of guideline passages is missing from this installation: install gatewise again")
    items = json.loads(file.read_text(encoding="utf-8"))
    return tuple(
        TreeRecord(
            item["text"],
            DecisionTree.from_preorder(item["tree"], f"{NAME}, record {number}"),
            number,
            {key: value for key, value in item.items() if key not in ("text", "tree")},
        )
        for number, item in enumerate(items, start=1)
    )
