"""PDF: columns, tables and headings, found by where and how the words are printed.

Where it is not certain how a table is to be read, a note says so. Footnotes stay where they are printed. What no text reader sees,
scanned pages and pictures, is said in notes.
"""

import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gatewise.errors import GatewiseError, reason_of, some
from gatewise_mdt.documents.document import (
    LOWERED,
    RAISED,
    Block,
    Document,
    Region,
    in_one_line,
    joined,
    one_line,
    quoted_list,
)
from gatewise_mdt.documents.headings import is_label, number_depth, reads_as_sentence, stands_like_heading, with_levels
from gatewise_mdt.documents.lines import EDGE, PageLine, PageTable
from gatewise_mdt.documents.page import PageItem, items_of
from gatewise_mdt.documents.plain_text import Line, blocks_without_levels, join_lines
from gatewise_mdt.documents.tables import Cell, header_count, table_blocks
from gatewise_mdt.documents.unruled import DOUBTED

_SCANNED = 20  # fewer letters than these on a page are a page number or a stamp
_PICTURE = 100  # pixels of the shorter side; what is smaller is an icon or a rule
_INDENT = 4  # points that the items within an item are moved in, at least
_SMALL, _LARGE = 0.88, 1.12  # of the size of most letters: footnotes and headings
_FIRST_RAISED = re.compile(f"{RAISED}([^{LOWERED}]*){LOWERED}")
_PAGE_NUMBER = re.compile(
    r"(?:page\s*)?[-–—]?\s*\d{1,4}\s*[-–—]?(?:\s*(?:of|/)\s*\d{1,4})?|第\s*\d+\s*页\s*(?:[/，,]?\s*共\s*\d+\s*页)?", re.IGNORECASE
)
# With a number where one counts pages: in "Step 1" and "GOLD 1-2" it does not.
_RUNNING = re.compile(r"(?:\bpage|\||\s[–—-])\s*(\d+)$|^(\d+)\s|第\s*(\d+)\s*页", re.IGNORECASE)
_CONTENTS_SAID = re.compile(
    r"(?:(?:table of )?contents|list of (?:tables|figures|boxes))(?: page| \(?(?:cont\w*)\.?\)?)?|[图表]?目\s*[录次]", re.IGNORECASE
)
_CONTENTS = re.compile(r"(?:\.{4,}|(?:\.\s){4,}|…{2,})\s*\d{1,4}$")  # a line of a table of contents
_FOOTNOTE = "small print with a mark, perhaps a footnote: it stands under the last heading of its page, and may belong to another"
_BESIDE = "it was read as a column of text, but stands beside another as the cells of a table do: compare it with the document"
# In one cell of a table, with nothing between them: "5 mg 10 mg".
_TWO_DOSES = re.compile(
    r"\d\s*(?:[mk]?g|mcg|micrograms?|[µμ]g|ml|iu|units?)(?:/kg)?\s+\d[\d.]*\s*(?:[mk]?g|mcg|micro|[µμ]g|ml|iu|units?)", re.I
)
_OVER_PAGES = "a row of the table may go on over a page or a column of text: compare it with the document"
_APART = "its words stand apart on the page, as in a table without rules: compare it with the document"


@dataclass
class _Page:
    """A page with what has to be known of its look.

    Attributes:
        corner: the left top corner of what is shown of it, of which margins for the printer may be cut away.
    """

    number: int
    height: float
    corner: tuple[float, float]
    items: list[PageItem]
    pictures: set[Any]
    turned: str
    outside: str  # text beside what is shown of it

    @property
    def where(self) -> str:
        return f"page {self.number}"

    @property
    def lines(self) -> list[PageLine]:
        return [item for item in self.items if isinstance(item, PageLine)]

    def region(self, top: float, bottom: float, x0: float, x1: float) -> Region:
        """A part of it."""
        left, above = self.corner
        return Region(self.number, x0 - left, x1 - left, top - above, bottom - above)

    def regions(self, item: PageItem) -> list[tuple[Region, ...]]:
        """Where a line, or each row of a table, is printed."""
        tops = item.tops if isinstance(item, PageTable) else (item.top,)
        ends = [next((one for one in tops[place + 1 :] if one > top), item.bottom) for place, top in enumerate(tops)]
        return [(self.region(top, end, item.x0, item.x1),) for top, end in zip(tops, ends, strict=True)]

    def letters(self) -> int:
        """Letters of the page; a Chinese character says about as much as three."""
        texts = [line.text for line in self.lines]
        texts += [cell.text for item in self.items if isinstance(item, PageTable) for row in item.rows for cell in row]
        return sum(3 if character >= "\u3400" else 1 for character in "".join(texts) if character.isalpha())


def read_pdf(content: bytes, name: str) -> Document:
    """Reads the text of a PDF.

    Raises:
        GatewiseError: the file is damaged, locked, or has no text but pictures of it.
    """
    import pdfplumber
    from pdfminer.pdfdocument import PDFPasswordIncorrect

    log = logging.getLogger("pdfminer")  # says a word on every small damage that it gets over
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with pdfplumber.open(io.BytesIO(content)) as opened:
            pages = [_page(page) for page in opened.pages]
    except Exception as error:  # a damaged file fails in as many ways as there are damages
        if isinstance(error, PDFPasswordIncorrect) or any(isinstance(one, PDFPasswordIncorrect) for one in error.args):
            raise GatewiseError(f"{name} is locked with a password: save it without one") from None
        raise GatewiseError(f"{name} cannot be read as PDF ({reason_of(error, 150)}): save or download it again") from error
    finally:
        log.setLevel(level)
    if not pages:
        raise GatewiseError(f"{name} cannot be read as PDF (it has no pages): save or download it again")
    notes = [*_unread(pages, name)]
    first, said = _without_running_lines(pages, name)
    blocks = [*first, *_blocks(pages)]
    return Document(name, tuple(blocks), (*notes, *said))


def _page(page: Any) -> _Page:
    shown, outside = _shown(page)
    large = (one for one in shown.images if min(map(int, one["srcsize"])) >= _PICTURE)
    made = _Page(
        page.page_number,
        float(page.height),
        _corner(page),
        items_of(shown),
        pictures={one["stream"].objid or (page.page_number, number) for number, one in enumerate(large)},
        turned="".join(one["text"] for one in shown.chars if not one["upright"]),
        outside=outside,
    )
    page.close()
    return made


def _shown(page: Any) -> tuple[Any, str]:
    """What is shown of a page, such as one half of a spread, and the text beside it."""
    x0, top = _corner(page)
    left, above, right, below = _cropped(page)
    width, height = right - left, below - above

    def is_shown(one: Any) -> bool:
        x, y = (one["x0"] + one["x1"]) / 2, (one["top"] + one["bottom"]) / 2
        return bool(x0 <= x <= x0 + width and top <= y <= top + height)

    return page.filter(is_shown), "".join(one["text"] for one in page.chars if not is_shown(one))


def _corner(page: Any) -> tuple[float, float]:
    """Where what is shown of a page begins. Its boxes are not turned as its text is, but have their sides changed at a quarter."""
    (x0, top, x1, bottom), (left, above, right, below) = page.mediabox, _cropped(page)
    cut_left = x1 - right if page.rotation in (180, 270) else left - x0
    cut_above = bottom - below if page.rotation in (90, 180) else above - top
    return x0 + cut_left, top + cut_above


def _cropped(page: Any) -> tuple[float, float, float, float]:
    """The part of a page's whole box that is shown; all of it where the file says that nothing is."""
    (x0, top, x1, bottom), (left, above, right, below) = page.mediabox, page.cropbox
    left, above, right, below = max(x0, left), max(top, above), min(x1, right), min(bottom, below)
    return (left, above, right, below) if left < right and above < below else page.mediabox


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
            f"{name} has no text, or next to none, on {_listed(scanned)} of {len(pages)}, as scanned pages have none: run text"
            " recognition (OCR) over it if they matter"
        )
    times = Counter(picture for page in pages for picture in page.pictures)  # a logo is on several
    pictured = [page.number for page in pages if any(times[picture] == 1 for picture in page.pictures)]
    if others := [number for number in pictured if number not in scanned]:
        yield (
            f"{name} has pictures on {_listed(others)} of {len(pages)}, which were not read: if they show text, such as a flow"
            " chart, run text recognition (OCR) over it"
        )
    if outside := [(page.outside, page.where) for page in pages if any(map(str.isalpha, page.outside))]:
        texts, places = zip(*outside, strict=True)
        yield f"{name}: text beside what is shown of a page was left out: {quoted_list(texts, places)}"
    if turned := [(page.turned, page.where) for page in pages if any(map(str.isalpha, page.turned))]:
        texts, places = zip(*turned, strict=True)
        yield f"{name}: text that is turned on the page was left out: {quoted_list(texts, places)}"


def _without_running_lines(pages: Sequence[_Page], name: str) -> tuple[list[Block], list[str]]:
    """Takes headers, footers, page numbers and a table of contents from the pages.

    A sentence among them, which could be a warning, is kept once.
    """
    found: dict[tuple[str, int], list[tuple[_Page, PageLine]]] = {}
    for page in pages:
        for line in page.lines:
            if line.bottom < EDGE * page.height or line.top > (1 - EDGE) * page.height:
                found.setdefault(_place(line), []).append((page, line))
    often = {key for key, on in found.items() if len({page.number for page, _ in on}) >= max(2, len(pages) // 3)}
    again = {key for key, on in found.items() if key in often or _PAGE_NUMBER.fullmatch(on[0][1].text)}
    sizes = Counter[float]()
    for page in pages:
        for line in page.lines:
            sizes[line.size] += len(line.text)
    usual = max(sizes, key=lambda size: sizes[size], default=0.0)
    first: list[Block] = []
    notes: list[str] = []
    left: set[int] = set()
    for key in (key for key in found if key in again):
        running = [(page, line) for page, line in found[key] if _stands_by_itself(line, page, again)]
        texts = Counter(line.text for _, line in running)
        heading = all(line.bottom < EDGE * page.height and line.size >= _LARGE * usual for page, line in running)
        if len(texts) > 1 and heading and not any(map(_PAGE_NUMBER.fullmatch, texts)) and not _counts_pages(running):
            continue  # "Step 1", "Step 2": headings, which pages begin with
        label = all(_PAGE_NUMBER.fullmatch(text) or (stands_like_heading(text) and not reads_as_sentence(text)) for text in texts)
        left |= {id(line) for _, line in running if label or texts[line.text] > 1}
        if not label:  # "Give 5 mg" on one page and "Give 50 mg" on another are two sentences
            places = {line.text: page.regions(line)[0] for page, line in reversed(running)}
            said = "this stands at the top or bottom of {} pages"
            first += [
                Block(one_line(text), 0, places[text][0].where, notes=(said.format(count),), regions=places[text])
                for text, count in texts.items()
                if count > 1
            ]
        elif texts and not _PAGE_NUMBER.fullmatch(next(iter(texts))):
            notes.append(f"{name}: {quoted_list(list(texts))}, at the top or bottom of {len(running)} pages, was left out")
    contents = _contents(pages)
    if contents:
        notes.append(f"{name}: a table of contents was left out: {quoted_list([line.text for line in contents])}")
    left |= {id(line) for line in contents}
    for page in pages:
        page.items = [item for item in page.items if id(item) not in left]
    return first, notes


def _counts_pages(running: Sequence[tuple[_Page, PageLine]]) -> bool:
    """Whether the numbers in lines of several pages are as far apart as the pages."""
    found = [(page.number, _RUNNING.search(line.text)) for page, line in running]
    return len({int(match[match.lastindex or 0]) - page if match else None for page, match in found} - {None}) == 1


def _contents(pages: Sequence[_Page]) -> list[PageLine]:
    """The lines of tables of contents, which are called so, lead to pages further on, or count from a later page.

    Those of a score do not: its numbers are lower, or fall, and are not as far apart as the pages on which its words stand. One
    number alone does not count.
    """
    found: list[PageLine] = []
    texts = {page.number: {line.text.casefold() for line in page.lines} for page in pages}
    for page in pages:
        lines = [line for line in page.lines if _CONTENTS.search(line.text)]
        if not lines:
            continue
        numbers = [page.number, *(int(re.findall(r"\d+", line.text)[-1]) for line in lines)]
        further = numbers == sorted(numbers) and page.number not in numbers[1:]
        said = any(_CONTENTS_SAID.fullmatch(line.text) for line in page.lines)
        titles = [_CONTENTS.sub("", line.text).strip().casefold() for line in lines]
        apart = [
            {number - other for other, there in texts.items() if other > page.number and title in there}
            for number, title in zip(numbers[1:], titles, strict=True)
        ]
        known = list(filter(None, apart))
        rises = numbers[1:] == sorted(numbers[1:]) and len(set(numbers[1:])) > 1
        if said or further or (rises and 2 * len(known) > len(lines) and set.intersection(*known)):
            found += lines
    return found


def _place(line: PageLine) -> tuple[str, int]:
    """What makes lines of several pages the same: their text, whatever its numbers, and their height."""
    return re.sub(r"\d+", "#", line.text), round(line.top / 3)


def _stands_by_itself(own: PageLine, page: _Page, again: set[tuple[str, int]]) -> bool:
    """Whether white parts a line from those of the page that stand nowhere else."""
    others = [item for item in page.items if not (isinstance(item, PageLine) and _place(item) in again)]
    away = [max(item.top - own.bottom, own.top - item.bottom) > 0.8 * own.size or abs(item.top - own.top) < 1 for item in others]
    return bool(away) and all(away)


def _listed(numbers: Sequence[int]) -> str:
    """Numbers of pages as people write them: "pages 2, 3, 7"."""
    return f"{'page' if len(numbers) == 1 else 'pages'} {some(map(str, numbers), 20)}"


# ---- headings, paragraphs, tables ----


def _blocks(pages: Sequence[_Page]) -> list[Block]:
    looks: Counter[tuple[float, bool]] = Counter()
    for page in pages:
        for line in page.lines:
            looks[_look(line)] += len(line.text)
    body = looks.most_common(1)[0][0] if looks else (0.0, False)
    reading = _Reading(body, _blank_from(pages, body))
    for page in pages:
        for item in page.items:
            if isinstance(item, PageLine):
                reading.line(item, page.regions(item)[0])
            else:
                reading.take_table(item, page.where, page.regions(item))
    return [in_one_line(block) for block in reading.finished()]


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
    heading: list[tuple[PageLine, tuple[Region, ...]]] = field(default_factory=list)
    in_footnote: bool = False
    doubted: bool = False
    table: PageTable | None = None
    headers: list[list[Cell]] = field(default_factory=list)
    rows: list[Sequence[Cell]] = field(default_factory=list)  # of the table that may go on
    places: list[str] = field(default_factory=list)
    regions: list[tuple[Region, ...]] = field(default_factory=list)  # of the rows
    rest: bool = False  # a row of it has gone on
    moved: list[int] = field(default_factory=list)  # how far lines are moved in

    def finished(self) -> list[Block]:
        """All blocks, the headings with their levels."""
        self._close()
        return _with_levels(self.blocks, self.looks) if self.looks else with_levels(self.blocks)

    def line(self, line: PageLine, regions: tuple[Region, ...]) -> None:
        where = regions[0].where
        if self.table is not None and line.text[:1].islower() and (where != self.places[-1] or line.top < self.table.top):
            self.rest = True  # of its last row, which has words in one column alone
            self._close()
            self.blocks.append(Block(line.text, 0, where, notes=(_OVER_PAGES,), regions=regions))
            return
        self._close_table()
        if line.doubted != self.doubted:
            self._close()
            self.doubted = line.doubted
        if line.apart:
            self._close()
            self.in_footnote = False
            self.blocks.append(Block(line.text, 0, where, notes=(_APART,), regions=regions))
            return
        if self._stands_out(line):
            before = self.heading[-1][0] if self.heading else None
            if before and not (_look(before) == _look(line) and 0 <= line.top - before.bottom < 0.6 * line.size):
                self._close_heading()
            if not self.heading:
                self._close_lines()
                self.in_footnote = False
            self.heading.append((line, regions))
            return
        self._close_heading()
        small, blank = line.size <= _SMALL * self.body[0], line.gap > self.blank * line.size
        if small and line.text.startswith(RAISED):
            self._close()
            self.blocks.append(Block(_FIRST_RAISED.sub(r"\1 ", line.text, count=1), 0, where, notes=(_FOOTNOTE,), regions=regions))
            self.in_footnote = True
        elif small and self.in_footnote and not blank:
            note = self.blocks[-1]
            self.blocks[-1] = replace(note, text=join_lines([note.text, line.text]), regions=joined([*note.regions, *regions]))
        else:
            self.in_footnote = False
            self.lines += [Line("", "")] if blank else []
            self.lines.append(Line(where, line.text, line.full, regions, self._moved(line)))

    def _moved(self, line: PageLine) -> int:
        """How far a line is moved in in its column, the same for lines of nearly one place."""
        own = round(line.x0 - line.left)
        known = next((one for one in self.moved if abs(one - own) < _INDENT), None)
        self.moved += [own] if known is None else []
        return own if known is None else known

    def _stands_out(self, line: PageLine) -> bool:
        size, bold = _look(line)
        return size >= _LARGE * self.body[0] or (bold and not self.body[1] and size >= 0.97 * self.body[0])

    def _close(self) -> None:
        self._close_table()
        self._close_heading()
        self._close_lines()

    def _close_heading(self) -> None:
        lines, self.heading = self.heading, []
        if not lines:
            return
        text, where = join_lines([line.text for line, _ in lines]), lines[0][1][0].where
        if is_label(text):
            self.looks[len(self.blocks)] = _look(lines[0][0])
            self.blocks.append(Block(text, 1, where, regions=joined(one for _, regions in lines for one in regions)))
        else:
            said = [Line(where, line.text, line.full, regions) for line, regions in lines]
            self.lines += [Line("", ""), *said, Line("", "")]

    def _close_lines(self) -> None:
        lines, self.lines = self.lines, []
        made = blocks_without_levels(lines, printed=True, named=not self.looks)
        self.blocks += [replace(block, notes=(*block.notes, _BESIDE)) for block in made] if self.doubted else made

    def take_table(self, table: PageTable, where: str, regions: Sequence[tuple[Region, ...]]) -> None:
        """A table, which may go on with the columns and headers of one on the page or in the column before."""
        rows, before = table.rows, self.table
        if table.doubted:
            table = replace(table, notes=(*table.notes, _BESIDE))
        count = len(self.headers)
        again = count > 0 and [_said(row) for row in rows[:count]] == [_said(row) for row in self.headers]
        anew = not again and (header_count(rows) if table.headers is None else table.headers) > 0
        if before is None or anew or not _goes_on(before, self.places[-1], table, where, again):
            self._close()
            self.in_footnote = False
            self.headers = rows[: header_count(rows) if table.headers is None else table.headers]
        else:
            rows = rows[count:] if again else rows
            if rows and self.rows and _may_be_rest(rows[0]):
                self.rest = True
                if self._take_rest(rows[0]):
                    self.regions[-1] += regions[-len(rows)]
                    rows = rows[1:]
            table = replace(table, headers=before.headers, notes=tuple(dict.fromkeys((*before.notes, *table.notes))))
        self.table = table
        self.rows += rows
        self.places += [where] * len(rows)
        self.regions += regions[len(regions) - len(rows) :]

    def _take_rest(self, row: Sequence[Cell]) -> bool:
        """Takes a row at the top of a page that is the rest of the last row: it begins in small letters as no first cell does."""
        last, said = self.rows[-1], [cell for cell in row if cell.text]
        of_rows = [cell.text for one in self.rows[len(self.headers) :] for cell in one if cell.column == 0 and cell.text]
        small = all(cell.text[:1].islower() for cell in said)
        if not small or (said[0].column == 0 and any(text[:1].islower() for text in of_rows)):
            return False
        rest = {cell.column: cell.text for cell in said}
        joined = [replace(cell, text=join_lines(list(filter(None, (cell.text, rest.pop(cell.column, "")))))) for cell in last]
        joined += [cell for cell in said if cell.column in rest]
        self.rows[-1] = sorted(joined, key=lambda cell: cell.column)
        return True

    def _close_table(self) -> None:
        table, self.table = self.table, None
        if table is None:
            return
        notes = (*table.notes, _OVER_PAGES) if self.rest else table.notes
        if not notes and any(_TWO_DOSES.search(cell.text) for row in self.rows for cell in row):
            notes = (DOUBTED,)
        made = table_blocks(self.rows, self.places, table.headers, self.regions)
        self.blocks += [replace(block, notes=(*notes, *block.notes)) for block in made]
        self.rows, self.places, self.regions, self.rest = [], [], [], False


def _may_be_rest(row: Sequence[Cell]) -> bool:
    """Whether a row at the top of a page may belong to the last one before it: it has no first cell, or begins in small letters."""
    said = [cell for cell in row if cell.text]
    return bool(said) and (said[0].column > 0 or all(cell.text[:1].islower() for cell in said))


def _goes_on(before: PageTable, place: str, table: PageTable, where: str, again: bool) -> bool:
    """Whether a table goes on with the columns of one that ends on another page, or in the column at its left."""
    if len(before.edges) != len(table.edges) or (place == where and table.top > before.bottom and table.x0 < before.x1):
        return False
    moved = table.edges[0] - before.edges[0]
    return again or all(abs(one + moved - other) < 4 for one, other in zip(before.edges, table.edges, strict=True))


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
