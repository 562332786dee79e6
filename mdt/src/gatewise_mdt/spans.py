"""Where the phrases of a tree stand in its text.

Text and phrase are compared without case, with runs of spaces as one, and full-width and half-width forms, the dashes and the
quotation marks of typesetting alike. Spans are positions in the text as it was given.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from gatewise_mdt.tree import DecisionTree, Node, Triple
from gatewise_mdt.wholes import cut

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


def locate(text: str, triple: Triple, near: Sequence[Span] = ()) -> TripleSpans:
    """The spans of a triple's subject and object.

    Of several occurrences those are taken that stand nearest to each other without overlap, the earliest of equally near ones.

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
    """All places where a phrase stands in a text, in order, possibly none.

    It stands there as one or more wholes of the text (:mod:`gatewise_mdt.wholes`), the last one possibly without the "s" of its
    plural: "antibiotic" is found in "antibiotics", but neither "iron" in "environment", nor "surgical" in "non-surgical", nor
    "5 mg" in "2.5 mg", "5 mg/kg" or "5-10 mg".
    """
    parts = cut(text)
    return [
        Span(parts.folded.starts[begin], parts.folded.ends[end - 1])
        for begin, end in islice(((begin, end) for begin, end in _occurrences(text, phrase) if parts.is_whole(begin, end)), _MOST)
    ]


def part_of(text: str, phrase: str) -> str | None:
    """The words of a text of which a phrase is a part that may not stand alone: "10-20 mg" for "20 mg"; None without such words."""
    parts = cut(text)
    for begin, end in _occurrences(text, phrase):
        begin, end = parts.around(begin, end)
        return " ".join(text[parts.folded.starts[begin] : parts.folded.ends[end - 1]].split())
    return None


def _gap(one: Span, other: Span) -> int:
    """Characters between two spans. An overlap is worse than any distance: the two would be one phrase."""
    gap = max(other.start - one.end, one.start - other.end)
    return gap if gap >= 0 else _OVERLAP


def _occurrences(text: str, phrase: str) -> Iterator[tuple[int, int]]:
    """Where the letters of a phrase are in the folded text, as parts of words or not: as they are, and else with other spaces."""
    parts, wanted = cut(text), cut(phrase.strip())
    if not wanted.folded.text:
        return
    found = False
    for begin in places_of(parts.folded.text, wanted.folded.text):
        found = found or parts.is_whole(begin, begin + len(wanted.folded.text))
        yield begin, begin + len(wanted.folded.text)
    if not found:
        letters = "".join(wanted.folded.text[at] for at in wanted.squeezed)
        for at in places_of("".join(parts.folded.text[at] for at in parts.squeezed), letters):
            yield parts.squeezed[at], parts.squeezed[at + len(letters) - 1] + 1


def places_of(text: str, wanted: str) -> Iterator[int]:
    """Where something stands in a text, letter by letter."""
    at = text.find(wanted)
    while at >= 0:
        yield at
        at = text.find(wanted, at + 1)
