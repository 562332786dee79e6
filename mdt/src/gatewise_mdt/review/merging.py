"""What earlier reviews left, put together with what comes in: which saved record and which passage of the draft is of which text.

Several passages may have one text, as in a guideline that repeats itself or a file with two trees for a text. So each is found
again by its tree and by where it comes from, and by its order only where that cannot give a tree to a passage of another one.
"""

import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from gatewise_mdt.documents.passages import ORIGIN
from gatewise_mdt.records import TreeRecord, short
from gatewise_mdt.review.edits import Nodes
from gatewise_mdt.review.files import Corrections, Draft
from gatewise_mdt.review.passage import ADJUDICATED_KEY, CARRIED_KEY, Passage, Version, others, version_of

L = TypeVar("L")
R = TypeVar("R")
Key = tuple[Any, ...] | None
Place = Callable[[dict[str, Any]], str | None]


class _Row(NamedTuple):
    """A passage as what comes in has it, as the draft has it, and as the file of corrections has it; at least one is there."""

    source: Passage | None
    old: Passage | None
    record: TreeRecord | None

    @property
    def text(self) -> str:
        return next(one.text for one in self if one is not None)


def merged(sources: Iterable[Passage], saved: Corrections, draft: Draft) -> tuple[list[Passage], list[str]]:
    """The passages of a review, with all that earlier reviews of them left, numbered from 1; and what has to be said of it.

    Passages are the same only when their texts are. The draft has the last word, unless another program changed a saved record
    meanwhile: then that one has, and the draft's tree can be had back by undoing. A saved record that may be of several passages
    becomes a passage of its own, so that no tree passes for one that a person approved.
    """
    rows = _rows(list(sources), saved, draft)
    notes: list[str] = []
    made = [_merged(row, notes, saved) for row in rows]
    without = {row.text for row in rows if row.record is None}
    notes += [
        f"the file of corrections has a tree for {short(row.text)}, a text that comes several times, and nothing says for which of"
        " them: it is shown as a passage of its own"
        for row in rows
        if row.source is row.old is None and row.text in without
    ]
    return [replace(passage, number=number) for number, passage in enumerate(made, start=1)], notes


def _rows(sources: list[Passage], corrections: Corrections, draft: Draft) -> list[_Row]:
    """What comes in, in its order; then what only the draft has, then what only the file of corrections has."""
    saved = corrections.records
    draft_of_source = _drafts_of(sources, draft.passages)
    draft_of_record = _drafts_with(saved, draft.passages, corrections.unapproved)
    drafts = {j: saved[i] for i, j in draft_of_record.items()}
    left = [record for i, record in enumerate(saved) if i not in draft_of_record]
    free = [i for i in range(len(sources)) if i not in draft_of_source]
    free_of_left = _sources_with(left, [sources[i] for i in free])
    fresh = {free[j]: left[i] for i, j in free_of_left.items()}

    removed = Counter(draft.removed)
    rows: list[_Row] = []
    for i, source in enumerate(sources):
        j = draft_of_source.get(i)
        if j is not None:
            rows.append(_Row(source, draft.passages[j], drafts.get(j)))
        elif i not in fresh and removed[source.text]:
            removed[source.text] -= 1
        else:
            rows.append(_Row(source, None, fresh.get(i)))
    shown = set(draft_of_source.values())
    rows += [_Row(None, old, drafts.get(j)) for j, old in enumerate(draft.passages) if j not in shown]
    rows += [_Row(None, None, record) for i, record in enumerate(left) if i not in free_of_left]
    return rows


# ---- which belongs to which, by position ----


def _drafts_of(sources: Sequence[Passage], drafted: Sequence[Passage]) -> dict[int, int]:
    """What the draft has of the passages that come in."""
    found: dict[int, int] = {}
    for left, right in _PLACES:
        _join(found, sources, drafted, _tree_at(left), _tree_at(right))
    _join(found, sources, drafted, _tree, _tree)
    for left, right in _PLACES:
        _join(found, sources, drafted, _at(left), _at(right))
    _join(found, sources, drafted, _text, _text)
    return found


def _drafts_with(saved: Sequence[TreeRecord], drafted: Sequence[Passage], unapproved: Container[int]) -> dict[int, int]:
    """The passages of the draft that the records of the file of corrections are of."""
    found: dict[int, int] = {}
    _join(found, saved, drafted, _record_version, lambda old: _version(old.text, old.saved))
    # Records are written before the draft: one of a review that broke off in between does not know that it was saved.
    _join(found, saved, drafted, _record_version, lambda old: _version(old.text, old.now))

    # Somebody may have approved a tree as a repair left it, which the file does not have so yet.
    def approved(record: TreeRecord) -> Key:
        version = version_of(record, "drafted")._replace(state="approved")
        return _version(record.text, version) if record.number in unapproved else None

    _join(found, saved, drafted, approved, lambda old: _version(old.text, old.now))

    # Another program changed or added the rest; a passage that had a record is the likelier one.
    def like(old: Passage) -> Key:
        return _version(old.text, old.now), _version(old.text, old.saved)

    for left, right in _PLACES:
        _join(found, saved, drafted, _record_at(left), _saved(_at(right)), like)
    _join(found, saved, drafted, _text, _saved(_text), like)
    for left, right in _PLACES:
        _join(found, saved, drafted, _record_at(left), _at(right), like)
    _join(found, saved, drafted, _text, _text, like)
    return found


def _sources_with(saved: Sequence[TreeRecord], sources: Sequence[Passage]) -> dict[int, int]:
    """The passages that come in, and are in no draft, that records are of."""
    found: dict[int, int] = {}
    like = _tree_at(_held)
    for left, right in _PLACES:
        _join(found, saved, sources, _record_tree_at(left), _tree_at(right))
    _join(found, saved, sources, _record_tree, _tree)
    for left, right in _PLACES:
        _join(found, saved, sources, _record_at(left), _at(right), like)
    _join(found, saved, sources, _text, _text, like)
    return found


def _join(
    found: dict[int, int],
    lefts: Sequence[L],
    rights: Sequence[R],
    left_key: Callable[[L], Key],
    right_key: Callable[[R], Key],
    like: Callable[[R], Key] | None = None,
) -> None:
    """Adds to ``found`` which of those that are left over go together: the first of a key on the left with the first on the right.

    Args:
        found: positions on the left -> on the right.
        left_key: None goes with nothing, here and on the right.
        like: where fewer are on the left than on the right, those on the right have to be equal in this, or none is taken.
    """
    taken = set(found.values())
    waiting: dict[Key, deque[int]] = defaultdict(deque)
    asking: dict[Key, list[int]] = defaultdict(list)
    for j, right in enumerate(rights):
        if j not in taken:
            waiting[right_key(right)].append(j)
    for i, left in enumerate(lefts):
        if i not in found:
            asking[left_key(left)].append(i)
    for key, positions in asking.items():
        there = waiting[key]
        doubtful = like is not None and len(positions) < len(there) and len({like(rights[j]) for j in there}) > 1
        if key is not None and not doubtful:
            found.update(zip(positions, there, strict=False))


def _text(one: Passage | TreeRecord) -> Key:
    return (one.text,)


def _tree(passage: Passage) -> Key:
    return None if passage.came is None else (passage.text, _nodes(passage.came))


def _record_tree(record: TreeRecord) -> Key:
    return record.text, _nodes(record.tree.to_preorder())


def _record_version(record: TreeRecord) -> Key:
    return _version(record.text, version_of(record, "drafted"))


def _version(text: str, version: Version | None) -> Key:
    return None if version is None else (text, _nodes(version.nodes), version.state)


def _nodes(nodes: Nodes | None) -> str:
    return json.dumps(nodes, sort_keys=True)


# ---- where a passage comes from, as the other keys of its record say it ----


def _at(place: Place) -> Callable[[Passage], Key]:
    """The text and where it comes from."""
    return lambda passage: _both((passage.text,), place(passage.more))


def _tree_at(place: Place) -> Callable[[Passage], Key]:
    """The text, the tree that came with it, and where they come from."""
    return lambda passage: _both((passage.text, _nodes(passage.came)), place(passage.more))


def _saved(key: Callable[[Passage], Key]) -> Callable[[Passage], Key]:
    return lambda passage: key(passage) if passage.saved else None


def _record_at(place: Place) -> Callable[[TreeRecord], Key]:
    return lambda record: _both((record.text,), place(others(record.more)))


def _record_tree_at(place: Place) -> Callable[[TreeRecord], Key]:
    return lambda record: _both(_record_tree(record), place(others(record.more)))


def _both(said: Key, place: str | None) -> Key:
    return None if said is None or place is None else (*said, place)


# Where the tree comes from, which says nothing of its passage: what comes in from a document does not have it.
_OF_TREES = (CARRIED_KEY, ADJUDICATED_KEY)


def _held(more: dict[str, Any], *but: str) -> str:
    return json.dumps({key: value for key, value in more.items() if key not in (*but, *_OF_TREES)}, sort_keys=True)


def _in_document(more: dict[str, Any]) -> str:
    """The place in a document of these very bytes, whatever its file is called, and however it was read."""
    return _held(more, "source", "notes")


def _in_any_document(more: dict[str, Any]) -> str:
    return _held(more, "source", "notes", "sha256")


def _in_unknown_document(more: dict[str, Any]) -> str | None:
    """The same of a record that does not say of which bytes: those of earlier versions of gatewise do not."""
    return None if "sha256" in more else _in_any_document(more)


def _under_headings(more: dict[str, Any]) -> str:
    """Without what moves when a document is changed in front of it."""
    return _held(more, "source", "notes", "sha256", "place", "offsets")


# From what tells passages of one text apart for sure to what does at all: of what is on the left, and on the right. Of two versions
# of a document the offsets are not compared: there they may be those of another passage that moved.
_PLACES: tuple[tuple[Place, Place], ...] = (
    (_held, _held),
    (_in_document, _in_document),
    (_in_unknown_document, _in_any_document),
    (_in_any_document, _in_unknown_document),
    (_under_headings, _under_headings),
)


# ---- one passage ----


def _merged(row: _Row, notes: list[str], corrections: Corrections) -> Passage:
    source, old, record = row
    first = source or old
    came = first.came if first else None
    if record is not None:
        known = [(version.nodes, version.state) for version in (old.now, old.saved) if version is not None] if old else []
        saved = version_of(record, "drafted")
        is_known = (saved.nodes, saved.state) in known
        repaired = record.number in corrections.repaired
        if record.number in corrections.unapproved:
            if (saved.nodes, "approved") in known:
                is_known = True  # somebody approved it as the repair left it
            else:
                notes.append(corrections.unapproved[record.number])
        # What a file of corrections holds beside the tree is as old as the tree.
        more = _placed({**(first.more if first else {}), **others(record.more)}, source)
        if old is None:
            past = (source.now,) if source and source.now.nodes is not None and source.now.nodes != saved.nodes else ()
            return Passage(0, record.text, saved, more, saved, came, past, repaired=repaired)
        if not is_known:
            notes.append(
                f"the file of corrections has another tree than before for {short(record.text)}, which is shown; undo brings back"
                " yours"
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
