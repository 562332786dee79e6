"""Documents to extract from: plain text, Markdown, HTML, PDF and DOCX, read into headings and paragraphs with their places."""

import codecs
import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gatewise.errors import GatewiseError, reason_of
from gatewise.files import content_of
from gatewise_mdt.documents.document import Document, quoted_list, without_meaning
from gatewise_mdt.documents.docx import read_docx
from gatewise_mdt.documents.headings import headings_without_text
from gatewise_mdt.documents.html import read_html
from gatewise_mdt.documents.markdown import read_markdown
from gatewise_mdt.documents.pdf import read_pdf
from gatewise_mdt.documents.plain_text import read_plain_text

STDIN = "-"
_SUFFIXES = ".txt, .md, .html, .pdf or .docx"
_OLD_WORD, _OLE = ".doc", b"\xd0\xcf\x11\xe0"
_OLD_WORD_SAID = "open it in Word or LibreOffice, and save it as .docx or PDF"
# The marks at the beginnings of files, those of four bytes first.
_MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32-LE",
    codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF16_LE: "UTF-16-LE",
    codecs.BOM_UTF16_BE: "UTF-16-BE",
}
_TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
_LOOK = "look whether its letters are right"
_CHARSET = re.compile(rb"<(?:meta\b[^>]*?charset\s*=|\?xml\b[^>]*?encoding\s*=)\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "iso8859-1": "cp1252", "ascii": "cp1252"}  # as browsers read them


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
        known = {*SUFFIXES, _OLD_WORD}  # which is refused in a sentence
        readable = [one for one in inside if one.suffix.lower() in known and not one.name.startswith("~$")]
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
    if content.startswith(_OLE):
        raise GatewiseError(f"{name} is in the old format of Word, or locked with a password: {_OLD_WORD_SAID}, without a password")
    read = _READERS[suffix.lower()](content, name)
    blocks = tuple(block for block in read.blocks if any(map(str.isalnum, block.text)))
    if not any(any(map(str.isalpha, block.text)) for block in blocks):
        raise GatewiseError(f"{name} has no words, expected a text in English or Chinese")
    notes = read.notes
    if turned := [block for block in blocks if _TURNING.search(block.text)]:
        texts = quoted_list([block.text for block in turned], [block.where for block in turned])
        notes += (
            f"{name} has invisible signs that turn its text round (U+202E and the like); it is read in the order of the file:"
            f" {texts}",
        )
    if told := without_meaning(blocks):
        notes += (f"{name}: {told}",)
    if alone := headings_without_text(blocks):
        texts = quoted_list([block.text for block in alone], [block.where for block in alone])
        notes += (f"{name}: {'a heading was' if len(alone) == 1 else 'headings were'} left out, as nothing stands under: {texts}",)
    return replace(read, blocks=blocks, notes=notes, sha256=hashlib.sha256(content).hexdigest())


def _text(read: Callable[[str, str], Document]) -> Callable[[bytes, str], Document]:
    """Reads bytes as text first; the document's notes say where they were not in UTF-8."""

    def read_bytes(content: bytes, name: str) -> Document:
        text, encoding = _decode(content, name, _charset(content) if read is read_html else "")
        document = read(re.sub("[\x02-\x04]", "", text).replace("\r\n", "\n").replace("\r", "\n"), name)
        said = (f"{name} was read as {encoding}",) if encoding else ()
        return replace(document, notes=(*said, *document.notes))

    return read_bytes


_READERS: dict[str, Callable[[bytes, str], Document]] = {
    ".txt": _text(read_plain_text),
    ".md": _text(read_markdown),
    ".markdown": _text(read_markdown),
    ".html": _text(read_html),
    ".htm": _text(read_html),
    ".xhtml": _text(read_html),
    ".pdf": read_pdf,
    ".docx": read_docx,
}
SUFFIXES = tuple(_READERS)
"""Of the names of documents that can be read."""


def _decode(content: bytes, name: str, declared: str) -> tuple[str, str]:
    """The text of a file, and how its bytes were read where that is not UTF-8 and had to be found out."""
    mark = next((one for one in _MARKS if content.startswith(one)), b"")
    encoding = _MARKS.get(mark, "UTF-8")
    try:
        text = content[len(mark) :].decode(encoding)
        found = f"{encoding}, by the mark at its beginning" if encoding != "UTF-8" else ""
    except UnicodeDecodeError as error:
        other = "" if mark else _other_encoding(content, declared)
        if not other:
            raise GatewiseError(f"{name}: not {encoding} text (byte {error.start + 1}); save the file as UTF-8") from error
        text, found = (
            content.decode(other),
            other.upper() + (", as it says itself" if other == declared else f", as it is no UTF-8: {_LOOK}"),
        )
    if "\x00" in text:
        raise GatewiseError(f"{name}: not text (it has zero bytes), expected {_SUFFIXES}")
    return text, found


def _other_encoding(content: bytes, declared: str) -> str:
    """In what a text is that is no UTF-8: as it says itself, or GB18030 if that makes Chinese of it; empty if neither."""
    for encoding in filter(None, (declared, "gb18030")):
        try:
            text = content.decode(encoding)
        except (UnicodeError, LookupError):  # some encodings that Python knows are of no texts
            continue
        if encoding == declared or _is_likely_chinese(text):
            return encoding
    return ""


def _is_likely_chinese(text: str) -> bool:
    """Whether a text has common Chinese characters in rows; Western letters read as Chinese make rare ones, each by itself."""
    others = [sign for sign in text if sign > "\x7f"]
    common = [
        sign
        for sign in others
        if re.match("[\u3000-\u303f\uff00-\uffef]", sign) or b"\xb0" <= sign.encode("gb2312", "replace") <= b"\xd7\xff"
    ]
    rows = sum(len(row) for row in re.findall(r"[\u3000-\u9fff\uff00-\uffef]{2,}", text))
    return len(common) > 0.8 * len(others) and rows > 0.6 * len(others)


def _charset(content: bytes) -> str:
    """The encoding that a page names for itself; empty if it names none, or one that is not known."""
    found = _CHARSET.search(content[:4096])
    try:
        name = codecs.lookup(found[1].decode("ascii", "replace")).name if found else ""
    except LookupError:
        return ""
    return _WIDER.get(name, name)


def _check_suffix(suffix: str, name: str) -> None:
    if suffix.lower() == _OLD_WORD:
        raise GatewiseError(f"{name} is in the old format of Word (.doc), which is not read: {_OLD_WORD_SAID}")
    if suffix.lower() not in _READERS:
        raise GatewiseError(f"{name}: the name ends in {suffix!r}, expected {_SUFFIXES}")
