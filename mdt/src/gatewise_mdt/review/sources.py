"""What comes into a review: documents cut into passages, and files of trees."""

from pathlib import Path
from typing import Any

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise.files import content_of
from gatewise_mdt.documents.passages import split_passages
from gatewise_mdt.documents.reading import SUFFIXES as DOCUMENTS
from gatewise_mdt.documents.reading import document_of
from gatewise_mdt.records import SUFFIXES, trees_of
from gatewise_mdt.review.passage import Passage, passage_of
from gatewise_mdt.samples import NAME, sample


def read_source(file: str, *, population: str | None = None, repair: bool = False) -> tuple[list[Passage], list[str]]:
    """The passages of a document, or the records of a file of trees; and what could not be read, was left out or was put right, a
    sentence each.

    Args:
        file: a path, or "sample:guidelines".
        population: of all passages of a document, instead of what headings say.
        repair: put right in a file of trees what has one plain meaning.

    Raises:
        GatewiseError: the file cannot be read, or nothing in it can.
    """
    if file == NAME:
        return [passage_of(record) for record in sample()], []
    if file.startswith("sample:"):
        raise GatewiseError(f"there is no sample {file!r} of trees: expected {NAME}")
    return source_of(content_of(file), file, population=population, repair=repair)


def source_of(content: bytes, name: str, *, population: str | None = None, repair: bool = False) -> tuple[list[Passage], list[str]]:
    """Like :func:`read_source`, from the content of a file.

    Raises:
        GatewiseError: as there.
    """
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES:
        if population:
            raise GatewiseError(
                f"a population was given with {name}, whose trees come with texts that say whom they are about: leave it out"
            )
        read = trees_of(content, name, suffix, repair=repair)
        if not read.records:
            raise GatewiseError(next(iter(read.faults.values())))
        return [passage_of(record) for record in read.records], [*read.faults.values(), *read.notes]
    if suffix not in (*DOCUMENTS, ".doc"):
        raise GatewiseError(
            f"{name}: the name ends in {suffix!r}, expected a text (.txt, .md, .html, .pdf, .docx) or trees (.json, .jsonl)"
        )
    document = document_of(content, name, suffix)
    made = []
    for passage in split_passages(document, population=population or None):
        # A name of another encoding than UTF-8, and what a damaged PDF calls letters, may hold what no file takes.
        held: dict[str, Any] = {key: writable(value) for key, value in passage.origin(name).items() if value}
        made.append(Passage(0, writable(passage.text), more=held))
    return made, [writable(note) for note in document.notes]
