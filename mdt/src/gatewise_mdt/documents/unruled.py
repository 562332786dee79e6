"""Tables without a full grid: their columns are told by the white between them, their rows by rules, grounds, white, or words.

The width of a column tells much: where the first word of a line would have had its place at the end of the line above, the line
begins a cell. Where nothing tells for certain, a note says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from gatewise_mdt.documents.headings import SENTENCE_END, is_caption
from gatewise_mdt.documents.language import has_han
from gatewise_mdt.documents.lines import EDGE, Look, PageTable, Word, fits, line_of, lines_of, pieces_of
from gatewise_mdt.documents.plain_text import join_lines
from gatewise_mdt.documents.tables import Cell

DOUBTED = "its rows and columns were told by where words stand, as the table has no full grid: compare it with the document"
_APART = 0.8  # of the size of letters: between cells
_NEAR = 2.0  # of the size of letters: between lines of a table
_FARTHEST = 8.0  # of the size of letters: between rules of a table

Line = list[Word]


@dataclass
class _Piece:
    """Words of a line that stand together."""

    words: list[Word]

    @property
    def x0(self) -> float:
        return self.words[0].x0

    @property
    def x1(self) -> float:
        return max(word.x1 for word in self.words)

    @property
    def bold(self) -> bool:
        return all(word.bold for word in self.words)

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


@dataclass
class _Column:
    """From where to where the cells of a column reach, and in which lines it has some."""

    x0: float
    x1: float
    lines: set[int]


def with_tables(lines: Sequence[Line], look: Look) -> Iterator[Line | PageTable]:
    """The lines of a column of text, with tables in the place of those that make one."""
    pieces = [_pieces(line) for line in lines]
    tables: dict[int, tuple[int, PageTable]] = {}  # by their first lines, with the ones after their last
    at = last = 0
    while at < len(lines):
        end = _end(pieces, at, look) if len(pieces[at]) > 1 else at
        start = max(last, _start(pieces, at, end, look)) if end > at else at
        made = _table(pieces[start:end], look) if end > at else None
        if made is None:
            at += 1
        else:
            tables[start] = end, made
            at = last = end
    at = 0
    while at < len(lines):
        if at in tables:
            at, made = tables[at]
            yield made
        else:
            yield lines[at]
            at += 1


def _pieces(line: Line) -> list[_Piece]:
    return [_Piece(words) for words in pieces_of(line, _APART)]


def _top(line: Sequence[_Piece]) -> float:
    return min(word.top for piece in line for word in piece.words)


def _bottom(line: Sequence[_Piece]) -> float:
    return max(word.bottom for piece in line for word in piece.words)


def _size(line: Sequence[_Piece]) -> float:
    return median(word.size for piece in line for word in piece.words)


# ---- where a table begins and ends ----


def _end(pieces: Sequence[Sequence[_Piece]], at: int, look: Look) -> int:
    """Where a table ends that begins with a line of several pieces; ``at`` itself if none begins."""
    end = at + 1
    columns = _columns(pieces[at : at + 1])
    first, low = _top(pieces[at]), _bottom(pieces[at])
    alone = 0  # lines since the last one with several pieces that stand at the left or over several columns
    for place in range(at + 1, len(pieces)):
        line = pieces[place]
        size = _size(line)
        white = _top(line) - low
        ruled = any(low - 1 <= rule.y <= _top(line) + 1 and _covers(rule, columns) for rule in look.rules)
        rules = sorted(
            rule.y for rule in look.rules if _covers(rule, columns) and first - size <= rule.y <= _top(line) + _FARTHEST * size
        )
        if _is_closed(rules, first, low, _top(line)):
            break
        if white > (3 if ruled else _NEAR) * size or (len(line) == 1 and is_caption(line[0].text)):
            break
        if len(line) > 1:
            if not _fits(line, columns, header=place < at + 3):
                break
            columns = _columns(pieces[at : place + 1])
            end, alone = place + 1, 0
        else:
            over = [number for number, column in enumerate(columns) if column.x0 < line[0].x1 and line[0].x0 < column.x1]
            framed = len(over) == 1 and len(rules) > 1 and rules[0] <= first + 1 and rules[-1] > _bottom(line) - 1
            if len(over) > 1 and line[0].x0 < columns[0].x0 - 3:
                break  # a paragraph, as cells have white before them
            # Within a frame, beside another line, or a further line of a cell.
            if framed or white < 0 or (len(over) == 1 and over[0] > 0 and not alone):
                end, alone = place + 1, 0
            else:
                alone += 1
                if alone > 2:
                    break
        low = max(low, _bottom(line))
    return _with_tail(pieces, at, end, columns, look) if end > at + 1 and len(columns) > 1 else at


def _is_closed(rules: Sequence[float], first: float, low: float, top: float) -> bool:
    """Whether the last of the rules over a table stands between two of its lines, and one above it, so that it ends there."""
    return len(rules) > 2 and rules[0] <= first + 1 and low - 1 <= rules[-1] <= top + 1


def _with_tail(pieces: Sequence[Sequence[_Piece]], at: int, end: int, columns: Sequence[_Column], look: Look) -> int:
    """The end of a table with the last lines of its first cell."""
    spaced = look.usual > 0 and any(
        _top(two) - _bottom(one) > look.usual + _more(_size(one)) for one, two in pairwise(pieces[at:end])
    )
    low = max(_bottom(line) for line in pieces[at:end])
    for place in range(end, min(end + 3, len(pieces))):
        line = pieces[place]
        white, size = _top(line) - low, _size(line)
        closed = any(_covers(rule, columns) and _bottom(line) - 1 <= rule.y <= _bottom(line) + size for rule in look.rules)
        opened = any(_covers(rule, columns) and low - 1 <= rule.y <= _top(line) + 1 for rule in look.rules)
        ground = any(
            one.top <= _top(line) + 1 and _bottom(line) - 1 <= one.bottom and _covers(one, columns) for one in look.grounds
        )
        before = next((piece for one in reversed(pieces[at:place]) for piece in one if piece.x0 < columns[0].x1), None)
        inside = len(line) == 1 and line[0].x1 < columns[1].x0 and line[0].x0 >= columns[0].x0 - 2
        tight = white < 0 or (spaced and white <= look.usual + _more(size))  # as within its cells
        goes_on = before is not None and white < 0.6 * size and not line[0].bold
        rest = (
            inside
            and goes_on
            and (tight or (before is pieces[place - 1][0] and not _room(before.words, line[0].words, columns[0])))
        )
        if not ((closed and not opened) or ground or rest):
            break
        low = _bottom(line)
        end = place + 1
    return end


def _start(pieces: Sequence[Sequence[_Piece]], at: int, end: int, look: Look) -> int:
    """Where a table begins: with a header above that stands over several columns, if a rule or its place tells that."""
    columns = _columns(pieces[at:end])
    start = at
    for place in reversed(range(max(0, at - 2), at)):
        line = pieces[place]
        if len(line) > 1 or _top(pieces[place + 1]) - _bottom(line) > 1.5 * _size(line) or is_caption(line[0].text):
            break
        ruled = any(_covers(rule, columns) and _top(line) - _size(line) <= rule.y <= _top(line) + 1 for rule in look.rules)
        ground = any(
            one.top <= _top(line) + 1 and _bottom(line) - 1 <= one.bottom and _covers(one, columns) for one in look.grounds
        )
        beside = line[0].x0 > columns[0].x1 and line[0].x1 < columns[-1].x1 + 2
        if not (ruled or ground or beside):
            break
        start = place
    return start


def _covers(drawn: tuple[float, ...], columns: Sequence[_Column]) -> bool:
    """Whether a rule or a ground goes over most of the columns."""
    x0, x1 = columns[0].x0, columns[-1].x1
    return min(drawn[1], x1) - max(drawn[0], x0) > 0.8 * (x1 - x0) and drawn[1] - drawn[0] < 1.6 * (x1 - x0) + 40


def _fits(line: Sequence[_Piece], columns: Sequence[_Column], *, header: bool) -> bool:
    """Whether the pieces of a line stand in columns of their own, or in white beside them, but for one that is over several."""
    over = [[number for number, column in enumerate(columns) if column.x0 < piece.x1 and piece.x0 < column.x1] for piece in line]
    single = [found[0] for found in over if len(found) == 1]
    wide = [found for found in over if len(found) > 1]
    if len(wide) > 1 or len(set(single)) < len(single):
        return False
    return header or not wide or wide[0][0] > 0  # what covers the first column has nothing beside it


# ---- columns ----


def _columns(lines: Sequence[Sequence[_Piece]]) -> list[_Column]:
    """The columns of lines, from the left. Pieces beside each other in a line are of two, and what covers both is of none."""
    columns: list[_Column] = []
    placed = [(piece, number) for number, line in enumerate(lines) for piece in line]
    # The lines with the most pieces tell most, and narrow pieces more than wide ones.
    for piece, number in sorted(placed, key=lambda one: (-len(lines[one[1]]), one[0].x1 - one[0].x0)):
        over = [column for column in columns if column.x0 < piece.x1 and piece.x0 < column.x1]
        if any(one.lines & other.lines for one, other in pairwise(sorted(over, key=lambda column: column.x0))):
            continue
        made = _Column(
            min([piece.x0, *(column.x0 for column in over)]),
            max([piece.x1, *(column.x1 for column in over)]),
            {number}.union(*(column.lines for column in over)),
        )
        columns = [*(column for column in columns if column not in over), made]
    columns.sort(key=lambda column: column.x0)
    most = max(map(len, lines))
    return (_columns_in_order(lines) or columns) if len(columns) > most == len(lines[0]) else columns


def _columns_in_order(lines: Sequence[Sequence[_Piece]]) -> list[_Column]:
    """The columns where headers stand over the middle and cells at the left, by the order of pieces; none if that does not fit."""
    body = _columns(lines[1:]) if len(lines) > 1 else []
    if len(body) != len(lines[0]) or any(_top(second) < _bottom(first) for first, second in pairwise(lines[:3])):
        return []
    made = [
        _Column(min(piece.x0, column.x0), max(piece.x1, column.x1), column.lines | {0})
        for piece, column in zip(lines[0], body, strict=True)
    ]
    return made if all(first.x1 < second.x0 for first, second in pairwise(made)) else []


@dataclass
class _Line:
    """A line of a table: the words of its cells by the first and the last column that they cover."""

    cells: dict[tuple[int, int], list[Word]]
    top: float
    bottom: float

    def at(self, column: int) -> list[Word] | None:
        return self.cells.get((column, column))


def _placed(line: Sequence[_Piece], columns: Sequence[_Column]) -> _Line:
    """A line with its words in their columns. A piece over several is parted where a column begins, or covers them all."""
    cells: dict[tuple[int, int], list[Word]] = {}
    for piece in line:
        over = _over(piece.x0, piece.x1, columns)
        parts: list[tuple[tuple[int, int], list[Word]]] = [((over[0], over[-1]), piece.words)]
        if len(over) > 1:
            parts = list(_parted(piece.words, columns)) or parts
        for key, words in parts:
            cells.setdefault(key, []).extend(words)
    return _Line(cells, _top(line), _bottom(line))


def _over(x0: float, x1: float, columns: Sequence[_Column]) -> list[int]:
    """The columns that something stands over; the nearest one if none."""
    over = [number for number, column in enumerate(columns) if column.x0 < x1 - 0.5 and x0 + 0.5 < column.x1]
    return over or [min(range(len(columns)), key=lambda number: max(columns[number].x0 - x1, x0 - columns[number].x1))]


def _parted(words: Sequence[Word], columns: Sequence[_Column]) -> Iterator[tuple[tuple[int, int], list[Word]]]:
    """Words of a piece by columns; none where a word stands over several, or no white is between two of them."""
    made: list[tuple[tuple[int, int], list[Word]]] = []
    for word in words:
        over = _over(word.x0, word.x1, columns)
        key = (over[0], over[-1])
        if made and made[-1][0] == key:
            made[-1][1].append(word)
            continue
        if len(over) > 1 or (made and word.x0 - made[-1][1][-1].x1 < 0.4 * word.size):
            return
        made.append((key, [word]))
    yield from made


# ---- rows ----


def _table(lines: Sequence[Sequence[_Piece]], look: Look) -> PageTable | None:
    """Lines as a table; None where they are none."""
    columns = _columns(lines)
    if len(columns) < 2 or _bottom(lines[-1]) < EDGE * look.height or _top(lines[0]) > (1 - EDGE) * look.height:
        return None
    x0, x1 = columns[0].x0, columns[-1].x1
    top, bottom = _top(lines[0]), max(map(_bottom, lines))
    size = median(map(_size, lines))
    placed = [_placed(line, columns) for line in lines]
    breaks = [_is_drawn_between(first, second, columns, look) for first, second in pairwise(placed)]
    several = sum(len(line.cells) > 1 for line in placed) + sum(two.top < one.bottom for one, two in pairwise(placed))
    bold = all(piece.bold for piece in lines[0]) and not all(piece.bold for line in lines[1:] for piece in line)
    edged = any(_covers(rule, columns) and top - size <= rule.y <= bottom + size for rule in look.rules)
    wide = all(second.x0 - first.x1 > 1.5 * size for first, second in pairwise(columns))
    if several < 2 or (several < 3 and not (bold or edged or any(breaks) or wide or len(columns) > 2)):
        return None
    groups, certain = _groups(placed, breaks, columns, size, look.usual)
    headers = _drawn_headers(groups, breaks)
    rows: list[list[Cell]] = []
    for number, group in enumerate(groups):
        row = _row([placed[place] for place in group], columns, number < (headers or 1))
        alone = len(row) == 1
        if alone and number > 0:
            certain = certain and row[0].bold
            row = [Cell(row[0].text, 0, len(columns), row[0].bold)] if row[0].bold or row[0].span > 1 or len(columns) > 2 else row
        rows.append(row)
    if any(cell.span > 1 and cell.span < len(columns) for row in rows[(headers or 2) :] for cell in row):
        certain = False
    if any(first[1] >= second[0] for line in placed for first, second in pairwise(sorted(line.cells))):
        certain = False
    names = [len(row) > 1 and not any(map(str.isdigit, "".join(cell.text for cell in row))) for row in rows]
    if names[0] and any(names[2:]) and 2 * sum(names) < len(names):
        certain = False  # a row without any number, as that of the headers: those of another table?
    edges = tuple(round(column.x0) for column in columns)
    tops = tuple(min(placed[place].top for place in group) for group in groups)
    return PageTable(rows, x0, x1, top, bottom, edges, headers, () if certain else (DOUBTED,), tops=tops)


def split_row(cells: Sequence[tuple[Cell, Sequence[Word]]], usual: float, *, body: bool) -> tuple[list[list[Cell]], bool]:
    """The rows that a row of a ruled table has, of which only the columns may be ruled, and whether that is certain.

    Args:
        cells: without text, with their words.
        body: no rules are there but those between the columns, around the table and below its header.
    """
    whole = [[_filled(cell, words) for cell, words in cells]]
    filled = [(cell, words) for cell, words in cells if words]
    several = [cell for cell, words in filled if len(list(lines_of(words))) > 1]
    if len(several) < 2 or any(cell.span > 1 for cell, _ in filled):
        return whole, True
    columns = [_Column(min(word.x0 for word in words), max(word.x1 for word in words), set()) for _, words in filled]
    numbers = {id(word): number for number, (_, words) in enumerate(filled) for word in words}
    lines = []
    for line in lines_of([word for _, words in filled for word in words]):
        held: dict[tuple[int, int], list[Word]] = {}
        for word in line:
            held.setdefault((numbers[id(word)], numbers[id(word)]), []).append(word)
        lines.append(_Line(held, min(word.top for word in line), max(word.bottom for word in line)))
    size = median(word.size for _, words in filled for word in words)
    begins = any(_begins(lines, place, columns) for place in range(1, len(lines)))
    low = min((second.top - first.bottom for first, second in pairwise(lines)), default=0.0)
    alike = len(lines) > 2 and all(len(line.cells) == len(filled) for line in lines)  # hardly lines of one cell each
    if not (body or begins or alike or (usual and low > usual + _more(size))):
        return whole, True
    groups, certain = _groups(lines, [False] * (len(lines) - 1), columns, size, usual)
    if len(groups) < 2:
        return whole, not body
    rows: list[list[Cell]] = []
    for group in groups:
        words_of: dict[int, list[Word]] = {}
        for place in group:
            for (number, _), words in lines[place].cells.items():
                words_of.setdefault(number, []).extend(words)
        row = [_filled(filled[number][0], words) for number, words in sorted(words_of.items())]
        rows.append(row)
    return rows, certain


def _filled(cell: Cell, words: Sequence[Word]) -> Cell:
    text = join_lines([line_of(line).text for line in lines_of(words)])
    return replace(cell, text=text, bold=bool(words) and all(word.bold for word in words))


def _is_drawn_between(first: _Line, second: _Line, columns: Sequence[_Column], look: Look) -> bool:
    """Whether a rule, or the edge of a ground, parts two lines over most of the columns."""
    y0, y1 = (first.top + first.bottom) / 2, (second.top + second.bottom) / 2
    if any(y0 < rule.y < y1 and _covers(rule, columns) for rule in look.rules):
        return True
    return any((y0 < one.top < y1 or y0 < one.bottom < y1) and _covers(one, columns) for one in look.grounds)


def _groups(
    lines: Sequence[_Line], breaks: Sequence[bool], columns: Sequence[_Column], size: float, usual: float
) -> tuple[list[list[int]], bool]:
    """The lines of each row, and whether they were told for certain."""
    pairs = len(lines) - 1
    begins = [_begins(lines, place, columns) for place in range(1, len(lines))]
    # By what is drawn, if each row has its own.
    if sum(breaks) >= 2 and not any(begins[place] and not breaks[place] for place in range(pairs)):
        return _split(len(lines), breaks), True
    # By white, if there is more of it between rows than within cells.
    low, whites = lines[0].bottom, []
    for line in lines[1:]:
        whites.append(line.top - low)
        low = max(low, line.bottom)
    more = _more(size)
    least = max(0.0, min(whites))
    if min(whites) < 0:  # lines that stand beside each other
        positive = [white for white in whites if white > 0]
        least = min(positive) if positive and max(positive) > min(positive) + more else 0.0
    large = [breaks[place] or whites[place] > least + more for place in range(pairs)]
    within = not usual or least <= usual + more  # of cells, as there is between the lines of a paragraph
    if (
        within
        and not all(large)
        and any(white > least + more for white in whites)
        and not any(begins[place] and not large[place] for place in range(pairs))
    ):
        return _split(len(lines), large), True
    # All lines stand alike: each is a row if more white is between them than between the lines of a paragraph, or all have a key.
    keyed = [0 in {column for first, last in line.cells for column in range(first, last + 1)} for line in lines]
    if all(keyed):
        if not within:
            return _split(len(lines), [True] * pairs), True
        sure = [breaks[place] or begins[place] for place in range(pairs)]
        full = all(len(line.cells) == len(columns) for line in lines)  # of cells of several lines, some would end before others
        if all(sure) or (full and 2 * sum(sure) >= pairs):
            return _split(len(lines), [True] * pairs), True
    told = []
    for place in range(pairs):
        fewer = len(lines[place + 1].cells) < max(len(lines[place].cells), 2)
        small = all(words[0].text[:1].islower() for words in lines[place + 1].cells.values())
        rest = (fewer or small) and all(_is_rest(lines, place + 1, key[0], columns) for key in lines[place + 1].cells)
        told.append(breaks[place] or begins[place] or (keyed[place + 1] and not rest))
    return _split(len(lines), told), False


def _more(size: float) -> float:
    """So much more white is between rows than within cells, at least."""
    return max(1.5, 0.18 * size)


def _split(count: int, breaks: Sequence[bool]) -> list[list[int]]:
    groups = [[0]]
    for place in range(1, count):
        if breaks[place - 1]:
            groups.append([])
        groups[-1].append(place)
    return groups


def _begins(lines: Sequence[_Line], place: int, columns: Sequence[_Column]) -> bool:
    """Whether a line surely begins a row: words stand in its first column, and some had room in the line above."""
    line, above = lines[place], lines[place - 1]
    shared = [column for column in range(len(columns)) if line.at(column) and above.at(column)]
    return line.at(0) is not None and any(_room(above.at(column), line.at(column), columns[column]) for column in shared)


def _is_rest(lines: Sequence[_Line], place: int, column: int, columns: Sequence[_Column]) -> bool:
    """Whether the words of a line may be the rest of a cell: begun in a line above, in small letters, and without room there."""
    words = lines[place].at(column)
    before = next((line.at(column) for line in reversed(lines[:place]) if line.at(column)), None)
    if words is None or before is None or SENTENCE_END.search(before[-1].text) or _room(before, words, columns[column]):
        return False
    return words[0].text[:1].islower() or has_han(words[0].text) or not words[0].text[:1].isalpha()


def _room(before: Sequence[Word] | None, after: Sequence[Word] | None, column: _Column) -> bool:
    """Whether the first word of a line would have had its place at the end of the line above in its column."""
    if not before or not after:
        return False
    return fits(after[0], (column.x1 - column.x0) - (before[-1].x1 - before[0].x0))


def _drawn_headers(groups: Sequence[Sequence[int]], breaks: Sequence[bool]) -> int | None:
    """How many rows at the top are parted from the others by the only thing that is drawn between rows."""
    drawn = [number for number in range(1, len(groups)) if breaks[groups[number][0] - 1]]
    return drawn[0] if len(drawn) == 1 and drawn[0] <= 2 and len(groups) > drawn[0] + 1 else None


def _row(lines: Sequence[_Line], columns: Sequence[_Column], header: bool) -> list[Cell]:
    """The cells of a row. In a header, what stands over the middle of several columns covers them."""
    words: dict[tuple[int, int], list[Word]] = {}
    for line in lines:
        for (first, last), held in line.cells.items():
            inside = next((key for key in words if key[0] <= last and first <= key[1]), (first, last))
            words.setdefault(inside, []).extend(held)
    cells = []
    for (first, last), held in sorted(words.items()):
        if header and len(words) < len(columns) - 1:
            first, last = _covered(held, first, last, columns)
        text = join_lines([line_of(line).text for line in lines_of(held)])
        cells.append(Cell(text, first, last - first + 1, all(word.bold for word in held)))
    return cells


def _covered(words: Sequence[Word], first: int, last: int, columns: Sequence[_Column]) -> tuple[int, int]:
    """The columns over whose middle words stand, of those that have the ones in which they stand."""
    x0, x1 = min(word.x0 for word in words), max(word.x1 for word in words)
    if first == 0:
        return first, last

    def away(key: tuple[int, int]) -> float:
        return abs((columns[key[0]].x0 + columns[key[1]].x1) / 2 - (x0 + x1) / 2)

    return min(
        ((one, other) for one in range(1, first + 1) for other in range(last, len(columns))),
        key=lambda key: (round(away(key) / 3), key),
    )
