"""Documents to records: read, cut into passages, extracted, with everything that failed in its place."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise.mdt.documents.language import detect_language
from gatewise.mdt.documents.passages import Passage, split_passages
from gatewise.mdt.documents.reading import STDIN, read_document
from gatewise.mdt.extraction.extractor import Extraction, Extractor, Progress
from gatewise.mdt.records import TreeRecord
from gatewise.mdt.relations import Language

_BATCHES_AT_ONCE = 4  # enough to sort passages by length, few enough not to lose much to an interrupt


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


def read_pieces(
    files: Sequence[str | Path],
    into: Batch,
    *,
    language: Language | None = None,
    population: str | None = None,
    most_characters: int | None = None,
) -> list[Piece]:
    """The passages of documents; those that cannot be read go to the faults. Arguments are those of :func:`extract_files`."""
    pieces: list[Piece] = []
    for file in files:
        name = "stdin" if str(file) == STDIN else writable(str(file))
        try:
            document = read_document(file)
            whole = language or detect_language(" ".join(block.text for block in document.blocks), name)
            passages = split_passages(document, population=population, most=most_characters)
            into.notes += map(writable, document.notes)
        except GatewiseError as error:
            into.faults.append(str(error))
            into.failed.append(name)
            continue
        pieces += [Piece(name, passage, language or _of(passage, whole)) for passage in passages]
    return pieces


def extract_files(
    files: Sequence[str | Path],
    extractor: Extractor,
    *,
    language: Language | None = None,
    population: str | None = None,
    most_characters: int | None = None,
    progress: Progress | None = None,
) -> Batch:
    """The trees of documents; what fails does not stop the rest.

    Args:
        files: .txt, .md, .pdf or .docx; "-" is standard input.
        language: of all documents; None finds it out.
        population: of all passages, instead of what documents and headings say.
        most_characters: of a passage; None takes 800 of English and 300 of Chinese.
        progress: as for :class:`Extractor`.

    Raises:
        GatewiseError: something is wrong that is no single document's fault.
    """
    batch = Batch()
    pieces = read_pieces(files, batch, language=language, population=population, most_characters=most_characters)
    return extract_pieces(pieces, extractor, batch, progress)


def extract_pieces(pieces: Sequence[Piece], extractor: Extractor, into: Batch, progress: Progress | None = None) -> Batch:
    """The trees of passages, added to what a batch has portion by portion: what an interrupt leaves can be used."""
    with_trees: set[str] = set()
    at_once = _BATCHES_AT_ONCE * extractor.batch_size
    for start in range(0, len(pieces), at_once):
        portion = pieces[start : start + at_once]
        texts, languages = [piece.passage.text for piece in portion], [piece.language for piece in portion]
        told = partial(_tell, progress, start, len(pieces)) if progress else None
        for piece, one in zip(portion, extractor(texts, language=languages, progress=told), strict=True):
            into.read += 1
            if isinstance(one, GatewiseError):
                into.faults.append(f"{piece.where}: {one}")
                continue
            into.notes += [f"{piece.where}: {warning}" for warning in one.warnings]
            if one.is_empty:
                into.notes.append(f"{piece.where}: no decision was found in {_quoted(piece.passage.passage)}")
                continue
            with_trees.add(piece.name)
            into.records.append(_record(one, piece, len(into.records) + 1))
    for name in dict.fromkeys(piece.name for piece in pieces):
        if name not in with_trees:
            into.failed.append(name)
            count = sum(piece.name == name for piece in pieces)
            into.faults.append(f"{name}: no decision was found in its {'only passage' if count == 1 else f'{count} passages'}")
    return into


def _tell(progress: Progress, before: int, total: int, what: str, done: int, _: int) -> None:
    """The progress of a portion as that of all passages."""
    progress(what, before + done, total)


def _record(found: Extraction, piece: Piece, number: int) -> TreeRecord:
    place = {"source": piece.name, "place": piece.passage.where, "headings": list(piece.passage.headings)}
    return found.record(number, place)


def _of(passage: Passage, otherwise: Language) -> Language:
    """A passage's own language; a short one that does not tell has the document's."""
    try:
        return detect_language(passage.passage)
    except GatewiseError:
        return otherwise


def _quoted(text: str) -> str:
    return f'"{text[:40]}{"…" if len(text) > 40 else ""}"'
