"""Where the phrases of a tree stand in its text.

Text and phrase are compared without case, with runs of spaces as one, full-width and half-width forms alike (NFKD), and with the
many dashes and quotation marks of typesetting as the plain ones. Spans are positions in the text as it was given.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from gatewise.mdt.tree import DecisionTree, Node, Triple

_PLAIN = str.maketrans(dict.fromkeys("‐‑‒–—―−－﹣", "-") | dict.fromkeys("‘’‚‛′＇", "'") | dict.fromkeys("“”„‟″＂", '"'))
_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
NUMBER = r"\d+(?:,\d{3}(?!\d))*(?:[.．·]\d+)*"
"""A number with its decimals and thousands, of which no part is taken for a number of its own: "5 mg" is not in "2.5 mg"."""
_NUMBER = re.compile(NUMBER)
_MOST = 500  # occurrences of one phrase that are looked at; a passage has a handful
_MOST_PAIRED = 60
_OVERLAP = 10**9


class Span(NamedTuple):
    """Characters ``text[start:end]``."""

    start: int
    end: int


class TripleSpans(NamedTuple):
    """Where subject and object of a triple stand in the text; None where they do not."""

    subject: Span | None
    object: Span | None


class _Folded(NamedTuple):
    """A text made comparable: its characters, and for each the place that it came from.

    Attributes:
        inner: the characters in a number that are not its first: a phrase neither begins nor ends before one of them.
    """

    text: str
    starts: list[int]
    ends: list[int]
    inner: frozenset[int]


def locate(text: str, triple: Triple, near: Sequence[Span] = ()) -> TripleSpans:
    """The spans of a triple's subject and object.

    Of several occurrences those are taken that stand nearest to each other without overlap, the earliest of equally near ones.
    A phrase that stands as words of its own is preferred to the beginning of a longer word.

    Args:
        near: places that the object should be near, too; they count thrice.
    """
    subjects, objects = find(text, triple.subject), find(text, triple.object)
    if not subjects or not objects:
        return TripleSpans(subjects[0] if subjects else None, objects[0] if objects else None)
    away = [3 * min((_gap(found, place) for place in near), default=0) for found in objects]
    best = min(
        ((_gap(subject, found) + far, subject.start, found.start), subject, found)
        for subject in subjects[:_MOST_PAIRED]
        for found, far in zip(objects[:_MOST_PAIRED], away, strict=False)
    )
    return TripleSpans(best[1], best[2])


def locate_tree(text: str, tree: DecisionTree) -> list[list[TripleSpans]]:
    """For each node, for each of its triples, where it stands in the text.

    What a node says mostly stands together, so an object that comes several times is looked for near the node's other objects.
    """
    located = []
    for node in tree.nodes:
        found = [find(text, triple.object) for triple in node.triples]
        certain = [(i, spans[0]) for i, spans in enumerate(found) if len(spans) == 1]
        located.append([locate(text, triple, [span for j, span in certain if j != i]) for i, triple in enumerate(node.triples)])
    return located


def absent_triples(text: str, tree: DecisionTree) -> tuple[Triple, ...]:
    """The triples of a tree whose subject or object does not stand in the text, each once."""
    return tuple(triple for triple in tree.triples if not (find(text, triple.subject) and find(text, triple.object)))


def in_text_order(text: str, tree: DecisionTree) -> DecisionTree:
    """The same tree with the triples of each node in the order of their objects in the text; what is not there comes last.

    One fixed order is easier to learn for a model than the many that annotators chose.
    """

    def place(triple: Triple) -> tuple[int, int]:
        spans = locate(text, triple)
        return (spans.object.start if spans.object else len(text), spans.subject.start if spans.subject else len(text))

    nodes = [
        Node(role=node.role, triples=tuple(sorted(node.triples, key=place)), logical_rel=node.logical_rel) for node in tree.nodes
    ]
    return DecisionTree(nodes=tuple(nodes))


def find(text: str, phrase: str) -> list[Span]:
    """All places where a phrase stands in a text, in order, possibly none: as words of its own, or else as the beginning of words.

    "antibiotic" is found in "antibiotics", but neither "iron" in "environment" nor "surgical" in "non-surgical". A number is found
    whole or not at all: neither "5 mg" nor "2" is in "2.5 mg".
    """
    folded, wanted = _fold(text), _fold(phrase).text.strip()
    if not wanted:
        return []
    found = _occurrences(folded, wanted)
    if not found and _CHINESE.search(wanted):
        # Spaces between Chinese characters, and between them and numbers, are a matter of taste.
        folded, wanted = _without_spaces(folded), wanted.replace(" ", "")
        found = _occurrences(folded, wanted)
    found = [at for at in found if not {at, at + len(wanted)} & folded.inner]
    whole = [at for at in found if _begins(folded.text, at) and _ends(folded.text, at + len(wanted))]
    pieces = [at for at in found if _begins(folded.text, at) or _is_compound(folded.text, at)]
    return [Span(folded.starts[at], folded.ends[at + len(wanted) - 1]) for at in whole or pieces]


def _gap(one: Span, other: Span) -> int:
    """Characters between two spans. An overlap is worse than any distance: the two would be one phrase."""
    gap = max(other.start - one.end, one.start - other.end)
    return gap if gap >= 0 else _OVERLAP


def _occurrences(folded: _Folded, wanted: str) -> list[int]:
    found: list[int] = []
    at = folded.text.find(wanted)
    while at >= 0 and len(found) < _MOST:
        found.append(at)
        at = folded.text.find(wanted, at + 1)
    return found


def _begins(text: str, at: int) -> bool:
    """Whether a word begins here."""
    return not _joined(text[max(0, at - 2) : at][::-1], text[at])


def _ends(text: str, at: int) -> bool:
    """Whether a word ends here."""
    return not _joined(text[at : at + 2], text[at - 1])


def _is_compound(text: str, at: int) -> bool:
    """Whether this is a later part of a word with a hyphen, but not the opposite of what it says alone."""
    return text[max(0, at - 1) : at] == "-" and text[max(0, at - 4) : at] != "non-"


def _joined(outside: str, inside: str) -> bool:
    """Whether a phrase's end is of one word with what stands beside it (the nearest character first).

    A hyphen joins as well: "surgical" is no word of its own in "non-surgical". Chinese is written without gaps, so its characters
    never join.
    """
    hyphened = outside[1:] if outside[:1] == "-" else ""
    beside = hyphened or outside[:1]
    if not beside or _CHINESE.match(beside) or _CHINESE.match(inside):
        return False
    if hyphened:
        return beside.isalnum() and inside.isalnum()
    return beside.isalpha() and inside.isalpha()


@lru_cache(maxsize=64)
def _fold(text: str) -> _Folded:
    characters: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for place, character in enumerate(text):
        if character.isspace():
            if characters and characters[-1] == " ":
                ends[-1] = place + 1
                continue
            made = " "
        else:
            # By character, so that each keeps its place; decomposed, so that accents are apart on both sides.
            made = unicodedata.normalize("NFKD", character.translate(_PLAIN)).casefold().translate(_PLAIN)
            if unicodedata.category(character) == "Cf":  # soft hyphens, joiners, byte order marks: not to be seen
                continue
        for one in made:
            characters.append(one)
            starts.append(place)
            ends.append(place + 1)
    whole = "".join(characters)
    inner = frozenset(i for number in _NUMBER.finditer(whole) for i in range(number.start() + 1, number.end()))
    return _Folded(whole, starts, ends, inner)


def _without_spaces(folded: _Folded) -> _Folded:
    kept = [i for i, character in enumerate(folded.text) if character != " "]
    return _Folded(
        "".join(folded.text[i] for i in kept),
        [folded.starts[i] for i in kept],
        [folded.ends[i] for i in kept],
        frozenset(place for place, i in enumerate(kept) if i in folded.inner),
    )
