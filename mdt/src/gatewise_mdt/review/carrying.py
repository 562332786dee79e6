"""What a review of an older version of a guideline is worth for the newer one.

A passage whose text is the same in both is carried over with all that was decided: its tree, its state, who approved it and when.
One whose text changed gets the old tree as a draft, to be read against the new text, and keeps the old text so that the change can
be shown. What has no counterpart is new, or gone. Nothing that a person did in the newer review is touched.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from heapq import nsmallest
from itertools import groupby
from typing import Any, Literal, NamedTuple

from gatewise_mdt.documents.passages import ORIGIN
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.review.passage import CARRIED_KEY, NOTHING, REVIEWED, Passage, State, Version, ids_of, lasting_keys, version_of
from gatewise_mdt.wholes import pieces

ALIKE = 0.6
"""From this share of words in common on, a passage passes for a changed one and not for a new one."""
# What a record says of its place in its document; the newer one has its own.
_OF_THE_DOCUMENT = (*ORIGIN, CARRIED_KEY)
_CLOSEST = 5  # of the older passages with the most words in common, so many are compared word for word
Kind = Literal["same", "gone", "new"]


LISTS = ("approved", "corrected", "drafted", "changed", "beside", "kept", "new")
"""The fields of :class:`Carried` that hold numbers of passages."""


class Match(NamedTuple):
    """An older record and the newer passage that it is of, by position.

    Attributes:
        same: the texts are the same, and the tree was made for no other text.
    """

    record: int
    passage: int
    same: bool


@dataclass(frozen=True)
class Carried:
    """What was carried over, by the numbers of the newer passages.

    Attributes:
        approved, corrected, drafted: passages with the same text, and the state that their trees came with.
        changed: passages whose text changed, and that have the old tree as a draft now.
        beside: passages whose text changed and that have a newer draft: the old tree lies beside it.
        kept: passages where a person corrected or approved a tree in the newer review, or did not want the old draft, or where one
            has to be chosen of two reviewers' trees; it stays so.
        unlike: of these, those for which the older review has another tree, with its record.
        new: passages that the older review has nothing for.
        gone: records of the older review that no passage of the newer one is like.
    """

    approved: list[int]
    corrected: list[int]
    drafted: list[int]
    changed: list[int]
    beside: list[int]
    kept: list[int]
    unlike: list[tuple[int, TreeRecord]]
    new: list[int]
    gone: list[TreeRecord]


def matches(passages: Sequence[Passage], records: Sequence[TreeRecord]) -> list[Match]:
    """Which older record is of which newer passage.

    Those with the same text (up to white space) go together, several by their ids. Where a text comes a different number of times
    than before, or under other headings, and had different trees, nothing says which of them is of which place: then none of them
    counts as the same. Of the rest, the likest pair goes together first, down to :data:`ALIKE`; among equals, the one that
    stands in its place.
    """
    older: dict[str, dict[str, int]] = defaultdict(dict)  # text -> id -> position
    newer: dict[str, dict[str, int]] = defaultdict(dict)
    both: tuple[tuple[Sequence[Passage | TreeRecord], dict[str, dict[str, int]]], ...] = ((records, older), (passages, newer))
    for held, by_text in both:
        for i, (one, name) in enumerate(zip(held, ids_of(held), strict=True)):
            by_text[_plain(one.text)][name] = i
    found: list[Match] = []
    for text, now in newer.items():
        was = older.get(text, {})
        before = list(was.values())
        if len({_content(records[i]) for i in before}) == 1:  # one tree for all
            found += [Match(before[min(at, len(before) - 1)], j, True) for at, j in enumerate(now.values())]
        elif was.keys() == now.keys():
            found += [Match(was[name], j, True) for name, j in now.items()]
        else:
            found += [Match(i, j, False) for i, j in zip(before, now.values(), strict=False)]
    taken, done = {one.record for one in found}, {one.passage for one in found}
    left = [i for i, record in enumerate(records) if i not in taken and _plain(record.text) not in newer]
    return sorted([*found, *_alike(passages, records, left, done)], key=lambda one: one.passage)


def _alike(passages: Sequence[Passage], records: Sequence[TreeRecord], left: Sequence[int], done: set[int]) -> list[Match]:
    older = {i: _words(records[i].text) for i in left}
    kinds = {i: set(words) for i, words in older.items()}
    pairs: list[tuple[float, float, int, int]] = []
    for j, passage in enumerate(passages):
        if j in done:
            continue
        words = _words(passage.text)
        own = set(words)
        shared = {i: 2 * both / (len(own) + len(kind)) for i, kind in kinds.items() if (both := len(own & kind))}
        moved = {i: abs(i / len(records) - j / len(passages)) for i in shared}
        matcher = SequenceMatcher(None, b=words, autojunk=False)
        # Rows of a table may all be as like: those in their place come first.
        for i in nsmallest(_CLOSEST, shared, key=lambda i: (-shared[i], moved[i])):
            matcher.set_seq1(older[i])
            if matcher.quick_ratio() >= ALIKE and (ratio := matcher.ratio()) >= ALIKE:
                pairs.append((-ratio, moved[i], i, j))
    made: list[Match] = []
    used: set[int] = set()
    for _, _, i, j in sorted(pairs):
        if i not in used and j not in done:
            made.append(Match(i, j, False))
            used.add(i)
            done.add(j)
    return made


def carry(passages: Sequence[Passage], records: Sequence[TreeRecord], source: str) -> tuple[list[Passage], Carried]:
    """The passages of a newer version with what an older review has for them, and what was done.

    A passage that a person has been at work on stays as it is, and so does one with the trees of two reviewers. Where there is a
    newer draft of a changed text, the old tree lies beside it.

    Args:
        records: of the older review's file of corrections.
        source: the name of that file.
    """
    found = matches(passages, records)
    made = list(passages)
    done: dict[str, list[int]] = defaultdict(list)
    unlike: list[tuple[int, TreeRecord]] = []
    for record, at, same in found:
        passage, old = passages[at], records[record]
        version, origin = _old(passage, old, same, source)
        there = version.nodes in [one.nodes for one in (passage.now, passage.beside, passage.now.standing, passage.saved) if one]
        # A draft that was carried over before and is not there any more gave way to something else in the newer review.
        gave_way = version.state == "drafted" and passage.more.get(CARRIED_KEY) == origin and not there
        reviewed = passage.now.standing is not None or any(one.state in REVIEWED for one in (passage.now, passage.saved) if one)
        if reviewed or gave_way or is_of_two(passage):
            done["kept"].append(passage.number)
            unlike += [] if there else [(passage.number, old)]
            continue
        made[at] = _carried(passage, old, version, origin, same)
        laid_beside = made[at].beside is not None and made[at].now == passage.now != NOTHING
        done[version.state if same else "beside" if laid_beside else "changed"].append(passage.number)
    matched = {one.passage for one in found}
    done["new"] = [passage.number for at, passage in enumerate(passages) if at not in matched]
    # Gone are those of which the newer version has nothing: no text like theirs, or no place for their tree.
    taken, kept = {one.record for one in found}, {_content(records[one.record]) for one in found if one.same}
    gone = [old for i, old in enumerate(records) if i not in taken and _content(old) not in kept]
    return made, Carried(**{name: done[name] for name in LISTS}, unlike=unlike, gone=gone)


def is_of_two(passage: Passage) -> bool:
    """Whether another reviewer's tree lies beside its own: both wait for a word, and a third one has no place."""
    return passage.beside is not None and passage.beside.of != ""


def _old(passage: Passage, record: TreeRecord, same: bool, source: str) -> tuple[Version, dict[str, Any]]:
    """An older tree in the state that it has for a newer passage, and what is said of where it comes from."""
    version = version_of(record, "drafted")
    if not same:  # how sure a model was of the old tree, it was for the old text
        sure = passage.now.confidence if passage.now.nodes == version.nodes else None
        version = version._replace(state="drafted", reviewed=None, confidence=sure)
    origin: dict[str, Any] = {"from": source}
    origin |= {key: record.more[key] for key in ("sha256", "place") if isinstance(record.more.get(key), str)}
    if _plain(record.text) != _plain(passage.text):
        origin["text"] = record.text
    if not same and record.reviewed is not None:
        origin["reviewed"] = record.reviewed
    return version, origin


def _carried(passage: Passage, record: TreeRecord, version: Version, origin: dict[str, Any], same: bool) -> Passage:
    more = {**passage.more, CARRIED_KEY: origin}
    if same:
        more = {key: value for key, value in lasting_keys(record.more).items() if key not in _OF_THE_DOCUMENT} | more
    if same or passage.now == NOTHING or passage.now.nodes == version.nodes:
        return replace(passage.with_version(version), more=more)
    if passage.beside is not None and passage.beside.nodes == version.nodes:
        return replace(passage, more=more)
    return replace(passage.put_extraction(version, -1), more=more)


def difference(old: str, new: str) -> list[tuple[Kind, str]]:
    """Two texts in pieces that both have, that only the old one has, and that only the new one has, in the order of reading.

    Words, numbers with their units, ranges and fractions are taken whole (:mod:`gatewise_mdt.wholes`): "5 mg" became "50 mg", and
    not "5" "50".
    """
    before, after = pieces(old)[0], pieces(new)[0]
    made: list[tuple[Kind, str]] = []
    for operation, i, k, j, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if operation == "equal":
            made.append(("same", "".join(before[i:k])))
        else:
            made += [("gone", "".join(before[i:k])), ("new", "".join(after[j:m]))]
    return _joined([one for one in made if one[1]])


def _joined(parts: list[tuple[Kind, str]]) -> list[tuple[Kind, str]]:
    """With changes in one piece where only a space is between them, so that phrases are read as phrases."""
    spread: list[tuple[Kind, str]] = []
    for at, (kind, text) in enumerate(parts):
        inside = 0 < at < len(parts) - 1 and not text.strip()
        spread += [("gone", text), ("new", text)] if kind == "same" and inside else [(kind, text)]
    made: list[tuple[Kind, str]] = []
    for is_same, group in groupby(spread, key=lambda one: one[0] == "same"):
        held = list(group)
        kinds: tuple[Kind, ...] = ("same",) if is_same else ("gone", "new")
        made += [(kind, text) for kind in kinds if (text := "".join(piece for its, piece in held if its == kind))]
    return made


def _content(record: TreeRecord) -> tuple[str, str, State]:
    version = version_of(record, "drafted")
    return _plain(record.text), json.dumps(version.nodes, sort_keys=True), version.state


def _words(text: str) -> list[str]:
    return [piece.casefold() for piece in pieces(text)[0] if piece.strip()]


def _plain(text: str) -> str:
    return " ".join(text.split())
