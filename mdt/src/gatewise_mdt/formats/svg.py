"""A decision tree as SVG, drawn by our own code, with nothing from outside.

Colours are attributes, so that every viewer shows them; a page that holds the drawing may set others by class. Text is wrapped to
the width of a box. Widths are those of DejaVu Sans, wider than most fonts that a
viewer may have instead, so that text stays inside its box.
"""

import html
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gatewise.checks import printable
from gatewise_mdt.formats.origin import confidence_of, origin_of
from gatewise_mdt.formats.words import Words, words_for
from gatewise_mdt.pathway import Link, Pathway
from gatewise_mdt.records import DOUBTFUL, TreeRecord
from gatewise_mdt.relations import AVOIDS, Language, relation_in
from gatewise_mdt.tree import DecisionTree, Node, Triple

BOX, PAD, GAP, MARGIN = 264, 14, (28, 58), 24
HEAD, SMALL, BODY, TITLE = 12, 11.5, 14, 17
LINE = 1.32  # of the font size
FONT = "system-ui,-apple-system,'Segoe UI','Noto Sans','Noto Sans CJK SC','PingFang SC','Microsoft YaHei',sans-serif"
# kind -> fill, border
COLOURS = {"condition": ("#e8f0fb", "#2f6db5"), "decision": ("#e6f4ea", "#2d7d46"), "nothing": ("#f5f6f7", "#7c8894")}
INK, FAINT, WARN = "#18222d", "#55636f", "#9a4b00"
YES, NO = "#2d7d46", "#a23b3b"
# Characters that XML does not allow, not even escaped.
_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


class _Line(NamedTuple):
    """One line of text in a box: its style, and the triple that it belongs to."""

    text: str
    style: str
    triple: int | None = None
    before: float = 0  # room above


_STYLES = {
    "head": (HEAD, True, FAINT),
    "join": (SMALL, True, FAINT),
    "label": (SMALL, False, FAINT),
    "avoid": (SMALL, True, NO),
    "object": (BODY, True, INK),
    "warn": (SMALL, False, WARN),
    "nothing": (BODY, False, FAINT),
    "sure": (SMALL, False, FAINT),
    "doubtful": (SMALL, True, WARN),
}


class Place(NamedTuple):
    """Where a box is: its top left corner and its size, in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def drawing_of(
    tree: DecisionTree,
    text: str = "",
    *,
    warnings: Sequence[str] = (),
    headings: Sequence[str] = (),
    origin: Sequence[str] = (),
    focusable: bool = False,
    language: Language | None = None,
    confidence: Sequence[float | None] = (),
) -> str:
    """The drawing of a tree, an SVG. It has no style attributes, which pages may not allow.

    Args:
        text: the passage, to mark triples that are not in it; without one nothing is marked.
        warnings: of the extraction, to stand under the drawing.
        headings: above the passage in its document, to stand there too.
        origin: where the tree comes from, for the description of the drawing, which is not drawn.
        focusable: the drawing is for a page, which has the title and answers to the Tab key: it stops at each box.
        language: of the drawing's own words; None takes the tree's, which one without triples does not tell.
        confidence: for each node how likely it is right, in [0, 1], to stand in its box; None where that is not known.
    """
    words = words_for(language or tree.language)
    main = main_subject(tree)
    title = "" if focusable else main or words.title
    drawn = _drawn(tree, text, title, words, warnings, headings, focusable, confidence)
    described = " ".join([words.notice, *(f"{phrase}." for phrase in origin)])
    below, height = _lines_below([words.notice], True, drawn.height, drawn.width)
    head = _head(drawn.width, height + MARGIN, words, main or words.nothing, described, focusable)
    return "".join([head, *drawn.parts, *below, "</svg>\n"])


def pathway_drawing_of(pathway: Pathway) -> str:
    """All trees of a pathway below each other, each after those that lead to it, and a line for each link: from its decision to the
    name of the passage that it leads to. Lines of links that nobody accepted yet are broken."""
    words = words_for(pathway.order[0].tree.language)
    lanes = _lanes(pathway)
    left = MARGIN + _LANE * max(lanes.values(), default=0)  # where the line nearest to the trees is
    parts: list[str] = []
    tops: dict[int, float] = {}
    boxes: dict[int, list[Place]] = {}
    y, width = float(MARGIN), 0.0
    for record in pathway.order:
        title = f"{record.number}. {name_in_pathway(record)}"
        own = words_for(record.tree.language)
        origin, warnings = origin_of(record, own), record.warnings
        drawn = _drawn(record.tree, record.text, title, own, warnings, record.headings, False, confidence_of(record))
        below, height = _lines_below(origin, False, drawn.height, drawn.width)
        named = _escaped(str(record.more.get("passage_id", "")))
        parts.append(
            f'<g class="passage" data-record="{record.number}" data-passage="{named}" transform="translate({left:g} {y:g})">'
        )
        parts += [*drawn.parts, *below, "</g>"]
        tops[record.number] = y + MARGIN + TITLE / 2
        boxes[record.number] = [one._replace(x=one.x + left, y=one.y + y) for one in drawn.places]
        y, width = y + height + 3 * MARGIN, max(width, left + drawn.width)
    followed: dict[Place, list[int]] = {}
    for link, lane in lanes.items():
        box = boxes[link.start][link.node]
        under = max(one.y + one.height for one in boxes[link.start]) + 6 + 3 * (lane % 4)
        parts.append(_line_of(link, box, under, left - _LANE * lane, tops[link.end], left + MARGIN - 6))
        followed.setdefault(box, []).append(link.end)
    for box, numbers in followed.items():
        said, across, down = f"\N{RIGHTWARDS ARROW} {', '.join(map(str, numbers))}", box.middle + 6, box.y + box.height + SMALL + 4
        at = f'x="{across - 3:g}" y="{down - SMALL:g}" width="{width_of(said, SMALL, True) + 6:g}" height="{SMALL + 4:g}"'
        parts += [f'<rect class="paper" {at} fill="#ffffff"/>', _text(said, across, down, SMALL, True, INK, "ink")]
    below, height = _lines_below([words.notice], True, y, width)
    head = _head(width, height + MARGIN, words, ", ".join(name_of(record) for record in pathway.order), words.notice, False)
    return "".join([head, *parts, *below, "</svg>\n"])


_LANE = 12  # pixels between two lines beside the trees


def _lanes(pathway: Pathway) -> dict[Link, int]:
    """For each link which of the lines beside the trees it takes: the first that no other takes where it does."""
    rows = {record.number: row for row, record in enumerate(pathway.order)}
    free: list[int] = []  # for each line the row from which on it is free
    lanes = {}
    for link in sorted(pathway.links, key=lambda link: (rows[link.start], rows[link.end], link.node)):
        lane = next((lane for lane, row in enumerate(free) if row < rows[link.start]), len(free))
        free[lane : lane + 1] = [rows[link.end]]
        lanes[link] = lane
    return lanes


def _line_of(link: Link, box: Place, under: float, lane: float, top: float, left: float) -> str:
    colour, name, dashes = (INK, "ink", "") if link.state == "accepted" else (WARN, "warn", ' stroke-dasharray="6 4"')
    way = f"M{box.middle:g} {box.y + box.height:g}V{under:g}H{lane:g}V{top:g}H{left:g}m-7 -5l7 5l-7 5"
    line = f'<path class="link {name}" d="{way}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>'
    title = f"<title>{_escaped(link.reason)}</title>" if link.reason else ""
    return f'<g data-link="{link.start}.{link.node}.{link.end}">{title}{line}</g>'


class _Drawn(NamedTuple):
    """A tree as parts of a drawing whose top left is at (0, 0)."""

    parts: list[str]
    places: list[Place]
    width: float
    height: float


def _drawn(
    tree: DecisionTree,
    text: str,
    title: str,
    words: Words,
    warnings: Sequence[str],
    headings: Sequence[str],
    focusable: bool,
    confidence: Sequence[float | None],
) -> _Drawn:
    main = main_subject(tree)
    sure = confidence or (None,) * len(tree.nodes)
    boxes = [_box_lines(node, main, words, text, one) for node, one in zip(tree.nodes, sure, strict=True)]
    places = place_boxes(tree, [_height(lines) for lines in boxes])
    across = max(place.x + place.width for place in places)
    width = max(across, 560.0) + 2 * MARGIN
    titles = wrap(title, width - 2 * MARGIN, TITLE, bold=True) if title else []
    top = MARGIN + (len(titles) * TITLE * LINE + 14 if titles else 0)
    places = [Place(p.x + (width - across) / 2, p.y + top, p.width, p.height) for p in places]
    bottom = max(place.y + place.height for place in places)
    means = words.confidence_means if any(one is not None for one in sure) else ""
    parts = []
    for i, line in enumerate(titles):
        y = MARGIN + TITLE * LINE * i + TITLE
        parts.append(_text(line, MARGIN, y, TITLE, True, INK, "ink"))
    parts += [_edges(places[i], places[both[0]], places[both[1]], words) for i, both in enumerate(tree.children) if both]
    for i, node in enumerate(tree.nodes):
        parts.append(_box(i, node, boxes[i], places[i], words, focusable, sure[i]))
    about = [f"{words.headings}: {' › '.join(headings)}"] if headings else []
    about += [f"{words.about}: {main}"] if main else []
    said, height = _lines_below([*about, *filter(None, [means])], False, bottom + 20, width)
    warned = [words.warnings, *(f"! {warning}" for warning in warnings)] if warnings else []
    told, height = _lines_below(warned, True, height, width)
    return _Drawn([*parts, *said, *told], places, width, height)


def _head(width: float, height: float, words: Words, about: str, described: str, focusable: bool) -> str:
    """What an SVG begins with."""
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
            f' font-family="{FONT}" role="{"group" if focusable else "img"}"'
            f' aria-label="{_escaped(words.title + ": " + about)}">',
            f"<title>{_escaped(words.title)}</title><desc>{_escaped(described)}</desc>" if not focusable else "",
            f'<rect class="paper" width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        ]
    )


def _lines_below(said: Sequence[str], is_warning: bool, y: float, width: float) -> tuple[list[str], float]:
    """Lines of text under a drawing, and where they end."""
    size, colour, name = (BODY, WARN, "warn") if is_warning else (SMALL, FAINT, "faint")
    parts = []
    for line in (line for one in said for line in wrap(one, width - 2 * MARGIN, size, is_warning)):
        y += size * (1.6 if is_warning else 1.5)
        parts.append(_text(line, MARGIN, y, size, is_warning, colour, name))
    return parts, y


def main_subject(tree: DecisionTree) -> str:
    """The subject of most triples, which a drawing names once; empty for a tree without triples."""
    subjects = [triple.subject for node in tree.nodes for triple in node.triples]
    return max(dict.fromkeys(subjects), key=subjects.count, default="")


def name_of(record: TreeRecord) -> str:
    """What a tree is called: its population, else its main subject."""
    return record.population or main_subject(record.tree) or words_for(record.tree.language).title


def name_in_pathway(record: TreeRecord) -> str:
    """What a passage is called among others of its document: after its heading."""
    return ": ".join([*record.headings[-1:], name_of(record)])


def kind_of(node: Node) -> str:
    """The look of a node: condition, decision or nothing."""
    return "condition" if node.is_condition else "nothing" if node.is_empty else "decision"


def label_of(triple: Triple, main: str) -> str:
    """What stands small over a triple's object: the relation, after the subject where that is not the main one."""
    return triple.relation if triple.subject == main else f"{triple.subject} \N{RIGHTWARDS ARROW} {triple.relation}"


def _box_lines(node: Node, main: str, words: Words, text: str, confidence: float | None) -> list[_Line]:
    if node.is_empty and not node.is_condition:  # an empty condition is one that somebody is still writing
        return [_Line(line, "nothing") for line in wrap(words.nothing, BOX - 2 * PAD, BODY)]
    lines = [_Line(words.head(node), "head")]
    for i, triple in enumerate(node.triples):
        if i:
            lines.append(_Line(words.joins[node.logical_rel], "join", None, 5))
        avoid = relation_in(triple.relation, "en") == AVOIDS  # not to be read as one of the drugs to take
        lines += _wrapped(label_of(triple, main), "avoid" if avoid else "label", i, 4)
        lines += _wrapped(triple.object, "object", i, 0)
        if text.strip() and (why := words.why_absent(text, triple)):
            lines += _wrapped(f"! {why}", "warn", i, 1)
    if confidence is not None:
        lines.append(_Line(words.sure(confidence), "doubtful" if confidence < DOUBTFUL else "sure", None, 6))
    return lines


def _wrapped(text: str, style: str, triple: int, before: float) -> list[_Line]:
    size, bold, _ = _STYLES[style]
    lines = wrap(text, BOX - 2 * PAD, size, bold)
    return [_Line(line, style, triple, before if i == 0 else 0) for i, line in enumerate(lines)]


def _height(lines: list[_Line]) -> float:
    return 2 * PAD - 6 + sum(_STYLES[line.style][0] * LINE + line.before for line in lines)


def _box(i: int, node: Node, lines: list[_Line], place: Place, words: Words, focusable: bool, confidence: float | None) -> str:
    kind = kind_of(node)
    fill, border = COLOURS[kind]
    spoken = words.nothing if node.is_empty else words.head(node) + ": " + words.comma.join(map(str, node.triples))
    spoken += "" if confidence is None else f". {words.sure(confidence)}"
    tab = f' tabindex="0" role="button" aria-label="{_escaped(spoken)}"' if focusable else ""
    radius, dashes = (16 if kind == "condition" else 4), (' stroke-dasharray="5 4"' if kind == "nothing" else "")
    parts = [
        f'<g class="node {kind}" data-node="{i}"{tab}>',
        f'<rect class="box" x="{place.x:g}" y="{place.y:g}" width="{place.width:g}" height="{place.height:g}" rx="{radius}"'
        f' fill="{fill}" stroke="{border}" stroke-width="1.5"{dashes}/>',
    ]
    y = place.y + PAD - 3
    open_triple: int | None = None
    for line in lines:
        size, bold, colour = _STYLES[line.style]
        if line.triple != open_triple:
            parts.append("</g>" if open_triple is not None else "")
            if line.triple is not None:
                parts.append(f'<g class="triple" data-triple="{i}.{line.triple}"><title>')
                parts.append(f"{_escaped(str(node.triples[line.triple]))}</title>")
            open_triple = line.triple
        y += line.before + size * LINE
        baseline = y - size * (LINE - 1) / 2 - size * 0.2
        if kind == "nothing":
            parts.append(_text(line.text, place.middle, baseline, size, bold, colour, "faint", anchor="middle"))
        else:
            name = {"object": "ink", "warn": "warn", "avoid": "no", "doubtful": "warn"}.get(line.style, "faint")
            parts.append(_text(line.text, place.x + PAD, baseline, size, bold, colour, name))
    parts.append("</g>" if open_triple is not None else "")
    number = _text(str(i + 1), place.x + place.width - PAD, place.y + PAD + HEAD * 0.8, SMALL, False, FAINT, "faint", anchor="end")
    return "".join([*parts, number if kind != "nothing" else "", "</g>"])


def _edges(parent: Place, yes: Place, no: Place, words: Words) -> str:
    start = parent.y + parent.height
    turn = yes.y - GAP[1] / 2 - 5  # children are on one line: the level's boxes begin together
    trunk = f"M{parent.middle:g} {start:g}V{turn:g}"
    parts = [f'<path class="edge trunk" d="{trunk}" fill="none" stroke="{FAINT}" stroke-width="1.8"/>']
    for child, word, colour, name, dashes in (
        (yes, words.yes, YES, "yes", ""),
        (no, words.no, NO, "no", ' stroke-dasharray="6 4"'),
    ):
        side = -1 if child.middle < parent.middle else 1
        bend = min(10.0, abs(child.middle - parent.middle))
        parts.append(
            f'<path class="edge {name}" d="M{parent.middle:g} {turn:g}'
            f'H{child.middle - side * bend:g}q{side * bend:g} 0 {side * bend:g} {bend:g}V{child.y:g}"'
            f' fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>'
        )
        wide = width_of(word, HEAD, True) + 12
        middle = turn + 17
        at = f'x="{child.middle - wide / 2:g}" y="{middle - 9:g}" width="{wide:g}" height="17"'
        parts.append(f'<rect class="paper" {at} rx="8" fill="#ffffff"/>')
        parts.append(_text(word, child.middle, middle + 4, HEAD, True, colour, name, anchor="middle"))
    return "".join(parts)


def _text(text: str, x: float, y: float, size: float, bold: bool, colour: str, name: str, anchor: str = "") -> str:
    where = f' text-anchor="{anchor}"' if anchor else ""
    weight = ' font-weight="600"' if bold else ""
    return f'<text class="{name}" x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{weight}{where}>{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    return html.escape(printable(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)))


# ---- where the boxes go ----

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
# Words (up to a hyphen or slash between letters), spaces, and Chinese characters.
_WORD = re.compile(r"\s+|[\u2e80-\uffef]|[^\s\u2e80-\uffef]+?(?:(?<=[^\W\d_])[-/–](?=[^\W\d_])|(?=[\s\u2e80-\uffef]|$))")


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
    """Lines no wider than ``width``: broken at spaces, after hyphens, between Chinese characters, and in long words."""
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
            fits = next(n for n in range(len(piece) - 1, 0, -1) if n == 1 or width_of(piece[:n], size, bold) <= width)
            lines.append(piece[:fits])
            piece = piece[fits:]
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


def place_boxes(tree: DecisionTree, heights: Sequence[float]) -> list[Place]:
    """Places for the boxes of a tree, by node: leaves beside each other, and each condition in the middle over its two children."""
    count = len(tree.nodes)
    depth, middle = [0] * count, [0.0] * count
    for i, both in enumerate(tree.children):
        for child in both or ():
            depth[child] = depth[i] + 1
    leaves = [i for i, both in enumerate(tree.children) if both is None]
    for number, leaf in enumerate(leaves):
        middle[leaf] = BOX / 2 + number * (BOX + GAP[0])
    for i in range(count - 1, -1, -1):  # backwards through the pre-order, children are placed before their parents
        if both := tree.children[i]:
            middle[i] = (middle[both[0]] + middle[both[1]]) / 2
    levels = [max(height for height, at in zip(heights, depth, strict=True) if at == level) for level in range(max(depth) + 1)]
    tops = [sum(levels[:level]) + GAP[1] * level for level in range(len(levels))]
    return [Place(middle[i] - BOX / 2, tops[depth[i]], BOX, heights[i]) for i in range(count)]
