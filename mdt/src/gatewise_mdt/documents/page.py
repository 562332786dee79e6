"""A printed page in the order in which people read it: column by column, its ruled tables in their places."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

from gatewise_mdt.documents.document import LOWERED, RAISED, UNKNOWN
from gatewise_mdt.documents.plain_text import join_lines
from gatewise_mdt.documents.tables import Cell

EDGE = 0.1  # of a page's height: what is printed there on several pages is a header or footer
_BOLD = re.compile(r"bold|black|heavy|demi|semibold|[-,]bd\b", re.IGNORECASE)
_MARK = re.compile(
    r"(?:[•●▪■◦‣∙·○–*\uf0b7\uf0a7-]|\(?(?:\d+(?:\.\d+)*|[a-zA-Z]|[ivx]{1,4})[.)]?|[（(]?[一二三四五六七八九十]+[）)、]?)$"
)
_NO_LETTER = re.compile(r"\(cid:\d+\)")
_GUTTER = 8.0  # points between columns of text
_FAR = 2.2  # of the size of letters: between pieces of a line that are no sentence
_LEAST_LINES = 4  # on each side of a gutter


class Word(NamedTuple):
    """A word, in points from the top left corner."""

    text: str
    x0: float
    x1: float
    top: float
    bottom: float
    size: float
    bold: bool


@dataclass(frozen=True)
class PageLine:
    """A line of a column.

    Attributes:
        bold: whether all of it is.
        apart: its words stand far apart, as in a table without rules.
        gap: points of white above it in its column; 0 for the first line.
        full: characters of a line that is as long as the column is wide.
        width: of the column, in points.
    """

    text: str
    x0: float
    x1: float
    top: float
    bottom: float
    size: float
    bold: bool
    apart: bool = False
    gap: float = 0.0
    full: int = 0
    width: float = 0.0


@dataclass(frozen=True)
class PageTable:
    """A table.

    Attributes:
        edges: where its columns begin, by which its continuation on the next page is known.
    """

    rows: list[list[Cell]]
    x0: float
    x1: float
    top: float
    bottom: float
    edges: tuple[float, ...]


PageItem = PageLine | PageTable
_Placed = Word | PageTable


def items_of(page: Any) -> list[PageItem]:
    """Lines and tables of a pdfplumber page, in the order in which they are read."""
    upright = page.filter(lambda thing: thing["object_type"] != "char" or bool(thing["upright"]))
    words = [
        Word(
            # Letters that the file gives no meaning to; one by itself is most often a bullet.
            "•" if _NO_LETTER.fullmatch(word["text"]) else _NO_LETTER.sub(UNKNOWN, word["text"]),
            word["x0"],
            word["x1"],
            word["top"],
            word["bottom"],
            word["size"],
            bool(_BOLD.search(word["fontname"])),
        )
        for word in upright.extract_words(x_tolerance_ratio=0.2, y_tolerance=2, extra_attrs=["fontname", "size"])
    ]
    tables: list[PageTable] = []
    for found in sorted(page.find_tables(), key=lambda table: -_area(table.bbox)):  # of one inside another only the outer one
        if table := _table(found, words):
            tables.append(table)
            words = [word for word in words if not any(_within(word, cell) for cell in found.cells)]
    return list(_read([*words, *tables], float(page.height)))


def _within(word: Word, box: Sequence[float]) -> bool:
    x, y = (word.x0 + word.x1) / 2, (word.top + word.bottom) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _area(box: Sequence[float]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _table(found: Any, words: Sequence[Word]) -> PageTable | None:
    """What is ruled as a table; None where it is a frame, or columns of text with a line between them."""
    edges = sorted({round(cell[0]) for cell in found.cells})
    columns_of_text = len(found.rows) == 1 and all(
        len(list(_lines_of([word for word in words if _within(word, cell)]))) > 5 for cell in found.cells
    )
    if len(edges) == 1 or columns_of_text or not any(_within(word, cell) for word in words for cell in found.cells):
        return None
    x0, top, x1, bottom = found.bbox
    return PageTable(list(_rows(found, words, edges)), x0, x1, top, bottom, tuple(edges))


def _rows(table: Any, words: Sequence[Word], edges: Sequence[int]) -> Iterator[list[Cell]]:
    """The rows of a table; a cell that goes over several rows stands in each."""
    above: dict[int, tuple[float, Cell]] = {}  # column -> where its cell ends, and the cell
    for row in table.rows:
        boxes = [box for box in row.cells if box]
        cells = []
        for box in boxes:
            inside = [word for word in words if _within(word, box)]
            column = edges.index(round(box[0]))
            span = max(1, sum(box[0] - 1 <= edge < box[2] - 1 for edge in edges))
            text = join_lines([_line(line).text for line in _lines_of(inside)])
            cell = Cell(text, column, span, bool(inside) and all(word.bold for word in inside))
            above[column] = box[3], cell
            cells.append(cell)
        low = min((box[3] for box in boxes), default=0.0)
        known = {cell.column + place for cell in cells for place in range(cell.span)}
        cells += [cell for column, (end, cell) in above.items() if column not in known and end > low - 1]
        yield sorted(cells, key=lambda cell: cell.column)


# ---- columns ----


def _read(placed: Sequence[_Placed], height: float) -> Iterator[PageItem]:
    """What is placed in a part of a page, as it is read: what is above two columns, the left one, the right one, the rest."""
    if not placed:
        return
    found = _gutter(placed)
    if found is None:
        yield from _column(placed, height)
        return
    x, top, bottom = found
    between = [one for one in placed if top < (one.top + one.bottom) / 2 < bottom]
    yield from _read([one for one in placed if (one.top + one.bottom) / 2 <= top], height)
    yield from _read([one for one in between if one.x1 <= x], height)
    yield from _read([one for one in between if one.x1 > x], height)
    yield from _read([one for one in placed if (one.top + one.bottom) / 2 >= bottom], height)


def _gutter(placed: Sequence[_Placed]) -> tuple[float, float, float] | None:
    """The highest strip of white that parts two columns of running text: its x, and from where to where it goes."""
    x0, x1 = min(one.x0 for one in placed), max(one.x1 for one in placed)
    top, bottom = min(one.top for one in placed), max(one.bottom for one in placed)
    least = _LEAST_LINES * median(one.bottom - one.top for one in placed)
    strips: list[tuple[float, float, float, float]] = []
    for place in range(int(x0 + 0.2 * (x1 - x0)), int(x0 + 0.8 * (x1 - x0)), 2):
        x = float(place)
        crossing = sorted((one.top, one.bottom) for one in placed if one.x0 < x + _GUTTER and one.x1 > x)
        at = top
        for start, end in [*crossing, (bottom, bottom)]:
            if start - at >= least:
                strips.append((at - start, x, at, start))
            at = max(at, end)
    for _, x, start, end in sorted(strips):
        between = [one for one in placed if start <= (one.top + one.bottom) / 2 <= end]
        if _is_running_text([one for one in between if one.x1 <= x]) and _is_running_text([one for one in between if one.x1 > x]):
            return x + _GUTTER / 2, start, end
    return None


def _is_running_text(placed: Sequence[_Placed]) -> bool:
    """Whether words make a column of text: several lines, of which most are nearly as long as the column is wide."""
    words = [one for one in placed if isinstance(one, Word)]
    if len(words) < 3 * _LEAST_LINES:
        return False
    lines = list(_lines_of(words))
    x0, x1 = min(word.x0 for word in words), max(word.x1 for word in words)
    long = sum(max(word.x1 for word in line) - min(word.x0 for word in line) > 0.65 * (x1 - x0) for line in lines)
    return len(lines) >= _LEAST_LINES and 2 * long >= len(lines)


# ---- lines ----


def _column(placed: Sequence[_Placed], height: float) -> Iterator[PageItem]:
    items: list[PageItem] = [one for one in placed if isinstance(one, PageTable)]
    for words in _lines_of([one for one in placed if isinstance(one, Word)]):
        pieces = list(_pieces(words))
        if words[0].bottom < EDGE * height or words[0].top > (1 - EDGE) * height:  # a footer and a page's number are two
            items += map(_line, pieces)
        else:
            items.append(replace(_line(words), apart=len(pieces) > 1))
    items.sort(key=lambda item: item.top)
    lines = [item for item in items if isinstance(item, PageLine)]
    width = max((line.x1 for line in lines), default=0) - min((line.x0 for line in lines), default=0)
    before = None
    for item in items:
        if isinstance(item, PageLine):
            full = int(max(len(item.text), 1) * width / max(item.x1 - item.x0, 1))
            item = replace(item, gap=max(0.0, item.top - before) if before is not None else 0.0, full=full, width=width)
        yield item
        before = item.bottom


def _lines_of(words: Sequence[Word]) -> Iterator[list[Word]]:
    """Words by lines from the top, each from the left. Small ones, as superscripts, go to the line that they stand in."""
    lines: list[list[Word]] = []
    for word in sorted(words, key=lambda one: (-round(one.size), one.top)):
        for line in reversed(lines):
            first = line[0]
            shared = min(first.bottom, word.bottom) - max(first.top, word.top)
            if shared > 0.55 * (word.bottom - word.top):
                line.append(word)
                break
        else:
            lines.append([word])
    for line in sorted(lines, key=lambda one: one[0].top):
        yield sorted(line, key=lambda one: one.x0)


def _line(words: Sequence[Word]) -> PageLine:
    """Words of a line; what is raised is marked."""
    size = max({word.size for word in words}, key=lambda size: sum(len(word.text) for word in words if word.size == size))
    main = [word for word in words if word.size == size]
    base = median(word.bottom for word in main)
    said, before = "", None
    for word in words:
        raised = word.size <= 0.85 * size and word.bottom < base - 0.12 * size
        apart = before is not None and word.x0 - before.x1 > 0.15 * size
        text = f"{RAISED}{word.text}{LOWERED}" if raised else word.text
        said += f"{' ' if apart else ''}{text}"
        before = word
    x0, x1 = min(word.x0 for word in words), max(word.x1 for word in words)
    top, bottom = min(word.top for word in main), max(word.bottom for word in main)
    said = said.replace(f"{LOWERED} {RAISED}", f"{LOWERED}{RAISED}")
    return PageLine(said, x0, x1, top, bottom, size, all(word.bold for word in main))


def _pieces(words: Sequence[Word]) -> Iterator[list[Word]]:
    """A line in pieces that stand far apart; a bullet or a number belongs to what follows it."""
    piece: list[Word] = []
    for word in words:
        far = piece and word.x0 - piece[-1].x1 >= _FAR * word.size
        if far and not (len(piece) == 1 and _MARK.match(piece[0].text)):
            yield piece
            piece = []
        piece.append(word)
    yield piece
