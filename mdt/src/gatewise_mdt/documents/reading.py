"""Documents to extract from: plain text, Markdown, PDF and DOCX, read into headings and paragraphs with their places."""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gatewise.errors import GatewiseError, reason_of
from gatewise.files import content_of
from gatewise_mdt.documents.document import Document, quoted_list
from gatewise_mdt.documents.docx import read_docx
from gatewise_mdt.documents.headings import headings_without_text
from gatewise_mdt.documents.markdown import read_markdown
from gatewise_mdt.documents.pdf import read_pdf
from gatewise_mdt.documents.plain_text import read_plain_text

STDIN = "-"
_SUFFIXES = ".txt, .md, .pdf or .docx"


def read_document(path: str | Path) -> Document:
    """Reads a document by the suffix of its name; "-" is plain text or Markdown from standard input.

    Args:
        path: of a file; see :func:`documents_in` for folders.

    Raises:
        GatewiseError: the file cannot be read, is of another kind, damaged, locked or empty, or has no text but pictures of it.
    """
    if str(path) == STDIN:
        return document_of(sys.stdin.buffer.read(), "stdin", ".md")
    name, suffix = str(path), Path(path).suffix
    return document_of(content_of(path), name, suffix)


def documents_in(paths: Sequence[str | Path]) -> list[str | Path]:
    """The paths, with what can be read in each folder in its place: its documents and those of folders in it, by name.

    What is no file, files of other kinds, hidden ones and those by which Word locks a document ("~$...") are passed over, and links
    to folders.

    Raises:
        GatewiseError: a folder has no document, or cannot be read.
    """
    found: list[str | Path] = []
    for path in paths:
        if str(path) == STDIN or not os.path.isdir(path):
            found.append(path)
            continue
        faults: list[OSError] = []
        inside = []
        for folder, folders, names in os.walk(path, onerror=faults.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside += [Path(folder) / name for name in sorted(names) if not name.startswith(".")]
        if faults:
            raise GatewiseError(f"{path} cannot be read ({reason_of(faults[0])})")
        readable = [one for one in inside if one.suffix.lower() in _READERS and not one.name.startswith("~$")]
        documents = [one for one in readable if one.is_file() or one.is_symlink()]  # a link to nothing is told, not passed over
        if not documents:
            raise GatewiseError(f"{path} has no document: expected files in it that end in {_SUFFIXES}")
        found += documents
    return found


def document_of(content: bytes, name: str, suffix: str) -> Document:
    """Reads the content of a file; the document knows the SHA-256 of just these bytes.

    Args:
        name: what messages call it.
        suffix: what kind of file it is, such as ".pdf"; case does not matter.

    Raises:
        GatewiseError: as :func:`read_document`.
    """
    _check_suffix(suffix, name)
    if not content.strip():
        raise GatewiseError(f"{name} is empty, expected a text in English or Chinese")
    read = _READERS[suffix.lower()](content, name)
    blocks = tuple(block for block in read.blocks if any(map(str.isalnum, block.text)))
    if not any(any(map(str.isalpha, block.text)) for block in blocks):
        raise GatewiseError(f"{name} has no words, expected a text in English or Chinese")
    notes = read.notes
    if alone := headings_without_text(blocks):
        texts = quoted_list([block.text for block in alone], [block.where for block in alone])
        notes += (f"{name}: {'a heading was' if len(alone) == 1 else 'headings were'} left out, as nothing stands under: {texts}",)
    return replace(read, blocks=blocks, notes=notes, sha256=hashlib.sha256(content).hexdigest())


_READERS: dict[str, Callable[[bytes, str], Document]] = {
    ".txt": lambda content, name: read_plain_text(_decode(content, name), name),
    ".md": lambda content, name: read_markdown(_decode(content, name), name),
    ".markdown": lambda content, name: read_markdown(_decode(content, name), name),
    ".pdf": read_pdf,
    ".docx": read_docx,
}


def _decode(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GatewiseError(f"{name}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from error
    if "\x00" in text:
        raise GatewiseError(f"{name}: not text (it has zero bytes), expected {_SUFFIXES}")
    return re.sub("[\x02-\x04]", "", text).replace("\r\n", "\n").replace("\r", "\n")


def _check_suffix(suffix: str, name: str) -> None:
    if suffix.lower() not in _READERS:
        raise GatewiseError(f"{name}: the name ends in {suffix!r}, expected {_SUFFIXES}")
