"""Plain text, and the lines of printed pages, put together to headings and paragraphs."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from gatewise.mdt.documents.document import Block, Document
from gatewise.mdt.documents.headings import (
    SENTENCE_END,
    is_heading,
    number_of,
    population_mark,
    reads_as_sentence,
    stands_like_heading,
    with_levels,
)

Line = tuple[str, str]  # its place, and what it says
_REPEATED = 3  # pages on which the same line makes a header or footer
_BARE_NUMBER = re.compile(r"[-–—]?\s*(\d{1,4})\s*[-–—]?|(\d{1,4})\s*(?:of|/)\s*\d{1,4}", re.IGNORECASE)
_PAGE_NUMBER = re.compile(r"page\s*\d+\s*(?:(?:of|/)\s*\d+)?|第\s*\d+\s*页\s*(?:[/，,]?\s*共\s*\d+\s*页)?", re.IGNORECASE)
_HAN_END = re.compile(r"[\u3000-\u9fff\uff00-\uffef]$")
# A hyphen at the end of a line stays where it belongs to the word.
_PREFIXES = ("non", "post", "pre", "anti", "self", "long", "short", "high", "low", "second", "first", "beta", "alpha")
_LONGEST_WORD = 40
_LINE = 60  # characters of a line that is one of a paragraph


def read_plain_text(text: str, name: str) -> Document:
    """Reads plain text."""
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    notes: list[str] = []
    if any("\f" in line for _, line in lines):  # pages, as programs print PDFs to text
        lines, notes = without_margins(_pages(lines), name)
    return Document(name, tuple(paragraphs(lines)), tuple(notes))


def _pages(lines: Sequence[Line]) -> list[list[Line]]:
    pages: list[list[Line]] = [[]]
    for where, line in lines:
        first, *others = line.split("\f")
        pages[-1].append((where, first))
        pages += [[(where, other)] for other in others]
    return pages


def paragraphs(lines: Sequence[Line], *, printed: bool = False) -> list[Block]:
    """Lines to headings and paragraphs, parted by empty lines; a line "population@passage" is one of its own.

    Args:
        printed: the lines are those of printed pages, without empty ones between them: a short line that ends a sentence ends its
            paragraph.
    """
    return with_levels(list(_gathered(lines, printed)))


def _gathered(lines: Sequence[Line], printed: bool) -> Iterator[Block]:
    longest = max((len(line.strip()) for _, line in lines), default=0)
    gathered: list[str] = []
    place = ""
    following = [*(line.strip() for _, line in lines[1:]), "", ""]
    for (where, raw), after in zip([*lines, ("", "")], following, strict=False):
        line = raw.strip()
        alone = population_mark(line) > 0 or _is_numbered_heading(line, gathered[-1] if gathered else "", after)
        if gathered and (not line or alone or (printed and stands_like_heading(line) and SENTENCE_END.search(gathered[-1]))):
            yield _paragraph(gathered, place)
            gathered = []
        if not line:
            continue
        place = place if gathered else where
        gathered.append(line)
        short = len(line) < 0.75 * longest
        # A line that goes on in small letters or with a number is a sentence that was broken, however short it is.
        title = len(gathered) == 1 and stands_like_heading(line) and (not after or _begins_anew(after))
        if alone or (printed and short and (title or SENTENCE_END.search(line))):
            yield _paragraph(gathered, place)
            gathered = []


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


def _paragraph(lines: Sequence[str], where: str) -> Block:
    parts = [lines[0]]
    for before, line in pairwise(lines):
        stem = re.search(r"([a-z]+)-$", before[-_LONGEST_WORD:])
        if stem and line[0].islower():
            parts[-1] = before if stem[1] in _PREFIXES else before[:-1]
        elif not _HAN_END.search(before) or line[0].isascii():
            parts.append(" ")
        parts.append(line)
    return Block(" ".join("".join(parts).split()), int(len(lines) == 1 and is_heading(lines[0])), where)


def without_margins(pages: Sequence[Sequence[Line]], name: str) -> tuple[list[Line], list[str]]:
    """The lines of pages without page numbers and without what stands at the top or bottom of several pages; and notes on that.

    A number is a page's only in its first or last line, and only if it fits another page's or no sentence runs through it.
    """
    filled = [[line for line in page if line[1].strip()] for page in pages]
    steps = _steps(filled)
    outer = Counter(
        line
        for number, page in enumerate(filled)
        for line in set(_edges([text.strip() for _, text in _trimmed(page, number, steps, set())]))
    )
    # What ends a sentence or says what to do is no header, and text left out could be a warning.
    margins = {
        line for line, count in outer.items() if count >= _REPEATED and stands_like_heading(line) and not reads_as_sentence(line)
    }
    kept: list[Line] = []
    for number, page in enumerate(pages):
        kept += _trimmed(page, number, steps, margins)
    notes = [f'{name}: "{line}", at the top or bottom of {outer[line]} pages, was left out' for line in sorted(margins)]
    return kept, notes


def _steps(pages: Sequence[Sequence[Line]]) -> set[int]:
    """How far numbers at the edges of pages are from the places of their pages, where several pages agree."""
    found = Counter(
        value - number
        for number, page in enumerate(pages)
        for value in {_value(text) for _, text in [*page[:2], *page[-2:]]}
        if value is not None
    )
    return {step for step, count in found.items() if count > 1}


def _value(line: str) -> int | None:
    number = _BARE_NUMBER.fullmatch(line.strip())
    return int(number[1] or number[2]) if number else None


def _edges(lines: Sequence[str]) -> Sequence[str]:
    return [lines[0], lines[-1]] if lines else []


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

    while lines and goes(lines[-1][1].strip(), next((text.strip() for _, text in lines[-2::-1] if text.strip()), ""), False):
        lines.pop()
    while lines and goes(lines[0][1].strip(), next((text.strip() for _, text in lines[1:] if text.strip()), ""), True):
        lines.pop(0)
    return lines
