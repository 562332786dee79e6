"""Where the boxes of a tree go: text wrapped to the width of a box, parents centred over their children, children left and right.

Widths are those of DejaVu Sans, wider than most fonts a viewer may have instead, so that text stays inside its box.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gatewise.mdt.tree import DecisionTree

# Widths in hundredths of the font size -> the printable ASCII characters that are so wide or a little less.
_WIDTHS = {
    29: "'ijl",
    31: "IJ",
    33: " ,.",
    35: "/:;\\|",
    37: "-f",
    41: "()[]!tr",
    47: '"',
    54: "*_`s?z",
    57: "cLFk",
    61: "vxyPT",
    63: "aeoY",
    65: "$0123456789ESbdghnpqu{}K",
    70: "ABVXZCR",
    77: "UNHD",
    80: "&GOQ",
    85: "w#+<=>^~M",
    100: "%mW@",
}
_WIDTH = {character: width / 100 for width, characters in _WIDTHS.items() for character in characters}
_BOLD = 1.12
# Chinese punctuation that must not begin, and that must not end a line.
_NOT_FIRST, _NOT_LAST = frozenset("，。、；：！？）》」』】”’％%"), frozenset("（《「『【“‘")
_WORD = re.compile(r"\s+|[^\s\u2e80-\uffef]+|[\u2e80-\uffef]")


def width_of(text: str, size: float, bold: bool = False) -> float:
    """About how wide a line of text is, in pixels; rather too much than too little."""
    return sum(map(_character_width, text)) * size * (_BOLD if bold else 1)


def _character_width(character: str) -> float:
    known = _WIDTH.get(character)
    if known is not None:
        return known
    if unicodedata.combining(character):
        return 0.0
    kind = unicodedata.east_asian_width(character)
    return 1.0 if kind in "WF" else 0.9 if kind == "A" else 0.7


def wrap(text: str, width: float, size: float, bold: bool = False) -> list[str]:
    """Lines no wider than ``width``: broken at spaces, between Chinese characters, and inside a word too long for a line."""
    lines: list[str] = []
    line = ""
    for piece in _pieces(text):
        if width_of(line + piece.rstrip(), size, bold) <= width:
            line += piece if line or not piece.isspace() else ""
            continue
        if line.strip():
            lines.append(line.rstrip())
        line = ""
        if piece.isspace():
            continue
        while width_of(piece, size, bold) > width and len(piece) > 1:
            cut = _cut(piece, width, size, bold)
            lines.append(piece[:cut])
            piece = piece[cut:]
        line = piece
    if line.strip():
        lines.append(line.rstrip())
    return lines or [""]


def _pieces(text: str) -> Iterator[str]:
    """Words, spaces and Chinese characters, the latter with the punctuation that has to stay beside them."""
    held = ""
    for piece in _WORD.findall(text):
        if held and not (piece in _NOT_FIRST or held[-1] in _NOT_LAST):
            yield held
            held = ""
        held += " " if piece.isspace() else piece
    if held:
        yield held


def _cut(word: str, width: float, size: float, bold: bool) -> int:
    """How many characters of a long word fit; after a hyphen or slash where there is one in the second half of the line."""
    used, fits = 0.0, 1
    for i, character in enumerate(word):
        used += width_of(character, size, bold)
        if used > width:
            break
        fits = i + 1
    good = max((word.rfind(mark, fits // 2, fits) for mark in "-/–"), default=-1)
    return good + 1 if good > 0 else fits


@dataclass(frozen=True)
class Place:
    """Where a box is: its top left corner and its size, in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def place_boxes(tree: DecisionTree, sizes: list[tuple[float, float]], gap: tuple[float, float]) -> list[Place]:
    """Places for the boxes of a tree, by node, none over another.

    Args:
        sizes: (width, height) of each box.
        gap: least room between boxes, (across, down).
    """
    count = len(tree.nodes)
    depth = [0] * count
    for i, both in enumerate(tree.children):
        for child in both or ():
            depth[child] = depth[i] + 1
    heights = [0.0] * (max(depth) + 1)
    for i, (_, height) in enumerate(sizes):
        heights[depth[i]] = max(heights[depth[i]], height)
    tops = [sum(heights[:level]) + gap[1] * level for level in range(len(heights))]
    # Backwards through the pre-order, children are placed before their parents; a subtree is moved as a whole by its shift.
    middle, shift = [0.0] * count, [0.0] * count
    left: list[list[float]] = [[] for _ in range(count)]  # outline of a subtree by level, seen from its own origin
    right: list[list[float]] = [[] for _ in range(count)]
    for i in range(count - 1, -1, -1):
        half = sizes[i][0] / 2
        both = tree.children[i]
        if both is None:
            left[i], right[i] = [-half], [half]
            continue
        a, b = both
        apart = max(one - other for one, other in zip(right[a], left[b], strict=False)) + gap[0]
        shift[a], shift[b] = -apart / 2, apart / 2
        left[i] = [-half, *_merged(left[a], left[b], shift[a], shift[b], min)]
        right[i] = [half, *_merged(right[a], right[b], shift[a], shift[b], max)]
    for i, both in enumerate(tree.children):
        for child in both or ():
            middle[child] = middle[i] + shift[child]
    least = min(middle[i] - sizes[i][0] / 2 for i in range(count))
    return [
        Place(middle[i] - sizes[i][0] / 2 - least, tops[depth[i]], sizes[i][0], sizes[i][1])  # from x = 0
        for i in range(count)
    ]


def _merged(a: list[float], b: list[float], a_shift: float, b_shift: float, choose: Callable[[list[float]], float]) -> list[float]:
    both = []
    for level in range(max(len(a), len(b))):
        values = [outline[level] + shift for outline, shift in ((a, a_shift), (b, b_shift)) if level < len(outline)]
        both.append(choose(values))
    return both
