"""What earlier reviews left, put together with what comes in.

A passage is known by its id, see :func:`gatewise_mdt.documents.passages.passage_ids`, which its records carry. Files of earlier
versions have none: their passages get those that their texts and headings make, and their records are found again by their trees
and places. Passages are never the same unless their texts are.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gatewise_mdt.documents.passages import ORIGIN, PASSAGE_ID
from gatewise_mdt.records import TreeFile, TreeRecord, quoted_beginning
from gatewise_mdt.review.edits import Nodes
from gatewise_mdt.review.files import Draft
from gatewise_mdt.review.passage import Passage, Version, lasting_keys, version_of, with_ids


class _Row(NamedTuple):
    """A passage as what comes in has it, as the history has it, and as the file of corrections has it; at least one is there."""

    source: Passage | None
    old: Passage | None
    record: TreeRecord | None = None

    @property
    def first(self) -> Passage | TreeRecord:
        """What is known of it from where it comes, or else from the history, or else from the file of corrections."""
        return next(one for one in self if one is not None)

    @property
    def text(self) -> str:
        return self.first.text


def merge(sources: Sequence[Passage], saved: TreeFile, draft: Draft) -> tuple[list[Passage], list[str]]:
    """The passages of a review, with all that earlier reviews of them left, numbered from 1; and what has to be said of it.

    The history has the last word, unless another program changed a saved record meanwhile: then that one has, and the tree of the
    history can be had back by undoing. A saved record that may be of several passages becomes a passage of its own, so that no tree
    passes for one that a person approved.
    """
    rows = _with_records(_rows(with_ids(sources), with_ids(draft.passages), list(draft.removed)), saved.records)
    notes: list[str] = []
    made = [_merged(row, notes, saved) for row in rows]
    without = {row.text for row in rows if row.record is None}
    notes += [
        f"the file of corrections has a tree for {quoted_beginning(row.text)}, a text that comes several times, and nothing says"
        " for which of them: it is shown as a passage of its own"
        for row in rows
        if row.source is row.old is None and row.text in without
    ]
    return [replace(passage, number=number) for number, passage in enumerate(with_ids(made), start=1)], notes


def _key(one: Passage | TreeRecord) -> tuple[Any, str]:
    return one.more.get(PASSAGE_ID), one.text


def _rows(sources: Sequence[Passage], drafted: Sequence[Passage], removed: list[str]) -> list[_Row]:
    """What comes in, in its order, without what was removed; then what only the history has."""
    left = {_key(one): one for one in drafted}
    found = {_key(one): left.pop(_key(one)) for one in sources if _key(one) in left}
    by_text: dict[str, list[Passage]] = defaultdict(list)  # under other headings than before
    for one in left.values():
        by_text[one.text].append(one)
    rows: list[_Row] = []
    for source in sources:
        old = found.get(_key(source))
        if old is None and by_text[source.text]:
            old = left.pop(_key(by_text[source.text].pop(0)))
        gone = [
            name for name in (source.more[PASSAGE_ID], source.text) if name in removed
        ]  # texts in histories of earlier versions
        if old is None and gone:
            removed.remove(gone[0])
        else:
            rows.append(_Row(source, old))
    return [*rows, *(_Row(None, one) for one in left.values())]


def _with_records(rows: list[_Row], records: Iterable[TreeRecord]) -> list[_Row]:
    """The rows with the records of the file of corrections; then what only that has."""
    made, left = list(rows), list(records)
    for way in _WAYS:
        there: dict[Any, list[int]] = defaultdict(list)
        for i, row in enumerate(made):
            if row.record is None:
                there[way(row)].append(i)
        asking: dict[Any, list[TreeRecord]] = defaultdict(list)
        for record in left:
            asking[way(_Row(None, None, record))].append(record)
        for key, asked in asking.items():
            places = there[key]
            if len(asked) < len(places) and len({_nodes(made[i].first) for i in places}) > 1:
                continue  # nothing says of which
            for i, record in zip(places, asked, strict=False):
                made[i] = made[i]._replace(record=record)
                left.remove(record)
    return [*made, *(_Row(None, None, record) for record in left)]


def _nodes(one: Passage | TreeRecord) -> str:
    nodes = one.tree.to_preorder() if isinstance(one, TreeRecord) else one.came if one.saved is None else one.saved.nodes
    return json.dumps(nodes, sort_keys=True)


def _place(row: _Row) -> str:
    return json.dumps([row.text, [row.first.more.get(key) for key in ("place", "headings")]], sort_keys=True)


# By what a record is found to be of a passage: its id; of files without ids its tree, its place in the document, and its text.
_WAYS: tuple[Callable[[_Row], Any], ...] = (
    lambda row: _key(row.first),
    lambda row: (row.text, _nodes(row.first)),
    _place,
    lambda row: row.text,
)


# ---- one passage ----


def _merged(row: _Row, notes: list[str], corrections: TreeFile) -> Passage:
    source, old, record = row
    first = source or old
    came = first.came if first else None
    if record is not None:
        known = [(version.nodes, version.state) for version in (old.now, old.saved) if version is not None] if old else []
        saved = version_of(record, "drafted")
        repaired = record.number in corrections.repaired
        # Somebody may have approved it as the repair left it.
        is_known = (saved.nodes, saved.state) in known or (repaired and (saved.nodes, "approved") in known)
        # What a file of corrections holds beside the tree is as old as the tree.
        more = _placed({**(first.more if first else {}), **lasting_keys(record.more)}, source)
        if old is None:
            past = (source.now,) if source and source.now.nodes is not None and source.now.nodes != saved.nodes else ()
            return Passage(0, record.text, saved, more, saved, came, past, repaired=repaired)
        if not is_known:
            notes.append(
                f"the file of corrections has another tree than before for {quoted_beginning(record.text)}, which is shown; undo"
                " brings back yours"
            )
            return replace(_next(old, saved, more, saved, came, old.now), repaired=repaired)
        return replace(_next(old, old.now, more, saved, came, saved), repaired=repaired)
    if old is None:
        assert source is not None
        return source
    if source is None:
        return replace(old, saved=None)
    differs = source.now.nodes is not None and source.now.nodes != old.now.nodes
    if differs and source.came != old.came and old.now.state in ("empty", "drafted"):  # the file has a new tree
        return _next(old, source.now.after(old.now), source.more, None, came, old.now)
    # So that undoing leads back to what the file gave, though the edits in between are gone.
    return _next(old, old.now, _placed(old.more, source), None, came, source.now if differs else old.now)


def _placed(more: dict[str, Any], source: Passage | None) -> dict[str, Any]:
    """What is held beside a tree, with the place of its passage in the document as it is now.

    Which version of the document a person read who approved the tree is said by :attr:`Version.reviewed`.
    """
    if source is None or "source" not in source.more:
        return more
    return {**source.more, **{key: value for key, value in more.items() if key not in ORIGIN}}


def _next(old: Passage, now: Version, more: dict[str, Any], saved: Version | None, came: Nodes | None, undone: Version) -> Passage:
    """A passage of an earlier review as it is in the next one.

    Args:
        undone: the version that undoing leads to, if it is another than the present one and has a tree.
    """
    past = (undone,) if undone != now._replace(undone=undone.undone) and undone.nodes is not None else ()
    number = old.version + (now != old.now)
    return replace(old, now=now, more=more, saved=saved, came=came, past=past, version=number)
