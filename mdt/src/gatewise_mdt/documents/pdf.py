"""PDF: columns, tables, boxes, footnotes and headings, told by where and how the words are printed.

What no reader of text sees, scanned pages and pictures, is said in notes.
"""

import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.documents.document import LOWERED, NOTE, RAISED, UNKNOWN, Block, Document, one_line, quoted_list, with_footnotes
from gatewise_mdt.documents.headings import is_label, number_depth, reads_as_sentence, stands_like_heading, with_levels
from gatewise_mdt.documents.page import PageBox, PageItem, PageLine, PageTable, items_of
from gatewise_mdt.documents.plain_text import Line, blocks_without_levels, join_lines, without_margins
from gatewise_mdt.documents.tables import Cell, header_count, table_blocks

_SCANNED = 20  # fewer letters than these on a page are a page number or a stamp
_PICTURE = 100  # pixels of the shorter side; what is smaller is an icon or a rule
_HIDDEN_TEXT = re.compile(rb"(?<![\d.])3\s+Tr\b")  # as text recognition lays over the picture that it has read
_EDGE = 0.1  # of a page's height: what is printed there on several pages is a header or footer
_SMALL, _LARGE = 0.88, 1.12  # of the size of most letters: footnotes and headings
_FOOTNOTE = re.compile(rf"{RAISED}?\s*(\d{{1,2}}|[a-z]|[*†‡§¶#]{{1,3}})(?:{LOWERED}|[.)\s])\s*(?=\S)")
_RAISED = re.compile(f"{RAISED}([^{LOWERED}]*){LOWERED}")
_UNIT = re.compile(r"(?<![A-Za-z'’])(?:[kcdmnµμ]?m|s)$")  # what is raised after it may be its power: "kg/m2"
_CONTENTS = re.compile(r"(?:\.{4,}|(?:\.\s){4,}|…{2,})\s*\d{1,4}$")  # a line of a table of contents


@dataclass
class _Page:
    """A page with what has to be known of its look."""

    number: int
    height: float
    items: list[PageItem]
    pictures: set[Any]
    turned: str

    @property
    def where(self) -> str:
        return f"page {self.number}"

    @property
    def going(self) -> tuple[float, ...]:
        """The columns of a table at its foot, which may go on; none without one."""
        inner = [item for item in self.items if item.top < (1 - _EDGE) * self.height]
        return inner[-1].edges if inner and isinstance(inner[-1], PageTable) else ()

    @property
    def lines(self) -> list[PageLine]:
        return [item for item in self.items if isinstance(item, PageLine)]

    def letters(self) -> int:
        """Letters of the page; a Chinese character says about as much as three."""
        texts = [
            line.text
            for item in self.items
            for line in (item.lines if isinstance(item, PageBox) else [item])
            if isinstance(line, PageLine)
        ]
        texts += [cell.text for item in self.items if isinstance(item, PageTable) for row in item.rows for cell in row]
        return sum(3 if character >= "\u3400" else 1 for character in "".join(texts) if character.isalpha())


def read_pdf(content: bytes, name: str) -> Document:
    """Reads the text of a PDF.

    Raises:
        GatewiseError: the file is damaged, locked, or has no text but pictures of it.
    """
    import pdfplumber
    from pdfminer.pdfdocument import PDFPasswordIncorrect

    try:
        with _quiet(), pdfplumber.open(io.BytesIO(content)) as opened:
            pages: list[_Page] = []
            for page in opened.pages:
                pages.append(_page(page, pages[-1].going if pages else ()))
    except Exception as error:  # a damaged file fails in as many ways as there are damages
        if isinstance(error, PDFPasswordIncorrect) or any(isinstance(one, PDFPasswordIncorrect) for one in error.args):
            raise GatewiseError(f"{name} is locked with a password: save it without one") from None
        raise GatewiseError(f"{name} cannot be read as PDF ({reason_of(error, 150)}): save or download it again") from error
    if not pages:
        raise GatewiseError(f"{name} cannot be read as PDF (it has no pages): save or download it again")
    notes = [*_unread(pages, name)]
    first, said = _without_running_lines(pages, name)
    notes += said
    if apart := [page.number for page in pages if any(line.apart for line in page.lines)]:
        notes.append(
            f"{name}: words stand apart on {_spans(apart)} as in a table, but none was found: compare the order in which they"
            " were read"
        )
    blocks = _blocks(pages)
    if places := sorted({block.where for block in blocks if UNKNOWN in block.text}):
        notes.append(
            f"{name}: some letters have no meaning in the file; {UNKNOWN} stands for each: compare {', '.join(places[:20])}"
        )
    return Document(name, (*first, *blocks), tuple(notes))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the word on every small damage that pdfminer gets over."""
    log = logging.getLogger("pdfminer")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _page(page: Any, going: Sequence[float]) -> _Page:
    try:
        turned = "".join(one["text"] for one in page.chars if not one["upright"])
        return _Page(page.page_number, float(page.height), items_of(page, going), _pictures(page), turned)
    finally:
        page.close()


def _pictures(page: Any) -> set[Any]:
    """The pictures that a page shows, by the numbers of their objects; none where their text has been recognised."""
    from pdfminer.pdftypes import resolve1

    try:
        parts = resolve1(page.page_obj.attrs.get("Contents"))
        drawing = b" ".join(
            resolve1(part).get_data() for part in (parts if isinstance(parts, list) else [parts]) if part is not None
        )
        if _HIDDEN_TEXT.search(drawing):
            return set()
        large = [one for one in page.images if min(map(int, one["srcsize"])) >= _PICTURE]
        return {one["stream"].objid or (page.page_number, number) for number, one in enumerate(large)}
    except Exception:  # its text was read all the same
        return set()


# ---- what is not read ----


def _unread(pages: Sequence[_Page], name: str) -> Iterator[str]:
    scanned = [page.number for page in pages if page.letters() < _SCANNED]
    if len(scanned) == len(pages):
        raise GatewiseError(
            f"{name} has no text on its {len(pages)} {'page' if len(pages) == 1 else 'pages'}, as scanned pages have none: run text"
            " recognition (OCR) over it first"
        )
    if scanned:
        yield (
            f"{name} has no text, or next to none, on {_spans(scanned)} of {len(pages)}, as scanned pages have none: run text"
            " recognition (OCR) over it if they matter"
        )
    times = Counter(picture for page in pages for picture in page.pictures)  # a logo is on several
    pictured = [page.number for page in pages if any(times[picture] == 1 for picture in page.pictures)]
    if others := [number for number in pictured if number not in scanned]:
        yield (
            f"{name} has pictures on {_spans(others)} of {len(pages)}, which were not read: if they show text, such as a flow"
            " chart, run text recognition (OCR) over it"
        )
    if turned := [(page.turned, page.where) for page in pages if any(map(str.isalpha, page.turned))]:
        texts, places = zip(*turned, strict=True)
        yield f"{name}: text that is turned on the page was left out: {quoted_list(texts, places)}"


def _without_running_lines(pages: Sequence[_Page], name: str) -> tuple[list[Block], list[str]]:
    """Takes headers, footers and page numbers from the pages. A sentence among them, which could be a warning, is kept once."""
    found: dict[tuple[str, int], list[_Page]] = {}
    for page in pages:
        for line in page.lines:
            if line.bottom < _EDGE * page.height or line.top > (1 - _EDGE) * page.height:
                found.setdefault(_place(line), []).append(page)
    again = {key for key, on in found.items() if len(on) >= max(2, len(pages) // 3) and any(map(str.isalpha, key[0]))}
    running = {key: [page for page in found[key] if _is_apart(key, page, again)] for key in again}
    running = {key: on for key, on in running.items() if len(on) > 1}
    first: list[Block] = []
    notes: list[str] = []
    for (text, _), on in running.items():
        if stands_like_heading(text) and not reads_as_sentence(text):
            notes.append(f'{name}: "{text}", at the top or bottom of {len(on)} pages, was left out')
        else:
            first.append(Block(one_line(text), 0, on[0].where, notes=(f"this stands at the top or bottom of {len(on)} pages",)))
    for page in pages:
        page.items = [item for item in page.items if not (isinstance(item, PageLine) and page in running.get(_place(item), ()))]
    lines = {id(line): Line(page.where, line.text) for page in pages for line in page.lines}
    kept, more = without_margins([[lines[id(line)] for line in page.lines] for page in pages], name)
    left = {id(line) for line in kept}
    contents = []
    for page in pages:
        page.items = [item for item in page.items if not isinstance(item, PageLine) or id(lines[id(item)]) in left]
        contents += [item.text for item in page.lines if _CONTENTS.search(item.text)]
        page.items = [item for item in page.items if not (isinstance(item, PageLine) and _CONTENTS.search(item.text))]
    if contents:
        notes.append(f"{name}: a table of contents was left out: {quoted_list(contents, most=3)}")
    return first, [*notes, *more]


def _place(line: PageLine) -> tuple[str, int]:
    return line.text, round(line.top / 3)


def _is_apart(key: tuple[str, int], page: _Page, again: set[tuple[str, int]]) -> bool:
    """Whether white parts a line from those of the page that stand nowhere else."""
    own = next(line for line in page.lines if _place(line) == key)
    others = [line for line in page.lines if _place(line) not in again and re.search("[^\\W\\d]", line.text)]
    places = [(line.top, line.bottom) for line in others]
    places += [(item.top, item.bottom) for item in page.items if not isinstance(item, PageLine)]
    return bool(places) and all(top - own.bottom > 0.8 * own.size or own.top - bottom > 0.8 * own.size for top, bottom in places)


def _spans(numbers: Sequence[int]) -> str:
    """Numbers of pages as people write them: "pages 2-5, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    said = ", ".join("-".join(map(str, span)) for span in spans)
    return f"{'page' if len(numbers) == 1 else 'pages'} {said}"


# ---- headings, paragraphs, tables ----


def _blocks(pages: Sequence[_Page]) -> list[Block]:
    looks: Counter[tuple[float, bool]] = Counter()
    for page in pages:
        for line in page.lines:
            looks[_look(line)] += len(line.text)
    body = looks.most_common(1)[0][0] if looks else (0.0, False)
    notes = _take_footnotes(pages, body[0])
    reading = _Reading(body, _blank_from(pages, body))
    for page in pages:
        for item in page.items:
            reading.take(item, page)
    made: list[Block] = []
    for block in reading.finished():
        plain = replace(block, text=one_line(block.text), stem=one_line(block.stem), notes=tuple(map(one_line, block.notes)))
        made += with_footnotes(plain, notes)
    return made


def _look(line: PageLine) -> tuple[float, bool]:
    """What tells headings of one level from others: size, to half a point, and bold."""
    return round(2 * line.size) / 2, line.bold


def _blank_from(pages: Sequence[_Page], body: tuple[float, bool]) -> float:
    """The white above a line, in sizes of its letters, that parts paragraphs."""
    lines = [line for page in pages for line in page.lines if _look(line) == body and line.gap]
    gaps = sorted(line.gap / line.size for line in lines)
    low = gaps[len(gaps) // 5] if gaps else 0.0
    full = sum(line.x1 - line.x0 > 0.8 * line.width for line in lines)
    return max(0.55, 1.4 * low) if 2 * full > len(lines) else 0.55  # else each line is a paragraph of its own


def _take_footnotes(pages: Sequence[_Page], size: float) -> dict[str, str]:
    """Takes footnotes that the text refers to from the feet of the pages, and marks where it does. Their texts by their marks."""
    notes: dict[str, str] = {}
    for page in pages:
        own: dict[str, list[str]] = {}
        lines = page.lines
        raised = {mark for line in lines if line.size > _SMALL * size for mark in _marks(line.text)}
        raised |= {mark for item in page.items for text in _texts(item) for mark in _marks(text)}
        starts = [_FOOTNOTE.match(line.text) for line in lines if line.size <= _SMALL * size and line.text.startswith(RAISED)]
        begun = {found[1] for found in starts if found}
        taken: set[int] = set()
        current = ""
        for line in lines:
            if line.size > _SMALL * size:
                current = ""
                continue
            found = _FOOTNOTE.match(line.text)
            marked = line.text.startswith(RAISED)
            if found and found[1] not in raised and marked and _may_follow(current, found[1]):
                current = ""  # another footnote, which stays where it stands
            # Where a footnote has a raised mark, a line that begins with that number says how many: "2 tablets".
            elif found and found[1] in raised and found[1] not in own and (marked or found[1] not in begun):
                current = found[1]
                own[current] = [line.text[found.end() :]]
                taken.add(id(line))
            elif current:
                own[current].append(line.text)
                taken.add(id(line))
        if not own:
            continue
        notes |= {f"{page.number}:{mark}": one_line(join_lines(texts)) for mark, texts in own.items()}
        page.items = [_referring(item, page.number, own.keys()) for item in page.items if id(item) not in taken]
    return notes


def _may_follow(mark: str, other: str) -> bool:
    """Whether the next footnote may have another mark: after 1 comes 2, and a line that begins with "99mTc" goes on with 1."""
    if not other.isalnum():
        return True
    if mark.isdigit() and other.isdigit():
        return 0 < int(other) - int(mark) <= 3
    return len(mark) == len(other) == 1 and mark.isalpha() and other.isalpha() and 0 < ord(other) - ord(mark) <= 3


def _marks(text: str) -> list[str]:
    return [mark for found in _RAISED.finditer(text) for mark in _marks_at(found)]


def _marks_at(found: re.Match[str]) -> list[str]:
    """The marks of footnotes in what is raised; none where it is the power of a number or a unit."""
    marks = [mark for mark in re.split(r"[,\s]+", found[1]) if mark]
    before = found.string[: found.start()].rstrip()
    powered = marks and ((before[-1:].isdigit() and marks[0].isdigit()) or (marks[0] in ("2", "3") and _UNIT.search(before)))
    return [] if powered else marks


def _texts(item: PageItem) -> list[str]:
    if isinstance(item, PageTable):
        return [cell.text for row in item.rows for cell in row]
    return [line.text for line in item.lines] if isinstance(item, PageBox) else []


def _referring(item: PageItem, page: int, known: Any) -> PageItem:
    def marked(text: str) -> str:
        def one(found: re.Match[str]) -> str:
            marks = _marks_at(found)
            if not any(mark in known for mark in marks):
                return found[0]
            left = ",".join(mark for mark in marks if mark not in known)
            said = "".join(f"{NOTE}{page}:{mark}{NOTE}" for mark in marks if mark in known)
            return f"{RAISED}{left}{LOWERED}{said}" if left else said

        return _RAISED.sub(one, text)

    if isinstance(item, PageTable):
        return replace(item, rows=[[replace(cell, text=marked(cell.text)) for cell in row] for row in item.rows])
    if isinstance(item, PageBox):
        return replace(item, lines=[replace(line, text=marked(line.text)) for line in item.lines])
    return replace(item, text=marked(item.text))


@dataclass
class _Reading:
    """Items put together to blocks, in which headings have the look of their level until all are known.

    Attributes:
        body: the look of most of the text.
        blank: see :func:`_blank_from`.
    """

    body: tuple[float, bool]
    blank: float
    blocks: list[Block] = field(default_factory=list)
    looks: dict[int, tuple[float, bool]] = field(default_factory=dict)  # of the headings, by their places among the blocks
    lines: list[Line] = field(default_factory=list)
    heading: list[PageLine] = field(default_factory=list)
    where: str = ""
    table: PageTable | None = None
    headers: list[list[Cell]] = field(default_factory=list)

    def take(self, item: PageItem, page: _Page) -> None:
        if isinstance(item, PageLine):
            self._line(item, page.where)
            return
        self._close()
        if isinstance(item, PageBox):
            self._box(item, page.where)
        else:
            self._table(item, page.where)

    def finished(self) -> list[Block]:
        """All blocks, the headings with their levels."""
        self._close()
        if not self.looks:
            return with_levels(self.blocks)
        return _with_levels(self.blocks, self.looks)

    def _line(self, line: PageLine, where: str) -> None:
        self.table = None
        if self._stands_out(line):
            before = self.heading[-1] if self.heading else None
            if before and not (_look(before) == _look(line) and 0 <= line.top - before.bottom < 0.6 * line.size):
                self._close_heading()
            if not self.heading:
                self._close_lines()
                self.where = where
            self.heading.append(line)
            return
        self._close_heading()
        if line.gap > self.blank * line.size:
            self.lines.append(Line("", ""))
        self.lines.append(Line(where, line.text, line.full))

    def _stands_out(self, line: PageLine) -> bool:
        size, bold = _look(line)
        return not line.apart and (size >= _LARGE * self.body[0] or (bold and not self.body[1] and size >= 0.97 * self.body[0]))

    def _close(self) -> None:
        self._close_heading()
        self._close_lines()

    def _close_heading(self) -> None:
        lines, self.heading = self.heading, []
        if not lines:
            return
        text = join_lines([line.text for line in lines])
        if is_label(text):
            self.looks[len(self.blocks)] = _look(lines[0])
            self.blocks.append(Block(text, 1, self.where))
        else:
            self.lines += [Line("", ""), *(Line(self.where, line.text, line.full) for line in lines), Line("", "")]

    def _close_lines(self) -> None:
        lines, self.lines = self.lines, []
        self.blocks += blocks_without_levels(lines, printed=True, named=not self.looks)

    def _box(self, box: PageBox, where: str) -> None:
        self.table = None
        lines: list[Line] = []
        for line in box.lines:
            lines += [Line("", "")] if line.gap > self.blank * line.size else []
            lines.append(Line(where, line.text, line.full))
        made = [replace(block, level=0) for block in blocks_without_levels(lines, printed=True, named=False)]
        if len(made) > 1 and not re.search(r"[.!?:;。！？：；]$", made[0].text):
            made[0] = replace(made[0], text=f"{made[0].text}:")  # its title
        self.blocks += made

    def _table(self, table: PageTable, where: str) -> None:
        rows, before = table.rows, self.table
        goes_on = before is not None and len(before.edges) == len(table.edges) and all(
            abs(one - other) < 4 for one, other in zip(before.edges, table.edges, strict=True)
        )  # fmt: skip
        self.table = table
        if goes_on and self.headers:
            count = len(self.headers)
            if [_said(row) for row in rows[:count]] != [_said(row) for row in self.headers]:
                rows = [*self.headers, *rows]
            self.blocks += table_blocks(rows, [where] * len(rows), count)
            return
        self.headers = rows[: header_count(rows)]
        self.blocks += table_blocks(rows, [where] * len(rows))


def _said(row: Sequence[Cell]) -> list[str]:
    return [cell.text for cell in row]


def _with_levels(blocks: Sequence[Block], looks: dict[int, tuple[float, bool]]) -> list[Block]:
    """Headings by their looks, largest first and bold before plain, and among those of one look by their numbers."""
    order = sorted(set(looks.values()), key=lambda look: (-look[0], not look[1]))
    depths: dict[tuple[float, bool], int] = {}
    for place, look in looks.items():
        if depth := number_depth(blocks[place].text):
            depths[look] = min(depth, depths.get(look, depth))
    keys = {}
    for place, block in enumerate(blocks):
        if block.level:
            own, depth = looks.get(place), number_depth(block.text)
            # One without a look of its own has a number, and is below all the others.
            keys[place] = (len(order), depth) if own is None else (order.index(own), max(0, depth - depths.get(own, depth)))
    ranks = {key: level for level, key in enumerate(sorted(set(keys.values())), start=1)}
    return [replace(block, level=ranks[keys[place]]) if place in keys else block for place, block in enumerate(blocks)]
