"""Words, lines and rules of a printed page, in points from its top left corner."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from gatewise_mdt.documents.document import BULLETS, LOWERED, RAISED
from gatewise_mdt.documents.language import has_han
from gatewise_mdt.documents.tables import Cell

EDGE = 0.1  # of a page's height: what is printed there on several pages is a header or footer
FAR = 2.2  # of the size of letters: between pieces of a line that are no sentence
_MARK = re.compile(rf"(?:[{BULLETS}·–*-]|\(?(?:\d+(?:\.\d+)*|[a-zA-Z]|[ivx]{{1,4}})[.)]?|[（(]?[一二三四五六七八九十]+[）)、]?)$")


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
        doubted: it is of a column of text that may be one of a table.
        gap: points of white above it in its column; 0 for the first line.
        full: characters of a line that is as long as the column is wide.
        width: of the column, in points.
        left: where the column begins.
    """

    text: str
    x0: float
    x1: float
    top: float
    bottom: float
    size: float
    bold: bool
    apart: bool = False
    doubted: bool = False
    gap: float = 0.0
    full: int = 0
    width: float = 0.0
    left: float = 0.0


@dataclass(frozen=True)
class PageTable:
    """A table.

    Attributes:
        edges: where its columns begin, by which its continuation on the next page is known.
        headers: how many rows at the top are its headers; None where only the look of the first row tells.
        notes: what has to be known of how its rows were told.
        doubted: it stands in a column of text that may be one of a table.
        tops: where each row begins.
    """

    rows: list[list[Cell]]
    x0: float
    x1: float
    top: float
    bottom: float
    edges: tuple[float, ...]
    headers: int | None = None
    notes: tuple[str, ...] = ()
    doubted: bool = False
    tops: tuple[float, ...] = ()


class Rule(NamedTuple):
    """A line that is drawn from the left to the right."""

    x0: float
    x1: float
    y: float


class Ground(NamedTuple):
    """A rectangle with a colour, on which something is printed."""

    x0: float
    x1: float
    top: float
    bottom: float


class Look(NamedTuple):
    """What has to be known of a page besides its words.

    Attributes:
        usual: white between the lines of a paragraph; 0 where it is not known.
    """

    height: float
    rules: tuple[Rule, ...] = ()
    grounds: tuple[Ground, ...] = ()
    usual: float = 0.0


def lines_of(words: Sequence[Word]) -> Iterator[list[Word]]:
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


def is_mark(text: str) -> bool:
    """Whether a word is a bullet, or the number of an item or a paragraph."""
    return bool(_MARK.match(text))


def line_of(words: Sequence[Word]) -> PageLine:
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


def fits(word: Word, white: float) -> bool:
    """Whether the first word of a line would have had its place in so much white at the end of the line above."""
    width = word.size if has_han(word.text) else word.x1 - word.x0
    return white > width + 0.25 * word.size + 0.5


def pieces_of(words: Sequence[Word], apart: float = FAR) -> Iterator[list[Word]]:
    """A line in pieces that stand apart, by so much of the size of letters; a bullet or a number belongs to what follows it."""
    piece: list[Word] = []
    for word in words:
        far = piece and word.x0 - piece[-1].x1 >= apart * word.size
        if far and not (piece[0] is words[0] and len(piece) == 1 and is_mark(piece[0].text)):
            yield piece
            piece = []
        piece.append(word)
    yield piece
