"""What a review of an older version of a guideline is worth for the newer one.

A passage whose text is the same in both is carried over with all that was decided: its tree, its state, who approved it and when.
One whose text changed gets the old tree as a draft, to be read against the new text, and keeps the old text so that the change can
be shown. What has no counterpart is new, or gone. Nothing that a person did in the newer review is touched.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

from gatewise_mdt.checking.ticks import text_read
from gatewise_mdt.documents.passages import ORIGIN
from gatewise_mdt.evaluation.mistakes import best_pairs
from gatewise_mdt.records import CARRIED_KEY, TreeRecord
from gatewise_mdt.review.passage import NOTHING, REVIEWED, Passage, Version, ids_of, lasting_keys, version_of
from gatewise_mdt.wholes import pieces

ALIKE = 0.6
"""From this share of words in common on, a passage passes for a changed one and not for a new one."""


@dataclass
class Carried:
    """What was carried over, by the numbers of the newer passages.

    Attributes:
        same: passages with the same text, which have the old tree and its state.
        changed: passages whose text changed: the old tree is their draft now, or lies beside a newer one.
        kept: passages where a person corrected or approved a tree in the newer review, or did not want the old draft, or where one
            has to be chosen of two reviewers' trees; it stays so.
        unlike: of these, those for which the older review has another tree, with its record.
        new: passages that the older review has nothing for.
        gone: records of the older review that no passage of the newer one is like.
    """

    same: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    unlike: list[tuple[int, TreeRecord]] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    gone: list[TreeRecord] = field(default_factory=list)


def carry(passages: Sequence[Passage], records: Sequence[TreeRecord], source: str) -> tuple[list[Passage], Carried]:
    """The passages of a newer version with what an older review has for them, and what was done.

    A passage that a person has been at work on stays as it is, and so does one with the trees of two reviewers. Where there is a
    newer draft of a changed text, the old tree lies beside it.

    Args:
        records: of the older review's file of corrections.
        source: the name of that file.
    """
    made, done, matched = list(passages), Carried(), _matches(passages, records)
    for at, (record, same) in sorted(matched.items()):
        passage, old = passages[at], records[record]
        version, origin = _old(passage, old, same, source)
        there = version.nodes in [one.nodes for one in (passage.now, passage.beside, passage.now.standing, passage.saved) if one]
        # What was carried over before and is not there any more, or lost its approval, gave way to something in the newer review.
        waits = passage.beside is not None and passage.beside.nodes == version.nodes
        gave_way = passage.more.get(CARRIED_KEY) == origin and not (there if version.state == "drafted" else waits)
        reviewed = passage.now.standing is not None or any(one.state in REVIEWED for one in (passage.now, passage.saved) if one)
        if reviewed or gave_way or (passage.beside is not None and passage.beside.of):
            done.kept.append(passage.number)
            done.unlike += [] if there else [(passage.number, old)]
            continue
        (done.same if same else done.changed).append(passage.number)
        made[at] = _carried(passage, old, version, origin, same)
    done.new = [passage.number for at, passage in enumerate(passages) if at not in matched]
    # Gone are those of which the newer version has nothing: no text like theirs, or no place for their tree.
    taken = {record for record, _ in matched.values()}
    kept = {_content(records[record]) for record, same in matched.values() if same}
    done.gone = [old for i, old in enumerate(records) if i not in taken and _content(old) not in kept]
    return made, done


def _matches(passages: Sequence[Passage], records: Sequence[TreeRecord]) -> dict[int, tuple[int, bool]]:
    """Position of a newer passage -> that of the older record which is of it, and whether the tree was made for no other text.

    Those with the same text (up to white space) go together, several by their ids. Where a text comes a different number of times
    than before, or under other headings, and had different trees, nothing says which of them is of which place: then none of them
    counts as the same. Of the rest, the likest pair goes together first, down to :data:`ALIKE`; among equals, the one that
    stands in its place.
    """
    older, newer = _by_text(records), _by_text(passages)
    found: dict[int, tuple[int, bool]] = {}
    for text, now in newer.items():
        was = older.get(text, {})
        before = list(was.values())
        if len({_content(records[i]) for i in before}) == 1:  # one tree for all
            found |= {j: (before[min(at, len(before) - 1)], True) for at, j in enumerate(now.values())}
        elif was.keys() == now.keys():
            found |= {j: (was[name], True) for name, j in now.items()}
        else:
            found |= {j: (i, False) for i, j in zip(before, now.values(), strict=False)}
    taken = {i for i, _ in found.values()}
    left = {i: one.text for i, one in enumerate(records) if i not in taken and _plain(one.text) not in newer}
    free = {j: passage.text for j, passage in enumerate(passages) if j not in found}
    return found | {j: (i, False) for j, i in likest(left, free).items()}


def likest(older: Mapping[int, str], newer: Mapping[int, str]) -> dict[int, int]:
    """Place of a newer text -> that of the older one that it is most like, if it is like one; each comes once."""
    olds = {i: _words(text) for i, text in older.items()}
    pairs: list[tuple[float, float, int, int]] = []
    for j, text in newer.items():
        matcher = SequenceMatcher(None, b=_words(text), autojunk=False)
        for i, words in olds.items():
            matcher.set_seq1(words)
            if matcher.real_quick_ratio() >= ALIKE and matcher.quick_ratio() >= ALIKE and (ratio := matcher.ratio()) >= ALIKE:
                pairs.append((-ratio, abs(i / (max(older) + 1) - j / (max(newer) + 1)), i, j))
    return {j: i for _, _, i, j in best_pairs(pairs)}


def _by_text(held: Sequence[Passage | TreeRecord]) -> dict[str, dict[str, int]]:
    """Text -> id -> position."""
    made: dict[str, dict[str, int]] = defaultdict(dict)
    for i, (one, name) in enumerate(zip(held, ids_of(held), strict=True)):
        made[_plain(one.text)][name] = i
    return made


def _old(passage: Passage, record: TreeRecord, same: bool, source: str) -> tuple[Version, dict[str, Any]]:
    """An older tree in the state that it has for a newer passage, and what is said of where it comes from."""
    version = version_of(record)
    if not same:  # how sure a model was of the old tree, it was for the old text
        sure = passage.now.confidence if passage.now.nodes == version.nodes else None
        version = version._replace(state="drafted", reviewed=None, confidence=sure, ticks=())
    origin: dict[str, Any] = {"from": source}
    origin |= {key: record.more[key] for key in ("sha256", "place") if isinstance(record.more.get(key), str)}
    if _plain(read := text_read(record)) != _plain(passage.text):
        origin["text"] = read
    if not same and record.reviewed is not None:
        origin["reviewed"] = record.reviewed
    return version, origin


def _carried(passage: Passage, record: TreeRecord, version: Version, origin: dict[str, Any], same: bool) -> Passage:
    more = {**passage.more, CARRIED_KEY: origin}
    if same:  # but what the older record says of its place in its document
        more = {key: value for key, value in lasting_keys(record.more).items() if key not in (*ORIGIN, CARRIED_KEY)} | more
    if same or passage.now == NOTHING or passage.now.nodes == version.nodes:
        return replace(passage.with_version(version), more=more)
    if passage.beside is not None and passage.beside.nodes == version.nodes:
        return replace(passage, more=more)
    return replace(passage.put_extraction(version, -1), more=more)


def reworded(passage: Passage, source: Passage) -> Passage:
    """A passage whose text is another one in its document now: its tree is a draft, to be read against the new text.

    *Undo* does not go back behind it, to an approval of the old text. Where the document came with a newer tree, the old one lies
    beside it; so does one that was approved, under a correction that nobody finished.
    """
    now, standing = passage.now, passage.now.standing
    held = passage.more.get(CARRIED_KEY)
    known: dict[str, Any] = held if isinstance(held, dict) else {}
    in_file = passage.text if passage.saved is not None else known.get("replaces", known.get("text"))
    is_read = passage.is_valid and text_read(passage.record()) == passage.text
    if is_read or "text" not in known:  # else a change from a text before this one is open
        known = {"from": str(passage.more.get("source") or "the earlier review"), "text": passage.text}
        known |= {key: passage.more[key] for key in ("sha256", "place") if isinstance(passage.more.get(key), str)}
        known |= {"reviewed": now.reviewed} if now.reviewed else {}
    if isinstance(in_file, str):
        known = {**known, "replaces": in_file}
    more = {**passage.more, **source.more, CARRIED_KEY: known}
    made = replace(
        passage,
        text=source.text,
        more=more,
        now=_draft(now),
        version=passage.version + 1,
        saved=None,
        marked=False,
        past=(),
        future=(),
    )
    if source.now.nodes is not None and source.now.nodes != now.nodes:
        return replace(made, now=source.now, beside=_draft(standing or now), extractions=made.extractions + 1)
    if standing is not None and standing.nodes != now.nodes and made.beside is None:
        return replace(made, beside=_draft(standing), extractions=made.extractions + 1)
    return made


def _draft(version: Version) -> Version:
    """A tree of another text, of which nobody has said yet that it is right for this one."""
    if version.nodes is None:
        return NOTHING
    return version._replace(state="drafted", approved=None, reviewed=None, confidence=None, ticks=())


def _content(record: TreeRecord) -> tuple[str, str, str]:
    version = version_of(record)
    return _plain(record.text), json.dumps(version.nodes, sort_keys=True), version.state


def _words(text: str) -> list[str]:
    return [piece.casefold() for piece in pieces(text)[0] if piece.strip()]


def _plain(text: str) -> str:
    return " ".join(text.split())
