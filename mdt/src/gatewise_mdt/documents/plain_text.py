"""Plain text, and the lines of printed pages, put together to headings and paragraphs."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from gatewise_mdt.documents.document import Block, Document, in_one_line
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


_HAN_END = re.compile(r"[\u3000-\u9fff\uff00-\uffef]$")
# A hyphen at the end of a line stays where it belongs to the word.
_PREFIXES = ("non", "post", "pre", "anti", "self", "long", "short", "high", "low", "second", "first", "beta", "alpha")
_LONGEST_WORD = 40
_LINE = 60  # characters of a line that is one of a paragraph
_BULLET = re.compile(r"[•●▪■◦‣∙·○–*\uf0b7\uf0a7-]\s+(?=\S)")
_ITEM_NUMBER = re.compile(r"\(?(\d{1,2}|[a-z])(?:[.)]\s+|、\s*)(?=\S)")
_SURE_BULLET = re.compile(r"[•●▪■◦‣∙○\uf0b7\uf0a7]\s*(?=\S)")


def read_plain_text(text: str, name: str) -> Document:
    """Reads plain text."""
    lines = [Line(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    notes = (f"{name} has page breaks: headers, footers and page numbers are not told from its text; give the PDF itself",)
    blocks = map(in_one_line, with_levels(blocks_without_levels(lines)))
    return Document(name, tuple(blocks), notes if "\f" in text else ())


def blocks_without_levels(lines: Sequence[Line], *, printed: bool = False, named: bool = True) -> list[Block]:
    """Lines to headings (all of level 1), paragraphs and items of lists, parted by empty lines; a line "population@passage" is one
    of its own.

    Args:
        printed: the lines are those of printed pages, without empty ones between them: a short line that ends a sentence ends its
            paragraph.
        named: a line is a heading if it reads like one; else only if it has a number, as where the fonts tell the others.
    """
    return list(_blocks(lines, printed, named))


def _blocks(lines: Sequence[Line], printed: bool, named: bool) -> Iterator[Block]:
    longest = max((len(line.text.strip()) for line in lines), default=0)
    held: list[str] = []
    place, item, depth = "", False, 0
    items: list[int] = []  # how far the items are moved in that the line may stand under, the outermost first

    def block(below: str) -> Block:
        is_one = not item and len(held) == 1 and stands_alone_as_heading(held[0]) and (named or number_of(held[0]) is not None)
        # "In pregnancy:" over a list is said of its items, and not of all that comes after it.
        is_one &= not (re.search(r"[:：]$", held[0]) and _BULLET.match(below))
        made = Block(join_lines(held), int(is_one), place, "item" if item else "paragraph", depth=depth)
        held.clear()
        return made

    stripped = [*(line.text.strip() for line in lines), "", ""]
    for number, (where, raw, full) in enumerate([*lines, Line("", "")]):
        line, after = stripped[number], stripped[number + 1]
        before = held[-1] if held else ""
        bullet = _bullet(line, before, item)
        alone = population_mark(line) > 0 or _is_numbered_heading(line, before, after)
        counted = not printed and not bullet and not alone and _is_counted(line, before, after, item)
        if held and (not line or alone or bullet or counted or (printed and _ends_before(line, before))):
            yield block(next(filter(None, stripped[number:]), ""))
        if not line:
            item = False
            continue
        if not held:
            place, item = where, bool(bullet or counted)
            moved = 0 if printed else len(raw.expandtabs(4)) - len(raw.expandtabs(4).lstrip())
            while items and (moved <= items[-1] or alone):
                items.pop()
            depth = len(items)
            if item:
                items.append(moved)
        held.append(line[bullet:] if bullet else line)
        short = len(line) < 0.75 * (full or longest)
        # A line that goes on in small letters or with a number is a sentence that was broken, however short it is.
        title = named and len(held) == 1 and not item and stands_like_heading(line) and (not after or _begins_anew(after))
        if alone or (printed and short and (title or SENTENCE_END.search(line))):
            yield block(after)


def _ends_before(line: str, before: str) -> bool:
    """Whether a paragraph of a printed page ends before a line."""
    return bool(stands_like_heading(line) and SENTENCE_END.search(before))


def _is_counted(line: str, before: str, after: str, in_list: bool) -> bool:
    """Whether a line is an item with a number, "2. Stop it": in a list, or before the next number or an inner item."""
    number = _ITEM_NUMBER.match(line)
    if number is None:
        return False
    following = _ITEM_NUMBER.match(after)
    goes_on = following is not None and (_counts(following[1]) == _counts(number[1]) + 1 or _counts(following[1]) == 1)
    return in_list or ((before == "" or before[-1] in ":：") and (goes_on or bool(_BULLET.match(after))))


def _counts(number: str) -> int:
    return int(number) if number.isdigit() else ord(number) - ord("a") + 1


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
