"""Word documents, read element by element.

python-docx's own texts leave out insertions, content controls and more. mammoth, tried on the corpus of the tests, reads hidden
text, misses headings by outline level or by a style based on a heading, and drops equations, simple fields and all places.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.documents.document import LOWERED, NOTE, RAISED, UNKNOWN, Block, Document, one_line, quoted_list, with_footnotes
from gatewise_mdt.documents.headings import is_label, number_depth
from gatewise_mdt.documents.tables import Cell, table_blocks

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
_BODY = 9  # the outline level of text
_LARGER = 1.15  # of the size of most text: a line in such letters is a heading


def read_docx(content: bytes, name: str) -> Document:
    """Headings, paragraphs, items, rows of tables and text boxes, all tracked changes accepted; the notes say what is left out.

    A title stands above all headings: it has level 1, and "Heading 1" level 2. Headings are told by their styles, those that these
    are based on, and outline levels; where none of that is, by bold or large letters.

    Raises:
        GatewiseError: the content cannot be read.
    """
    import docx

    try:
        opened = docx.Document(io.BytesIO(content))
        notes = {key: said for key, kind, said in _parts_beside(opened) if kind in ("footnotes", "endnotes")}
        reading = _Reading(name, _Styles.of(opened), notes)
        blocks = tuple(reading.read(opened.element.body))
        return Document(
            name, blocks, (*reading.notes(), *_changes(opened.element.body, name), *_beside(opened, name, reading.referred))
        )
    except Exception as error:  # no zip archive, no document in it, broken XML, and as many damages as there are files
        raise GatewiseError(
            f"{name} cannot be read as DOCX ({reason_of(error, 150)}): save it again as a Word document (.docx)"
        ) from error


@dataclass(frozen=True)
class _Styles:
    """What styles say of paragraphs and runs, with what they are based on.

    Attributes:
        known: id of a style -> its element.
        normal: id of the style of paragraphs that name none.
        defaults: properties of all runs; None without any.
    """

    known: dict[str, Any]
    normal: str
    defaults: Any
    found: dict[tuple[str, str], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, opened: Any) -> "_Styles":
        root = opened.styles.element
        known = {style.get(f"{_W}styleId", ""): style for style in root.iter(f"{_W}style")}
        normal = next((key for key, one in known.items() if _is_on(one, "default") and one.get(f"{_W}type") == "paragraph"), "")
        return cls(known, normal, root.find(f"{_W}docDefaults/{_W}rPrDefault/{_W}rPr"))

    def chain(self, style: str) -> Iterator[Any]:
        """A style, the one that it is based on, and so on."""
        seen: set[str] = set()
        while style in self.known and style not in seen:
            seen.add(style)
            yield self.known[style]
            base = self.known[style].find(f"{_W}basedOn")
            style = base.get(f"{_W}val", "") if base is not None else ""

    def of_paragraph(self, paragraph: Any) -> str:
        named = paragraph.find(f"{_W}pPr/{_W}pStyle")
        return self.normal if named is None else named.get(f"{_W}val", "")

    def names(self, style: str) -> list[str]:
        found = (one.find(f"{_W}name") for one in self.chain(style))
        return [one.get(f"{_W}val", "").lower() for one in found if one is not None]

    def outline(self, paragraph: Any) -> int:
        """The outline level of a paragraph, 0 for "Heading 1", -1 for a title, 9 for text."""
        own = paragraph.find(f"{_W}pPr/{_W}outlineLvl")
        if own is not None:
            return _number(own, _BODY)
        for style in self.chain(self.of_paragraph(paragraph)):
            set_to, named = style.find(f"{_W}pPr/{_W}outlineLvl"), style.find(f"{_W}name")
            name = "" if named is None else named.get(f"{_W}val", "").lower()
            heading = re.fullmatch(r"heading (\d)", name)
            if set_to is not None or heading:
                return _number(set_to, _BODY) if set_to is not None else int(heading[1]) - 1 if heading else _BODY
            if name == "title":
                return -1
        return _BODY

    def property(self, run: Any, paragraph: Any, tag: str) -> Any:
        """A property of a run: its own, that of its style, that of its paragraph's style, or the document's; None without one."""
        own = run.find(f"{_W}rPr/{_W}{tag}")
        if own is not None:
            return own
        styled = run.find(f"{_W}rPr/{_W}rStyle")
        for style in ("" if styled is None else styled.get(f"{_W}val", ""), self.of_paragraph(paragraph)):
            if (style, tag) not in self.found:
                places = (one.find(f"{_W}rPr/{_W}{tag}") for one in self.chain(style))
                self.found[style, tag] = next((place for place in places if place is not None), None)
            if self.found[style, tag] is not None:
                return self.found[style, tag]
        return None if self.defaults is None else self.defaults.find(f"{_W}{tag}")

    def heads_tables(self, table: Any) -> bool:
        """Whether a table's style sets its first row off, and the table wants that."""
        look, style = table.find(f"{_W}tblPr/{_W}tblLook"), table.find(f"{_W}tblPr/{_W}tblStyle")
        if look is None or style is None or not _first_row(look):
            return False
        parts = (part for one in self.chain(style.get(f"{_W}val", "")) for part in one.iter(f"{_W}tblStylePr"))
        return any(part.get(f"{_W}type") == "firstRow" and len(part) > 0 for part in parts)

    def is_hidden(self, run: Any, paragraph: Any) -> bool:
        return _on(self.property(run, paragraph, "vanish"))

    def look(self, paragraph: Any) -> tuple[float, bool]:
        """The size in points of the largest letters, and whether all are bold."""
        runs = [run for run in paragraph.iter(f"{_W}r") if any((text.text or "").strip() for text in run.iter(f"{_W}t"))]
        points = [_number(self.property(run, paragraph, "sz"), 22) / 2 for run in runs]
        return max(points, default=0.0), bool(runs) and all(_on(self.property(run, paragraph, "b")) for run in runs)


def _number(element: Any, otherwise: int) -> int:
    """The value of an element; ``otherwise`` where there is none, or no number."""
    value = "" if element is None else element.get(f"{_W}val", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 5 else otherwise


def _first_row(look: Any) -> bool:
    if look.get(f"{_W}firstRow") is not None:
        return _is_on(look, "firstRow")
    try:
        return bool(int(look.get(f"{_W}val", "0"), 16) & 0x20)
    except ValueError:
        return False


def _on(element: Any) -> bool:
    return element is not None and element.get(f"{_W}val", "1") not in ("0", "false", "off")


def _is_on(element: Any, attribute: str) -> bool:
    return element.get(f"{_W}{attribute}", "0") in ("1", "true", "on")


@dataclass
class _Reading:
    """The walk through a document's body.

    Attributes:
        footnotes: texts of footnotes and endnotes by their kind and number.
        referred: those that the text refers to.
        left: what cannot be read -> how often it was met.
        hidden: texts that are hidden.
        contents: lines of a table of contents.
        looks: of the paragraphs that may be headings by their look alone, by the ids of their blocks.
        sizes: letters of each size.
    """

    name: str
    styles: _Styles
    footnotes: dict[str, str] = field(default_factory=dict)
    referred: set[str] = field(default_factory=set)
    left: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    looks: dict[int, tuple[float, bool]] = field(default_factory=dict)
    sizes: Counter[float] = field(default_factory=Counter)
    number: int = 0
    boxed: bool = False
    within: Any = None  # the paragraph that is being read

    def read(self, body: Any) -> Iterator[Block]:
        """All blocks, with headings and footnotes."""
        for block in self._with_headings(list(self.blocks(body))):
            yield from with_footnotes(replace(block, text=one_line(block.text), stem=one_line(block.stem)), self.footnotes)

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
        names = self.styles.names(self.styles.of_paragraph(paragraph))
        if any(re.fullmatch(r"toc (?:\d|heading)", name) for name in names):
            self.contents.append(one_line(said))
        else:
            outline = self.styles.outline(paragraph)
            level = outline + 2 if outline < _BODY else 0
            item = not level and (
                paragraph.find(f"{_W}pPr/{_W}numPr") is not None or any(name.startswith("list") for name in names)
            )
            block = Block(said, level, where, "item" if item else "paragraph")
            look = self.styles.look(paragraph)
            self.sizes[look[0]] += len(said)
            if not (level or item or self.boxed):
                self.looks[id(block)] = look
            yield block
        yield from self._boxes(boxes, where)

    def _with_headings(self, blocks: list[Block]) -> list[Block]:
        """The blocks, in which bold or large lines that read like headings are such, below those that have a style."""
        body = self.sizes.most_common(1)[0][0] if self.sizes else 0.0
        keys: dict[int, tuple[float, int]] = {}
        for block in blocks:
            size, bold = self.looks.get(id(block), (0.0, False))
            text = one_line(block.text)
            if (bold or size >= _LARGER * body > 0) and is_label(text):
                keys[id(block)] = (-size, number_depth(text))
        ranks = {key: rank for rank, key in enumerate(sorted(set(keys.values())), start=1)}
        made, above = [], 0
        for block in blocks:
            if id(block) in keys:
                made.append(replace(block, level=above + ranks[keys[id(block)]]))
                continue
            above = block.level or above
            made.append(block)
        return made

    def _boxes(self, boxes: list[Any], where: str) -> Iterator[Block]:
        while boxes:  # a box may hold another
            yield Block(one_line(self._all(boxes.pop(0), boxes)), 0, f"{where}, a text box")

    def _table(self, table: Any) -> Iterator[Block]:
        """The rows, a cell once however many columns it spans, and again in each row that it spans.

        The cells' own elements are read: python-docx lays out a grid first, which an odd table has none of. A table of one cell is
        a box, whose paragraphs are read as such.
        """
        rows = [row for row in _within(table, "tr") if row.find(f"{_W}trPr/{_W}del") is None]
        single = [cell for row in rows for cell in _within(row, "tc")]
        if len(single) == 1:
            yield from self._box(single[0])
            return
        self.number += 1
        where = f"paragraph {self.number}, a table"
        spanning: dict[int, str] = {}
        made: list[list[Cell]] = []
        boxes: list[Any] = []
        headers = 0
        for row in rows:
            if _on(row.find(f"{_W}trPr/{_W}hidden")):
                self.hidden.append(one_line(self._all(row, [])))
                continue
            headers += len(made) == headers and _on(row.find(f"{_W}trPr/{_W}tblHeader"))
            cells: list[Cell] = []
            column = _number(row.find(f"{_W}trPr/{_W}gridBefore"), 0)
            for cell in _within(row, "tc"):
                text = "" if cell.find(f"{_W}tcPr/{_W}cellDel") is not None else one_line(self._all(cell, boxes))
                merge = cell.find(f"{_W}tcPr/{_W}vMerge")
                if merge is None:
                    spanning.pop(column, None)
                elif merge.get(f"{_W}val") == "restart" or column not in spanning:
                    spanning[column] = text
                else:
                    text = f"{spanning[column]} {text}".strip()
                span = max(1, _number(cell.find(f"{_W}tcPr/{_W}gridSpan"), 1))
                cells.append(Cell(text, column, span, all(self.styles.look(one)[1] for one in cell.iter(f"{_W}p"))))
                column += span
            made.append(cells)
        yield from table_blocks(made, [where] * len(made), headers or (1 if self.styles.heads_tables(table) else None))
        yield from self._boxes(boxes, where)

    def _box(self, cell: Any) -> Iterator[Block]:
        was, self.boxed = self.boxed, True
        inside = [block for block in self.blocks(cell) if one_line(block.text)]
        self.boxed = was
        if len(inside) > 1 and not inside[0].level and not re.search(r"[.!?:;。！？：；]\s*$", inside[0].text):
            inside[0] = replace(inside[0], text=f"{inside[0].text}:")  # its title
        yield from inside

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
        if tag in (f"{_W}footnoteReference", f"{_W}endnoteReference"):
            return self._reference(element)
        if tag == f"{_W}p":
            self.within = element
        if tag == f"{_W}r" and self.within is not None and self.styles.is_hidden(element, self.within):
            if said := one_line("".join(text.text or "" for text in element.iter(f"{_W}t"))):
                self.hidden.append(said)
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
            is_raised = raised is not None and raised.get(f"{_W}val") == "superscript" and NOTE not in said
            return f"{RAISED}{said}{LOWERED}" if is_raised else said
        if tag == f"{_MATH}sup":
            return f"^{said}"
        if tag == f"{_MATH}den":
            return f"/{said}"
        # Paragraphs and cells within a cell or box stand apart, and "1/2" must not run into the "500 mg" beside it.
        return f" {said} " if tag in (f"{_W}p", f"{_W}tc", f"{_DRAWING}p", f"{_MATH}oMath", f"{_MATH}f") else said

    def _reference(self, element: Any) -> str:
        kind = "footnotes" if element.tag == f"{_W}footnoteReference" else "endnotes"
        key = f"{kind} {element.get(f'{_W}id', '')}"
        if key not in self.footnotes:
            return ""
        self.referred.add(key)
        return f"{NOTE}{key}{NOTE}"

    def _symbol(self, element: Any) -> str:
        try:
            code = int(element.get(f"{_W}char", ""), 16)
        except ValueError:
            code = 0
        own = code - 0xF000 if 0xF000 <= code < 0xF100 else code
        known = _SYMBOLS.get(own) if element.get(f"{_W}font", "").lower() == "symbol" else None
        if known is None:
            self.left["symbol"] += 1
        return known or UNKNOWN

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
            yield f"{self.name}: signs of a symbol font were not known ({self.left['symbol']}); {UNKNOWN} stands for each"
        if hidden := [text for text in self.hidden if text]:
            yield f"{self.name}: hidden text was left out: {quoted_list(hidden)}"
        if self.contents:
            yield f"{self.name}: a table of contents was left out: {quoted_list(self.contents, most=3)}"


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
        yield f"{name}: text that is struck through was read like any other: {quoted_list([text for text in struck if text])}"


def _beside(opened: Any, name: str, read: set[str]) -> Iterator[str]:
    """Notes on text that stands outside the body and is left out: headers, footers, comments, and footnotes without a place."""
    found: dict[str, list[str]] = {}
    for key, kind, said in _parts_beside(opened):
        if key not in read and any(map(str.isalpha, said)) and said not in found.setdefault(kind, []):
            found[kind].append(said)
    for kind, texts in found.items():
        named = kind if kind.endswith("s") else f"{kind}s"
        yield f"{name}: the {named} were left out: {quoted_list(texts)}"


def _parts_beside(opened: Any) -> Iterator[tuple[str, str, str]]:
    """What stands outside the body, each with a key and its kind."""
    from docx.oxml import parse_xml

    for relation in opened.part.rels.values():
        kind = relation.reltype.rpartition("/")[2]
        if relation.is_external or kind not in ("footnotes", "endnotes", "comments", "header", "footer"):
            continue
        root = parse_xml(relation.target_part.blob)
        for part in [root] if kind in ("header", "footer") else root:
            reading = _Reading("", _Styles({}, "", None))
            yield f"{kind} {part.get(f'{_W}id', relation.rId)}", kind, one_line(reading._all(part, []))
