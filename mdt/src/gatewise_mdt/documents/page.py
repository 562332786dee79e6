"""A printed page read as people do: column by column, with its tables and boxes in their places."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from gatewise_mdt.documents.document import LOWERED, RAISED, UNKNOWN
from gatewise_mdt.documents.plain_text import join_lines
from gatewise_mdt.documents.tables import Cell

_BOLD = re.compile(r"bold|black|heavy|demi|semibold|[-,]bd\b", re.IGNORECASE)
_MARK = re.compile(
    r"(?:[•●▪■◦‣∙·○–*\uf0b7\uf0a7-]|\(?(?:\d+(?:\.\d+)*|[a-zA-Z]|[ivx]{1,4})[.)]?|[（(]?[一二三四五六七八九十]+[）)、]?)$"
)
_NO_LETTER = re.compile(r"\(cid:\d+\)")
_GUTTER = 8.0  # points between columns of text
# Of the size of letters: between cells of a table without rules, and between pieces of a line that are no sentence.
_APART, _FAR = 1.1, 2.2
_TALLEST = 10  # lines of a cell above the middle of its row
_LEAST_LINES = 4  # on each side of a gutter
_WHOLE_PAGE = 0.5  # of it: what is ruled around more is a frame, not a box


@dataclass(frozen=True)
class Word:
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
        gap: points of white above it in its column; 0 for the first line.
        full: characters of a line that is as long as the column is wide.
        width: of the column, in points.
        apart: it is a piece of a line whose pieces stand apart, though no table was found there.
    """

    text: str
    x0: float
    x1: float
    top: float
    bottom: float
    size: float
    bold: bool
    gap: float = 0.0
    full: int = 0
    width: float = 0.0
    apart: bool = False


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


@dataclass(frozen=True)
class PageBox:
    """Text with a frame around it."""

    lines: list[PageLine]
    x0: float
    x1: float
    top: float
    bottom: float


PageItem = PageLine | PageTable | PageBox
_Placed = Word | PageTable | PageBox


def items_of(page: Any, going: Sequence[float] = ()) -> list[PageItem]:
    """Lines, tables and boxes of a pdfplumber page, in the order in which they are read.

    Args:
        going: where the columns of a table without rules begin that may go on from the page before.
    """
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
    ruled = list(_ruled(page, words))
    held = {id(word) for _, inside in ruled for word in inside}
    return list(_read([*(word for word in words if id(word) not in held), *(thing for thing, _ in ruled)], going))


def _within(word: Word, box: Sequence[float]) -> bool:
    x, y = (word.x0 + word.x1) / 2, (word.top + word.bottom) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


# ---- tables with rules, and boxes ----


def _ruled(page: Any, words: Sequence[Word]) -> Iterator[tuple[PageTable | PageBox, list[Word]]]:
    """What is ruled on a page, with the words that it holds; of what lies within another thing, only the outer one."""
    finder = page.debug_tablefinder()
    in_tables = {cell for table in finder.tables for cell in table.cells}
    found = [(table.bbox, table) for table in finder.tables] + [(cell, None) for cell in finder.cells if cell not in in_tables]
    taken: list[Sequence[float]] = []
    for (x0, top, x1, bottom), table in sorted(found, key=lambda one: -_area(one[0])):
        inside = _inside(words, (x0, top, x1, bottom))
        if not inside or _area((x0, top, x1, bottom)) > _WHOLE_PAGE * page.width * page.height:
            continue
        if any(box[0] - 1 <= x0 and box[1] - 1 <= top and x1 <= box[2] + 1 and bottom <= box[3] + 1 for box in taken):
            continue
        edges = sorted({round(cell[0]) for row in table.rows for cell in row.cells if cell}) if table else [round(x0)]
        if table is None or len(edges) == 1:
            lines = list(_lines(inside))
            if len(lines) < 2:  # a heading on a coloured ground
                continue
            yield PageBox(lines, x0, x1, top, bottom), inside
        elif len(table.rows) == 1 and all(len(list(_lines(_inside(inside, cell)))) > 5 for cell in table.rows[0].cells if cell):
            continue  # columns of text with a line between them
        else:
            loose = [word for word in inside if not any(_within(word, cell) for cell in table.cells)]
            beside = _in_open_cells(table, loose, edges)
            rows = list(_rows(table, inside, edges, beside))
            # What is loose and in no open cell is text of its own.
            holds = inside if beside else [word for word in inside if word not in loose]
            yield PageTable(rows, x0, x1, top, bottom, tuple(edges)), holds
        taken.append((x0, top, x1, bottom))


def _area(box: Sequence[float]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _inside(words: Sequence[Word], box: Sequence[float]) -> list[Word]:
    return [word for word in words if _within(word, box)]


def _in_open_cells(table: Any, loose: Sequence[Word], edges: Sequence[int]) -> dict[tuple[int, int], list[Word]]:
    """Words of a table that lie in no cell, by row and column: a corner may have no lines around it.

    Empty where some of them run over columns, as a paragraph does: its lines must not be parted.
    """
    found: dict[tuple[int, int], list[Word]] = {}
    for piece in (piece for line in _grouped(loose) for piece in _segments(line, _APART)):
        y = (piece[0].top + piece[0].bottom) / 2
        row = max(number for number, one in enumerate(table.rows) if one.bbox[1] <= y)
        column = sum(edge <= piece[0].x0 + 1 for edge in edges) - 1
        taken = any(cell[0] - 1 <= edges[column] < cell[2] - 1 and cell[1] <= y <= cell[3] for cell in table.cells)
        if column < 0 or taken or piece[-1].x1 > [*edges, table.bbox[2]][column + 1] + 1:
            return {}
        found.setdefault((row, column), []).extend(piece)
    return found


def _rows(
    table: Any, words: Sequence[Word], edges: Sequence[int], beside: Mapping[tuple[int, int], Sequence[Word]]
) -> Iterator[list[Cell]]:
    """The rows of a table, with what is beside its cells; a cell that goes over several rows stands in each."""
    above: dict[int, tuple[float, Cell]] = {}  # column -> where its cell ends, and the cell
    for number, row in enumerate(table.rows):
        cells = [_cell(held, column) for (place, column), held in beside.items() if place == number]
        for box in row.cells:
            if not box:
                continue
            inside = _inside(words, box)
            column = edges.index(round(box[0]))
            span = max(1, sum(box[0] - 1 <= edge < box[2] - 1 for edge in edges))
            cell = _cell(inside, column, span)
            above[column] = box[3], cell
            cells.append(cell)
        bottom = max((box[3] for box in row.cells if box), default=0.0)
        low = min((box[3] for box in row.cells if box), default=bottom)
        known = {cell.column + place for cell in cells for place in range(cell.span)}
        cells += [cell for column, (end, cell) in above.items() if column not in known and end > low - 1]
        yield sorted(cells, key=lambda cell: cell.column)


def _cell(words: Sequence[Word], column: int, span: int = 1) -> Cell:
    return Cell(join_lines([line.text for line in _lines(words)]), column, span, bool(words) and all(word.bold for word in words))


# ---- columns ----


def _read(placed: Sequence[_Placed], going: Sequence[float]) -> Iterator[PageItem]:
    """What is placed in a part of a page, as it is read: what is above two columns, the left one, the right one, the rest."""
    if not placed:
        return
    found = _gutter(placed)
    if found is None:
        yield from _column(placed, going)
        return
    x, top, bottom = found
    above = [one for one in placed if (one.top + one.bottom) / 2 <= top]
    below = [one for one in placed if (one.top + one.bottom) / 2 >= bottom]
    between = [one for one in placed if top < (one.top + one.bottom) / 2 < bottom]
    yield from _read(above, going)
    yield from _read([one for one in between if one.x1 <= x], going)
    yield from _read([one for one in between if one.x1 > x], going)
    yield from _read(below, ())


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
    for _, x, start, low in sorted(strips):
        end = _without_tail(placed, x, start, low)
        between = [one for one in placed if start <= (one.top + one.bottom) / 2 <= end]
        if _is_running_text([one for one in between if one.x1 <= x]) and _is_running_text([one for one in between if one.x1 > x]):
            return x + _GUTTER / 2, start, end
    return None


def _without_tail(placed: Sequence[_Placed], x: float, start: float, end: float) -> float:
    """Where two columns end: before a heading at the left that is of what stands over both of them below."""
    between = [one for one in placed if start <= (one.top + one.bottom) / 2 <= end and isinstance(one, Word)]
    right = max((word.bottom for word in between if word.x0 > x), default=end)
    tail = [word for word in between if word.x1 <= x and word.top >= right]
    size = median(word.size for word in between) if between else 0.0
    stands_out = tail and len(list(_grouped(tail))) <= 3 and all(word.bold or word.size > 1.1 * size for word in tail)
    return min(word.top for word in tail) if stands_out and any(one.top >= end - 1 for one in placed) else end


def _is_running_text(placed: Sequence[_Placed]) -> bool:
    """Whether words make a column of text: several lines, of which most are nearly as long as the column is wide."""
    words = [one for one in placed if isinstance(one, Word)]
    if len(words) < 3 * _LEAST_LINES:
        return False
    lines = list(_grouped(words))
    x0, x1 = min(word.x0 for word in words), max(word.x1 for word in words)
    long = sum(max(word.x1 for word in line) - min(word.x0 for word in line) > 0.65 * (x1 - x0) for line in lines)
    return len(lines) >= _LEAST_LINES and 2 * long >= len(lines)


# ---- lines, and tables without rules ----


def _column(placed: Sequence[_Placed], going: Sequence[float]) -> Iterator[PageItem]:
    words = [one for one in placed if isinstance(one, Word)]
    ruled = sorted((one for one in placed if not isinstance(one, Word)), key=lambda one: one.top)
    items: list[PageItem] = [*_tables_in(list(_grouped(words)), going)]
    for table in ruled:
        place = next((number for number, item in enumerate(items) if item.top >= table.top), len(items))
        items.insert(place, table)
    yield from _with_gaps(items)


def _with_gaps(items: Sequence[PageItem]) -> Iterator[PageItem]:
    lines = [item for item in items if isinstance(item, PageLine)]
    width = max((line.x1 for line in lines), default=0) - min((line.x0 for line in lines), default=0)
    before = None
    for item in items:
        if isinstance(item, PageLine):
            letters = max(len(item.text), 1)
            full = int(letters * width / max(item.x1 - item.x0, 1))
            item = replace(item, gap=max(0.0, item.top - before) if before is not None else 0.0, full=full, width=width)
        yield item
        before = item.bottom


def _lines(words: Sequence[Word]) -> Iterator[PageLine]:
    """Words as lines, without a look for tables."""
    yield from (item for item in _with_gaps([_line(group) for group in _grouped(words)]) if isinstance(item, PageLine))


def _grouped(words: Sequence[Word]) -> Iterator[list[Word]]:
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
    base = median(word.bottom for word in words if word.size == size)
    said, before = "", None
    for word in words:
        raised = word.size <= 0.85 * size and word.bottom < base - 0.12 * size
        apart = before is not None and word.x0 - before.x1 > 0.15 * size
        text = f"{RAISED}{word.text}{LOWERED}" if raised else word.text
        said += f"{' ' if apart else ''}{text}"
        before = word
    x0, x1 = min(word.x0 for word in words), max(word.x1 for word in words)
    main = [word for word in words if word.size == size]
    top, bottom = min(word.top for word in main), max(word.bottom for word in main)
    return PageLine(
        said.replace(f"{LOWERED} {RAISED}", f"{LOWERED}{RAISED}"), x0, x1, top, bottom, size, all(word.bold for word in main)
    )


def _segments(words: Sequence[Word], apart: float) -> list[list[Word]]:
    """A line in pieces that stand apart, by so much of the size of letters; a bullet or a number belongs to what follows it."""
    pieces: list[list[Word]] = []
    for word in words:
        near = pieces and word.x0 - pieces[-1][-1].x1 < apart * word.size
        marks = pieces and len(pieces[-1]) == 1 and _MARK.match(pieces[-1][0].text)
        if near or marks:
            pieces[-1].append(word)
        else:
            pieces.append([word])
    return pieces


def _tables_in(lines: Sequence[list[Word]], going: Sequence[float]) -> Iterator[PageLine | PageTable]:
    """Lines of a column, of which those whose pieces stand one below the other make a table."""
    pieces = [_segments(line, _APART) for line in lines]
    at = 0
    while at < len(lines):
        end = _end_of_going(pieces, at, going) if going and at < 3 else 0  # below a running header
        end, columns = (end, going) if end else (_table_at(pieces, at) or (0, ()))
        if end:
            yield _unruled([_split_at(line, columns) for line in pieces[at:end]], columns)
            at, going = end, ()
            continue
        # What stands far apart, as a footer and a page's number, is no sentence.
        far = _segments(lines[at], _FAR)
        yield from (replace(_line(piece), apart=len(far) > 1) for piece in far)
        at += 1


def _table_at(pieces: Sequence[list[list[Word]]], at: int) -> tuple[int, list[float]] | None:
    """Where a table that begins with this line ends, and where its columns begin; None if none begins."""

    def gap(place: int) -> float:
        return pieces[place][0][0].top - max(word.bottom for piece in pieces[place - 1] for word in piece)

    # The first line with the most pieces has all columns; a cell of several lines may begin above the others of its row.
    near = at + 1
    while near < min(at + _TALLEST, len(pieces)) and gap(near) < 2 * pieces[at][0][0].size:
        near += 1
    anchor = max(range(at, near), key=lambda place: (len(pieces[place]), -place))
    if len(pieces[anchor]) < 2:
        return None
    columns = [piece[0].x0 for piece in pieces[anchor]]
    size = pieces[anchor][0][0].size

    def aligned(place: int, among: Sequence[float]) -> bool:
        return all(any(abs(piece[0].x0 - column) <= 0.6 * size for column in among) for piece in pieces[place])

    # What stands alone above, in the first column, is a paragraph.
    if not all(aligned(place, columns if len(pieces[place]) > 1 else columns[1:]) for place in range(at, anchor)):
        return None
    rows, end = 1 + sum(len(pieces[place]) > 1 for place in range(at, anchor)), anchor + 1
    for place in range(anchor + 1, len(pieces)):
        alone = len(pieces[place]) == 1 and aligned(place, columns[:1])
        paragraph = alone and pieces[place][0][-1].x1 > columns[1] - 0.3 * size  # below the table
        if gap(place) >= 2 * size or not aligned(place, columns) or paragraph:
            break
        rows += len(pieces[place]) > 1
        end = place + 1
    while end > anchor + 1 and len(pieces[end - 1]) == 1 and aligned(end - 1, columns[:1]):
        end -= 1
    bold = [all(word.bold for piece in pieces[place] for word in piece) for place in (at, end - 1)]
    return (end, columns) if rows >= 3 or (rows == 2 and (len(columns) > 2 or bold == [True, False])) else None


def _end_of_going(pieces: Sequence[list[list[Word]]], at: int, columns: Sequence[float]) -> int:
    """Where a table ends that goes on here with columns that are known; 0 if it does not."""
    rows, end = 0, at
    for line in pieces[at:]:
        split = _split_at(line, columns)
        size = split[0][0].size
        places = [next((n for n, column in enumerate(columns) if abs(piece[0].x0 - column) < 0.3 * size), None) for piece in split]
        runs_over = any(
            place is not None and place + 1 < len(columns) and piece[-1].x1 > columns[place + 1]
            for place, piece in zip(places, split, strict=True)
        )
        if None in places or runs_over or (end > at and split[0][0].top - pieces[end - 1][0][0].bottom > 2 * size):
            break
        rows += len(split) > 1
        end += 1
    return end if rows else 0


def _split_at(line: Sequence[list[Word]], columns: Sequence[float]) -> list[list[Word]]:
    """The pieces of a line, cut where a column of its table begins: a cell may be filled to its edge."""
    made: list[list[Word]] = []
    for piece in line:
        made.append(piece[:1])
        for before, word in pairwise(piece):
            begins = any(abs(word.x0 - column) < 1.5 for column in columns) and word.x0 - before.x1 > 0.5 * word.size
            if begins:
                made.append([word])
            else:
                made[-1].append(word)
    return made


def _unruled(pieces: Sequence[list[list[Word]]], columns: Sequence[float]) -> PageTable:
    tops = [min(word.top for piece in line for word in piece) for line in pieces]
    bottoms = [max(word.bottom for piece in line for word in piece) for line in pieces]
    right = max(word.x1 for line in pieces for piece in line for word in piece)
    rows: list[list[list[Word]]] = []
    last: dict[int, Word] = {}  # column -> the last word in its cell of this row
    for number, line in enumerate(pieces):
        placed: dict[int, list[Word]] = {}
        for piece in line:
            nearest = min(range(len(columns)), key=lambda number: abs(columns[number] - piece[0].x0))
            placed.setdefault(nearest, []).extend(piece)
        size = line[0][0].size
        above = tops[number] - bottoms[number - 1] if number else 0.0
        below = tops[number + 1] - bottoms[number] if number + 1 < len(pieces) else above
        if 0 in placed and len(line) > 1:
            # A word that would have had its place after the last one of the line above is no rest of a cell.
            ends = [*columns[1:], right + size]
            rooms = [
                ends[column] - last[column].x1 - (piece[0].x1 - piece[0].x0) - 0.8 * piece[0].size
                for column, piece in placed.items()
                if column in last
            ]
            goes_on = above < 0.55 * size and not any(room > 0 for room in rooms)
            begins = 0 in last and not goes_on
        else:  # a cell of several lines may begin above the others of its row, which stand beside its middle
            begins = above > below + 0.2 * size
        if begins or not rows:
            rows.append([[] for _ in columns])
            last = {}
        for column, piece in placed.items():
            rows[-1][column] += piece
            last[column] = piece[-1]
    cells = [[_cell(words, column) for column, words in enumerate(row)] for row in rows]
    words = [word for line in pieces for piece in line for word in piece]
    return PageTable(
        cells,
        min(word.x0 for word in words),
        max(word.x1 for word in words),
        min(word.top for word in words),
        max(word.bottom for word in words),
        tuple(round(column) for column in columns),
    )
