"""What comes into a review: documents cut into passages, and files of trees."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewise.checks import HALF_A_PAIR, has_half_a_pair, writable
from gatewise.errors import GatewiseError
from gatewise.files import content_of
from gatewise_mdt.documents.passages import split_passages
from gatewise_mdt.documents.reading import document_of
from gatewise_mdt.records import SUFFIXES, TreeRecord, trees_of
from gatewise_mdt.review.passage import Passage, lasting_keys, version_of
from gatewise_mdt.samples import NAME, sample


@dataclass(frozen=True)
class Source:
    """Passages to review, and what could not be read, was left out or was put right, a sentence each."""

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
        if population:
            raise population_error(file)
        return Source([_passage_of(record) for record in sample()], [])
    if file.startswith("sample:"):
        raise GatewiseError(f"there is no sample {file!r} of trees: expected {NAME}")
    return source_of(content_of(path_of(file)), file, population=population, repair=repair)


def path_of(file: str) -> Path:
    """The path of a file that a user named, if it is there.

    Raises:
        GatewiseError: it is not, or is a folder.
    """
    try:
        folder = stat.S_ISDIR(os.stat(file).st_mode)
    except FileNotFoundError:
        raise GatewiseError(f"{file}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise GatewiseError(f"{file!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if folder:
        raise GatewiseError(f"{file} is a folder: expected a file of trees, or a text")
    return Path(file)


def source_of(content: bytes, name: str, *, population: str | None = None, repair: bool = False) -> Source:
    """Like :func:`read_source`, from the content of a file.

    Raises:
        GatewiseError: as there.
    """
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES:
        if population:
            raise population_error(name)
        read = trees_of(content, name, suffix, repair=repair)
        if not read.records:
            raise GatewiseError(next(iter(read.faults.values())))
        return Source([_passage_of(record) for record in read.records], [*read.faults.values(), *read.notes])
    if suffix not in (".txt", ".md", ".markdown", ".pdf", ".docx"):
        raise GatewiseError(
            f"{name}: the name ends in {suffix!r}, expected a text (.txt, .md, .pdf, .docx) or trees (.json, .jsonl)"
        )
    return _document(content, name, suffix, population)


def population_error(name: str) -> GatewiseError:
    """What is said where a population is given with trees: whom their texts are about they say before their "@"."""
    return GatewiseError(
        f"a population was given with {name}, whose trees come with texts that say whom they are about: leave the population out"
    )


def source_of_text(text: str, population: str | None = None) -> Source:
    """The passages of a text that somebody pasted.

    Raises:
        GatewiseError: there is no passage in it.
    """
    if has_half_a_pair(text):
        raise GatewiseError(f"the text {HALF_A_PAIR}")
    return _document(text.encode(), "pasted text", ".txt", population)


def _document(content: bytes, name: str, suffix: str, population: str | None) -> Source:
    if population and has_half_a_pair(population):
        raise GatewiseError(f"the population {HALF_A_PAIR}")
    document = document_of(content, name, suffix)
    made = []
    for passage in split_passages(document, population=population or None):
        # A name of another encoding than UTF-8, and what a damaged PDF calls letters, may hold what no file takes.
        held: dict[str, Any] = {key: writable(value) for key, value in passage.origin(name).items() if value}
        made.append(Passage(0, writable(passage.text), more=held))
    return Source(made, [writable(note) for note in document.notes])


def _passage_of(record: TreeRecord) -> Passage:
    if not record.text.strip():
        raise GatewiseError(f"record {record.number} has no text, against which its tree could be read")
    version = version_of(record, "drafted")
    return Passage(0, record.text, version, lasting_keys(record.more), came=version.nodes)
