"""What comes into a review: documents cut into passages, files of trees, and what an earlier review left of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gatewise.characters import HALF_A_PAIR, has_half_a_pair
from gatewise.errors import GatewiseError
from gatewise.files import content_of
from gatewise.mdt.passages import split_passages
from gatewise.mdt.reading import document_of
from gatewise.mdt.records import SUFFIXES, TreeRecord, trees_of
from gatewise.mdt.review.files import Draft
from gatewise.mdt.review.passage import Passage, others, version_of
from gatewise.mdt.samples import NAME, sample


@dataclass(frozen=True)
class Source:
    """Passages to review, and what could not be read, a sentence each."""

    passages: list[Passage]
    faults: list[str]


def read_source(file: str, *, population: str | None = None, repair: bool = False) -> Source:
    """The passages of a document, or the records of a file of trees.

    Args:
        file: a path, or "sample:guidelines".
        population: of all passages of a document, instead of what headings say.
        repair: put right in a file of trees what has one plain meaning.

    Raises:
        GatewiseError: the file cannot be read, or nothing in it can.
    """
    if file == NAME:
        return Source([_passage_of(record) for record in sample()], [])
    if file.startswith("sample:"):
        raise GatewiseError(f"there is no sample {file!r} of trees: expected {NAME}")
    path = Path(file)
    if path.is_dir():
        raise GatewiseError(f"{file} is a folder: expected a file of trees, or a text")
    return source_of(content_of(path), file, population=population, repair=repair)


def source_of(content: bytes, name: str, *, population: str | None = None, repair: bool = False) -> Source:
    """Like :func:`read_source`, from the content of a file.

    Raises:
        GatewiseError: as there.
    """
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES and (suffix != ".txt" or _has_outlines(content)):
        read = trees_of(content, name, suffix, repair=repair)
        if not read.records:
            raise GatewiseError(next(iter(read.faults.values())))
        return Source([_passage_of(record) for record in read.records], [*read.faults.values()])
    if suffix not in (".txt", ".md", ".markdown", ".pdf", ".docx"):
        raise GatewiseError(
            f"{name}: the name ends in {suffix!r}, expected a text (.txt, .md, .pdf, .docx) or trees (.json, .jsonl)"
        )
    return Source(_passages_of(content, name, suffix, population), [])


def pasted(text: str, population: str | None = None) -> list[Passage]:
    """The passages of a text that somebody pasted.

    Raises:
        GatewiseError: there is no passage in it.
    """
    if has_half_a_pair(text):
        raise GatewiseError(f"the text {HALF_A_PAIR}")
    return _passages_of(text.encode(), "pasted text", ".txt", population)


def _passages_of(content: bytes, name: str, suffix: str, population: str | None) -> list[Passage]:
    made = []
    for passage in split_passages(document_of(content, name, suffix), population=population or None):
        more: dict[str, Any] = {"source": name, "place": passage.where, "headings": list(passage.headings)}
        made.append(Passage(0, passage.text, more={key: value for key, value in more.items() if value}))
    return made


def _passage_of(record: TreeRecord) -> Passage:
    if not record.text.strip():
        raise GatewiseError(f"record {record.number} has no text, against which its tree could be read")
    return Passage(0, record.text, version_of(record, "drafted"), others(record.more))


def _has_outlines(content: bytes) -> bool:
    """Whether a .txt file holds outlines of trees and not a text: each begins with a line "text: …"."""
    lines = (line.strip() for line in content.decode("utf-8-sig", "replace").splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return first.lower().startswith("text:")


def merged(sources: Iterable[Passage], saved: Sequence[TreeRecord], draft: Draft) -> tuple[list[Passage], list[str]]:
    """The passages of a review, with all that earlier reviews of them left, numbered from 1; and what has to be said of it.

    Passages are the same when their texts are; of several with one text the first goes with the first. The draft has the last word,
    unless another program changed a saved record meanwhile: then that one has, and the draft's tree can be had back by undoing.
    """
    drafted, kept = defaultdict(list), defaultdict(list)
    for passage in draft.passages:
        drafted[passage.text].append(passage)
    for record in saved:
        kept[record.text].append(record)
    removed = Counter(draft.removed)
    made: list[Passage] = []
    notes: list[str] = []

    def add(text: str, source: Passage | None, old: Passage | None) -> None:
        record = kept[text].pop(0) if kept[text] else None
        if old is None and record is None and removed[text]:
            removed[text] -= 1
            return
        made.append(_merged(source, record, old, notes))

    for source in sources:
        add(source.text, source, drafted[source.text].pop(0) if drafted[source.text] else None)
    for passage in draft.passages:
        if any(passage is one for one in drafted[passage.text]):
            drafted[passage.text].remove(passage)
            add(passage.text, None, passage)
    for record in saved:
        if kept[record.text]:
            add(record.text, None, None)
    return [replace(passage, number=number) for number, passage in enumerate(made, start=1)], notes


def _merged(source: Passage | None, record: TreeRecord | None, old: Passage | None, notes: list[str]) -> Passage:
    first = source or old
    if record is not None:
        saved = version_of(record, "drafted")
        # What a file of corrections holds beside the tree is as old as the tree.
        more = {**(first.more if first else {}), **others(record.more)}
        if old is None:
            past = [source.now] if source and source.now.nodes is not None and source.now.nodes != saved.nodes else []
            return Passage(0, record.text, saved, more, saved, past)
        known = [(version.nodes, version.state) for version in (old.now, old.saved) if version is not None]
        if (saved.nodes, saved.state) not in known:
            notes.append(
                f"the file of corrections has another tree than before for {_short(record.text)}, which is shown; undo brings back"
                " yours"
            )
            return Passage(0, record.text, saved, more, saved, [old.now])
        return Passage(0, record.text, old.now, more, saved, [saved] if old.now != saved else [])
    assert first is not None
    if old is None:
        return first
    fresh = source is not None and source.now.nodes is not None and source.now.nodes != old.now.nodes
    if fresh and old.now.state in ("empty", "drafted"):
        assert source is not None
        return Passage(0, first.text, source.now, source.more, None, [old.now] if old.now.nodes is not None else [])
    # So that undoing leads back to what the model or the file gave, though the steps in between are gone.
    past = [source.now] if fresh and source is not None else []
    return Passage(0, first.text, old.now, old.more, None, past)


def _short(text: str) -> str:
    return f'"{text[:40]}{"…" if len(text) > 40 else ""}"'
