"""Lists of a Word document: which number Word shows before a paragraph, and how deep it stands.

Word keeps no numbers in the text: it counts, by what ``numbering.xml`` says of each list and level.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
STEP = 360  # twentieths of a point by which a list is usually moved in from the one that it stands in
_ROMAN = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"), (9, "ix"),
          (5, "v"), (4, "iv"), (1, "i"))  # fmt: skip
_HAN = "零一二三四五六七八九"


@dataclass(frozen=True)
class Indent:
    """How far a paragraph is moved in, in twentieths of a point; None where it is not said.

    Attributes:
        left: its lines.
        first: the first of them from the others, where the mark of an item stands.
    """

    left: int | None = None
    first: int | None = None

    def over(self, other: "Indent") -> "Indent":
        """With what another one says beside."""
        return Indent(other.left if self.left is None else self.left, other.first if self.first is None else self.first)

    @property
    def mark(self) -> int:
        """Where the first line begins."""
        return (self.left or 0) + (self.first or 0)


@dataclass(frozen=True)
class _Level:
    start: int
    format: str
    text: str
    indent: "Indent"
    style: str  # the style of paragraphs that are of this level
    restarts: bool
    legal: bool  # all numbers in digits


@dataclass(frozen=True)
class ListPlace:
    """Where a paragraph stands in the lists of a document.

    Attributes:
        list: which list, as the document names it; "" for one without numbering of its own.
        level: in that list, from 0.
        mark: how far its number or bullet is moved in, in twentieths of a point.
        left: how far its other lines are.
        typed: its number is a part of its text, and ``list`` says what it looks like.
        opens: it is the first of its list.
    """

    list: str
    level: int
    mark: int
    left: int
    typed: bool = False
    opens: bool = False

    def is_below(self, other: "ListPlace") -> bool:
        """Whether it is an item of the list in another item."""
        if self.list and self.list == other.list and not self.typed:
            return self.level > other.level
        if self.opens and other.typed and self.list != other.list and self.mark == other.mark:
            return True  # "（1）" after "1、"
        return self.mark >= other.mark + STEP // 3

    def is_beside(self, other: "ListPlace") -> bool:
        """Whether it is another item of the same typed list, and so stands under all that the other does."""
        return self.typed and other.typed and (self.list, self.mark) == (other.list, other.mark)

    def holds(self, left: int) -> bool:
        """Whether a paragraph that is no item, and whose lines are moved in so far, stands in the item."""
        return left >= self.mark + STEP // 3 or left >= self.left > 0


class Numbering:
    """The lists of a document, which count as its paragraphs come.

    Args:
        root: of ``numbering.xml``; None without one.
    """

    def __init__(self, root: Any) -> None:
        self._levels: dict[str, dict[int, _Level]] = {}  # of each list
        self._counted: dict[str, str] = {}  # list -> what it goes on counting with others
        self._starts: dict[str, dict[int, int]] = {}  # list -> where it starts anew
        self._numbers: dict[str, dict[int, int]] = {}
        if root is not None:
            self._read(root)

    def _read(self, root: Any) -> None:
        abstract = {one.get(f"{_W}abstractNumId", ""): one for one in root.iter(f"{_W}abstractNum")}
        styled = {value_of(one.find(f"{_W}styleLink")): one for one in abstract.values() if one.find(f"{_W}styleLink") is not None}
        for one in root.iter(f"{_W}num"):
            name = one.get(f"{_W}numId", "")
            counted = value_of(one.find(f"{_W}abstractNumId"))
            base = abstract.get(counted)
            if base is not None and (link := base.find(f"{_W}numStyleLink")) is not None:
                base = styled.get(value_of(link), base)
            self._levels[name] = dict(_levels(base)) if base is not None else {}
            self._counted[name], self._starts[name] = counted, {}
            for other in one.iter(f"{_W}lvlOverride"):
                self._levels[name] |= dict(_levels(other))
                if (start := other.find(f"{_W}startOverride")) is not None:
                    self._starts[name][whole_of(other.get(f"{_W}ilvl"))] = whole_of(value_of(start))

    def level_of(self, name: str, style: str) -> int:
        """The level of a list whose paragraphs have a style; the first without one."""
        return next((level for level, one in self._levels.get(name, {}).items() if one.style == style), 0)

    def indent(self, name: str, level: int) -> Indent:
        """How far the paragraphs of a list are moved in."""
        one = self._levels.get(name, {}).get(level)
        return one.indent if one else Indent()

    def next_number(self, name: str, level: int) -> str:
        """What Word shows before the next paragraph of a list, such as "2." or "b)"; empty before one with a bullet."""
        levels = self._levels.get(name, {})
        own = levels.get(level)
        if own is None:
            return ""
        counts = self._numbers.setdefault(self._counted[name], {})
        if (start := self._starts[name].pop(level, None)) is not None:
            counts[level] = start
        else:
            counts[level] = counts[level] + 1 if level in counts else own.start
        for deeper in [other for other in counts if other > level and (other not in levels or levels[other].restarts)]:
            del counts[deeper]
        if own.format in ("bullet", "none") and "%" not in own.text:
            return own.text.strip() if own.format == "none" else ""

        def counted(found: re.Match[str]) -> str:
            one = levels.get(int(found[1]) - 1, own)
            number = counts.get(int(found[1]) - 1, one.start)
            return "" if one.format == "none" else written(number, "decimal" if own.legal else one.format)

        return "" if own.format == "bullet" else re.sub(r"%(\d)", counted, own.text).strip()


def _levels(base: Any) -> Iterator[tuple[int, _Level]]:
    for one in base.iter(f"{_W}lvl"):
        yield (
            whole_of(one.get(f"{_W}ilvl")),
            _Level(
                whole_of(value_of(one.find(f"{_W}start"), "1"), 1),
                value_of(one.find(f"{_W}numFmt"), "decimal"),
                value_of(one.find(f"{_W}lvlText")),
                indent_of(one),
                value_of(one.find(f"{_W}pStyle")),
                value_of(one.find(f"{_W}lvlRestart"), "1") != "0",
                one.find(f"{_W}isLgl") is not None,
            ),
        )


def indent_of(holder: Any) -> Indent:
    """What a paragraph, a style or a level of a list says of how far it is moved in."""
    said = holder.find(f"{_W}pPr/{_W}ind")
    if said is None:
        return Indent()
    hanging = _twips(said.get(f"{_W}hanging"))
    first = _twips(said.get(f"{_W}firstLine")) if hanging is None else -hanging
    return Indent(_twips(said.get(f"{_W}left", said.get(f"{_W}start"))), first)


def _twips(said: str | None) -> int | None:
    return int(float(said)) if said and re.fullmatch(r"-?\d{1,6}(?:\.\d+)?", said) else None


def value_of(element: Any, otherwise: str = "") -> str:
    """The value of an element; ``otherwise`` where there is none."""
    return otherwise if element is None else element.get(f"{_W}val", otherwise)


def whole_of(said: Any, otherwise: int = 0) -> int:
    """The number that a text is; ``otherwise`` for any other."""
    return int(said) if isinstance(said, str) and re.fullmatch(r"[0-9]{1,6}", said) else otherwise


def written(number: int, kind: str) -> str:
    """A number in one of Word's ways of writing them; in digits where it is one of the others."""
    if kind in ("lowerLetter", "upperLetter") and 0 < number < 1000:
        letter = chr(ord("a") + (number - 1) % 26) * ((number - 1) // 26 + 1)
        return letter.upper() if kind == "upperLetter" else letter
    if kind in ("lowerRoman", "upperRoman") and 0 < number < 5000:
        made, left = "", number
        for value, sign in _ROMAN:
            made += sign * (left // value)
            left %= value
        return made.upper() if kind == "upperRoman" else made
    if kind.startswith("decimalEnclosedCircle") and 1 <= number <= 20:
        return chr(0x2460 + number - 1)
    if re.match(r"chinese|japaneseCounting|taiwaneseCounting|ideographDigital", kind) and 0 < number < 100:
        tens, ones = divmod(number, 10)
        return f"{_HAN[tens] if tens > 1 else ''}{'十' if tens else ''}{_HAN[ones] if ones else ''}"
    return str(number)
