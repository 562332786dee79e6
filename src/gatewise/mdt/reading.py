"""Documents to extract from: plain text, Markdown, PDF and DOCX, read into headings and paragraphs with their places."""

import io
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewise.errors import GatewiseError
from gatewise.files import content_of

STDIN = "-"
_SCANNED = 20  # fewer letters than these on a page are a page number or a stamp
_REPEATED = 3  # pages on which the same line makes a header or footer
_HEADING = 80
_PAGE_NUMBER = re.compile(r"(?:page |第)?\s*\d+\s*(?:(?:of|/|页)\s*\d*)?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?。！？:：;；][\"'”’)）\]]*$")
_HAN_END = re.compile(r"[\u3000-\u9fff\uff00-\uffef]$")
# A hyphen at the end of a line stays where it belongs to the word.
_PREFIXES = ("non", "post", "pre", "anti", "self", "long", "short", "high", "low", "second", "first", "beta", "alpha")


@dataclass(frozen=True)
class Block:
    """A heading or a paragraph.

    Attributes:
        level: of a heading, from 1; 0 for a paragraph.
        where: its place, such as "line 12" or "page 3".
    """

    text: str
    level: int = 0
    where: str = ""


@dataclass(frozen=True)
class Document:
    """What a file says.

    Attributes:
        name: the file as it was given; "stdin" for "-".
    """

    name: str
    blocks: tuple[Block, ...]


def read_document(path: str | Path) -> Document:
    """Reads a document by the suffix of its name; "-" is plain text or Markdown from standard input.

    Raises:
        GatewiseError: the file cannot be read, is of another kind, damaged, locked or empty, has no text but pictures of it, or its
            reader (extra ``mdt``) is not installed.
    """
    if str(path) == STDIN:
        return document_of(sys.stdin.buffer.read(), "stdin", ".md")
    name, suffix = str(path), Path(path).suffix
    if Path(path).is_dir():
        raise GatewiseError(f"{name} is a folder: expected a file that ends in {_suffixes()}")
    _check_suffix(suffix, name)
    return document_of(content_of(path), name, suffix)


def document_of(content: bytes, name: str, suffix: str) -> Document:
    """Reads the content of a file.

    Args:
        name: what messages call it.
        suffix: what kind of file it is, such as ".pdf"; case does not matter.

    Raises:
        GatewiseError: as :func:`read_document`.
    """
    _check_suffix(suffix, name)
    if not content.strip():
        raise GatewiseError(f"{name} is empty, expected a text in English or Chinese")
    blocks = tuple(block for block in _READERS[suffix.lower()](content, name) if block.text)
    if not any(any(map(str.isalpha, block.text)) for block in blocks):
        raise GatewiseError(f"{name} has no words, expected a text in English or Chinese")
    return Document(name, blocks)


def _text(content: bytes, name: str) -> Iterator[Block]:
    yield from _paragraphs([(f"line {number}", line) for number, line in enumerate(_decoded(content, name).split("\n"), start=1)])


def _markdown(content: bytes, name: str) -> Iterator[Block]:
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise _missing("markdown-it-py", name) from None
    text = _decoded(content, name)
    level, in_table, row = 0, False, ""
    cells: list[str] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        where = f"line {token.map[0] + 1}" if token.map else ""
        if token.type == "heading_open":
            level = int(token.tag[1:])
        elif token.type == "heading_close":
            level = 0
        elif token.type == "tr_open":
            cells, in_table, row = [], True, where
        elif token.type == "tr_close":
            in_table = False
            yield Block(" ".join(filter(None, cells)), 0, row)
        elif token.type == "inline":
            said = _line("".join(_inline(child) for child in token.children or ()))
            if in_table:
                cells.append(said)
            else:
                yield Block(said, level, where)
        elif token.type in ("fence", "code_block"):
            yield Block(_line(token.content), 0, where)


def _inline(token: Any) -> str:
    return " " if token.type in ("softbreak", "hardbreak") else str(token.content) if token.type in ("text", "code_inline") else ""


def _pdf(content: bytes, name: str) -> Iterator[Block]:
    try:
        import pypdf
    except ImportError:
        raise _missing("pypdf", name) from None
    log = logging.getLogger("pypdf")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it tells of every small damage that it gets over
    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        # Many files are locked with an empty password, against printing only.
        if reader.is_encrypted and not reader.decrypt(""):
            raise GatewiseError(f"{name} is locked with a password: save it without one")
        pages = [page.extract_text() or "" for page in reader.pages]
    except GatewiseError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are damages
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GatewiseError(f"{name} cannot be read as PDF ({reason[:150]}): save or download it again") from error
    finally:
        log.setLevel(level)
    if all(sum(map(str.isalpha, page)) < _SCANNED for page in pages):
        raise GatewiseError(
            f"{name} has no text on its {len(pages)} {'page' if len(pages) == 1 else 'pages'}, as scanned pages have none: run text"
            " recognition (OCR) over it first"
        )
    yield from _paragraphs(_without_margins(pages), printed=True)


def _without_margins(pages: list[str]) -> list[tuple[str, str]]:
    """The lines of pages with their places, without page numbers and what stands at the top or bottom of several pages."""
    lines = [[line for line in page.split("\n") if not _PAGE_NUMBER.fullmatch(line.strip())] for page in pages]
    filled = [[line.strip() for line in page if line.strip()] for page in lines]
    outer = Counter(line for page in filled if page for line in {page[0], page[-1]})
    # What ends a sentence is no header, and text left out could be a warning.
    margins = {line for line, count in outer.items() if count >= _REPEATED and _looks_like_heading(line)}
    kept = []
    for number, page in enumerate(lines, start=1):
        inside = [line for line in page if line.strip()]
        while inside and inside[0].strip() in margins:
            inside.pop(0)
        while inside and inside[-1].strip() in margins:
            inside.pop()
        kept += [(f"page {number}", line) for line in inside]
    return kept


def _docx(content: bytes, name: str) -> Iterator[Block]:
    try:
        import docx
        from docx.table import Table
    except ImportError:
        raise _missing("python-docx", name) from None
    try:
        parts = list(docx.Document(io.BytesIO(content)).iter_inner_content())
    except Exception as error:  # no zip archive, no document in it, broken XML
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GatewiseError(f"{name} cannot be read as DOCX ({reason[:150]}): save it again as a Word document (.docx)") from error
    for number, part in enumerate(parts, start=1):
        where = f"paragraph {number}"
        if isinstance(part, Table):
            for row in part.rows:
                # A cell that spans columns comes once for each.
                yield Block(_line(" ".join(dict.fromkeys(cell.text for cell in row.cells))), 0, f"{where}, a table")
            continue
        style = part.style.name if part.style is not None and part.style.name else ""
        heading = re.fullmatch(r"heading (\d)", style.lower())
        level = 1 if style.lower() == "title" else int(heading[1]) if heading else 0
        yield Block(_line(part.text), level, where)


_READERS: dict[str, Callable[[bytes, str], Iterator[Block]]] = {
    ".txt": _text,
    ".md": _markdown,
    ".markdown": _markdown,
    ".pdf": _pdf,
    ".docx": _docx,
}


def _paragraphs(lines: list[tuple[str, str]], *, printed: bool = False) -> Iterator[Block]:
    """Lines to paragraphs, parted by empty lines; a line "population@passage" is one of its own.

    Args:
        printed: the lines are those of printed pages, without empty ones between them: a short line that ends a sentence ends its
            paragraph.
    """
    longest = max((len(line.strip()) for _, line in lines), default=0)
    gathered: list[str] = []
    place = ""
    for where, raw in [*lines, ("", "")]:
        line = raw.strip()
        alone = population_mark(line) > 0
        if gathered and (not line or alone or (printed and _looks_like_heading(line) and _SENTENCE_END.search(gathered[-1]))):
            yield _paragraph(gathered, place)
            gathered = []
        if not line:
            continue
        place = place if gathered else where
        gathered.append(line)
        ends = bool(_SENTENCE_END.search(line)) and len(line) < 0.75 * longest
        title = len(gathered) == 1 and _looks_like_heading(line) and len(line) < 0.75 * longest
        if alone or (printed and (ends or title)):
            yield _paragraph(gathered, place)
            gathered = []


def population_mark(text: str) -> int:
    """Where the "@" stands that parts a population from its passage; -1 without one. That of an address is none."""
    at = text.find("@")
    is_address = re.match(r"[\w-]+(?:\.[\w-]+)+\b", text[at + 1 :]) and not text[at - 1].isspace()
    return -1 if at <= 0 or is_address else at


def _paragraph(lines: list[str], where: str) -> Block:
    text = lines[0]
    for line in lines[1:]:
        stem = re.search(r"([a-z]+)-$", text)
        if stem and line[0].islower():
            text = (text if stem[1] in _PREFIXES else text[:-1]) + line
        else:
            text += line if _HAN_END.search(text) and not line[0].isascii() else f" {line}"
    heading = len(lines) == 1 and _looks_like_heading(text)
    return Block(_line(text), int(heading), where)


def _looks_like_heading(line: str) -> bool:
    """Whether a line of plain text stands like a heading: short, no sentence, no item of a list."""
    if len(line) > _HEADING or _SENTENCE_END.search(line) or "@" in line or "，" in line or "。" in line:
        return False
    return bool(re.match(r"(?:\d+(?:\.\d+)*\.?\s+|[一二三四五六七八九十]+、\s*)?[A-Z\u4e00-\u9fff]", line))


def _decoded(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GatewiseError(f"{name}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from error
    if "\x00" in text:
        raise GatewiseError(f"{name}: not text (it has zero bytes), expected {_suffixes()}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_suffix(suffix: str, name: str) -> None:
    if suffix.lower() not in _READERS:
        raise GatewiseError(f"{name}: the name ends in {suffix!r}, expected {_suffixes()}")


def _line(text: str) -> str:
    return " ".join(text.split())


def _missing(library: str, name: str) -> GatewiseError:
    return GatewiseError(f"{name} needs {library} to be read, which is not installed: install gatewise[mdt]")


def _suffixes() -> str:
    return ".txt, .md, .pdf or .docx"
