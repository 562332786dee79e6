"""A table as sentences: each row says "header: cell" for all of its cells, so that no value stands without what it is of."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gatewise_mdt.documents.document import Block, Region, Table
from gatewise_mdt.documents.headings import gives_dose, reads_as_sentence, tells_what_to_do
from gatewise_mdt.documents.language import has_han

_END = re.compile(r"[.!?;:。！？；：][\"'”’)）\]]*$")
_HEADER = re.compile(
    r"(?:(?:the|name of the|type of)\s+)?(?:drugs?|medicines?|medications?|agents?|doses?|dosage|dosing|indications?|populations?"
    r"|patients?|groups?|age|weight|severity|risk|grade|stage|frequency|route|duration|time|steps?|conditions?|criteria|findings?"
    r"|actions?|treatments?|recommendations?|targets?|comments?|notes?|evidence|strength|if|then|what to do|[a-z]+ \([^)]*\))"
    r"|药物(?:名称)?|药品|剂量|用法(?:用量)?|人群|适应证|禁忌证?|分级|分期|严重程度|推荐(?:意见|等级)?|时间|处理|条件|措施|备注",
    re.IGNORECASE,
)
_LONGEST_HEADER = 60
_DOUBT = '"{}" stands alone in its row, and may be said of the rows below it: compare the table with the document'
_NO_FIRST = 'its first cell is empty, and "{}" was taken from a row above: compare it with the document'
_SHORT = re.compile(r"(?:^|[\s.])[a-z]{1,4}\.$")  # "i.v."


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        column: the first one that it covers, from 0.
        span: columns that it covers.
        bold: whether all of its text is.
    """

    text: str
    column: int
    span: int = 1
    bold: bool = False


Row = Sequence[Cell]


def table_blocks(
    rows: Sequence[Row], places: Sequence[str], headers: int | None = None, regions: Sequence[tuple[Region, ...]] = ()
) -> list[Block]:
    """The rows of a table as blocks.

    Args:
        places: of each row, for the blocks.
        headers: how many rows at the top are its headers, at least: where the last of them has a cell over several columns that the
            row below names one by one, that is a header too. None where the document does not say, and the look of the first row
            has to tell.
        regions: where each row is printed.
    """
    filled = [[replace(cell, text=" ".join(cell.text.split())) for cell in row] for row in rows]
    count = _all_headers(filled, min(headers, len(rows))) if headers is not None else header_count(filled)
    if count > 1:
        filled = [*map(_spread, filled[: count - 1], filled[1:count]), *filled[count - 1 :]]
    said = [number for number, row in enumerate(filled) if any(cell.text for cell in row)]
    if not said or said[-1] < count:  # nothing below that they could head
        count = 0
    top = [header_of(filled[:count], column) for column in range(_width(filled))]
    notes: list[str] = []
    if count and count != headers:
        which = "the first row of the table was" if count == 1 else f"the first {count} rows of the table were"
        notes.append(f"{which} taken for its headers: {_quoted(top)}")
    if count and any(cell.text and 1 < cell.span < _width(filled[count - 1 : count]) for cell in filled[count - 1]):
        notes.append("a header stands over several columns that have none of their own: compare the table with the document")
    if not count and len(said) > 1 and max(map(len, filled)) > 1:
        notes.append("no headers were found in the table: compare it with the document")
    if count and (idle := _idle(filled[count:], top)):
        notes.append(f"headers of the table were left out, as nothing stands under: {_quoted(idle)}")
    table = Table(tuple(map(_seen, filled)), count, tuple(regions))
    made = _blocks(filled[count:], places[count:], top if count else [], tuple(notes))
    placed = [replace(block, table=table, row=block.row + count) for block in made]
    return [replace(block, regions=regions[block.row]) for block in placed] if regions else placed


def _seen(row: Row) -> tuple[tuple[str, int], ...]:
    """The cells of a row from the left, each with how many columns it covers; empty ones where none is."""
    made: list[tuple[str, int]] = []
    at = 0
    for cell in row:
        made += [("", 1)] * (cell.column - at) + [(cell.text, cell.span)]
        at = cell.column + cell.span
    return tuple(made)


def _quoted(headers: Sequence[str]) -> str:
    return ", ".join(f'"{header}"' for header in dict.fromkeys(filter(None, headers)))


def _idle(rows: Sequence[Row], top: Sequence[str]) -> list[str]:
    """The headers that no row says."""
    width = _width(rows)
    names = [_is_over_all(row, width) or (alone and _is_label(row)) for row, alone in zip(rows, _alone(rows), strict=True)]
    cells = [cell for row, is_name in zip(rows, names, strict=True) if not is_name for cell in row if cell.text]
    said = {header for cell in cells for header in top[cell.column : cell.column + cell.span]}
    return [header for header in top if header and header not in said]


def _width(rows: Sequence[Row]) -> int:
    return max((cell.column + cell.span for row in rows for cell in row), default=0)


def _is_over_all(row: Row, width: int) -> bool:
    """Whether all that a row says stands in one cell over all columns."""
    said = [cell for cell in row if cell.text]
    return len(said) == 1 and said[0].span == width > 1


def header_count(rows: Sequence[Row]) -> int:
    """How many rows at the top of a table look like its headers: one, or more if cells of the first cover several columns."""
    # What stands over several columns alone, "Maximum dose", is above a row of headers.
    over = len(rows) > 2 and any(cell.text and cell.column > 0 and cell.span > 1 for cell in rows[0]) and not header_of(rows[:1], 0)
    if over and header_of(rows[1:2], 0) and _looks_like_header(rows[1:]):
        return 1 + _all_headers(rows[1:], 1)
    return _all_headers(rows, 1) if _looks_like_header(rows) else 0


def _all_headers(rows: Sequence[Row], count: int) -> int:
    """How many rows are headers, where it is known of some at the top."""
    while 0 < count < len(rows) - 1 and _names_columns(rows[count - 1], rows[count]):
        count += 1
    return count


def _names_columns(row: Row, below: Row) -> bool:
    """Whether a row names, one by one, the columns that a header above covers: "Dose if eGFR is", then "≥ 60", "30-59", "< 30"."""
    wide = [cell for cell in _spread(row, below) if cell.span > 1 and cell.text]
    named = [cell for cell in below if cell.text]
    sentence = any(len(cell.text) > _LONGEST_HEADER or (_END.search(cell.text) and not _SHORT.search(cell.text)) for cell in named)
    if not wide or not named or sentence:
        return False
    if any(gives_dose(cell.text) or tells_what_to_do(cell.text) for cell in named):
        return False
    inside = [cell for cell in named if any(one.column <= cell.column < one.column + one.span for one in wide)]
    beside = [cell for cell in named if cell not in inside and cell.text != header_of([row], cell.column)]
    # The name of a drug beside it would make it a row like all others.
    return len(inside) > len(wide) and not beside and all(cell.span < max(one.span for one in wide) for cell in inside)


def _spread(row: Row, below: Row) -> list[Cell]:
    """A row of headers whose cells cover the empty ones after them, if the row below names those and not the first column."""
    said = {cell.column for cell in below if cell.text}
    made: list[Cell] = []
    for cell in row:
        empty = not cell.text and cell.span == 1 and cell.column in said
        if empty and made and made[-1].text and made[-1].column > 0 and made[-1].column in said and 0 not in said:
            made[-1] = replace(made[-1], span=made[-1].span + 1)
        else:
            made.append(cell)
    return made


def header_of(rows: Sequence[Row], column: int) -> str:
    """What the header rows say above a column, from the top."""
    said = [cell.text for row in rows for cell in row if cell.column <= column < cell.column + cell.span and cell.text]
    named = ""
    for text in dict.fromkeys(text.rstrip(":：") for text in said):
        goes_on = re.search(r"\b(?:is|are|if|when|for|with|of|in|at|by|from)$", named)  # "Dose if eGFR is", then "< 30"
        named += f"{' ' if goes_on else ', ' if named else ''}{text}"
    return named


def _blocks(rows: Sequence[Row], places: Sequence[str], top: Sequence[str], notes: tuple[str, ...]) -> Iterator[Block]:
    width = _width(rows)
    first: Cell | None = None  # of the last row that has a first cell
    label, waiting = "", None  # of a row that names what the rows below it are about
    doubt: tuple[str, ...] = ()  # whether it does
    for number, (row, where, alone) in enumerate(zip(rows, places, _alone(rows), strict=True)):
        said = [cell for cell in row if cell.text]
        if not said:
            continue
        whole = _is_over_all(row, width)
        is_label = (whole or alone) and _is_label(row)
        if is_label or whole:
            block = Block(said[0].text, 0, where, "row", notes=notes, row=number)
            before, waiting, first = waiting, None, None
            if before is not None:
                yield before
            if is_label:  # of two rows, one below the other, the first may name more than the second
                certain = before is None and (whole or said[0].bold)
                doubt = () if certain else (_DOUBT.format((before or block).text),)
                label, waiting = block.text, replace(block, notes=(*notes, *doubt))
            else:
                yield block
            continue
        waiting = None
        taken: tuple[str, ...] = ()
        if said[0].column == 0:
            first = said[0]
        elif top and first is not None and said[0].column >= first.span:
            said, taken = [first, *said], (_NO_FIRST.format(first.text),)
        text, stem = _row(said, top, label)
        yield Block(text, 0, where, "row", stem, (*notes, *doubt, *taken), row=number)
    if waiting is not None:
        yield waiting


def _alone(rows: Sequence[Row]) -> list[bool]:
    """For each row whether it says something in its first cell alone, and those below say more, as a name of what they are of."""
    said = [[cell for cell in row if cell.text] for row in rows]
    made: list[bool] = []
    following: list[int] = []  # how many cells of the rows below say something, the nearest last
    for row in reversed(said):
        made.append(len(row) == 1 and row[0].column == 0 and max(following[-2:], default=0) > 1)
        following += [len(row)] if row else []
    return made[::-1]


def _is_label(row: Row) -> bool:
    """Whether what stands alone in a row names something, and is no sentence."""
    text = next(cell.text for cell in row if cell.text)
    return not (reads_as_sentence(text) or _END.search(text))


def _row(row: Row, top: Sequence[str], label: str) -> tuple[str, str]:
    """A row as one text, and its beginning."""
    chinese = has_han("".join([label, *(cell.text for cell in row), *top]))
    colon, stop, gap, both = ("：", "。", "", "和") if chinese else (": ", ".", " ", " and ")
    parts = [label] if label else []
    for cell in row:
        header = both.join(dict.fromkeys(filter(None, top[cell.column : cell.column + cell.span])))
        parts.append(f"{header}{colon}{cell.text}" if header else cell.text)
    if top or label:
        parts = [part if _END.search(part) else f"{part}{stop}" for part in parts]
        return gap.join(parts), parts[0] if len(parts) > 1 else ""
    said = parts[0]
    for part in parts[1:]:
        # "Low risk", then "Stop it.": a new sentence in the second cell.
        new = bool(re.match(r"[A-Z]", part)) and not _END.search(said)
        said += f"{colon}{part}" if new and not chinese else f" {part}"
    return said, parts[0] if len(parts) > 1 else ""


def _looks_like_header(rows: Sequence[Row]) -> bool:
    """Whether the first row of a table is its header, though nothing says so. In doubt it is not: a value would become a name."""
    first = [cell for cell in rows[0] if cell.text] if rows else []
    if len(rows) < 2 or len(first) < 2:
        return False
    if any(len(cell.text) > _LONGEST_HEADER or re.search(r"[.!;。！；]$", cell.text) or gives_dose(cell.text) for cell in first):
        return False
    if all(cell.bold for cell in first) and not all(cell.bold for row in rows[1:] for cell in row if cell.text):
        return True
    if sum(bool(_HEADER.fullmatch(cell.text)) for cell in first) > (0 if _HEADER.fullmatch(first[0].text) else 1):
        return True
    if len(rows) < 3 or any(tells_what_to_do(cell.text) or re.search(r"\d", cell.text) for cell in first):
        return False
    below = [[other.text for row in rows[1:] for other in row if other.column == cell.column] for cell in first]
    return any(len(texts) > 1 and all(re.search(r"\d", text) for text in texts) for texts in below)
