"""Which characters of a passage the triples of a tree have, and where each phrase stands.

A phrase covers every place where it stands. One that does not stand in the text as it is covers the words of it that do.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from gatewise_mdt.checking.marks import HAN, Marks, Number, Span, set_of
from gatewise_mdt.relations import relation_in
from gatewise_mdt.spans import places_of
from gatewise_mdt.tree import DecisionTree, Triple
from gatewise_mdt.wholes import fold

_SMALL = set_of("a an and as at be by for from if in is it of on or than that the to was were which who with")
_SHORTEST_HAN = 2
_NOTE = re.compile(r"(?<=[^\s])\[\d{1,2}\]")  # "130/80 mmHg[1] or higher"


@dataclass(frozen=True)
class Held:
    """A triple of a node, with the places of its phrases in the folded text.

    Attributes:
        node: index in pre-order.
        relation: in English.
    """

    node: int
    triple: Triple
    relation: str
    subjects: tuple[Span, ...]
    objects: tuple[Span, ...]


class Cover:
    """What of a passage a tree has."""

    def __init__(self, marks: Marks, tree: DecisionTree) -> None:
        self.marks, self.tree = marks, tree
        noted = {at for match in _NOTE.finditer(marks.text) for at in range(*match.span())}
        self._squeezed = [at for at, sign in enumerate(marks.text) if sign != " " and at not in noted]
        self._letters = "".join(marks.text[at] for at in self._squeezed)
        self._known: dict[str, tuple[Span, ...]] = {}
        self._of_node: dict[int, bytearray] = {}

    @cached_property
    def held(self) -> list[Held]:
        return [
            Held(number, triple, relation_in(triple.relation, "en"), self.places(triple.subject), self.places(triple.object))
            for number, node in enumerate(self.tree.nodes)
            for triple in node.triples
        ]

    @cached_property
    def covered(self) -> bytearray:
        """For each character whether a triple has it."""
        return self._covered_by(self.tree.triples)

    def in_node(self, node: int) -> bytearray:
        """The same for the triples of one node."""
        if node not in self._of_node:
            self._of_node[node] = self._covered_by(self.tree.nodes[node].triples)
        return self._of_node[node]

    def _covered_by(self, triples: Iterable[Triple]) -> bytearray:
        made = bytearray(len(self.marks.text))
        said = [span for triple in triples for span in self.places(triple.object) or self.parts(triple.object)]
        said += [span for triple in triples for span in self.places(triple.subject)]  # people, of whom parts say little
        for begin, end in said:
            made[begin:end] = b"\1" * (end - begin)
        return made

    def has(self, span: Span) -> bool:
        """Whether every character is covered, spaces apart."""
        return all(self.covered[at] or self.marks.text[at] == " " for at in range(span.begin, span.end))

    def touches(self, span: Span) -> bool:
        return any(self.covered[span.begin : span.end])

    def is_background(self, place: int) -> bool:
        """Whether the sentence at a place advises nothing, and no triple has anything of it."""
        return not self.marks.advises(place) and not self.touches(self.marks.sentence_at(place))

    @cached_property
    def implied(self) -> list[Number]:
        """Limits that a condition has from the other side, with a decision where it does not hold: "< 140/90" of "≥ 140/90".

        It has one triple: where "< 140/90 and no diabetes" does not hold, it need not be "≥ 140/90".
        """
        asked = bytearray(len(self.marks.text))
        for number, both in enumerate(self.tree.children):
            no = self.tree.nodes[both[1]] if both else None
            if no and not no.is_empty and not no.is_condition and len(self.tree.nodes[number].triples) == 1:
                asked = bytearray(map(max, asked, self.in_node(number)))

        def said(number: Number) -> list[str]:
            return [self.marks.text[a:b] for a, b in number.digits]

        sides = self.marks.sides
        held = [one for one in sides if all(all(asked[a:b]) for a, b in one.digits)]
        return [
            one
            for one, below in sides.items()
            if one not in held and any(said(one) == said(other) and sides[other] != below for other in held)
        ]

    def places(self, phrase: str) -> tuple[Span, ...]:
        """Where a phrase stands, as words; spaces and the marks of notes do not matter."""
        if phrase not in self._known:
            wanted = re.sub(r"\s", "", _NOTE.sub("", fold(phrase).text)).strip(".,;:。，；：、")
            self._known[phrase] = tuple(self._find(wanted)) if wanted else ()
        return self._known[phrase]

    def _find(self, wanted: str) -> list[Span]:
        found = [Span(self._squeezed[at], self._squeezed[at + len(wanted) - 1] + 1) for at in places_of(self._letters, wanted)]
        return [one for one in found if _may_begin(self.marks.text, one.begin) and _may_end(self.marks.text, one.end)]

    def parts(self, phrase: str) -> list[Span]:
        """The words of a phrase that stand in the text, and of Chinese the longest pieces."""
        folded, found = fold(phrase).text, []
        for match in re.finditer(rf"[{HAN}]+|[^\W{HAN}][^\s{HAN}]*", folded):
            word = match[0].strip(".,;:()[]")
            if re.match(rf"[{HAN}]", word):
                found += self._pieces(word)
            elif word not in _SMALL:
                found += self._find(word) if word else []
        return found

    def _pieces(self, word: str) -> list[Span]:
        found, at = [], 0
        while at < len(word):
            end = len(word)
            while end - at >= _SHORTEST_HAN and word[at:end] not in self._letters:
                end -= 1
            if end - at >= _SHORTEST_HAN:
                found += self._find(word[at:end])
                at = end
            else:
                at += 1
        return found


def _is_sign(sign: str) -> bool:
    return sign.isascii() and sign.isalnum()


def _may_begin(text: str, begin: int) -> bool:
    """No word, and no number, is cut in two."""
    before = text[max(0, begin - 2) : begin]
    if not _is_sign(text[begin]) or not before:
        return True
    if text[begin].isdigit():
        return not (before[-1].isdigit() or (before[-1] in ".," and before[:1].isdigit()))
    return not (before[-1].isascii() and before[-1].isalpha())


def _may_end(text: str, end: int) -> bool:
    after = text[end : end + 2]
    if not _is_sign(text[end - 1]) or not after:
        return True
    if text[end - 1].isdigit():
        return not (after[0].isdigit() or (after[0] in ".," and after[1:].isdigit()))
    if after[0] == "s" and not (after[1:] and after[1].isalpha()):
        return True
    return not (after[0].isascii() and after[0].isalpha())
