"""What a rule hands back, and what rules share."""

from typing import NamedTuple

from gatewise_mdt.checking.cover import Cover
from gatewise_mdt.checking.marks import Span


class Finding(NamedTuple):
    """What a rule found.

    Attributes:
        span: of the folded passage; None where the words are the tree's own.
        node: index in pre-order, where a node is concerned.
        sentence: for people, with ``{words}``.
        words: of the tree, where there is no span.
        sure: where it differs from that of the rule.
    """

    span: Span | None
    node: int | None
    sentence: str
    words: str = ""
    sure: float | None = None


def letters(text: str, span: Span) -> Span:
    """A span without the signs at its ends."""
    begin, end = span
    while begin < end and not text[begin].isalnum() and text[begin] not in "/<>=≤≥":
        begin += 1
    while begin < end and not text[end - 1].isalnum():
        end -= 1
    return Span(begin, end)


def node_of(cover: Cover, span: Span) -> int | None:
    """The first node whose triples have a place."""
    for held in cover.held:
        if any(place.holds(span) for place in (*held.objects, *held.subjects)):
            return held.node
    return None


def quoted(phrase: str) -> str:
    """A phrase in a sentence that is formatted later."""
    return '"' + phrase.replace("{", "{{").replace("}", "}}") + '"'


def hull(one: Span, other: Span) -> Span:
    """From the first character of both to the last."""
    return Span(min(one.begin, other.begin), max(one.end, other.end))
