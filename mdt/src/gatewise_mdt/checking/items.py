"""What to look at before a tree is approved: an item for each thing of the text that the tree lost or turned round."""

from dataclasses import dataclass, replace
from typing import Any

from gatewise_mdt.checking.cover import Cover
from gatewise_mdt.checking.marks import marks_of
from gatewise_mdt.checking.rules import RULES, Finding
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.tree import DecisionTree
from gatewise_mdt.wholes import Folded


@dataclass(frozen=True)
class Item:
    """One thing to look at.

    Attributes:
        kind: a name of :data:`gatewise_mdt.checking.rules.RULES`.
        words: of the passage, or of the tree where they stand nowhere in the passage.
        start, end: where the words stand in ``record.passage``; None where they do not.
        node: index in pre-order of the node that is concerned; None where no node is.
        sentence: what is wrong, for people.
        sure: how likely the rule is right, in [0, 1], as measured, see :mod:`gatewise_mdt.checking.rules`.
        hint: the rule errs too often to ask for a tick.
        again: how often the words stand in the passage before these; one more for a second item of just these words.
    """

    kind: str
    words: str
    start: int | None
    end: int | None
    node: int | None
    sentence: str
    sure: float
    hint: bool = False
    again: int = 0

    @property
    def identity(self) -> tuple[str, str, int | None, int]:
        """What a tick is kept under: it stays as long as the words, how often they stand before, and the node's index do.

        Another item that goes away, as a tree is corrected, hands its identity to none.
        """
        return self.kind, self.words, self.node, self.again

    def to_json(self) -> dict[str, Any]:
        """The item with plain names."""
        place = None if self.start is None else [self.start, self.end]
        return {
            "kind": self.kind, "words": self.words, "place": place, "node": self.node, "sentence": self.sentence,
            "sure": self.sure, "hint": self.hint, "again": self.again,
        }  # fmt: skip


def items(record: TreeRecord) -> list[Item]:
    """What to look at in a record's tree, items before hints, the surest first, then in the order of the text."""
    return items_of(record.passage, record.tree)


def items_of(passage: str, tree: DecisionTree) -> list[Item]:
    """Like :func:`items`, of a passage without its population."""
    marks = marks_of(passage)
    cover = Cover(marks, tree)
    made = [
        _item(rule.kind, rule.sure, rule.is_hint, one, marks.folded, passage) for rule in RULES for one in rule.find(marks, cover)
    ]
    made.sort(key=lambda item: (item.hint, -item.sure, item.start is None, item.start or 0, item.node or 0))
    numbered: dict[tuple[str, str, int | None, int], Item] = {}
    for item in made:
        item = replace(item, again=0 if item.start is None else passage.count(item.words, 0, item.start))
        while item.identity in numbered:
            item = replace(item, again=item.again + 1)
        numbered[item.identity] = item
    return list(numbered.values())


def _item(kind: str, sure: float, is_hint: bool, found: Finding, folded: Folded, passage: str) -> Item:
    start = end = None
    words = found.words
    if found.span is not None:
        start, end = folded.starts[found.span.begin], folded.ends[found.span.end - 1]
        start += len(passage[start:end]) - len(passage[start:end].lstrip())
        words = passage[start:end].rstrip()
        end = start + len(words)
    return Item(
        kind,
        words,
        start,
        end,
        found.node,
        found.sentence.format(words=f'"{words}"'),
        sure if found.sure is None else found.sure,
        is_hint,
    )
