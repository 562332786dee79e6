"""A printed page in the order in which people read it: column by column, with its tables in their places."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

from gatewise_mdt.documents.columns import gutter, usual_white
from gatewise_mdt.documents.document import DOT, UNKNOWN, of_symbol_font
from gatewise_mdt.documents.lines import EDGE, Ground, Look, PageLine, PageTable, Rule, Word, line_of, lines_of, pieces_of
from gatewise_mdt.documents.tables import Cell
from gatewise_mdt.documents.unruled import DOUBTED, split_row, with_tables

_BOLD = re.compile(r"bold|black|heavy|demi|semibold|[-,]bd\b", re.IGNORECASE)
_NO_LETTER = re.compile(r"\(cid:\d+\)|[\x00-\x1f\x7f]")
_SYMBOL = re.compile(r"(?:^|\+)Symbol(?:MT|PS)?(?:$|[-,])")
_BESIDE = 1.1  # of the size of letters: between pieces of two lines at the same place
_TOUCH = 0.4  # points between words of cells that touch
_THIN = 3.0  # points of a rectangle that is a rule

PageItem = PageLine | PageTable
_Placed = Word | PageTable
Drawn = TypeVar("Drawn", Rule, Ground)


def items_of(page: Any) -> list[PageItem]:
    """Lines and tables of a pdfplumber page, in the order in which they are read."""
    page = _printed_once(page)
    upright = page.filter(lambda thing: thing["object_type"] != "char" or bool(thing["upright"]))
    # Coloured grounds are no grid: they may lie under each second row.
    ruled = page.filter(lambda thing: thing["object_type"] != "rect" or thing["stroke"] or _is_thin(thing))
    grids = sorted(ruled.find_tables(), key=lambda table: -_area(table.bbox))
    printed = upright.extract_words(x_tolerance_ratio=0.2, y_tolerance=2, extra_attrs=["fontname", "size"], return_chars=True)
    words = _with_bullets([word for one in printed for word in _words(one, grids)])
    usual = usual_white(list(lines_of(words)))
    tables: list[PageTable] = []
    for found in grids:  # of one inside another only the outer one
        if table := _table(found, words, usual):
            tables.append(table)
            words = [word for word in words if not any(_within(word, cell) for cell in found.cells)]
    return list(_read([*words, *tables], _look(page, usual)))


def _printed_once(page: Any) -> Any:
    """A page without the letters that are printed again at their place, to look bold; pdfplumber's own way takes minutes."""
    from pdfplumber.utils import cluster_objects

    alike = defaultdict[Any, list[Any]](list)
    for one in page.chars:
        alike[one["text"], one["fontname"], one["size"], one["upright"]].append(one)
    again = set[int]()
    for letters in alike.values():
        for line in cluster_objects(letters, "top", 0.5):
            for place in cluster_objects(line, "x0", 0.5):
                again |= {id(one) for one in sorted(place, key=lambda one: (one["top"], one["x0"]))[1:]}
    return page.filter(lambda one: id(one) not in again)


def _words(printed: Any, grids: Sequence[Any]) -> Iterator[Word]:
    """A word, or the words that it is made of in cells beside each other, between which there is next to no white."""
    y = (printed["top"] + printed["bottom"]) / 2
    cells = [cell for grid in grids for cell in grid.cells if cell[1] < y < cell[3]]
    # Letters of one word that runs over the edge of its cell stand close.
    gaps = [(one["x1"], other["x0"]) for one, other in pairwise(printed["chars"]) if other["x0"] - one["x1"] > _TOUCH]
    edges = sorted({cell[0] for cell in cells if any(first - 0.3 <= cell[0] <= second + 0.3 for first, second in gaps)})
    ends = [printed["x0"], *edges, printed["x1"]]
    for start, end in pairwise(ends):
        inside = [one for one in printed["chars"] if start <= (one["x0"] + one["x1"]) / 2 <= end] if edges else printed["chars"]
        text = "".join(one["text"] for one in inside) if edges else printed["text"]
        if inside:
            text = _NO_LETTER.sub(UNKNOWN, text)
            yield Word(
                of_symbol_font(text, standard=True) if _SYMBOL.search(printed["fontname"]) else text,
                min(one["x0"] for one in inside),
                max(one["x1"] for one in inside),
                printed["top"],
                printed["bottom"],
                printed["size"],
                bool(_BOLD.search(printed["fontname"])),
            )


def _with_bullets(words: Sequence[Word]) -> list[Word]:
    """A sign by itself to which the file gives no meaning is most often a bullet, where it stands before a text.

    A dot of the font Symbol is one too, and elsewhere a sign of multiplication: files give both places the same meaning.
    """
    first = {id(piece[0]): len(piece) > 1 for line in lines_of(words) for piece in pieces_of(line)}
    made = []
    for word in words:
        if word.text == DOT:
            word = word._replace(text="•" if id(word) in first else "×")
        made.append(word._replace(text="•") if word.text == UNKNOWN and first.get(id(word)) else word)
    return made


def _is_thin(rect: Any) -> bool:
    return bool(min(rect["bottom"] - rect["top"], rect["x1"] - rect["x0"]) <= _THIN)


def _within(word: Word, box: Sequence[float]) -> bool:
    x, y = (word.x0 + word.x1) / 2, (word.top + word.bottom) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _area(box: Sequence[float]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _table(found: Any, words: Sequence[Word], usual: float) -> PageTable | None:
    """What is ruled as a table; None where it is a frame, or columns of text with a line between them."""
    edges = sorted({round(cell[0]) for cell in found.cells})
    columns_of_text = len(found.rows) == 1 and all(
        len(list(lines_of([word for word in words if _within(word, cell)]))) > 5 for cell in found.cells
    )
    if len(edges) == 1 or columns_of_text or not any(_within(word, cell) for word in words for cell in found.cells):
        return None
    x0, top, x1, bottom = found.bbox
    rows: list[list[Cell]] = []
    tops: list[float] = []
    certain = True
    headers = None
    for place, row in enumerate(_ruled_rows(found, edges)):
        parts, told = split_row(
            [(cell, [word for word in words if _within(word, box)]) for cell, box in row], usual, body=len(found.rows) < 3
        )
        if len(parts) > 1 and rows and not headers:
            headers = len(rows)  # what a rule parts from several rows is over them
        rows += parts
        tops += [found.rows[place].bbox[1]] * len(parts)
        certain = certain and told
    return PageTable(rows, x0, x1, top, bottom, tuple(edges), headers, () if certain else (DOUBTED,), tops=tuple(tops))


def _ruled_rows(table: Any, edges: Sequence[int]) -> Iterator[list[tuple[Cell, Sequence[float]]]]:
    """The rows of a ruled table, as cells without text and their boxes; a cell that goes over several rows is in each."""
    above: dict[int, tuple[Cell, Sequence[float]]] = {}
    for row in table.rows:
        cells = []
        for box in (box for box in row.cells if box):
            column = edges.index(round(box[0]))
            span = max(1, sum(box[0] - 1 <= edge < box[2] - 1 for edge in edges))
            above[column] = Cell("", column, span), box
            cells.append(above[column])
        low = min((box[3] for _, box in cells), default=0.0)
        known = {cell.column + place for cell, _ in cells for place in range(cell.span)}
        cells += [(cell, box) for column, (cell, box) in above.items() if column not in known and box[3] > low - 1]
        yield sorted(cells, key=lambda one: one[0].column)


# ---- what is drawn ----


def _look(page: Any, usual: float) -> Look:
    """The rules and grounds of a page, of which pieces side by side are one."""
    rules = [Rule(one["x0"], one["x1"], one["top"]) for one in page.lines if abs(one["bottom"] - one["top"]) < 1]
    grounds = []
    for one in page.rects:
        high, wide = one["bottom"] - one["top"], one["x1"] - one["x0"]
        if high <= _THIN and wide > _THIN:
            rules.append(Rule(one["x0"], one["x1"], (one["top"] + one["bottom"]) / 2))
        elif high > _THIN and wide > _THIN and high < 0.5 * page.height:
            if one["stroke"]:
                rules += [Rule(one["x0"], one["x1"], y) for y in (one["top"], one["bottom"])]
            if one["fill"] and not _is_white(one["non_stroking_color"]):
                grounds.append(Ground(one["x0"], one["x1"], one["top"], one["bottom"]))
    return Look(float(page.height), tuple(_joined(rules)), tuple(_joined(grounds)), usual)


def _is_white(color: Any) -> bool:
    values = tuple(color) if isinstance(color, (tuple, list)) else (color,)
    if not all(isinstance(value, (int, float)) for value in values):
        return False
    return values == (0, 0, 0, 0) if len(values) == 4 else all(value >= 1 for value in values)


def _joined(drawn: Sequence[Drawn]) -> Iterator[Drawn]:
    """Rules, or grounds: pieces side by side at the same height are one."""
    held: Drawn | None = None
    for one in sorted(drawn, key=lambda one: (*map(round, one[2:]), one.x0)):
        if held and one.x0 - held.x1 < 1.5 and all(abs(y - other) < 1 for y, other in zip(held[2:], one[2:], strict=True)):
            held = held._replace(x1=max(held.x1, one.x1))
            continue
        if held:
            yield held
        held = one
    if held:
        yield held


# ---- columns and lines ----


def _read(placed: Sequence[_Placed], look: Look) -> Iterator[PageItem]:
    """What is placed in a part of a page, as it is read: what is above two columns, the left one, the right one, the rest."""
    if not placed:
        return
    found = gutter(placed, look)
    if found is None:
        yield from _column(placed, look)
        return
    between = [one for one in placed if found.top < (one.top + one.bottom) / 2 < found.bottom]
    yield from _read([one for one in placed if (one.top + one.bottom) / 2 <= found.top], look)
    for side in ([one for one in between if one.x1 <= found.x], [one for one in between if one.x1 > found.x]):
        for item in _read(side, look):
            yield replace(item, doubted=True) if found.doubted else item
    yield from _read([one for one in placed if (one.top + one.bottom) / 2 >= found.bottom], look)


def _have_white_alike(above: Sequence[Sequence[Word]], line: Sequence[Sequence[Word]]) -> bool:
    """Whether two lines are parted by white at the same place, as those of two columns are."""

    def whites(pieces: Sequence[Sequence[Word]]) -> list[tuple[float, float]]:
        return [(first[-1].x1, second[0].x0) for first, second in pairwise(pieces)]

    return any(min(one[1], other[1]) - max(one[0], other[0]) > line[0][0].size for one in whites(above) for other in whites(line))


def _column(placed: Sequence[_Placed], look: Look) -> Iterator[PageItem]:
    items: list[PageItem] = [one for one in placed if isinstance(one, PageTable)]
    above: list[list[Word]] = []
    words_by_lines = list(lines_of([one for one in placed if isinstance(one, Word)]))
    for words in with_tables(words_by_lines, look._replace(usual=usual_white(words_by_lines) or look.usual)):
        if isinstance(words, PageTable):
            items.append(words)
            above = []
            continue
        pieces = list(pieces_of(words))
        if words[0].bottom < EDGE * look.height or words[0].top > (1 - EDGE) * look.height:  # a footer and a page's number are two
            # Below others of several pieces they may be a table's.
            items += (replace(line_of(piece), apart=len(pieces) > 2) for piece in pieces)
            continue
        near = list(pieces_of(words, _BESIDE))
        apart = len(pieces) > 1 or _have_white_alike(above, near)
        if apart and items and isinstance(items[-1], PageLine) and _have_white_alike(above, near):
            items[-1] = replace(items[-1], apart=True)
        items.append(replace(line_of(words), apart=apart))
        above = near
    items.sort(key=lambda item: item.top)
    lines = [item for item in items if isinstance(item, PageLine)]
    left = min((line.x0 for line in lines), default=0)
    width = max((line.x1 for line in lines), default=0) - left
    before = None
    for item in items:
        if isinstance(item, PageLine):
            full = int(max(len(item.text), 1) * width / max(item.x1 - item.x0, 1))
            gap = max(0.0, item.top - before) if before is not None else 0.0
            item = replace(item, gap=gap, full=full, width=width, left=left)
        yield item
        before = item.bottom
