"""What earlier reviews left, put together with what comes in.

A passage is known by its id, see :func:`gatewise_mdt.documents.passages.passage_ids`, which its records carry. Records of earlier
versions have none, and are found again by their texts and headings. Passages are never the same unless their texts are.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from gatewise_mdt.documents.passages import ORIGIN, PASSAGE_ID
from gatewise_mdt.records import CARRIED_KEY, TreeRecord, quoted_beginning
from gatewise_mdt.review.carrying import likest, reworded
from gatewise_mdt.review.files import Draft
from gatewise_mdt.review.passage import NOTHING, Passage, Version, lasting_keys, passage_of, version_of, with_ids


@dataclass
class _Row:
    """A passage as what comes in has it, as the history has it, and as the file of corrections has it; at least one is there."""

    source: Passage | None = None
    old: Passage | None = None
    record: TreeRecord | None = None

    @property
    def first(self) -> Any:
        return self.source or self.old or self.record


# What a record and the passage that it is of have in common: its id; for a record without one, as much as possible.
_WAYS: tuple[Callable[[Passage | TreeRecord], Any], ...] = (
    lambda one: (one.text, one.more.get(PASSAGE_ID)),
    lambda one: (one.text, str(one.more.get("headings"))),
    lambda one: one.text,
)


def merge(sources: Sequence[Passage], saved: Sequence[TreeRecord], draft: Draft) -> tuple[list[Passage], list[str]]:
    """The passages of a review, with all that earlier reviews of them left; and what has to be said of it.

    The history has the last word, unless another program changed a saved record meanwhile: then that one has, and the tree of the
    history can be had back by undoing. A saved record that may be of several passages becomes a passage of its own, so that no tree
    passes for one that a person approved. An approval is of a text: where that is another one in the document now, or is gone, the
    tree is to be looked at again.
    """
    rows = _rows(with_ids(sources), draft)
    left = list(saved)
    of_row: list[Callable[[_Row], Any]] = [lambda row, way=way: way(row.first) for way in _WAYS]  # type: ignore[misc]
    # Next to the id is the tree that the history says is saved: a text may have other places in the document than it had then.
    ways = [*zip(_WAYS, of_row, strict=True)]
    ways.insert(1, (_saved_of, lambda row: row.old and _saved_of(row.old)))
    for way, way_of_row in ways:
        for key, records in _grouped(left, way).items():
            places = [row for row in rows if row.record is None and way_of_row(row) == key]
            if len(records) == len(places):  # else nothing says of which
                for row, record in zip(places, records, strict=True):
                    row.record = record
                    left.remove(record)
    documents = {_document(source) for source in sources}
    carried = {text for row in rows if row.old is not None for text in _carried_texts(row.old)}
    # Of what was put under a new text before, the file has the old record until it is saved.
    left = [record for record in left if record.text not in carried or _document(record) not in documents]
    notes = [
        f"the file of corrections has a tree for {quoted_beginning(record.text)}, a text that comes several times, and nothing says"
        " for which of them: it is shown as a passage of its own"
        for record in left
        if any(row.first.text == record.text for row in rows)
    ]
    rows += [_Row(record=record) for record in left]
    made = [_merged(row, draft, notes) for row in rows]
    news = (i for i, row in enumerate(rows) if row.source and row.record is None and (row.old is None or made[i].now == NOTHING))
    olds = (i for i, row in enumerate(rows) if row.source is None and made[i].now != NOTHING)
    fresh, texts = {i: made[i].text for i in news}, {source.text for source in sources}
    lost = {i: made[i].text for i in olds if _document(made[i]) in documents and made[i].text not in texts}
    pairs = likest(lost, fresh)
    for j, i in pairs.items():
        notes += _told(made[i], "changed in")
        made[j] = reworded(made[i], made[j])
    gone = {i: "is gone from" for i in lost.keys() - pairs.values() if _document(made[i])}
    doubtful = dict.fromkeys(_doubtful(rows), "comes another number of times, or under other headings, in")
    for i, what in (gone | doubtful).items():
        if made[i].now.standing is not None or i in doubtful:
            notes += _told(made[i], what)
        if made[i].now.standing is not None:
            made[i] = made[i].unapproved()
    return with_ids([one for i, one in enumerate(made) if i not in pairs.values()]), notes


def _document(one: Passage | TreeRecord) -> str:
    """The document that a passage is of, or the file of trees, by its name, whichever path leads to it; empty where it is not
    known."""
    source = one.more.get("source")
    return PurePath(source).name if isinstance(source, str) else ""


def _carried_texts(passage: Passage) -> list[str]:
    known = passage.more.get(CARRIED_KEY)
    return [str(known[key]) for key in ("text", "replaces") if key in known] if isinstance(known, dict) else []


def _told(passage: Passage, what: str) -> list[str]:
    """What has to be said of a person's word whose text is not that of the document."""
    said = f"the text of {quoted_beginning(passage.text)} {what} the document since its tree was"
    if passage.now.standing is None:
        then = "it is a draft now; look" if what == "changed in" else "look"
        return [f"{said} corrected: {then} at it again"] if passage.now.state == "corrected" else []
    by = f" by {passage.now.approver}" if passage.now.approver else ""
    said += f" approved{by}: it is approved no more"
    return [f"{said}; look at it again and save: until then the file of corrections has it as it was"]


def _rows(sources: Sequence[Passage], draft: Draft) -> list[_Row]:
    """What comes in, in its order; then what only the history has."""
    left = list(draft.passages.values())
    rows = [_Row(source) for source in sources]
    for way in (_WAYS[0], _WAYS[2]):  # the text under other headings than before
        by_key = _grouped(left, way)
        for row in rows:
            if row.old is None and row.source is not None and by_key[way(row.source)]:
                row.old = by_key[way(row.source)].pop(0)
                left.remove(row.old)
    return [*rows, *(_Row(old=one) for one in left)]


def _doubtful(rows: Sequence[_Row]) -> list[int]:
    """Rows of a document that has changed, whose text had several trees in it and is in other places now: nothing says which tree
    is of which. What was left over when it changed before is not asked. Without a history its records tell."""
    earlier = {i: one for i, row in enumerate(rows) if (one := row.old or _placed_record(row.record)) is not None}
    last = {_bytes(one) for i, one in earlier.items() if rows[i].source is not None}
    groups = _grouped(range(len(rows)), lambda i: (_document(rows[i].first), rows[i].first.text))
    doubtful: list[int] = []
    for group in groups.values():
        sources = [source for i in group if (source := rows[i].source) is not None]
        olds = {i: earlier[i] for i in group if i in earlier and _bytes(earlier[i]) in last - set(map(_bytes, sources))}
        before, now = ({one.more.get(PASSAGE_ID) for one in part} for part in (olds.values(), sources))
        # Places without a tree have no records.
        is_elsewhere = before != now if all(rows[i].old for i in olds) else not before <= now
        trees = [_trees(one) for one in olds.values()]
        if sources and is_elsewhere and any(tree != trees[0] for tree in trees):
            doubtful += olds
    return doubtful


def _placed_record(record: TreeRecord | None) -> TreeRecord | None:
    """A record that says where in which version of the document its tree was read."""
    return record if record is not None and record.more.get(PASSAGE_ID) and record.more.get("sha256") else None


def _trees(one: Passage | TreeRecord) -> tuple[Any, Any]:
    """The tree as it is, and the one that a person stands for."""
    now = one.now if isinstance(one, Passage) else version_of(one)
    return now.nodes, now.standing and now.standing.nodes


def _saved_of(one: Passage | TreeRecord) -> str | None:
    """A text with the tree that the file of corrections has for it, and who reviewed that."""
    saved = one.saved if isinstance(one, Passage) else _unmarked(one)
    return saved and json.dumps([one.text, saved.nodes, saved.state, saved.reviewed], sort_keys=True)


def _unmarked(record: TreeRecord) -> Version:
    """What a record holds, whatever it says of a tree that was put in its place since."""
    return version_of(replace(record, more={**record.more, "changed": None}))


def _bytes(one: Passage | TreeRecord) -> tuple[str, Any]:
    """The document that a passage is of, as it was read."""
    return _document(one), one.more.get("sha256")


def _grouped(held: Sequence[Any], way: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    made: dict[Any, list[Any]] = defaultdict(list)
    for one in held:
        made[way(one)].append(one)
    return made


def _merged(row: _Row, draft: Draft, notes: list[str]) -> Passage:
    source, old, record = row.source, row.old, row.record
    given = source if source is not None and source.now.nodes is not None else None
    if old is None:
        if record is None:
            assert source is not None
            return source
        more = {**(source.more if source else {}), **lasting_keys(record.more)}
        marked = bool(record.more.get("changed"))
        made = replace(passage_of(record), more=_placed(more, source), saved=version_of(record), marked=marked)
        return replace(made, past=(given.now,)) if given and given.now.nodes != made.now.nodes else made
    known = [(one.nodes, one.state, one.ticks) for one in (old.now, old.now.standing, old.saved) if one]
    saved = _unmarked(record) if record else None  # the history knows how it was changed
    more = _placed({**old.more, **(lasting_keys(record.more) if record else {})}, source)
    old = replace(old, more=more, saved=saved, marked=bool(record and record.more.get("changed")))
    if record and saved:
        if (saved.nodes, saved.state, saved.ticks) in known:
            return old
        notes.append(
            f"the file of corrections has another tree than before, or other ticks, for {quoted_beginning(record.text)}: that is"
            " shown; undo brings back yours"
        )
        # Nothing here knows how it was changed: where the file says that it was, it is approved no more.
        saved = version_of(record)
        return replace(old, saved=saved).with_version(saved)
    if given and old.now.state in ("empty", "drafted") and given.now.nodes not in [nodes for nodes, _ in draft.seen[old.number]]:
        return old.with_version(given.now.after(old.now))  # the file that is reviewed has a new tree
    return old


def _placed(more: dict[str, Any], source: Passage | None) -> dict[str, Any]:
    """What is held beside a tree, with the place of its passage in the document as it is now.

    Which version of the document a person read who approved the tree is said by :attr:`Version.reviewed`.
    """
    if source is None or "source" not in source.more:
        return more
    return {**source.more, **{key: value for key, value in more.items() if key not in ORIGIN}}
