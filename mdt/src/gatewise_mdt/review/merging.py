"""What earlier reviews left, put together with what comes in.

A passage is known by its id, see :func:`gatewise_mdt.documents.passages.passage_ids`, which its records carry. Records of earlier
versions have none, and are found again by their texts and headings. Passages are never the same unless their texts are.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gatewise_mdt.documents.passages import ORIGIN, PASSAGE_ID
from gatewise_mdt.records import TreeRecord, quoted_beginning
from gatewise_mdt.review.files import Draft
from gatewise_mdt.review.passage import Passage, lasting_keys, passage_of, version_of, with_ids


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
    passes for one that a person approved.
    """
    rows = _rows(with_ids(sources), draft)
    left = list(saved)
    for way in _WAYS:
        for key, records in _grouped(left, way).items():
            places = [row for row in rows if row.record is None and way(row.first) == key]
            if len(records) == len(places):  # else nothing says of which
                for row, record in zip(places, records, strict=True):
                    row.record = record
                    left.remove(record)
    notes = [
        f"the file of corrections has a tree for {quoted_beginning(record.text)}, a text that comes several times, and nothing says"
        " for which of them: it is shown as a passage of its own"
        for record in left
        if any(row.first.text == record.text for row in rows)
    ]
    rows += [_Row(record=record) for record in left]
    return with_ids([_merged(row, draft, notes) for row in rows]), notes


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
        made = replace(passage_of(record), more=_placed(more, source), saved=version_of(record))
        return replace(made, past=(given.now,)) if given and given.now.nodes != made.now.nodes else made
    known = [(one.nodes, one.state) for one in (old.now, old.now.standing, old.saved) if one]
    saved = version_of(record) if record else None
    old = replace(old, more=_placed({**old.more, **(lasting_keys(record.more) if record else {})}, source), saved=saved)
    if record and saved:
        if (saved.nodes, saved.state) in known:
            return old
        notes.append(
            f"the file of corrections has another tree than before for {quoted_beginning(record.text)}, which is shown; undo brings"
            " back yours"
        )
        return old.with_version(saved)
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
