"""Documents to records: read, cut into passages, extracted, with everything that failed in its place.

With a :class:`Journal`, what is found for a passage is on disk as soon as it is there, and an extraction that broke off, however it
did, goes on from there. What was found before keeps its date.
"""

import re
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatewise.checks import writable
from gatewise.errors import GatewiseError, some
from gatewise_mdt.documents.language import detect_language
from gatewise_mdt.documents.passages import Passage, split_passages
from gatewise_mdt.documents.reading import STDIN, read_document
from gatewise_mdt.extraction.extractor import Extraction, Extracts, Progress
from gatewise_mdt.json_lines import JsonLines
from gatewise_mdt.records import TreeRecord, quoted_beginning
from gatewise_mdt.relations import Language
from gatewise_mdt.spans import absent_triples
from gatewise_mdt.tree import DecisionTree

_FORMAT = 1
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'|\d+")


@dataclass
class Batch:
    """What was found in some documents.

    Attributes:
        records: the trees, in the order of the documents; ``more`` says where each comes from and what has to be known of it.
        faults: what failed, a sentence with its place each.
        notes: what was put right or left out, a sentence with its place each.
        failed: the documents that gave no tree at all.
        read: passages that are done.
    """

    records: list[TreeRecord] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    read: int = 0


@dataclass(frozen=True)
class Piece:
    """A passage of a document, and its language."""

    name: str
    passage: Passage
    language: Language

    @property
    def where(self) -> str:
        """Document and place, for messages."""
        return ", ".join(filter(None, (self.name, self.passage.where)))


class Journal:
    """What was found for passages, a line each, written as it comes.

    Args:
        path: the file, which is made with the first passage.
        settings: what the trees depend on beside the texts, as JSON holds it.

    Raises:
        GatewiseError: the file is no journal, is damaged, or is one of an extraction with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._lines, self._head = JsonLines(path), {"journal": _FORMAT, "settings": dict(settings)}
        self._found: dict[tuple[str, str], deque[Extraction | GatewiseError]] = defaultdict(deque)
        rows = self._lines.read()
        self._begun = bool(rows)
        if rows and rows[0] != self._head:
            raise GatewiseError(
                f"{path} was not left by an extraction with these settings (it begins with {rows[0]}): give the command of then"
                " to go on with it, or move the file to begin anew"
            )
        for number, row in enumerate(rows[1:], start=2):
            try:
                self._found[row["language"], row["text"]].append(_extraction(row))
            except (KeyError, TypeError, GatewiseError) as error:
                raise GatewiseError(f"{path}, line {number} is damaged ({error}): remove the file to begin anew") from error

    def take(self, piece: "Piece") -> Extraction | GatewiseError | None:
        """What was found for a passage; each that was found is given once, as a text may come several times."""
        found = self._found.get((piece.language, piece.passage.text))
        return found.popleft() if found else None

    def keep(self, piece: "Piece", found: Extraction | GatewiseError) -> None:
        """Returns when what was found for a passage is on disk.

        Raises:
            GatewiseError: it cannot be written.
        """
        rows = [_row(piece, found)]
        self._lines.append(rows if self._begun else [self._head, *rows])
        self._begun = True

    def remove(self) -> None:
        """At the end, when everything is where it belongs."""
        self.path.unlink(missing_ok=True)


def read_pieces(
    files: Sequence[str | Path],
    into: Batch,
    *,
    language: Language | None = None,
    population: str | None = None,
    most_characters: int | None = None,
) -> list[Piece]:
    """The passages of documents; those that cannot be read go to the faults.

    Args:
        files: .txt, .md, .html, .pdf or .docx; "-" is standard input.
        language: of all documents; None finds it out.
        population: of all passages, instead of what documents and headings say.
        most_characters: of a passage; None takes 800 of English and 300 of Chinese.
    """
    pieces: list[Piece] = []
    for file in files:
        name = "stdin" if str(file) == STDIN else writable(str(file))
        try:
            document = read_document(file)
            whole = language or detect_language(" ".join(block.text for block in document.blocks), name)
            passages = split_passages(document, population=population, most=most_characters)
            into.notes += map(writable, document.notes)
            into.notes += summed([(name, passage.where, writable(note)) for passage in passages for note in passage.notes])
        except GatewiseError as error:
            into.faults.append(str(error))
            into.failed.append(name)
            continue
        pieces += [Piece(name, passage, language or _of(passage, whole)) for passage in passages]
    return pieces


def extract_pieces(
    pieces: Sequence[Piece],
    extractor: Extracts,
    into: Batch,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Batch:
    """The trees of passages, added to what a batch has: what an interrupt leaves can be used."""
    found = [journal.take(piece) if journal else None for piece in pieces]
    left = [i for i, one in enumerate(found) if one is None]
    before = len(pieces) - len(left)
    texts, languages = [pieces[i].passage.text for i in left], [pieces[i].language for i in left]
    told = (lambda done, _: progress(before + done, len(pieces))) if progress else None
    try:
        for number, one in extractor.as_they_come(texts, language=languages, progress=told):
            found[left[number]] = one
            if journal:
                journal.keep(pieces[left[number]], one)
    finally:
        said: list[tuple[str, str, str]] = []
        for piece, got in zip(pieces, found, strict=True):
            if got is not None:
                said += _add(piece, got, into)
        into.notes += summed(said)
    with_trees = {record.more["source"] for record in into.records}
    for name in dict.fromkeys(piece.name for piece in pieces):
        if name not in with_trees:
            into.failed.append(name)
            count = sum(piece.name == name for piece in pieces)
            into.faults.append(f"{name}: no decision was found in its {'only passage' if count == 1 else f'{count} passages'}")
    return into


def _add(piece: Piece, one: Extraction | GatewiseError, into: Batch) -> list[tuple[str, str, str]]:
    """Puts what was found for a passage where it belongs; what is to be noted, for :func:`summed`."""
    into.read += 1
    if isinstance(one, GatewiseError):
        into.faults.append(f"{piece.where}: {one}")
        return []
    said = list(one.warnings)
    if one.is_empty:
        said.append(f"no decision was found in {quoted_beginning(piece.passage.passage)}")
    else:
        into.records.append(one.record(len(into.records) + 1, piece.passage.origin(piece.name)))
    return [(piece.name, piece.passage.where, note) for note in said]


def summed(said: Sequence[tuple[str, str, str]], most: int = 8) -> list[str]:
    """Notes on documents and places, one for each kind in a document: the first of it, and where it holds too.

    Notes are of one kind if they differ only in what they quote and in numbers.
    """
    kinds: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, where, note in said:
        kinds.setdefault((name, _QUOTED.sub("#", note)), []).append((where, note))
    made = []
    for (name, _), found in kinds.items():
        where, note = found[0]
        places = list(dict.fromkeys(place for place, _ in found if place and place != where))
        others = f"; likewise {some(places, most)}" if places else ""
        made.append(f"{', '.join(filter(None, (name, where)))}: {note}{others}")
    return made


def _row(piece: Piece, one: Extraction | GatewiseError) -> dict[str, Any]:
    """A passage and what was found as a line of a journal; where it stands in its document is read from that anew."""
    key = {"language": piece.language, "text": piece.passage.text}
    if isinstance(one, GatewiseError):
        return {**key, "fault": writable(str(one))}
    warnings = [writable(warning) for warning in one.warnings]
    said = {"warnings": warnings, "confidence": one.confidence, "extraction": one.made_with}
    return {**key, "tree": one.tree.to_preorder(), **said}


def _extraction(row: Mapping[str, Any]) -> Extraction | GatewiseError:
    if "fault" in row:
        return GatewiseError(row["fault"])
    tree = DecisionTree.from_preorder(row["tree"])
    absent = absent_triples(row["text"], tree)
    if not isinstance(made_with := row.get("extraction"), dict | None):
        raise TypeError("what its tree was made with is no object")
    confidence = row.get("confidence")
    return Extraction(
        row["text"],
        tree,
        row["language"],
        absent,
        tuple(row["warnings"]),
        made_with=made_with,
        confidence=None if confidence is None else tuple(confidence),
    )


def _of(passage: Passage, otherwise: Language) -> Language:
    """A passage's own language; a short one that does not tell has the document's."""
    try:
        return detect_language(passage.passage)
    except GatewiseError:
        return otherwise
