"""Word documents, read element by element: python-docx's own texts leave out insertions, content controls and more."""

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gatewise.errors import GatewiseError, reason_of
from gatewise.mdt.documents.document import Block, Document, listed

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_DRAWING = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_CHOICE = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_DELETED = {f"{_W}del", f"{_W}moveFrom"}
_MOVED = {*_DELETED, f"{_W}ins", f"{_W}moveTo"}
# Properties and instructions, and the reading aids over Chinese characters.
_UNSAID = {
    *_DELETED,
    *(f"{_W}{tag}" for tag in ("pPr", "rPr", "tblPr", "tblGrid", "trPr", "tcPr", "sdtPr", "sectPr", "delText", "instrText", "rt")),
}
_TEXT = {f"{_W}t", f"{_MATH}t", f"{_DRAWING}t"}
_SPACES = {f"{_W}tab", f"{_W}ptab", f"{_W}br", f"{_W}cr"}
_UNREADABLE = {
    f"{_DRAWING}blip": "picture",
    "{urn:schemas-microsoft-com:vml}imagedata": "picture",
    "{http://schemas.openxmlformats.org/drawingml/2006/chart}chart": "chart",
    "{http://schemas.openxmlformats.org/drawingml/2006/diagram}relIds": "diagram",
    f"{_W}object": "embedded object",
    f"{_W}altChunk": "embedded document",
}
# The font Symbol's own places in Unicode, of signs that change what a sentence says.
_SYMBOLS = {
    0xA3: "≤", 0xA5: "∞", 0xAB: "↔", 0xAC: "←", 0xAD: "↑", 0xAE: "→", 0xAF: "↓", 0xB0: "°", 0xB1: "±", 0xB3: "≥", 0xB4: "×",
    0xB7: "•", 0xB8: "÷", 0xB9: "≠", 0xBB: "≈", 0x3C: "<", 0x3D: "=", 0x3E: ">", 0x2B: "+", 0x2D: "-", 0x61: "α", 0x62: "β",
    0x63: "χ", 0x64: "δ", 0x65: "ε", 0x67: "γ", 0x6B: "κ", 0x6C: "λ", 0x6D: "μ", 0x44: "Δ",
}  # fmt: skip
_UNKNOWN = "\ufffd"
# No XML text holds these: they stand around a superscript until all of a paragraph is known.
_RAISED, _LOWERED = "\x02", "\x03"


def read_docx(content: bytes, name: str) -> Document:
    """Headings, paragraphs, rows of tables and text boxes, with all tracked changes accepted; the notes say what is left out.

    A title stands above all headings: it has level 1, and "Heading 1" level 2.

    Raises:
        GatewiseError: the content cannot be read.
        ImportError: python-docx is not installed.
    """
    import docx

    try:
        opened = docx.Document(io.BytesIO(content))
        reading = _Reading(name, _styles(opened))
        blocks = tuple(reading.blocks(opened.element.body))
        return Document(name, blocks, (*reading.notes(), *_changes(opened.element.body, name), *_beside(opened, name)))
    except Exception as error:  # no zip archive, no document in it, broken XML, and as many damages as there are files
        raise GatewiseError(
            f"{name} cannot be read as DOCX ({reason_of(error, 150)}): save it again as a Word document (.docx)"
        ) from error


@dataclass
class _Reading:
    """The walk through a document's body.

    Attributes:
        styles: id of a style -> its name, in small letters.
        left: what cannot be read -> how often it was met.
    """

    name: str
    styles: dict[str, str]
    left: Counter[str] = field(default_factory=Counter)
    number: int = 0

    def blocks(self, container: Any) -> Iterator[Block]:
        for child in container:
            if child.tag in _UNSAID:
                continue
            if child.tag == f"{_W}p":
                yield from self._paragraph(child)
            elif child.tag == f"{_W}tbl":
                yield from self._table(child)
            elif child.tag in _UNREADABLE:
                self.left[_UNREADABLE[child.tag]] += 1
            else:  # a content control or another cover around paragraphs
                yield from self.blocks(_chosen(child))

    def _paragraph(self, paragraph: Any) -> Iterator[Block]:
        self.number += 1
        where = f"paragraph {self.number}"
        boxes: list[Any] = []
        said = self._said(paragraph, boxes)
        yield Block(_line(said), self._level(paragraph), where)
        yield from self._boxes(boxes, where)

    def _level(self, paragraph: Any) -> int:
        style = paragraph.find(f"{_W}pPr/{_W}pStyle")
        named = self.styles.get(style.get(f"{_W}val", ""), "") if style is not None else ""
        heading = re.fullmatch(r"heading (\d)", named)
        return 1 if named == "title" else int(heading[1]) + 1 if heading else 0

    def _boxes(self, boxes: list[Any], where: str) -> Iterator[Block]:
        while boxes:  # a box may hold another
            yield Block(_line(self._all(boxes.pop(0), boxes)), 0, f"{where}, a text box")

    def _table(self, table: Any) -> Iterator[Block]:
        """The rows, a cell once however many columns it spans, and again in each row that it spans.

        The cells' own elements are read: python-docx lays out a grid first, which an odd table has none of.
        """
        self.number += 1
        where = f"paragraph {self.number}, a table"
        spanning: dict[int, str] = {}
        for row in _within(table, "tr"):
            if row.find(f"{_W}trPr/{_W}del") is not None:
                continue
            boxes: list[Any] = []
            said = []
            column = _number_at(row, "trPr", "gridBefore", 0)
            for cell in _within(row, "tc"):
                text = "" if cell.find(f"{_W}tcPr/{_W}cellDel") is not None else _line(self._all(cell, boxes))
                merge = cell.find(f"{_W}tcPr/{_W}vMerge")
                if merge is None:
                    spanning.pop(column, None)
                elif merge.get(f"{_W}val") == "restart" or column not in spanning:
                    spanning[column] = text
                else:
                    text = f"{spanning[column]} {text}".strip()
                said.append(text)
                column += max(1, _number_at(cell, "tcPr", "gridSpan", 1))
            yield Block(_line(" ".join(said)), 0, where)
            yield from self._boxes(boxes, where)

    def _all(self, element: Any, boxes: list[Any]) -> str:
        return "".join(self._said(child, boxes) for child in element)

    def _said(self, element: Any, boxes: list[Any]) -> str:
        """The text of an element, in which text boxes are put aside for later."""
        tag = element.tag
        if not isinstance(tag, str) or tag in _UNSAID:
            return ""
        if tag in _TEXT:
            return element.text or ""
        if tag in _SPACES:
            return " "
        if tag in _UNREADABLE:
            self.left[_UNREADABLE[tag]] += 1
            return ""
        if tag == f"{_W}txbxContent":
            boxes.append(element)
            return ""
        if tag == f"{_W}noBreakHyphen":
            return "-"
        if tag == f"{_W}sym":
            return self._symbol(element)
        if tag == f"{_MATH}oMath":
            self.left["equation"] += 1
        said = self._all(_chosen(element), boxes)
        if tag == f"{_W}r":
            raised = element.find(f"{_W}rPr/{_W}vertAlign")
            return f"{_RAISED}{said}{_LOWERED}" if raised is not None and raised.get(f"{_W}val") == "superscript" else said
        if tag == f"{_MATH}sup":
            return f"^{said}"
        if tag == f"{_MATH}den":
            return f"/{said}"
        # Paragraphs and cells within a cell or box stand apart, and "1/2" must not run into the "500 mg" beside it.
        return f" {said} " if tag in (f"{_W}p", f"{_W}tc", f"{_DRAWING}p", f"{_MATH}oMath", f"{_MATH}f") else said

    def _symbol(self, element: Any) -> str:
        try:
            code = int(element.get(f"{_W}char", ""), 16)
        except ValueError:
            code = 0
        own = code - 0xF000 if 0xF000 <= code < 0xF100 else code
        known = _SYMBOLS.get(own) if element.get(f"{_W}font", "").lower() == "symbol" else None
        if known is None:
            self.left["symbol"] += 1
        return known or _UNKNOWN

    def notes(self) -> Iterator[str]:
        """What the walk met and could not read as it stands."""
        unread = [
            f"{count} {kind if count == 1 else f'{kind}s'}" for kind, count in self.left.items() if kind in _UNREADABLE.values()
        ]
        if unread:
            yield f"{self.name}: {', '.join(unread)} could not be read: look there for text that matters"
        if self.left["equation"]:
            yield f"{self.name}: equations were read as plain text ({self.left['equation']}): compare them with the document"
        if self.left["symbol"]:
            yield f"{self.name}: signs of a symbol font were not known ({self.left['symbol']}); {_UNKNOWN} stands for each"


def _styles(opened: Any) -> dict[str, str]:
    found = {}
    for style in opened.styles.element.iter(f"{_W}style"):
        named = style.find(f"{_W}name")
        found[style.get(f"{_W}styleId", "")] = named.get(f"{_W}val", "").lower() if named is not None else ""
    return found


def _chosen(element: Any) -> Any:
    """The children to read: of a content that is given in several ways only the first."""
    if element.tag != f"{_CHOICE}AlternateContent":
        return element
    choice = element.find(f"{_CHOICE}Choice")
    return choice if choice is not None else element


def _within(element: Any, tag: str) -> Iterator[Any]:
    """The rows of a table or the cells of a row, those in content controls too."""
    for child in element:
        if child.tag == f"{_W}{tag}":
            yield child
        elif isinstance(child.tag, str) and child.tag not in _UNSAID and child.tag not in (f"{_W}tr", f"{_W}tc"):
            yield from _within(child, tag)


def _number_at(element: Any, properties: str, tag: str, otherwise: int) -> int:
    found = element.find(f"{_W}{properties}/{_W}{tag}")
    value = "" if found is None else found.get(f"{_W}val", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 5 else otherwise


def _changes(body: Any, name: str) -> Iterator[str]:
    """Notes on tracked changes and on what is struck through."""
    if next(body.iter(*_MOVED), None) is not None:
        yield f"{name} has tracked changes: it was read as if all were accepted"
    struck = []
    for mark in body.iter(f"{_W}strike", f"{_W}dstrike"):
        run = mark.getparent().getparent()
        if mark.get(f"{_W}val", "1") not in ("0", "false", "off") and run is not None and run.tag == f"{_W}r":
            struck.append("".join(text.text or "" for text in run.iter(f"{_W}t")).strip())
    if any(struck):
        yield f"{name}: text that is struck through was read like any other: {listed([text for text in struck if text])}"


def _beside(opened: Any, name: str) -> Iterator[str]:
    """Notes on text that stands outside the body and is left out: footnotes, endnotes, comments, headers and footers."""
    from docx.oxml import parse_xml

    found: dict[str, list[str]] = {}
    for relation in opened.part.rels.values():
        kind = relation.reltype.rpartition("/")[2]
        if relation.is_external or kind not in ("footnotes", "endnotes", "comments", "header", "footer"):
            continue
        root = parse_xml(relation.target_part.blob)
        single = root if kind in ("header", "footer") else None
        for part in [single] if single is not None else root:
            said = _line(_Reading(name, {})._all(part, []))
            if any(map(str.isalpha, said)) and said not in found.setdefault(kind, []):
                found[kind].append(said)
    for kind, texts in found.items():
        named = kind if kind.endswith("s") else f"{kind}s"
        yield f"{name}: the {named} were left out: {listed(texts)}"


def _line(said: str) -> str:
    """One line of text; a superscript after a number is marked, as 10 to the 9th is not 109."""
    joined = said.replace(_LOWERED + _RAISED, "")
    marked = re.sub(rf"(?<=\d){_RAISED}(?=[-−–+]?\d)", "^", joined)
    return " ".join(marked.replace(_RAISED, "").replace(_LOWERED, "").split())
