"""HTML: headings, paragraphs, lists and tables as they are marked, without what a browser does not show and what leads elsewhere.

Styles are not worked out: what only CSS hides, numbers or sets side by side is read as it stands in the file.
"""

import copy
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.documents.document import (
    HIDDEN,
    LOWERED,
    NOTE,
    RAISED,
    STRUCK,
    TYPED_BULLET,
    Block,
    Document,
    Unread,
    in_one_line,
    of_symbol_font,
    one_line,
    quoted_list,
    with_footnotes,
)
from gatewise_mdt.documents.headings import SENTENCE_END, is_label
from gatewise_mdt.documents.numbering import written
from gatewise_mdt.documents.tables import Cell, table_blocks

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_APART = (
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure footer form header"
    " hgroup hr html legend li main menu ol p pre search section summary table tbody td tfoot th thead tr ul"
)
_UNSAID = "base head input link meta param rp rt script source style template title track wbr"
_BLOCKS, _LEFT_OUT = frozenset(_APART.split()), frozenset(_UNSAID.split())
_PRESSED = {"button", "datalist", "noscript", "option", "select", "textarea"}
_NAMES = {*_HEADINGS, "caption", "dt", "legend", "summary", "th"}  # where a button says what is below it
_OF_HEAD = {"base", "link", "meta", "script", "style", "template", "title"}
_UNREADABLE = {
    "svg": "picture", "canvas": "picture", "object": "embedded object", "embed": "embedded object", "iframe": "embedded document",
    "video": "film", "audio": "recording",
}  # fmt: skip
_AROUND = {"nav", "header", "footer", "aside"}  # outside of the main part they are about the site
_ROLES = {"navigation", "banner", "contentinfo", "search", "complementary"}
_HIDDEN = re.compile(r"(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)
_WORD_LEVEL = re.compile(r"mso-list:\s*(?!Ignore)\S+\s+level(\d)")
_BACK = re.compile(r"\s*[↩⏎↑^]\ufe0e?\s*$")
_KINDS = {"a": "lowerLetter", "A": "upperLetter", "i": "lowerRoman", "I": "upperRoman"}
_DEEP_CELL = "a cell of the table has a list or table within it, which is read as text: compare it with the document"
_SYMBOL = re.compile(r"font-family\s*:\s*[\"']?Symbol[\"']?\s*(?:[,;]|$)", re.IGNORECASE)  # and not "Segoe UI Symbol"
_BETWEEN = {"mfrac": "/", "msup": "^"}  # of MathML, whose two parts would run together
_BREAK = "\n"
_WIDEST = 1000  # columns or rows of a cell, as browsers have it


def read_html(text: str, name: str) -> Document:
    """Headings, paragraphs, items of lists and rows of tables of the page's main part.

    Raises:
        GatewiseError: the text cannot be read as HTML.
    """
    import lxml.html

    # A declaration of XML would speak of bytes, which are read by now.
    source = re.sub(r"^\s*<\?xml[^>]*\?>", lambda found: _BREAK * found[0].count(_BREAK), text)
    # Of pages in XML: a browser shows it, and the parser takes it for a comment.
    source = re.sub(r"<!\[CDATA\[(.*?)\]\]>", lambda found: html.escape(found[1], quote=False), source, flags=re.DOTALL)
    try:
        root = lxml.html.document_fromstring(source, parser=lxml.html.HTMLParser(huge_tree=True, remove_comments=True))
        body = _body(root)
        reading = _Reading(*_footnotes(root))
        main = _main(root if body is None else body)
        if main is not body and body is not None:
            reading.take_around(body, main)
        reading.walk(main, in_main=main is not body)
        blocks = reading.finished()
        if not any(
            any(map(str.isalpha, block.text)) for block in blocks if not block.level
        ):  # all of it stands in what others have around their text
            reading = _Reading(*_footnotes(root), whole=True)
            reading.walk(root if body is None else body)
            blocks = reading.finished()
    except RecursionError as error:
        raise GatewiseError(
            f"{name} cannot be read as HTML (elements within elements, hundreds deep): save it again, or as PDF"
        ) from error
    except (ValueError, lxml.etree.LxmlError) as error:
        raise GatewiseError(f"{name} cannot be read as HTML ({reason_of(error, 150)}): save it again, or as PDF") from error
    return Document(name, tuple(blocks), tuple(f"{name}: {note}" for note in reading.notes()))


def _body(root: Any) -> Any:
    """The body of a page; None without one. What a page without the tag "body" begins with, the parser leaves in its head."""
    head, body = root.find("head"), root.find("body")
    astray = [one for one in (head if head is not None else ()) if isinstance(one.tag, str) and one.tag not in _OF_HEAD]
    if astray and body is None:
        body = root.makeelement("body")
        root.append(body)
    if astray:
        astray[-1].tail, body.text = f"{astray[-1].tail or ''}{body.text or ''}", None
        body[:0] = astray
    return body


def _main(body: Any) -> Any:
    """The part that the page is for: its only ``main``, else its only article, else all of it."""
    for found in (body.xpath(".//main | .//*[@role='main']"), body.xpath(".//article")):
        if len(found) == 1:
            return found[0]
        if found:
            break
    return body


def _footnotes(root: Any) -> tuple[dict[str, str], set[Any]]:
    """Texts that raised links on the page lead to, by their ids, and the elements that have them."""
    notes, elements = {}, set()
    for link in root.iter("a"):
        key = (link.get("href") or "")[1:]
        if not (link.get("href") or "").startswith("#") or not key or not _refers(link) or key in notes:
            continue
        for found in root.xpath("//*[@id=$key or (self::a and @name=$key)]", key=key):
            # A link at the beginning of a note stands for the note.
            element = found.getparent() if found.tag in ("a", "span", "sup") and found.getparent() is not None else found
            is_note = element.tag in ("li", "p", "div", "aside", "dd") and element.find(".//table") is None
            if not is_note or link in element.iter("a"):
                continue
            said = _note(element, _mark_of(link))
            if any(map(str.isalpha, said)):
                notes[key] = said
                elements.add(element)
                break
    return notes, elements


def _mark_of(element: Any) -> str:
    return str(element.text_content()).strip(" []().:")


def _note(element: Any, mark: str) -> str:
    """What a footnote says, without the mark of the links that lead to it: a dose may stand at its beginning, too."""
    own = copy.deepcopy(element)
    first = next((one for one in own.iter("sup", "a", "span") if one is not own and one.text_content().strip()), None)
    leads = first is not None and own.text_content().strip().startswith(first.text_content().strip()) and _mark_of(first) == mark
    if first is not None and leads:
        first.clear(keep_tail=True)
    said = _BACK.sub("", one_line(_Reading({}, set())._cell(own)[0]))
    return said if leads or own.tag == "li" else re.sub(rf"^[\[(]?{re.escape(mark)}(?:[\]).:]\s*|\s+)", "", said)


def _refers(link: Any) -> bool:
    """Whether a link is the mark of a footnote."""
    role = f"{link.get('role', '')} {link.get('epub:type', '')} {link.get('class', '')}"
    raised = (link.getparent() is not None and link.getparent().tag == "sup") or link.find(".//sup") is not None
    return bool((raised or re.search(r"noteref|footnote-ref", role)) and len(link.text_content().strip()) < 8)


@dataclass
class _List:
    """A list that is open.

    Attributes:
        number: of the next item; None where items have a bullet.
        kind: how numbers are written.
    """

    number: int | None = None
    kind: str = "decimal"
    step: int = 1


@dataclass
class _Reading:
    """The walk through a page."""

    footnotes: Mapping[str, str]
    apart: set[Any]  # elements that are footnotes
    blocks: list[Block] = field(default_factory=list)
    whole: bool = False  # whether nothing stands around the text
    held: list[tuple[str, bool]] = field(default_factory=list)  # pieces of the paragraph, and whether they are bold
    line: int = 0
    items: int = 0  # that are open
    mark: str | None = None  # of the item that begins; None within one
    above: int = 0  # the level of the last heading
    symbol: bool = False  # whether letters are of the font Symbol
    lists: list[_List] = field(default_factory=list)
    left: Unread = field(default_factory=Unread)
    pictures: list[str] = field(default_factory=list)

    def finished(self) -> list[Block]:
        self._close()
        said = " ".join(part for block in self.blocks for part in (block.text, *block.notes))
        used = {note for key, note in self.footnotes.items() if f"{NOTE}{key}{NOTE}" in said}
        for note in self.footnotes.values():
            if note not in used:
                self.left.tell("footnotes that nothing in the text refers to were left out", note)
        return [made for block in self.blocks for made in with_footnotes(in_one_line(block), self.footnotes)]

    def take_around(self, body: Any, main: Any) -> None:
        """What stands outside of the main part: left out, but for a heading that the main part has none of."""
        heads = [one for one in body.iter("h1") if main not in one.iterancestors()]
        if len(heads) == 1 and main.find(".//h1") is None and any(map(str.isalnum, heads[0].text_content())):
            self.walk(heads[0])
        within = {main, *main.iterancestors()}
        for element in body.iter():
            if element.getparent() in within - {main} and element not in within:
                self._note_around(self._texts(element))
            if element in within - {main}:
                self._note_around([element.text, *(child.tail for child in element)])

    def _note_around(self, texts: Iterable[str | None]) -> None:
        said = " ".join(text for text in texts if text)
        if any(map(str.isalpha, said)):
            self.left.tell("what stands around the text was left out", said)

    def _texts(self, element: Any) -> Iterator[str]:
        if isinstance(element.tag, str) and element.tag not in _LEFT_OUT:
            yield element.text or ""
            for child in element:
                yield from self._texts(child)
                yield f" {child.tail or ''}"

    # ---- blocks ----

    def walk(self, element: Any, *, bold: bool = False, in_main: bool = True) -> None:
        """Reads an element and what is in it."""
        tag = element.tag
        if not isinstance(tag, str) or tag in _LEFT_OUT or element in self.apart:
            return
        if element.get("hidden") is not None or _HIDDEN.search(element.get("style") or ""):
            self.left.tell(HIDDEN, element.text_content())
            return
        if tag in _PRESSED and not (tag == "button" and any(one.tag in _NAMES for one in element.iterancestors())):
            self.left.tell("what is there to be pressed, chosen or filled in was left out", "".join(self._texts(element)))
            return
        outside = tag in _AROUND and not in_main and not any(one.tag == "article" for one in element.iterancestors())
        if not self.whole and (tag == "nav" or element.get("role") in _ROLES or outside):
            self._note_around(self._texts(element))
            for heading in element.iter("h1") if tag == "header" else ():
                self._heading(heading, 1)
            return
        if tag in _HEADINGS:
            self._heading(element, _HEADINGS[tag])
        elif tag == "table" and not _is_layout(element):
            self._close()
            self._table(element)
        elif tag in ("ul", "ol", "menu", "dl"):
            self._list(element, in_main=in_main)
        elif tag == "p" and (level := _WORD_LEVEL.search(element.get("style") or "")):
            self.items += int(level[1]) - 1
            self._item(element, self._word_mark(element), in_main)
            self.items -= int(level[1]) - 1
        elif tag in _BLOCKS:
            self._close()
            self._inside(element, bold=bold, in_main=in_main)
            self._close()
        else:
            self._inline(element, bold=bold or tag in ("b", "strong"), in_main=in_main)

    def _word_mark(self, paragraph: Any) -> str:
        """The number of an item of a list that Word saved as a web page; its bullet is none."""
        shown = [one for one in paragraph.iter("span") if re.search(r"mso-list:\s*Ignore", one.get("style") or "")]
        self.apart |= set(shown)
        said = " ".join("".join(one.text_content() for one in shown[:1]).split())
        return f"{said} " if re.search(r"\w[.)、]$", said) else ""

    def _inside(self, element: Any, *, bold: bool, in_main: bool, between: str = "") -> None:
        self._say(element.text, bold, element)
        for number, child in enumerate(element):
            self._say(between if number else "", bold, child)
            self.walk(child, bold=bold, in_main=in_main)
            self._say(child.tail, bold, child)

    def _inline(self, element: Any, *, bold: bool, in_main: bool = True) -> None:
        tag = element.tag
        if tag == "br":
            self._say(_BREAK, bold, element, raw=True)
        elif tag == "img":
            self.pictures.append(" ".join((element.get("alt") or "").split()))
        elif tag in _UNREADABLE:
            self.left.counts[_UNREADABLE[tag]] += 1
        elif tag == "a" and self._is_mark(element):
            self._say(f"{NOTE}{element.get('href')[1:]}{NOTE}", bold, element, raw=True)
        elif tag == "sup" and not (len(element) == 1 and element[0].tag == "a" and self._is_mark(element[0])):
            self._say(RAISED, bold, element)
            self._inside(element, bold=bold, in_main=in_main)
            self._say(LOWERED, bold, element)
        else:
            struck = tag in ("del", "s", "strike")
            was, self.symbol = self.symbol, self.symbol or bool(_SYMBOL.search(element.get("style") or ""))
            between = _BETWEEN.get(tag, "") if len(element) == 2 else ""
            self.left.counts["equation"] += tag == "math"
            around = " " if struck or tag == "mfrac" else ""  # "50" struck out before "5" is not 505, nor 1 before 1/2 eleven
            self._say(around, bold, element)
            self._inside(element, bold=bold, in_main=in_main, between=between)
            self.symbol = was
            self._say(around, bold, element)
            if struck:
                self.left.tell(STRUCK, element.text_content())

    def _is_mark(self, link: Any) -> bool:
        return _refers(link) and (link.get("href") or "#")[1:] in self.footnotes

    def _say(self, text: str | None, bold: bool, element: Any, *, raw: bool = False) -> None:
        said = text if raw else re.sub(r"\s+", " ", text or "")
        said = of_symbol_font(said) if said and self.symbol and not raw else said
        if not said:
            return
        if said.strip() and not any(one.strip() for one, _ in self.held):
            self.line = element.sourceline or self.line
        self.held.append((said, bold))

    def _close(self) -> None:
        """Ends a paragraph or the beginning of an item."""
        held, self.held = self.held, []
        said = "".join(text for text, _ in held)
        if not any(map(str.isalnum, said)):
            return
        mark, self.mark = self.mark, None
        lines = [line for line in (" ".join(one.split()) for one in said.split(_BREAK)) if line]
        if any(TYPED_BULLET.match(line) for line in lines[1:]):  # a list that is typed
            for number, line in enumerate(lines):
                bullet = TYPED_BULLET.match(line)
                own = f"{mark or ''}{line}" if number == 0 else line[bullet.end() :] if bullet else line
                first = number == 0 and mark is not None
                self._add(own, "item" if bullet or first else "paragraph", self.items - first)
            return
        whole = re.split(rf"{_BREAK}\s*{_BREAK}", said)
        paragraphs = [" ".join(one.split()) for one in whole if any(map(str.isalnum, one))]
        all_bold = all(bold for text, bold in held if text.strip())
        if all_bold and not self.items and len(paragraphs) == 1 and is_label(paragraphs[0]):
            self.blocks.append(Block(paragraphs[0], self.above + 1, f"line {self.line}"))
            return
        for number, paragraph in enumerate(paragraphs):
            first = number == 0 and mark is not None
            self._add(f"{mark}{paragraph}" if first else paragraph, "item" if first else "paragraph", self.items - first)

    def _add(self, text: str, kind: Any, depth: int) -> None:
        self.blocks.append(Block(text, 0, f"line {self.line}", kind, depth=depth))

    def _heading(self, element: Any, level: int) -> None:
        self._close()
        self._inside(element, bold=False, in_main=True)
        held, self.held = self.held, []
        said = " ".join("".join(text for text, _ in held).split())
        if any(map(str.isalnum, said)):
            self.above = level
            self.blocks.append(Block(said, level, f"line {element.sourceline}"))

    # ---- lists ----

    def _list(self, element: Any, *, in_main: bool) -> None:
        self._close()
        if element.tag == "ol":
            count = sum(child.tag == "li" for child in element)
            back = element.get("reversed") is not None
            start = _whole(element.get("start"), count if back else 1)
            self.lists.append(_List(start, _KINDS.get(element.get("type") or "", "decimal"), -1 if back else 1))
        else:
            self.lists.append(_List())
        self._entries(element, 0, in_main)
        self.lists.pop()

    def _entries(self, element: Any, terms: int, in_main: bool) -> int:
        """The items of a list, or what a list of definitions has in a div.

        Args:
            terms: 1 after a term, which what defines it stands under.
        """
        self._say(element.text, False, element)
        self._close()
        for child in element:
            if child in self.apart:
                continue
            if child.tag == "li":
                self._item(child, self._mark(child), in_main)
            elif element.tag == "dl" and child.tag == "div":
                terms = self._entries(child, terms, in_main)
            elif child.tag in ("dt", "dd"):
                terms = self._definition(child, terms, in_main)
            else:  # a list that stands beside the items, and belongs to the last
                self.items += 1
                self.walk(child, in_main=in_main)
                self.items -= 1
            self._say(child.tail, False, child)
            self._close()
        return terms

    def _definition(self, element: Any, terms: int, in_main: bool) -> int:
        under = terms if element.tag == "dd" else 0
        self.items += under
        self._item(element, "", in_main)
        self.items -= under
        return 1 if element.tag == "dt" else terms

    def _item(self, element: Any, mark: str, in_main: bool) -> None:
        self._close()
        self.items += 1
        self.mark = mark
        self._inside(element, bold=False, in_main=in_main)
        self._close()
        self.mark = None
        self.items -= 1

    def _mark(self, item: Any) -> str:
        own = self.lists[-1]
        if own.number is None:
            return ""
        number = _whole(item.get("value"), own.number)
        own.number = number + own.step
        return f"{written(number, _KINDS.get(item.get('type') or '', own.kind))}. "

    # ---- tables ----

    def _table(self, table: Any) -> None:
        self._loose(table, ("thead", "tbody", "tfoot", "tr"))
        rows: list[list[Cell]] = []
        headers, deep = 0, False
        places: list[str] = []
        over: dict[int, tuple[int, Cell]] = {}  # cells from above, by their first column, and how many rows they go on for
        for row in _rows(table):
            cells: list[Cell] = []
            column = 0
            own = [cell for cell in row if cell.tag in ("td", "th")]
            while own or any(first >= column for first in over):
                if column in over:
                    count, cell = over.pop(column)
                    cells.append(cell)
                    if count > 1:
                        over[column] = (count - 1, cell)
                    column += cell.span
                elif own:
                    element = own.pop(0)
                    text, bold = self._cell(element)
                    deep |= element.find(".//table") is not None or element.find(".//li//li") is not None
                    free = next((first - column for first in sorted(over) if first > column), _WIDEST)
                    cell = Cell(text, column, min(_span(element.get("colspan")), free), bold)
                    cells.append(cell)
                    down = _span(element.get("rowspan"), _WIDEST)
                    if down > 1:
                        over[column] = (down - 1, cell)
                    column += cell.span
                else:
                    column += 1
            over = {first: one for first, one in over.items() if one[0] > 0}
            is_header = row.getparent().tag == "thead" or (
                any(cell.text for cell in cells) and all(cell.tag == "th" for cell in row if cell.tag in ("td", "th"))
            )
            headers += is_header and len(rows) == headers
            rows.append(cells)
            places.append(f"line {row.sourceline}")
        notes = (_DEEP_CELL,) if deep else ()
        by_row = any({cell.tag for cell in row} == {"th", "td"} for row in list(_rows(table))[:1])  # its names stand in a column
        for block in table_blocks(rows, places, headers or (0 if by_row else None)):
            self.blocks.append(replace(block, notes=(*block.notes, *notes), depth=self.items))

    def _loose(self, element: Any, parts: tuple[str, ...]) -> None:
        """What stands in a table but in no cell, as its caption: browsers show it before the table."""
        self._say(element.text, False, element)
        for child in element:
            if child.tag == "tr" and "tr" in parts:
                self._loose(child, ("td", "th"))
            elif child.tag in parts and child.tag not in ("td", "th"):
                self._loose(child, ("tr",))
            elif child.tag not in parts:
                self.walk(child)
            self._say(child.tail, False, child)
        self._close()

    def _cell(self, element: Any) -> tuple[str, bool]:
        """The text of a cell, in which items and paragraphs are parted, and whether all of it is bold."""
        inner = replace(self, blocks=[], held=[], lists=[], items=0, mark=None)
        inner._inside(element, bold=element.tag == "th", in_main=True)
        bold = all(bold for text, bold in inner.held if text.strip())
        inner._close()
        said = ""
        for block in inner.blocks:
            parted = "" if not said or SENTENCE_END.search(said) or block.kind == "paragraph" else ";"
            said = f"{said}{parted} {block.text}".strip()
        return said, bold and bool(said)

    def notes(self) -> Iterator[str]:
        """What the walk met and could not read as it stands, or left out."""
        yield from self.left.notes()
        if self.pictures:
            named = f", which the page calls {quoted_list(list(filter(None, self.pictures)))}" if any(self.pictures) else ""
            count = f"{len(self.pictures)} {'picture' if len(self.pictures) == 1 else 'pictures'}"
            yield f"{count} could not be read{named}: look there for text that matters"


def _is_layout(table: Any) -> bool:
    """Whether a table only sets things beside each other: it has headings or tables in it, or a single cell."""
    if table.get("role") in ("presentation", "none"):
        return True
    cells = [cell for row in _rows(table) for cell in row if cell.tag in ("td", "th")]
    if any(cell.tag == "th" for cell in cells):
        return False
    return len(cells) == 1 or any(table.find(f".//{tag}") is not None for tag in ("table", *_HEADINGS))


def _rows(table: Any) -> Iterator[Any]:
    """The rows of a table, those of its foot last, and none of a table in it."""
    parts = [one for one in table if one.tag in ("thead", "tbody", "tr")] + [one for one in table if one.tag == "tfoot"]
    for part in parts:
        yield from [part] if part.tag == "tr" else (row for row in part if row.tag == "tr")


def _span(said: str | None, whole: int = 1) -> int:
    """How many columns or rows a cell covers; 0 is all that are left."""
    return min(_whole(said, 1) or whole, _WIDEST)


def _whole(said: str | None, otherwise: int) -> int:
    return int(said) if said and re.fullmatch(r"\s*-?[0-9]{1,6}\s*", said) else otherwise
