"""Word documents, read element by element.

python-docx's own texts leave out insertions, content controls and more. mammoth, tried on the corpus of the tests, reads hidden
text, misses headings by outline level or by a style based on a heading, and drops equations, simple fields and all places.
"""

import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import takewhile
from typing import Any

from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.documents.document import (
    HIDDEN,
    LOWERED,
    NOTE,
    RAISED,
    STRUCK,
    TYPED_BULLET,
    UNKNOWN,
    Block,
    Document,
    Unread,
    in_one_line,
    of_symbol_font,
    one_line,
    quoted_list,
    with_footnotes,
)
from gatewise_mdt.documents.headings import (
    ITEM_NUMBER,
    SENTENCE_END,
    counted,
    is_label,
    number_depth,
    reads_as_sentence,
    style_of,
)
from gatewise_mdt.documents.numbering import _W, STEP, Indent, ListPlace, Numbering, indent_of, value_of, whole_of
from gatewise_mdt.documents.tables import Cell, table_blocks

_MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_DRAWING = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"  # says again what stands before it
_DELETED = {f"{_W}del", f"{_W}moveFrom"}
_MOVED = {*_DELETED, f"{_W}ins", f"{_W}moveTo"}
# Properties and instructions, the reading aids over Chinese characters, and text boxes, which are read by themselves.
_UNSAID = {
    *_DELETED,
    _FALLBACK,
    *(f"{_W}{tag}" for tag in ("pPr", "rPr", "tblPr", "tblGrid", "trPr", "tcPr", "sdtPr", "sectPr", "delText", "instrText", "rt")),
    f"{_W}txbxContent",
}
_SAID = {f"{_W}noBreakHyphen": "-", **dict.fromkeys((f"{_W}tab", f"{_W}ptab", f"{_W}br", f"{_W}cr"), " ")}
_TEXT = {f"{_W}t", f"{_MATH}t", f"{_DRAWING}t"}
_UNREADABLE = {
    f"{_DRAWING}blip": "picture",
    "{urn:schemas-microsoft-com:vml}imagedata": "picture",
    "{http://schemas.openxmlformats.org/drawingml/2006/chart}chart": "chart",
    "{http://schemas.openxmlformats.org/drawingml/2006/diagram}relIds": "diagram",
    f"{_W}object": "embedded object",
    f"{_W}altChunk": "embedded document",
}
_DEEP_CELL = "a cell of the table has a list within a list, or a table, which is read as text: compare it with the document"
_MOST = 2**29  # bytes, unpacked: what a file of a few kilobytes may say it has
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
        if (size := sum(one.file_size for one in zipfile.ZipFile(io.BytesIO(content)).infolist())) > _MOST:
            raise ValueError(f"unpacked it has {size >> 20} MiB, more than {_MOST >> 20}")
        opened = docx.Document(io.BytesIO(content))
        beside = list(_parts_beside(opened))
        footnotes = {key: said for key, kind, said in beside if kind.endswith("notes")}
        reading = _Reading(_Styles(opened.styles.element), footnotes, Numbering(_numbering(opened)))
        body = opened.element.body
        blocks = tuple(reading.read(body))
        for key, kind, said in beside:  # headers, footers, comments, and footnotes without a place
            if key not in reading.referred and any(map(str.isalpha, said)):  # not a page's number alone
                reading.left.tell(f"the {kind if kind.endswith('s') else f'{kind}s'} were left out", said)
        return Document(name, blocks, tuple(f"{name}: {note}" for note in reading.notes(body)))
    except Exception as error:  # no zip archive, no document in it, broken XML, and as many damages as there are files
        raise GatewiseError(
            f"{name} cannot be read as DOCX ({reason_of(error, 150)}): save it again as a Word document (.docx)"
        ) from error


class _Styles:
    """What styles say of paragraphs and runs, with what they are based on."""

    def __init__(self, root: Any) -> None:
        self.known = {style.get(f"{_W}styleId", ""): style for style in root.iter(f"{_W}style")}
        default = (key for key, one in self.known.items() if _is_on(one, "default") and one.get(f"{_W}type") == "paragraph")
        self.normal = next(default, "")  # of paragraphs that name none
        self.defaults = root.findall(f"{_W}docDefaults/{_W}rPrDefault")  # of all runs
        self.chain, self._styled = cache(self._chain), cache(self._of_styles)  # asked for each run

    def _chain(self, style: str) -> list[Any]:
        """A style, the one that it is based on, and so on."""
        found: list[Any] = []
        while style in self.known and self.known[style] not in found:
            found.append(self.known[style])
            style = value_of(found[-1].find(f"{_W}basedOn"))
        return found

    def of_paragraph(self, paragraph: Any) -> list[Any]:
        return self.chain(value_of(paragraph.find(f"{_W}pPr/{_W}pStyle"), self.normal))

    def outline(self, paragraph: Any) -> int:
        """The outline level of a paragraph, 0 for "Heading 1", -1 for a title, 9 for text."""
        for holder in (paragraph, *self.of_paragraph(paragraph)):
            level = holder.find(f"{_W}pPr/{_W}outlineLvl")
            if level is not None:
                return whole_of(value_of(level), _BODY)
            name = _name(holder)
            if heading := re.fullmatch(r"heading (\d)", name):
                return int(heading[1]) - 1
            if name == "title":
                return -1
        return _BODY

    def property(self, run: Any, paragraph: Any, tag: str) -> Any:
        """A property of a run: its own, that of its style, that of its paragraph's style, or the document's; None without one."""
        own = run.find(f"{_W}rPr/{_W}{tag}")
        styles = value_of(run.find(f"{_W}rPr/{_W}rStyle")), value_of(paragraph.find(f"{_W}pPr/{_W}pStyle"), self.normal)
        return self._styled(styles, tag) if own is None else own

    def _of_styles(self, styles: tuple[str, str], tag: str) -> Any:
        """What the styles of a run and of its paragraph say of a property, or else the document."""
        holders = (*self.chain(styles[0]), *self.chain(styles[1]), *self.defaults)
        return next((found for holder in holders if (found := holder.find(f"{_W}rPr/{_W}{tag}")) is not None), None)

    def heads_tables(self, table: Any) -> bool:
        """Whether a table's style sets its first row off, and the table wants that."""
        look = table.find(f"{_W}tblPr/{_W}tblLook")
        if look is None or not (_is_on(look, "firstRow") or int(look.get(f"{_W}val", "0"), 16) & 0x20):
            return False
        chain = self.chain(value_of(table.find(f"{_W}tblPr/{_W}tblStyle")))
        parts = [part for one in chain for part in one.iter(f"{_W}tblStylePr")]
        return any(part.get(f"{_W}type") == "firstRow" and len(part) > 0 for part in parts)

    def look(self, paragraph: Any) -> tuple[float, bool]:
        """The size in points of the largest letters, and whether all are bold."""
        runs = [run for run in paragraph.iter(f"{_W}r") if any((text.text or "").strip() for text in run.iter(f"{_W}t"))]
        points = [whole_of(value_of(self.property(run, paragraph, "sz")), 22) / 2 for run in runs]
        return max(points, default=0.0), bool(runs) and all(_on(self.property(run, paragraph, "b")) for run in runs)


def _name(style: Any) -> str:
    return value_of(style.find(f"{_W}name")).lower()


def _on(element: Any) -> bool:
    return element is not None and value_of(element, "1") not in ("0", "false", "off")


def _is_on(element: Any, attribute: str) -> bool:
    return element.get(f"{_W}{attribute}", "0") in ("1", "true", "on")


class _Reading:
    """The walk through a document's body."""

    def __init__(self, styles: _Styles, footnotes: dict[str, str], numbering: Numbering) -> None:
        self.styles, self.footnotes = styles, footnotes  # by their kind and number
        self.numbering = numbering
        self.lists: list[ListPlace] = []  # the items that the paragraph may stand under, the outermost first
        self.referred: set[str] = set()  # footnotes that the text refers to
        self.left = Unread()
        self.contents: list[str] = []  # lines of a table of contents
        self.looks: dict[int, tuple[float, bool]] = {}  # of what may be a heading by its look alone, by the ids of blocks
        self.sizes: Counter[float] = Counter()  # letters of each size
        self.number = 0  # of the paragraph or table
        self.boxed = self.deep_cells = False
        self.within: Any = None  # the paragraph that is being read

    def read(self, body: Any) -> Iterator[Block]:
        """All blocks, with headings and footnotes."""
        for block in self._with_headings(list(self.blocks(body))):
            yield from with_footnotes(in_one_line(block), self.footnotes)

    def blocks(self, container: Any) -> Iterator[Block]:
        for child in container:
            if child.tag in _UNSAID:
                continue
            if child.tag == f"{_W}p":
                yield from self._paragraph(child)
            elif child.tag == f"{_W}tbl":
                yield from self._table(child)
            elif child.tag in _UNREADABLE:
                self.left.counts[_UNREADABLE[child.tag]] += 1
            else:  # a content control or another cover around paragraphs
                yield from self.blocks(child)

    def _paragraph(self, paragraph: Any) -> Iterator[Block]:
        self.number += 1
        where = f"paragraph {self.number}"
        said = self._said(paragraph)
        names = [_name(style) for style in self.styles.of_paragraph(paragraph)]
        if any(re.fullmatch(r"toc (?:\d|heading)", name) for name in names):
            self.contents.append(one_line(said))
        else:
            outline = self.styles.outline(paragraph)
            level = outline + 2 if outline < _BODY else 0
            place, number = self._in_list(paragraph, names)
            item = place is not None and not level
            if not level and place is None and (typed := TYPED_BULLET.match(said.lstrip())):
                item, said = True, said.lstrip()[typed.end() :]
            look = self.styles.look(paragraph)
            if not level and not item and (place := self._typed(paragraph, said.lstrip(), look)) is not None:
                item = True
            depth = 0 if level or not one_line(said) else self._depth(paragraph, place, item)
            block = Block(
                f"{number} {said}" if item and number else said, level, where, "item" if item else "paragraph", depth=depth
            )
            self.sizes[look[0]] += len(said)
            if not (level or item or depth or self.boxed):
                self.looks[id(block)] = look
            yield block
        yield from self._text_boxes(paragraph, where)

    def _in_list(self, paragraph: Any, names: Sequence[str]) -> tuple[ListPlace | None, str]:
        """Where an item stands, and the number that Word shows before it; None for a paragraph that is no item."""
        holders = (paragraph, *self.styles.of_paragraph(paragraph))
        properties = next((found for one in holders if (found := one.find(f"{_W}pPr/{_W}numPr")) is not None), None)
        if properties is not None:
            name, level = self._list(properties, holders[1].get(f"{_W}styleId", "") if len(holders) > 1 else "")
            if name not in ("", "0"):  # 0 takes a paragraph out of the list of its style
                indent = self._indent(paragraph)
                return _place(name, level, indent, level), self.numbering.next_number(name, level)
        style = next((found for name in names if (found := re.fullmatch(r"list(?: bullet| number)?(?: (\d))?", name))), None)
        if style is None or properties is not None:
            return None, ""
        indent = self._indent(paragraph)
        return _place("", 0, indent, int(style[1] or 1) - 1), ""

    def _typed(self, paragraph: Any, said: str, look: tuple[float, bool]) -> ListPlace | None:
        """Where an item stands whose number is typed; None for what is none, or may be a heading."""
        number = ITEM_NUMBER.match(said)
        if number is None or look[1] or not (reads_as_sentence(said) or re.search(r"[:：]$", one_line(said))):
            return None
        own = _place(style_of(said), 0, self._indent(paragraph), 0)
        return replace(own, typed=True, opens=counted(number) == 1)

    def _indent(self, paragraph: Any) -> Indent:
        """How far a paragraph is moved in, by what it says itself, its list or its style."""
        found = Indent()
        for holder in (paragraph, *self.styles.of_paragraph(paragraph)):
            found, properties = found.over(indent_of(holder)), holder.find(f"{_W}pPr/{_W}numPr")
            if properties is not None:
                found = found.over(self.numbering.indent(*self._list(properties, holder.get(f"{_W}styleId", ""))))
        return found

    def _list(self, properties: Any, style: str) -> tuple[str, int]:
        """Which list a paragraph is of, and on which level; where the level is not said, on that of its style."""
        name, own = value_of(properties.find(f"{_W}numId")), properties.find(f"{_W}ilvl")
        return name, self.numbering.level_of(name, style) if own is None else whole_of(value_of(own), 0)

    def _depth(self, paragraph: Any, place: ListPlace | None, item: bool) -> int:
        """How many items a paragraph stands under; an item is one of those for what comes after it."""
        indent = self._indent(paragraph)
        if item:
            own = place or _place("", 0, indent, 0)
            while self.lists and not own.is_below(self.lists[-1]):
                if own.is_beside(self.lists.pop()):
                    break
            self.lists.append(own)
            return len(self.lists) - 1
        while self.lists and not self.lists[-1].holds(indent.left or 0):
            self.lists.pop()
        return len(self.lists)

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
            above = block.level or above
            made.append(replace(block, level=above + ranks[keys[id(block)]]) if id(block) in keys else block)
        return made

    def _text_boxes(self, element: Any, where: str) -> Iterator[Block]:
        was, number, self.boxed = self.boxed, self.number, True
        for box in element.iter(f"{_W}txbxContent"):
            around = takewhile(lambda outer: outer is not element, box.iterancestors())
            said_elsewhere = any(outer.tag in (_FALLBACK, *_DELETED) for outer in box.iterancestors())
            # A box within a box is read with its paragraph.
            if not said_elsewhere and not any(outer.tag == f"{_W}txbxContent" for outer in around):
                yield from (replace(block, where=f"{where}, a text box") for block in list(self.blocks(box)))
        self.boxed, self.number = was, number

    def _table(self, table: Any) -> Iterator[Block]:
        """The rows, a cell once however many columns it spans, and again in each row that it spans.

        The cells' own elements are read: python-docx lays out a grid first, which an odd table has none of. A table of one cell is
        a box, whose paragraphs are read as such.
        """
        rows = [row for row in _inside(table, "tr") if row.find(f"{_W}trPr/{_W}del") is None]
        single = [cell for row in rows for cell in _inside(row, "tc")]
        if len(single) == 1:
            was, self.boxed = self.boxed, True
            yield from list(self.blocks(single[0]))
            self.boxed = was
            return
        self.number += 1
        self.lists = []
        where = f"paragraph {self.number}, a table"
        spanning: dict[int, str] = {}
        made: list[list[Cell]] = []
        headers = 0
        for row in rows:
            if _on(row.find(f"{_W}trPr/{_W}hidden")):
                self.left.tell(HIDDEN, one_line(self._all(row)))
                continue
            headers += len(made) == headers and _on(row.find(f"{_W}trPr/{_W}tblHeader"))
            cells: list[Cell] = []
            column = whole_of(value_of(row.find(f"{_W}trPr/{_W}gridBefore")), 0)
            for cell in _inside(row, "tc"):
                text = "" if cell.find(f"{_W}tcPr/{_W}cellDel") is not None else self._cell(cell)
                merge = cell.find(f"{_W}tcPr/{_W}vMerge")
                if merge is None:
                    spanning.pop(column, None)
                elif value_of(merge) == "restart" or column not in spanning:
                    spanning[column] = text
                else:
                    text = f"{spanning[column]} {text}".strip()
                span = min(max(1, whole_of(value_of(cell.find(f"{_W}tcPr/{_W}gridSpan")), 1)), 1000)
                cells.append(Cell(text, column, span, all(self.styles.look(one)[1] for one in cell.iter(f"{_W}p"))))
                column += span
            made.append(cells)
        blocks = table_blocks(made, [where] * len(made), headers or (1 if self.styles.heads_tables(table) else None))
        notes, self.deep_cells = ((_DEEP_CELL,) if self.deep_cells else ()), False
        yield from (replace(block, notes=(*block.notes, *notes)) for block in blocks)
        yield from self._text_boxes(table, where)

    def _cell(self, cell: Any) -> str:
        """The text of a cell, in which the items of a list are parted."""
        said = ""
        within: list[ListPlace] = []
        for child in cell:
            self.deep_cells |= child.tag == f"{_W}tbl"
            place, number = None, ""
            if child.tag == f"{_W}p":
                names = [_name(style) for style in self.styles.of_paragraph(child)]
                place, number = self._in_list(child, names)
            part = " ".join(f"{number} {self._said(child)}".split())
            if not part:
                continue
            if place is not None:
                deeper = bool(within) and place.is_below(within[-1])
                self.deep_cells |= deeper
                said += "" if not said or SENTENCE_END.search(said) else ":" if deeper else ";"
                within.append(place)
            said = f"{said} {part}".strip()
        return said

    def _all(self, element: Any) -> str:
        return "".join(map(self._said, element))

    def _said(self, element: Any) -> str:
        """The text of an element."""
        tag = element.tag
        if not isinstance(tag, str) or tag in _UNSAID:
            return ""
        if tag in _TEXT:
            said = element.text or ""
            return of_symbol_font(said) if tag == f"{_W}t" and self._in_symbol_font(element.getparent()) else said
        if tag in _SAID:
            return _SAID[tag]
        if tag in _UNREADABLE:
            self.left.counts[_UNREADABLE[tag]] += 1
            return ""
        if tag in (f"{_W}footnoteReference", f"{_W}endnoteReference"):
            key = f"{'footnotes' if 'footnote' in tag else 'endnotes'} {element.get(f'{_W}id', '')}"
            self.referred |= {key} & self.footnotes.keys()
            return f"{NOTE}{key}{NOTE}" if key in self.footnotes else ""
        if tag == f"{_W}sym":
            return self._symbol(element)
        if tag == f"{_W}p":
            self.within = element
        if tag == f"{_W}r" and _on(self._property(element, "vanish")):
            self.left.tell(HIDDEN, one_line("".join(text.text or "" for text in element.iter(f"{_W}t"))))
            return ""
        said = self._all(element)
        if tag == f"{_W}r":
            raised = value_of(self._property(element, "vertAlign")) == "superscript" and NOTE not in said
            # "50" struck out before "5" is not 505.
            if self._is_struck(element):
                self.left.tell(STRUCK, "".join(text.text or "" for text in element.iter(f"{_W}t")))
                said = f" {said} "
            return f"{RAISED}{said}{LOWERED}" if raised else said
        if tag in (f"{_MATH}sup", f"{_MATH}den"):
            return f"{'^' if tag == f'{_MATH}sup' else '/'}{said}"
        self.left.counts["equation"] += tag == f"{_MATH}oMath"
        # Paragraphs and cells within a cell or box stand apart, and "1/2" must not run into the "500 mg" beside it.
        return f" {said} " if tag in (f"{_W}p", f"{_W}tc", f"{_DRAWING}p", f"{_MATH}oMath", f"{_MATH}f") else said

    def _property(self, run: Any, tag: str) -> Any:
        """A property of a run of the paragraph that is being read; of one outside of any, its own."""
        return run.find(f"{_W}rPr/{_W}{tag}") if self.within is None else self.styles.property(run, self.within, tag)

    def _in_symbol_font(self, run: Any) -> bool:
        font = self._property(run, "rFonts")
        return font is not None and "symbol" in (font.get(f"{_W}ascii", "").lower(), font.get(f"{_W}hAnsi", "").lower())

    def _is_struck(self, run: Any) -> bool:
        return any(_on(self._property(run, tag)) for tag in ("strike", "dstrike"))

    def _symbol(self, element: Any) -> str:
        said = chr(0xF000 | (int(element.get(f"{_W}char", "0"), 16) & 0xFF))  # with or without this
        return of_symbol_font(said) if element.get(f"{_W}font", "").lower() == "symbol" else UNKNOWN

    def notes(self, body: Any) -> Iterator[str]:
        """What the walk met and could not read as it stands."""
        yield from self.left.notes()
        if self.contents:
            yield f"a table of contents was left out: {quoted_list(self.contents, most=3)}"
        if next(body.iter(*_MOVED), None) is not None:
            yield "tracked changes were read as if all were accepted"


def _place(name: str, level: int, indent: Indent, depth: int) -> ListPlace:
    """Where an item of a list stands; one that no indent is known of, as deep as its style or level says."""
    if indent.left is None:
        return ListPlace(name, level, STEP * depth, STEP * (depth + 1))
    return ListPlace(name, level, indent.mark, indent.left)


def _inside(table: Any, tag: str) -> Iterator[Any]:
    """The rows of a table or the cells of a row, those in content controls too."""
    for child in table:
        if child.tag == f"{_W}{tag}":
            yield child
        elif isinstance(child.tag, str) and child.tag not in _UNSAID and child.tag not in (f"{_W}tr", f"{_W}tc"):
            yield from _inside(child, tag)


def _numbering(opened: Any) -> Any:
    """What the document says of its lists; None if it says nothing."""
    from docx.oxml import parse_xml

    parts = [one.target_part for one in opened.part.rels.values() if one.reltype.endswith("/numbering") and not one.is_external]
    return parse_xml(parts[0].blob) if parts else None


def _parts_beside(opened: Any) -> Iterator[tuple[str, str, str]]:
    """What stands outside the body, each with a key and its kind."""
    from docx.oxml import parse_xml

    for relation in opened.part.rels.values():
        kind = relation.reltype.rpartition("/")[2]
        if relation.is_external or kind not in ("footnotes", "endnotes", "comments", "header", "footer"):
            continue
        root = parse_xml(relation.target_part.blob)
        for part in [root] if kind in ("header", "footer") else root:
            reading = _Reading(_Styles(root), {}, Numbering(None))
            yield f"{kind} {part.get(f'{_W}id', relation.rId)}", kind, one_line(reading._all(part))
