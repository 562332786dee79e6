"""Plain text, and the lines of printed pages, put together to headings and paragraphs."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from gatewise_mdt.documents.document import Block, Document
from gatewise_mdt.documents.headings import (
    SENTENCE_END,
    is_heading,
    number_of,
    population_mark,
    reads_as_sentence,
    stands_alone_as_heading,
    stands_like_heading,
    with_levels,
)


class Line(NamedTuple):
    """A line.

    Attributes:
        where: its place.
        text: what it says.
        full: characters of a line that is as long as its column is wide; 0 takes the longest of all lines.
    """

    where: str
    text: str
    full: int = 0


_REPEATED = 3  # pages on which the same line makes a header or footer
_BARE_NUMBER = re.compile(r"[-–—]?\s*(\d{1,4})\s*[-–—]?|(\d{1,4})\s*(?:of|/)\s*\d{1,4}", re.IGNORECASE)
_PAGE_NUMBER = re.compile(r"page\s*\d+\s*(?:(?:of|/)\s*\d+)?|第\s*\d+\s*页\s*(?:[/，,]?\s*共\s*\d+\s*页)?", re.IGNORECASE)
_HAN_END = re.compile(r"[\u3000-\u9fff\uff00-\uffef]$")
# A hyphen at the end of a line stays where it belongs to the word.
_PREFIXES = ("non", "post", "pre", "anti", "self", "long", "short", "high", "low", "second", "first", "beta", "alpha")
_LONGEST_WORD = 40
_LINE = 60  # characters of a line that is one of a paragraph
_BULLET = re.compile(r"[•●▪■◦‣∙·○–*\uf0b7\uf0a7-]\s+(?=\S)")
_SURE_BULLET = re.compile(r"[•●▪■◦‣∙○\uf0b7\uf0a7]\s*(?=\S)")


def read_plain_text(text: str, name: str) -> Document:
    """Reads plain text."""
    lines = [Line(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    notes: list[str] = []
    if any("\f" in line.text for line in lines):  # pages, as programs print PDFs to text
        lines, notes = without_margins(_pages(lines), name)
    return Document(name, tuple(paragraphs(lines)), tuple(notes))


def _pages(lines: Sequence[Line]) -> list[list[Line]]:
    pages: list[list[Line]] = [[]]
    for line in lines:
        first, *others = line.text.split("\f")
        pages[-1].append(Line(line.where, first))
        pages += [[Line(line.where, other)] for other in others]
    return pages


def paragraphs(lines: Sequence[Line], *, printed: bool = False) -> list[Block]:
    """Lines to headings, paragraphs and items of lists, parted by empty lines; a line "population@passage" is one of its own.

    Args:
        printed: the lines are those of printed pages, without empty ones between them: a short line that ends a sentence ends its
            paragraph.
    """
    return with_levels(blocks_without_levels(lines, printed=printed))


def blocks_without_levels(lines: Sequence[Line], *, printed: bool, named: bool = True) -> list[Block]:
    """As :func:`paragraphs`, with 1 for the level of all headings.

    Args:
        named: a line is a heading if it reads like one; else only if it has a number, as where the fonts tell the others.
    """
    return list(_gathered(lines, printed, named))


def _gathered(lines: Sequence[Line], printed: bool, named: bool) -> Iterator[Block]:
    longest = max((len(line.text.strip()) for line in lines), default=0)
    held: list[str] = []
    place, item = "", False

    def block() -> Block:
        is_one = not item and len(held) == 1 and stands_alone_as_heading(held[0]) and (named or number_of(held[0]) is not None)
        made = Block(join_lines(held), int(is_one), place, "item" if item else "paragraph")
        held.clear()
        return made

    following = [*(line.text.strip() for line in lines[1:]), "", ""]
    for (where, raw, full), after in zip([*lines, Line("", "")], following, strict=False):
        line = raw.strip()
        before = held[-1] if held else ""
        bullet = _bullet(line, before, item)
        alone = population_mark(line) > 0 or _is_numbered_heading(line, before, after)
        if held and (not line or alone or bullet or (printed and stands_like_heading(line) and SENTENCE_END.search(before))):
            yield block()
        if not line:
            item = False
            continue
        if not held:
            place, item = where, bool(bullet)
        held.append(line[bullet:] if bullet else line)
        short = len(line) < 0.75 * (full or longest)
        # A line that goes on in small letters or with a number is a sentence that was broken, however short it is.
        title = named and len(held) == 1 and not item and stands_like_heading(line) and (not after or _begins_anew(after))
        if alone or (printed and short and (title or SENTENCE_END.search(line))):
            yield block()


def _bullet(line: str, before: str, in_list: bool) -> int:
    """Where the text of an item begins behind its bullet; 0 if the line is none. "5" and, below it, "- 10 mg" is a range."""
    found = _SURE_BULLET.match(line)
    if found is None and (in_list or not before or before[-1] in ":：") and not (before and re.search(r"[\d<>≤≥=]$", before)):
        found = _BULLET.match(line)
    return found.end() if found else 0


def _is_numbered_heading(line: str, before: str, after: str) -> bool:
    """Whether a line is a heading though no empty line parts it from its text: it has a number, and is none of a list's items."""
    number = number_of(line)
    if number is None or not is_heading(line):
        return False
    if after.startswith(f"{number}.") and number_of(after) not in (None, number):  # "2 Treatment", then "2.1 Adults with asthma"
        return True
    if "." in number:
        return not after or _begins_anew(after)
    in_list = number_of(before) is not None or number_of(after) is not None
    return not in_list and _begins_anew(after) and (reads_as_sentence(after) or len(after) > _LINE)


def _begins_anew(line: str) -> bool:
    return stands_like_heading(line) or bool(re.match(r"[^\w\s]*(?:[A-Z]|[^\W\d_a-z])", line))


def join_lines(lines: Sequence[str]) -> str:
    """Lines as one, with words that were cut at their ends put together."""
    parts = list(lines[:1])
    for before, line in pairwise(lines):
        stem = re.search(r"([a-z]+)-$", before[-_LONGEST_WORD:])
        if stem and line[0].islower():
            parts[-1] = before if stem[1] in _PREFIXES else before[:-1]
        elif not _HAN_END.search(before) or line[0].isascii():
            parts.append(" ")
        parts.append(line)
    return " ".join("".join(parts).split())


def without_margins(pages: Sequence[Sequence[Line]], name: str) -> tuple[list[Line], list[str]]:
    """The lines of pages without page numbers and without what stands at the top or bottom of several pages; and notes on that.

    A number is a page's only in its first or last line, and only if it fits another page's or no sentence runs through it.
    """
    filled = [[line for line in page if line.text.strip()] for page in pages]
    steps = _steps(filled)
    outer: Counter[str] = Counter()
    for number, inner in enumerate(filled):
        trimmed = _trimmed(inner, number, steps, set())
        outer.update({line.text.strip() for line in [*trimmed[:1], *trimmed[-1:]]})
    # What ends a sentence or says what to do is no header, and text left out could be a warning.
    margins = {
        line for line, count in outer.items() if count >= _REPEATED and stands_like_heading(line) and not reads_as_sentence(line)
    }
    kept: list[Line] = []
    for number, page in enumerate(pages):
        lines = _trimmed(page, number, steps, margins)
        if kept and lines and SENTENCE_END.search(kept[-1].text.rstrip()) and _begins_anew(lines[0].text.strip()):
            kept.append(Line("", ""))  # the empty lines there went with the margins
        kept += lines
    notes = [f'{name}: "{line}", at the top or bottom of {outer[line]} pages, was left out' for line in sorted(margins)]
    return kept, notes


def _steps(pages: Sequence[Sequence[Line]]) -> set[int]:
    """How far numbers at the edges of pages are from the places of their pages, where several pages agree."""
    found = Counter(
        value - number
        for number, page in enumerate(pages)
        for value in {_value(line.text) for line in [*page[:2], *page[-2:]]}
        if value is not None
    )
    return {step for step, count in found.items() if count > 1}


def _value(line: str) -> int | None:
    number = _BARE_NUMBER.fullmatch(line.strip())
    return int(number[1] or number[2]) if number else None


def _trimmed(page: Sequence[Line], number: int, steps: set[int], margins: set[str]) -> list[Line]:
    """A page without empty lines, margins and page numbers at its edges."""
    lines = list(page)

    def goes(text: str, beside: str, first: bool) -> bool:
        if not text or text in margins or _PAGE_NUMBER.fullmatch(text):
            return True
        value = _value(text)
        if value is None:
            return False
        apart = _begins_anew(beside) if first else bool(SENTENCE_END.search(beside) or is_heading(beside))
        return value - number in steps or not beside or apart

    while lines and goes(lines[-1].text.strip(), next((one.text.strip() for one in lines[-2::-1] if one.text.strip()), ""), False):
        lines.pop()
    while lines and goes(lines[0].text.strip(), next((one.text.strip() for one in lines[1:] if one.text.strip()), ""), True):
        lines.pop(0)
    return lines
