"""Columns of running text on a page, told from the columns of a table by where lines begin and what goes on over them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median

from gatewise_mdt.documents.headings import SENTENCE_END
from gatewise_mdt.documents.language import has_han
from gatewise_mdt.documents.lines import EDGE, Look, PageTable, Word, fits, is_mark, lines_of, pieces_of

_GUTTER = 8.0  # points between columns of text
_LEAST_LINES = 4  # on each side of a gutter
_APART = 1.2  # of the size of letters: between cells, and hardly ever between words of a sentence
_NEAR = 30.0  # points between strips of the same columns
_FAR_BELOW = 2.5  # of the size of letters: between lines of a table
_ALIKE = 1.5  # points between the tops of lines that stand beside each other
_FOOT = 0.05  # of a page's height: what stands there, apart from all above, is a footer
_SMALL = 0.88  # of the size of letters: notes at the foot
_NARROWEST = 12.0  # of the size of letters: a column of running text

_Placed = Word | PageTable
_Beside = tuple[float, float, int | None, int | None]
"""From where to where lines beside each other go, and their numbers on the left and on the right side."""


@dataclass
class _Side:
    """The lines on one side of a strip of white.

    Attributes:
        whole: all of each line; where it is in pieces, ``lines`` has the piece next to the strip.
    """

    whole: list[list[Word]]
    is_left: bool = True

    @cached_property
    def lines(self) -> list[list[Word]]:
        return [list(pieces_of(line, _APART))[-1 if self.is_left else 0] for line in self.whole]

    @cached_property
    def x0(self) -> float:
        return min(word.x0 for line in self.lines for word in line)

    @cached_property
    def x1(self) -> float:
        return max(word.x1 for line in self.lines for word in line)

    @cached_property
    def size(self) -> float:
        return median(word.size for line in self.lines for word in line)

    @cached_property
    def tops(self) -> list[float]:
        return [min(word.top for word in line) for line in self.lines]

    @cached_property
    def bottoms(self) -> list[float]:
        return [max(word.bottom for word in line) for line in self.lines]

    @cached_property
    def whites(self) -> list[float]:
        return [top - bottom for top, bottom in zip(self.tops[1:], self.bottoms[:-1], strict=True)]

    @cached_property
    def goes_on(self) -> list[bool]:
        """For each line whether it surely goes on with the text of the one above, as running text does."""
        return [False, *(self._goes_on(place) for place in range(1, len(self.lines)))]

    def _goes_on(self, place: int) -> bool:
        above, line = self.lines[place - 1], self.lines[place]
        if self.whites[place - 1] > 0.8 * self.size or self.has_room(place):
            return False
        if has_han(line[0].text + above[-1].text):
            wide = above[-1].x1 - above[0].x0 > max(0.8 * (self.x1 - self.x0), _NARROWEST / 2 * self.size)
            return wide and not SENTENCE_END.search(above[-1].text)
        return len(above) > 3 and line[0].text[:1].islower()

    def has_room(self, place: int) -> bool:
        """Whether the first word of a line would have had its place at the end of the line above."""
        return fits(self.lines[place][0], self.x1 - self.lines[place - 1][-1].x1)

    @cached_property
    def more(self) -> float:
        """White between lines that is more than there is within a paragraph or a cell."""
        within = [white for white, goes_on in zip(self.whites, self.goes_on[1:], strict=True) if goes_on]
        usual = median(within) if within else max(0.0, min(self.whites, default=0.0))
        return min(usual + max(1.5, 0.18 * self.size), 0.9 * self.size)

    @cached_property
    def gaps(self) -> list[tuple[float, float]]:
        """From where to where there is more white than between lines."""
        return [(low, high) for low, high in zip(self.bottoms[:-1], self.tops[1:], strict=True) if high - low > self.more]

    @cached_property
    def begins(self) -> list[int]:
        """The lines that surely begin something: after more white than there is between lines, or after room."""
        return [0, *(place for place in range(1, len(self.lines)) if self.whites[place - 1] > self.more or self.has_room(place))]

    @cached_property
    def middles(self) -> list[float]:
        """The heights of the middles of what begins somewhere."""
        ends = [*(place - 1 for place in self.begins[1:]), len(self.lines) - 1]
        return [(self.tops[first] + self.bottoms[last]) / 2 for first, last in zip(self.begins, ends, strict=True)]

    @cached_property
    def is_prose(self) -> bool:
        """Whether it has running text: lines that go on over several; small print below it does not count."""
        large = sum(median(word.size for word in line) > _SMALL * self.size for line in self.lines)
        return sum(self.goes_on) >= min(2, large // 2) and self.x1 - self.x0 > _NARROWEST * self.size

    def is_of_prose(self, place: int) -> bool:
        return self.goes_on[place] or (place + 1 < len(self.lines) and self.goes_on[place + 1])


def usual_white(lines: Sequence[list[Word]]) -> float:
    """White between the lines of paragraphs; 0 where there are none."""
    if not lines:
        return 0.0
    side = _Side(list(lines))
    whites = [side.whites[place - 1] for place in range(1, len(lines)) if side.goes_on[place] and side.whites[place - 1] > 0]
    return median(whites) if whites else 0.0


@dataclass(frozen=True)
class Gutter:
    """White between two columns of running text.

    Attributes:
        doubted: it may be white between columns of a table.
    """

    x: float
    top: float
    bottom: float
    doubted: bool = False


def gutter(placed: Sequence[_Placed], look: Look) -> Gutter | None:
    """The highest strip of white that parts two columns of running text."""
    of_tables: list[tuple[float, float, float]] = []
    above = _without_foot(placed, look)
    for x, start, end in _strips(above):
        if any(abs(x - one) < _NEAR and top <= start and end <= bottom for one, top, bottom in of_tables):
            continue
        between = [one for one in above if start <= (one.top + one.bottom) / 2 <= end and isinstance(one, Word)]
        left = _Side(list(lines_of([one for one in between if one.x1 <= x])))
        right = _Side(list(lines_of([one for one in between if one.x1 > x])), is_left=False)
        few = min(len(left.lines), len(right.lines))
        if few < 2 or (few < _LEAST_LINES and not (left.is_prose and right.is_prose)):
            continue
        alike = _are_parted_alike(left, right) or _begin_alike(left, right)
        if not _part_text(left, right, alike, x, look):
            of_tables.append((x, start, end))
            continue
        doubted = alike or not (left.is_prose and right.is_prose)
        least = 2 * left.size
        for top, bottom in _tables_across(left, right, x, look):
            if top - start >= least:
                return Gutter(x, start, top, doubted)
            start = bottom
        return Gutter(x, start, end, doubted) if end - start >= least else None
    return None


def _without_foot(placed: Sequence[_Placed], look: Look) -> Sequence[_Placed]:
    """What is placed above a footer, which is below both columns, and would be a line too many of a short one."""
    foot = {id(one) for one in placed if one.top > (1 - _FOOT) * look.height}
    above = [one for one in placed if id(one) not in foot]
    if not foot or not above:
        return placed
    white = min(one.top for one in placed if id(one) in foot) - max(one.bottom for one in above)
    return above if white > median(one.bottom - one.top for one in placed) else placed


def _strips(placed: Sequence[_Placed]) -> Iterator[tuple[float, float, float]]:
    """Strips of white with something on both sides, the highest first: the middle of each, and from where to where it goes."""
    x0, x1 = min(one.x0 for one in placed), max(one.x1 for one in placed)
    top, bottom = min(one.top for one in placed), max(one.bottom for one in placed)
    least = 2 * median(one.bottom - one.top for one in placed)
    strips: list[tuple[float, float, float, float]] = []
    for place in range(int(x0 + 0.2 * (x1 - x0)), int(x0 + 0.8 * (x1 - x0)), 2):
        x = float(place)
        crossing = sorted((one.top, one.bottom) for one in placed if one.x0 < x + _GUTTER and one.x1 > x)
        at = top
        for start, end in [*crossing, (bottom, bottom)]:
            if start - at >= least:
                strips.append((at - start, x, at, start))
            at = max(at, end)
    seen: set[tuple[int, int, int]] = set()
    for _, x, start, end in sorted(strips):
        key = (round(start), round(end), sum(one.x1 <= x for one in placed))
        if key not in seen:
            seen.add(key)
            yield x + _GUTTER / 2, start, end


def _part_text(left: _Side, right: _Side, alike: bool, x: float, look: Look) -> bool:
    """Whether two columns are of running text, and not of a table.

    Two columns of running text are, however alike they are, if no rules go over both of them. One beside short lines is, if these
    begin where it goes on.
    """
    if not (left.is_prose or right.is_prose):
        return False
    both = left.is_prose and right.is_prose
    # Of short lines and running text in one frame, the frame's own rules count.
    top, bottom = (
        max(left.tops[0], right.tops[0], EDGE * look.height),
        min(left.bottoms[-1], right.bottoms[-1], (1 - EDGE) * look.height),
    )
    edge = 0.0 if both else left.size
    if sum(rule.x0 < x - _GUTTER and x + _GUTTER < rule.x1 and top - edge < rule.y < bottom + edge for rule in look.rules) > 1:
        return False
    return both or (not alike and _beginnings(left, right)[1] > 1)


def _are_parted_alike(left: _Side, right: _Side) -> bool:
    """Whether white parts both sides at the same heights, as it does the rows of a table."""
    top, bottom = max(left.tops[0], right.tops[0]), min(left.bottoms[-1], right.bottoms[-1])
    first, second = ([(low, high) for low, high in side.gaps if top - 1 < low and high < bottom + 1] for side in (left, right))
    both = [(one, other) for one in first for other in second if min(one[1], other[1]) - max(one[0], other[0]) > 1.5]
    return len(both) >= 2 and len(both) >= 0.8 * min(len(first), len(second)) and len(both) >= 0.6 * max(len(first), len(second))


def _begin_alike(left: _Side, right: _Side) -> bool:
    """Whether what begins on one side begins on the other, and little begins beside what goes on."""
    alike, against = _beginnings(left, right)
    return alike >= 2 and against <= 0.25 * alike


def _beginnings(left: _Side, right: _Side) -> tuple[int, int]:
    """How many lines begin something on both sides, and how many on one where the other goes on."""
    alike = against = 0
    for one, other in ((left, right), (right, left)):
        for place, middle in list(zip(one.begins, one.middles, strict=True))[1:]:
            top = one.tops[place]
            beside = next((number for number, at in enumerate(other.tops) if abs(at - top) < _ALIKE), None)
            if beside is None and any(abs(middle - at) < _ALIKE for at in other.middles):
                alike += 1
            elif beside is None:
                within = any(first < top < second for first, second in pairwise(other.tops))
                against += within
            elif beside in other.begins:
                alike += 1
            elif other.goes_on[beside]:
                against += 1
    return alike, against


def _tables_across(left: _Side, right: _Side, x: float, look: Look) -> Iterator[tuple[float, float]]:
    """From where to where tables go that stand over two columns of text: short lines beside each other."""
    beside: list[_Beside] = [
        (top, bottom, number, None) for number, (top, bottom) in enumerate(zip(left.tops, left.bottoms, strict=True))
    ]
    for number, (top, bottom) in enumerate(zip(right.tops, right.bottoms, strict=True)):
        place = next((place for place, row in enumerate(beside) if row[3] is None and abs(row[0] - top) < _ALIKE), None)
        if place is None:
            beside.append((top, bottom, None, number))
        else:
            beside[place] = (min(beside[place][0], top), max(beside[place][1], bottom), beside[place][2], number)
    runs: list[list[_Beside]] = [[]]
    for row in sorted(beside, key=lambda one: one[0]):
        top, _, one, other = row
        prose = (one is not None and left.is_of_prose(one)) or (other is not None and right.is_of_prose(other))
        listed = one is not None and is_mark(left.whole[one][0].text)
        if prose or listed or (runs[-1] and top - max(before[1] for before in runs[-1]) > _FAR_BELOW * left.size):
            runs.append([])
        if not (prose or listed):
            runs[-1].append(row)
    for run in runs:
        pairs = [number for number, row in enumerate(run) if row[2] is not None and row[3] is not None]
        if not pairs:
            continue
        table = run[pairs[0] : pairs[-1] + 1]
        top, bottom = table[0][0], max(row[1] for row in table)
        within = [rule for rule in look.rules if top - left.size < rule.y < bottom + left.size]
        ruled = any(rule.x0 < x - _GUTTER and x + _GUTTER < rule.x1 for rule in within)
        if (len(pairs) > 2 and not _are_two_tables(left, right, [run[number] for number in pairs])) or (ruled and len(pairs) > 1):
            yield top - 0.1, bottom + 0.1


def _are_two_tables(left: _Side, right: _Side, rows: Sequence[_Beside]) -> bool:
    """Whether both sides have columns of their own, and the right one names, so that they are two tables."""
    of_left = [left.whole[row[2]] for row in rows if row[2] is not None]
    of_right = [right.whole[row[3]] for row in rows if row[3] is not None]
    own = all(2 * sum(len(list(pieces_of(line, _APART))) > 1 for line in lines) > len(rows) for lines in (of_left, of_right))
    return own and 2 * sum(line[0].text[:1].isalpha() for line in of_right) > len(rows)
