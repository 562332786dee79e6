"""What a document says: headings, paragraphs, items of lists and rows of tables with their places, and the sections they make."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, zip_longest
from typing import Literal, NamedTuple

from gatewise.errors import some

# No text of a document holds these: they stand around a superscript, and around the name of a footnote where it is referred to,
# until all of a paragraph is known.
RAISED, LOWERED, NOTE = "\x02", "\x03", "\x04"
_MARK = re.compile(rf"\s*{NOTE}([^{NOTE}]*){NOTE}")  # of a footnote
_SMALL_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_RAISED_NOTE = "what is raised after a number was taken for the mark of a note: compare it with the document"
_REFERS_AFTER = re.compile(
    r"(?:[^\W\d_]{3}|[a-z)][.,;:?!]|[\u3400-\u9fff)）”。，；：、]|(?<![^\W\d_])(?:m?g|kg|[µμ]g|m?[lL]|d[lL]|IU|U|h)|%)$"
)
_MEASURED = (
    r"\s*(?:m?g|kg|mcg|[µμ]g|micro\w+|m[lL]|mm\s?Hg|%|mmol|tablets?|puffs?|drops?|times|hours?|days?|weeks?|months?|years?)\b"
)
_UNIT = r"\s?(?:%|(?:m?g|kg|mcg|[µμ]g|micrograms|m[lL]|mm\s?Hg|mm|cm|mmol|[µμ]mol|IU|units?)\b(?:/\w+(?:\.\d+)?)*)"
_SUPERSCRIPT = re.compile(f"{RAISED}([^{LOWERED}]*){LOWERED}?({_UNIT})?")
_SMALL_NUMBER = re.compile(rf"(?<=\d)([⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+)({_UNIT})?")
BULLETS = "•●▪■◦‣∙○\uf0b7\uf0a7"
"""Signs that are bullets wherever they stand before a text, two of them of Word's own fonts."""
TYPED_BULLET = re.compile(rf"(?:[{BULLETS}]\s*|[-–*]\s+(?=[^\W\d_]))(?=\S)")
"""A bullet that is a part of the text, as nothing marks a list."""
UNKNOWN = "\ufffd"
"""Stands for a sign that a document gives no meaning to."""
_SYMBOLS = {
    0xA3: "≤", 0xA5: "∞", 0xAB: "↔", 0xAC: "←", 0xAD: "↑", 0xAE: "→", 0xAF: "↓", 0xB0: "°", 0xB1: "±", 0xB3: "≥", 0xB4: "×",
    0xB7: "•", 0xB8: "÷", 0xB9: "≠", 0xBB: "≈", 0x3C: "<", 0x3D: "=", 0x3E: ">", 0x2B: "+", 0x2D: "-", 0x61: "α", 0x62: "β",
    0x63: "χ", 0x64: "δ", 0x65: "ε", 0x67: "γ", 0x6B: "κ", 0x6C: "λ", 0x6D: "μ", 0x44: "Δ",
}  # fmt: skip
"""The font Symbol's own places, of signs that change what a sentence says."""
DOT = "⋅"
"""A dot of the font Symbol that may be a bullet, or a sign of multiplication."""
_STANDARD = {"£": "≤", "‡": "≥", "–": UNKNOWN, "·": DOT}
"""What some of these places are in PDF's standard encoding, in which a file's Symbol may be read: its "±" is not told from "–"."""
_PRIVATE = re.compile("[\ue000-\uf8ff]")
Kind = Literal["paragraph", "item", "row", "footnote"]


class Region(NamedTuple):
    """A part of a printed page, in points from the top left corner of what is shown of it."""

    page: int
    x0: float
    x1: float
    top: float
    bottom: float

    @property
    def where(self) -> str:
        return f"page {self.page}"


@dataclass(frozen=True)
class Table:
    """A table as a document shows it.

    Attributes:
        rows: for each of its cells, from the left, the text and how many columns it covers.
        headers: how many rows at the top are its headers.
        regions: where each row is printed; empty in a document without pages.
    """

    rows: tuple[tuple[tuple[str, int], ...], ...]
    headers: int
    regions: tuple[tuple[Region, ...], ...] = ()


@dataclass(frozen=True)
class Block:
    """A heading, or a piece of the text.

    Attributes:
        level: of a heading, from 1; 0 for what is none.
        where: its place, such as "line 12" or "page 3".
        kind: of text: a paragraph, an item of a list, a row of a table, or a footnote, which stands after what refers to it.
        stem: of a row: its beginning, which is said again where the row does not fit into one passage.
        depth: how many items of lists it stands under: 0 for an outer item and for what is in no list, 1 for an inner item, and for
            a second paragraph of an outer one.
        notes: what has to be known of how it was read, a sentence each.
        regions: where it is printed.
        table: of a row its table, and ``row`` its place in there.
    """

    text: str
    level: int = 0
    where: str = ""
    kind: Kind = "paragraph"
    stem: str = ""
    notes: tuple[str, ...] = ()
    depth: int = 0
    regions: tuple[Region, ...] = field(default=(), compare=False, repr=False)
    table: Table | None = field(default=None, compare=False, repr=False)
    row: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class Document:
    """What a file says.

    Attributes:
        name: the file as it was given; "stdin" for "-".
        notes: what could not be read or was left out, a whole sentence each that names the file.
        sha256: of the bytes that it was read from, in hexadecimal digits: which version of the file it is; empty where it was not
            read from any.
    """

    name: str
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()
    sha256: str = ""

    @property
    def text(self) -> str:
        """The text as gatewise reads it: the blocks' texts, a line each.

        Offsets of passages count its characters (Unicode code points, as Python counts them), and not the bytes or characters of
        the file: marks of Markdown, the layout of a PDF and the like are not in it, and a row of a table reads "header: cell".
        """
        return "\n".join(block.text for block in self.blocks)

    @property
    def starts(self) -> list[int]:
        """Where each block begins in the text, and where one after the last would."""
        return list(accumulate((len(block.text) + 1 for block in self.blocks), initial=0))


def sections(blocks: Sequence[Block]) -> Iterator[tuple[tuple[Block, ...], list[Block]]]:
    """The paragraphs directly under each heading, none for some, with the headings above them, the outermost first."""
    above: tuple[Block, ...] = ()
    held: list[Block] = []
    for block in blocks:
        if not block.level:
            held.append(block)
            continue
        if above or held:
            yield above, held
        above, held = (*(one for one in above if one.level < block.level), block), []
    if above or held:
        yield above, held


def with_footnotes(block: Block, notes: Mapping[str, str]) -> Iterator[Block]:
    """A block without the marks of footnotes, and then the footnotes that it refers to, a block each.

    A footnote that only a note of the block refers to is said in that note, for it is about nothing that the block says.
    """
    found = _MARK.findall(block.text)
    told = tuple(_MARK.sub(lambda mark: f" (footnote: {notes[mark[1]]})", note) for note in block.notes)
    text = " ".join(_MARK.sub("", block.text).split()) if found else block.text
    yield replace(block, text=text, stem=_MARK.sub("", block.stem), notes=told)
    for note in dict.fromkeys(found):
        kind = "脚注：" if re.search("[\u4e00-\u9fff]", notes[note]) else "Footnote: "
        yield Block(f"{kind}{notes[note]}", 0, block.where, "footnote")


def joined(regions: Iterable[Region]) -> tuple[Region, ...]:
    """Regions of lines in their order, of which those below each other in a column are one."""
    made: list[Region] = []
    for one in regions:
        last = made[-1] if made else None
        if last and last.page == one.page and one.top > last.top - 1 and min(last.x1, one.x1) > max(last.x0, one.x0):
            bottom = max(last.bottom, one.bottom)
            made[-1] = Region(one.page, min(last.x0, one.x0), max(last.x1, one.x1), last.top, bottom)
        else:
            made.append(one)
    return tuple(made)


def unmarked(text: str) -> str:
    """The text of a cell without the marks of footnotes and superscripts."""
    return one_line(_MARK.sub("", text))


def one_line(said: str) -> str:
    """One line of text; a superscript is a power ("10^9"), refers to a note ("daily[3]"), or is a part of a word ("m2", "1st")."""
    return _told(said)[0]


def in_one_line(block: Block) -> Block:
    """A block with its text and stem in one line, and a note on what may be the mark of a note or a power."""
    text, doubted = _told(block.text)
    notes = (*block.notes, f"{quoted_list(doubted)}: {_RAISED_NOTE}") if doubted else block.notes
    return replace(block, text=text, stem=one_line(block.stem), notes=notes)


def _told(said: str) -> tuple[str, list[str]]:
    """A text in one line, and what of it is raised after a number and was taken for the mark of a note."""
    doubted: list[str] = []
    joined = said.replace(LOWERED + RAISED, "")
    level = _SUPERSCRIPT.sub(lambda found: _levelled(joined, found, doubted), joined)
    made = _SMALL_NUMBER.sub(lambda found: _levelled(level, found, doubted), level)
    return " ".join(made.replace(RAISED, "").replace(LOWERED, "").split()), doubted


def _levelled(text: str, found: re.Match[str], doubted: list[str]) -> str:
    """A superscript and the unit after it as plain text. A small number that is a sign of its own stays if it is no mark."""
    before, (raised, unit) = text[: found.start()], found.groups("")
    said = superscript(before, raised.translate(_SMALL_DIGITS), text[found.end(1) :].removeprefix(LOWERED))
    number = re.search(r"[\d./–-]*\d$", before[-40:])
    if number and said.startswith("["):
        doubted.append(f"{number[0]}{unit}{said}")
        return f"{unit}{said}"  # "130/80 mmHg[1]", so that the number keeps its unit
    return (raised if found.re is _SMALL_NUMBER else said) + unit


def superscript(before: str, raised: str, after: str) -> str:
    """A superscript between two texts, as it stands in plain text.

    After a number it is a power of ten, "10^9/L", or refers to a note: 130/80 with a raised 1 is not 130/801, and no power either.
    """
    reference = re.fullmatch(r"\d[\d,–-]*|[a-z]|[*†‡§¶]{1,3}", raised)
    if before[-1:].isdigit():
        if re.fullmatch(r"[-−–+]\d+", raised) or (re.fullmatch(r"\d{1,2}", raised) and _is_power_of_ten(before, raised, after)):
            return f"^{raised}"
        if re.match(r"[/⁄]\d", after):  # 1 and a half tablets
            return f" {raised}"
        if raised in ("o", "0") and re.match(r"\s?[CF]\b", after):
            return "°"
        return f"[{raised}]" if reference else raised
    # After a word or a full stop it is a reference, unless the word is a unit of length: "visits[3]", "5 mg[a]", but "30 kg/m2".
    return f"[{raised}]" if reference and _REFERS_AFTER.search(before) else raised


def _is_power_of_ten(before: str, raised: str, after: str) -> bool:
    times = re.search(r"[x×·*]\s?10$", before)
    ten = re.search(r"(?<![\d.,/–-])10$", before) and raised != "1" and not re.match(_MEASURED, after)
    return bool(times or ten)


def of_symbol_font(said: str, *, standard: bool = False) -> str:
    """A text in the font Symbol by what the letters look like: its m is a μ, and its ³ a ≥. UNKNOWN for those that are not known.

    Args:
        standard: letters may have been read in PDF's standard encoding.
    """

    def look(letter: str) -> str:
        code = ord(letter)
        if standard and letter in _STANDARD:
            return _STANDARD[letter]
        is_own = 0xF000 <= code <= 0xF0FF
        if not (is_own or letter in "£³" or (letter.isascii() and letter.isalpha())):
            return letter  # a digit, or in Unicode already
        place = code & 0xFF
        return chr(place) if 0x20 <= place < 0x40 else _SYMBOLS.get(place, UNKNOWN)

    return "".join(map(look, said))


def without_meaning(blocks: Iterable[Block]) -> str:
    """A sentence on signs that have no meaning outside of a font, or none at all; empty where there are none."""
    private = [block for block in blocks if UNKNOWN in block.text or _PRIVATE.search(re.sub(f"[{BULLETS}]", "", block.text))]
    if not private:
        return ""
    places = list(dict.fromkeys(block.where for block in private))
    return f"some letters have no meaning in the file; {UNKNOWN} or a sign of its own stands for each: compare {some(places, 20)}"


def quoted_list(texts: Sequence[str], places: Sequence[str] = (), most: int = 20) -> str:
    """Texts in quotation marks, long ones shortened, with their places if given, and the number of those that are not shown."""
    said = [f'"{text[:80]}{"…" if len(text) > 80 else ""}"' for text in texts[:most]]
    said = [f"{one} ({place})" if place else one for one, place in zip_longest(said, places[:most], fillvalue="")]
    return ", ".join(said) + (f" and {len(texts) - most} more" if len(texts) > most else "")


class Unread:
    """What a reader met of a document and left out, or could not read as it stands.

    Attributes:
        counts: how many there were of each kind that cannot be read.
    """

    def __init__(self) -> None:
        self._texts: dict[str, dict[str, None]] = {}
        self.counts: Counter[str] = Counter()

    def tell(self, what: str, text: str) -> None:
        """Keeps a text for the note that says what was done with such ones."""
        self._texts.setdefault(what, {})[" ".join(text.split())] = None

    def notes(self) -> Iterator[str]:
        """A sentence on each kind of what there was; on texts only where they say something."""
        for what, texts in self._texts.items():
            if said := [text for text in texts if any(map(str.isalnum, text))]:
                yield f"{what}: {quoted_list(said)}"
        equations = self.counts.pop("equation", 0)
        if self.counts:
            kinds = [f"{count} {kind if count == 1 else f'{kind}s'}" for kind, count in self.counts.items()]
            yield f"{', '.join(kinds)} could not be read: look there for text that matters"
        if equations:
            yield f"equations were read as plain text ({equations}): compare them with the document"


HIDDEN = "hidden text was left out"
STRUCK = "text that is struck through was read like any other"
