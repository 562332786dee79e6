"""A printed page in the order in which people read it: column by column, with its tables in their places."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from gatewise_mdt.documents.columns import gutter, usual_white
from gatewise_mdt.documents.document import UNKNOWN
from gatewise_mdt.documents.lines import EDGE, Drawn, Ground, PageLine, PageTable, Rule, Word, line_of, lines_of, pieces_of
from gatewise_mdt.documents.plain_text import join_lines
from gatewise_mdt.documents.tables import Cell
from gatewise_mdt.documents.unruled import with_tables

_BOLD = re.compile(r"bold|black|heavy|demi|semibold|[-,]bd\b", re.IGNORECASE)
_NO_LETTER = re.compile(r"\(cid:\d+\)")
_THIN = 3.0  # points of a rectangle that is a rule

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
    return list(_read([*words, *tables], _drawn(page), float(page.height)))


def _within(word: Word, box: Sequence[float]) -> bool:
    x, y = (word.x0 + word.x1) / 2, (word.top + word.bottom) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _area(box: Sequence[float]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _table(found: Any, words: Sequence[Word]) -> PageTable | None:
    """What is ruled as a table; None where it is a frame, or columns of text with a line between them."""
    edges = sorted({round(cell[0]) for cell in found.cells})
    columns_of_text = len(found.rows) == 1 and all(
        len(list(lines_of([word for word in words if _within(word, cell)]))) > 5 for cell in found.cells
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
            text = join_lines([line_of(line).text for line in lines_of(inside)])
            cell = Cell(text, column, span, bool(inside) and all(word.bold for word in inside))
            above[column] = box[3], cell
            cells.append(cell)
        low = min((box[3] for box in boxes), default=0.0)
        known = {cell.column + place for cell in cells for place in range(cell.span)}
        cells += [cell for column, (end, cell) in above.items() if column not in known and end > low - 1]
        yield sorted(cells, key=lambda cell: cell.column)


# ---- what is drawn ----


def _drawn(page: Any) -> Drawn:
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
    return Drawn(tuple(_joined_rules(rules)), tuple(_joined_grounds(grounds)))


def _is_white(color: Any) -> bool:
    values = tuple(color) if isinstance(color, (tuple, list)) else (color,)
    if not all(isinstance(value, (int, float)) for value in values):
        return False
    return values == (0, 0, 0, 0) if len(values) == 4 else all(value >= 1 for value in values)


def _joined_rules(rules: Sequence[Rule]) -> Iterator[Rule]:
    held: Rule | None = None
    for rule in sorted(rules, key=lambda one: (round(one.y), one.x0)):
        if held and abs(held.y - rule.y) < 1 and rule.x0 - held.x1 < 1.5:
            held = Rule(held.x0, max(held.x1, rule.x1), held.y)
            continue
        if held:
            yield held
        held = rule
    if held:
        yield held


def _joined_grounds(grounds: Sequence[Ground]) -> Iterator[Ground]:
    held: Ground | None = None
    for one in sorted(grounds, key=lambda one: (round(one.top), round(one.bottom), one.x0)):
        if held and abs(held.top - one.top) < 1 and abs(held.bottom - one.bottom) < 1 and one.x0 - held.x1 < 1.5:
            held = held._replace(x1=max(held.x1, one.x1))
            continue
        if held:
            yield held
        held = one
    if held:
        yield held


# ---- columns and lines ----


def _read(placed: Sequence[_Placed], drawn: Drawn, height: float) -> Iterator[PageItem]:
    """What is placed in a part of a page, as it is read: what is above two columns, the left one, the right one, the rest."""
    if not placed:
        return
    found = gutter(placed, drawn, height)
    if found is None:
        yield from _column(placed, drawn, height)
        return
    between = [one for one in placed if found.top < (one.top + one.bottom) / 2 < found.bottom]
    yield from _read([one for one in placed if (one.top + one.bottom) / 2 <= found.top], drawn, height)
    for side in ([one for one in between if one.x1 <= found.x], [one for one in between if one.x1 > found.x]):
        for item in _read(side, drawn, height):
            yield replace(item, doubted=True) if found.doubted and isinstance(item, PageLine) else item
    yield from _read([one for one in placed if (one.top + one.bottom) / 2 >= found.bottom], drawn, height)


def _column(placed: Sequence[_Placed], drawn: Drawn, height: float) -> Iterator[PageItem]:
    items: list[PageItem] = [one for one in placed if isinstance(one, PageTable)]
    words_by_lines = list(lines_of([one for one in placed if isinstance(one, Word)]))
    for words in with_tables(words_by_lines, drawn, height, usual_white(words_by_lines)):
        if isinstance(words, PageTable):
            items.append(words)
            continue
        pieces = list(pieces_of(words))
        if words[0].bottom < EDGE * height or words[0].top > (1 - EDGE) * height:  # a footer and a page's number are two
            items += map(line_of, pieces)
        else:
            items.append(replace(line_of(words), apart=len(pieces) > 1))
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
