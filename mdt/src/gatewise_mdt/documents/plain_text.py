"""Plain text, and the lines of printed pages, put together to headings and paragraphs."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from gatewise_mdt.documents.document import BULLETS, Block, Document, Region, in_one_line, joined
from gatewise_mdt.documents.headings import (
    ITEM_NUMBER,
    SENTENCE_END,
    counted,
    is_general,
    is_heading,
    number_of,
    population_mark,
    reads_as_sentence,
    stands_alone_as_heading,
    stands_like_heading,
    style_of,
    with_levels,
)


class Line(NamedTuple):
    """A line.

    Attributes:
        where: its place.
        text: what it says.
        full: characters of a line that is as long as its column is wide; 0 takes the longest of all lines.
        regions: where it is printed.
        moved: how far a printed line is moved in, to compare; that of another one is in its text.
    """

    where: str
    text: str
    full: int = 0
    regions: tuple[Region, ...] = ()
    moved: int = 0


_HAN_END = re.compile(r"[\u3000-\u9fff\uff00-\uffef]$")
# A hyphen at the end of a line stays where it belongs to the word, by what is before and after it: "follow-ing" is none.
_HYPHENED = re.compile(
    r"(?:non|post|pre|anti|self|long|short|high|low|second|first|beta|alpha|once|twice|two|three|half|well)-|follow-(?:ups?|on|through)\b"
    r"|co-(?:trimoxazole|amoxiclav|codamol|dydramol|careldopa|beneldopa|danthr|phenotrope|fluampicil|flumactone|amilo|cyprindiol"
    r"|magaldrox|proxamol|simalcite|tenidone|triamterzide|codaprin|zidocapt|dergocrine|trifamole|morbid|administ|prescri|infect"
    r"|treat|medic|occur|exist)"
)
_LONGEST_WORD = 40
_LINE = 60  # characters of a line that is one of a paragraph
_BULLET = re.compile(rf"[{BULLETS}·–*+-]\s+(?=\S)")
_SURE_BULLET = re.compile(rf"[{BULLETS}]\s*(?=\S)")


def read_plain_text(text: str, name: str) -> Document:
    """Reads plain text."""
    lines = [Line(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
    notes = (f"{name} has page breaks: headers, footers and page numbers are not told from its text; give the PDF itself",)
    blocks = map(in_one_line, _with_doubts(with_levels(blocks_without_levels(lines))))
    return Document(name, tuple(blocks), notes if "\f" in text else ())


def _with_doubts(blocks: Sequence[Block]) -> Iterator[Block]:
    """Blocks with notes on what comes after a list under a short line, which may be a heading or name what the list alone is of."""
    heading: Block | None = None
    listed = beyond = False
    for before, block in zip([None, *blocks], blocks, strict=False):
        if block.level:
            heading, listed, beyond = block, False, False
        if heading is not None and before is heading and number_of(heading.text) is None and not is_general(heading.text):
            listed |= block.kind == "item"
        beyond |= listed and block.kind != "item" and not block.depth
        if beyond and heading is not None:
            said = f'"{heading.text}" was taken for a heading, and may be said of the list below it alone: compare the document'
            yield replace(block, notes=(*block.notes, said))
        else:
            yield block


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
    regions: list[Region] = []
    place, item, depth = "", False, 0
    items: list[_Item] = []  # that the line may stand under, the outermost first

    def block(below: str) -> Block:
        is_one = not item and len(held) == 1 and stands_alone_as_heading(held[0]) and (named or number_of(held[0]) is not None)
        # "In pregnancy:" over a list is said of its items, and not of all that comes after it.
        is_one &= not (re.search(r"[:：]$", held[0]) and _BULLET.match(below))
        made = Block(join_lines(held), int(is_one), place, "item" if item else "paragraph", depth=depth, regions=joined(regions))
        held.clear()
        regions.clear()
        return made

    stripped = [*(line.text.strip() for line in lines), "", ""]
    below = _next_said(lines)
    for number, (where, raw, full, printed_at, printed_in) in enumerate([*lines, Line("", "")]):
        line, after = stripped[number], stripped[number + 1]
        before = held[-1] if held else ""
        bullet = _bullet(line, before, item)
        alone = population_mark(line) > 0 or _is_numbered_heading(line, before, after)
        # The first line of a printed paragraph may be moved in and stand under nothing.
        moved = (printed_in if bullet else 0) if printed else _moved(raw)
        again = any((one.moved, one.style) == (moved, style_of(line)) for one in items) if line else False
        has_number = (
            not printed
            and not bullet
            and not alone
            and _is_counted(line, before, below[number].strip(), item, again, _moved(below[number]) > moved)
        )
        # A paragraph of a printed page ends where a line may be a heading.
        ends = printed and stands_like_heading(line) and SENTENCE_END.search(before)
        if held and (not line or alone or bullet or has_number or ends):
            yield block(line or below[number].strip())
        if not line:
            item = False
            continue
        if not held:
            place, item = where, bool(bullet or has_number)
            own = _Item(moved, style_of(line), line) if item else None
            while items and (alone or not items[-1].holds(moved, own)):
                last = items.pop()
                if own and (last.moved, last.style) == (own.moved, own.style):  # it stands under what that one does
                    break
            depth = len(items)
            items += [own] if own else []
        held.append(line[bullet:] if bullet else line)
        regions += printed_at
        short = len(line) < 0.75 * (full or longest)
        # A line that goes on in small letters or with a number is a sentence that was broken, however short it is.
        title = named and len(held) == 1 and not item and stands_like_heading(line) and (not after or _begins_anew(after))
        if alone or (printed and short and (title or SENTENCE_END.search(line))):
            yield block(after)


def _next_said(lines: Sequence[Line]) -> list[str]:
    """For each line, and after the last, the next one that says something; empty without one."""
    made = [""]
    for line in reversed(lines):
        made.append(line.text if line.text.strip() else made[-1])
    return [*made[-2::-1], ""]


class _Item(NamedTuple):
    """An item that other lines may stand under.

    Attributes:
        moved: how many signs it is moved in.
        style: of its number or bullet.
    """

    moved: int
    style: str
    text: str

    def holds(self, moved: int, item: "_Item | None") -> bool:
        """Whether a line that is moved in so far stands under it, which may be an item itself."""
        if item is None or moved != self.moved or item.style == self.style:
            return moved > self.moved
        # Not moved in, but "（1）" under "1、", or a list under a line with a colon.
        number = ITEM_NUMBER.match(item.text)
        numbered = number is not None and counted(number) == 1 and ITEM_NUMBER.match(self.text)
        return bool(numbered or re.search(r"[:：]$", self.text))


def _moved(line: str) -> int:
    """How many signs a line is moved in."""
    wide = line.expandtabs(4)
    return len(wide) - len(wide.lstrip())


def _is_counted(line: str, before: str, below: str, in_list: bool, again: bool, moved_in: bool) -> bool:
    """Whether a line is an item with a number, "2. Stop it": in a list, or before the next number or an inner item.

    Args:
        again: an item with such a number stands above it.
        moved_in: the next line that says something is moved in.
    """
    number = ITEM_NUMBER.match(line)
    if number is None or in_list:
        return number is not None
    if before and before[-1] not in ":：":
        return False
    following = ITEM_NUMBER.match(below)
    inner = bool(_BULLET.match(below)) or (following is not None and counted(following) == 1)
    if not again and not before and stands_alone_as_heading(line):
        return inner and (moved_in or line[-1] in ":：")
    return again or inner or (following is not None and counted(following) == counted(number) + 1)


def _bullet(line: str, before: str, in_list: bool) -> int:
    """Where the text of an item begins behind its bullet; 0 if the line is none. "5" and, below it, "- 10 mg" is a range."""
    found = _SURE_BULLET.match(line)
    if found is None and (in_list or not before or before[-1] in ":：") and not (before and re.search(r"[\d<>≤≥=]$", before)):
        found = _BULLET.match(line)
    return found.end() if found else 0


def _is_numbered_heading(line: str, before: str, after: str) -> bool:
    """Whether a line is a heading though no empty line parts it from its text: it has a number, and is none of a list's items."""
    number = number_of(line)
    begins = not before or (SENTENCE_END.search(before) and before[-1] not in ":：;；")
    if number is None and begins and (counts := re.match(r"\d+(?=\s)", line)):  # "2 Years to 12 Years"
        number = counts[0]
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
        stem = re.search(r"((?:(?<![A-Za-z])[A-Z])?[a-z]+)[-\u2010]$", before[-_LONGEST_WORD:])
        if before.endswith("\xad"):  # which is there for this alone
            parts[-1] = before[:-1]
        elif stem and line[0].islower():
            parts[-1] = before if _HYPHENED.match(f"{stem[1].lower()}-{line}") else before[:-1]
        elif not _HAN_END.search(before) or line[0].isascii():
            parts.append(" ")
        parts.append(line)
    return " ".join("".join(parts).split())
