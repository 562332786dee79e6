"""What to look at before a tree is approved: an item for each thing of the text that the tree lost or turned round."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gatewise_mdt.checking.changes import changes
from gatewise_mdt.checking.cover import Cover
from gatewise_mdt.checking.finding import Finding, quoted
from gatewise_mdt.checking.marks import marks_of
from gatewise_mdt.checking.rules import RULES
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.tree import DecisionTree, Triple

CHANGED = "changed text"
"""The kind of what changed in the text since its tree was made, which no rule finds."""


@dataclass(frozen=True)
class Item:
    """One thing to look at.

    Attributes:
        kind: a name of :data:`gatewise_mdt.checking.rules.RULES`, or :data:`CHANGED`.
        words: of the passage, or of the tree where they stand nowhere in the passage.
        start, end: where the words stand in ``record.passage``; None where they do not.
        node: index in pre-order of the node that is concerned; None where no node is.
        sentence: what is wrong, for people.
        sure: how likely the rule is right, in [0, 1], as measured, see :mod:`gatewise_mdt.checking.rules`.
        hint: the rule errs too often to ask for a tick.
        again: how often the words stand in the passage before these; one more for a second item of just these words and triples.
        about: the triples of the node that the item speaks of; all of them where it names none.
        alike: how many items differ in ``again`` and ``node`` alone, of which one could pass for the other when one goes.
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
    about: tuple[Triple, ...] = ()
    alike: int = 1

    @property
    def identity(self) -> tuple[str, str, int, tuple[Triple, ...]]:
        """What tells it from all others of its passage. Nodes that come or go change none, but where ``alike`` changes."""
        return self.kind, self.words, self.again, self.about

    @property
    def is_change(self) -> bool:
        """Whether it only says what changed in the text, to be looked at, and no mistake."""
        return self.kind == CHANGED

    def to_json(self) -> dict[str, Any]:
        """The item with plain names."""
        place = None if self.start is None else [self.start, self.end]
        return {
            "kind": self.kind, "words": self.words, "place": place, "node": self.node, "sentence": self.sentence,
            "sure": self.sure, "hint": self.hint, "again": self.again,
        }  # fmt: skip


def items(record: TreeRecord) -> list[Item]:
    """What to look at in a record's tree, items before hints, the surest first, then in the order of the text."""
    return [*_changed(record), *items_of(record.passage, record.tree, record.headings)]


def _changed(record: TreeRecord) -> list[Item]:
    """What changed since the tree was made. It stays when the tree is corrected: a person has to look."""
    passage, made = record.passage, list[Item]()
    before = record.text.find("@") + 1
    before += len(record.text) - before - len(record.text[before:].lstrip())
    for change in changes(record.older_text, record.text) if record.older_text else ():
        gone, words = (" ".join(part.split()) for part in (change.gone, change.new))
        start = change.start - before + len(change.new) - len(change.new.lstrip())
        end = start + len(change.new.strip())
        stands = bool(words) and start >= 0 and end <= len(passage)
        said = f'The text has "{words}" now, which it had not before.' if words else f'The text had "{gone}", and has it no more.'
        if gone and words:
            said = f'The text had "{gone}" here and has "{words}" now.'
        again = sum(one.words == (words or gone) for one in made)
        made.append(Item(CHANGED, words or gone, start if stands else None, end if stands else None, None, said, 1.0, again=again))
    return made


@lru_cache(maxsize=2048)
def items_of(passage: str, tree: DecisionTree, headings: tuple[str, ...] = ()) -> tuple[Item, ...]:
    """Like :func:`items`, of a passage without its population, and the headings above it."""
    marks = marks_of(passage, headings)
    cover = Cover(marks, tree)
    made = [_item(rule.kind, rule.sure, rule.is_hint, one, cover, passage) for rule in RULES for one in rule.find(marks, cover)]
    made.sort(key=lambda item: (item.hint, -item.sure, item.start is None, item.start or 0, item.node or 0))
    numbered: dict[tuple[Any, ...], Item] = {}
    alike = Counter((item.kind, item.words, item.start, item.about) for item in made)
    for item in made:
        item = replace(item, alike=alike[item.kind, item.words, item.start, item.about])
        while (own := item.identity) in numbered:
            item = replace(item, again=item.again + 1)
        numbered[own] = item
    return tuple(numbered.values())


def _item(kind: str, sure: float, is_hint: bool, found: Finding, cover: Cover, passage: str) -> Item:
    start = end = None
    words, folded = found.words, cover.marks.folded
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
        again=0 if start is None else passage.count(words, 0, start),
        about=_about(found, cover),
    )


def _about(found: Finding, cover: Cover) -> tuple[Triple, ...]:
    """The triples of the node that a finding speaks of: those that stand in its words, or whose objects it names; else all."""
    held = [one for one in cover.held if one.node == found.node]
    named = [one for one in held if quoted(one.triple.object) in found.sentence or one.triple.object == found.words]
    stands = [one for one in held if found.span and any(place.overlaps(found.span) for place in one.objects)]
    return tuple(sorted(one.triple for one in named or stands or held))
