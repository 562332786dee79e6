"""What comes into a review: documents cut into passages, and files of trees."""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise.files import content_of
from gatewise_mdt.documents.passages import split_passages
from gatewise_mdt.documents.reading import SUFFIXES as DOCUMENTS
from gatewise_mdt.documents.reading import document_of
from gatewise_mdt.records import SUFFIXES, trees_of
from gatewise_mdt.review.original import Original
from gatewise_mdt.review.passage import Passage, passage_of
from gatewise_mdt.samples import sample_of

_MOST_BYTES = 2**27  # of a document that is looked for


class Source(NamedTuple):
    """The passages of a document, or the records of a file of trees.

    Attributes:
        notes: what could not be read, was left out or was put right, a sentence each.
        original: the document.
    """

    passages: list[Passage]
    notes: list[str]
    original: Original | None = None


def read_source(file: str, *, population: str | None = None, repair: bool = False) -> Source:
    """Reads a document or a file of trees.

    Args:
        file: a path, or "sample:guidelines".
        population: of all passages of a document, instead of what headings say.
        repair: put right in a file of trees what has one plain meaning.

    Raises:
        GatewiseError: the file cannot be read, or nothing in it can.
    """
    if file.startswith("sample:"):
        return Source([passage_of(record) for record in sample_of(file)], [])
    return source_of(content_of(file), file, population=population, repair=repair)


def source_of(content: bytes, name: str, *, population: str | None = None, repair: bool = False) -> Source:
    """Like :func:`read_source`, from the content of a file.

    Raises:
        GatewiseError: as there.
    """
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES:
        if population:
            raise GatewiseError(
                f"a population was given, but {name} is a file of trees, whose texts say whom they are about: leave it out"
            )
        read = trees_of(content, name, suffix, repair=repair)
        if not read.records:
            raise GatewiseError(next(iter(read.faults.values())))
        return Source([passage_of(record) for record in read.records], [*read.faults.values(), *read.notes])
    if suffix not in (*DOCUMENTS, ".doc"):
        raise GatewiseError(
            f"{name}: the name ends in {suffix!r}, expected a text (.txt, .md, .html, .pdf, .docx) or trees (.json, .jsonl)"
        )
    original = original_of(content, name)
    document = original.document
    made = []
    for passage in split_passages(document, population=population or None):
        # A name of another encoding than UTF-8, and what a damaged PDF calls letters, may hold what no file takes.
        held: dict[str, Any] = {key: writable(value) for key, value in passage.origin(name).items() if value}
        made.append(Passage(0, writable(passage.text), more=held))
    return Source(made, [writable(note) for note in document.notes], original)


def original_of_record(more: Mapping[str, Any], folder: Path) -> Original | None:
    """The document that a record names, if it is where its name says or in the folder, and still the one that was read."""
    source, sha256 = more.get("source"), more.get("sha256")
    if not isinstance(source, str) or not isinstance(sha256, str) or "\0" in source:
        return None
    for path in (Path(source), folder / Path(source).name):
        if path.suffix.lower() in DOCUMENTS and os.path.isfile(path) and os.path.getsize(path) <= _MOST_BYTES:
            with suppress(GatewiseError):
                if hashlib.sha256(content := content_of(path)).hexdigest() == sha256:
                    return original_of(content, source)
    return None


def original_of(content: bytes, name: str) -> Original:
    """A document as the page shows it.

    Raises:
        GatewiseError: it cannot be read.
    """
    suffix = Path(name).suffix.lower()
    return Original(document_of(content, name, suffix), content if suffix == ".pdf" else b"")
