"""What the text forbids and the tree gives, the other way round, and what is negated in one of the two."""

import re
from collections.abc import Iterator

from gatewise_mdt.checking.cover import Cover, Held
from gatewise_mdt.checking.finding import AVOIDS, GIVES, Finding, hull, letters, quoted
from gatewise_mdt.checking.marks import Marks, Span
from gatewise_mdt.checking.numbers import LISTING
from gatewise_mdt.wholes import fold

_NEGATED = re.compile(
    r"\b(?:not|no|never|without|avoid(?:ed|ing)?|cannot|contra-?indicated|stop(?:ped|ping)?|discontinu\w+|withh\w+|prohibited|refrain|non(?!-)"
    r"|against|neither|nor|reduc\w+|limit\w*|restrict\w*)\b|n't\b|[不无未禁忌勿非免停]"
)


def _is_negated(phrase: str) -> bool:
    return bool(_NEGATED.search(fold(phrase).text))


def _forbidden_at(marks: Marks, span: Span) -> Span | None:
    """The words that forbid what stands at a place."""
    return next((one.cue for one in marks.forbidden if one.scope.holds(span)), None)


def _may_be_forbidden(marks: Marks, span: Span) -> bool:
    return marks.warns(span.begin) or any(one.wide.begin <= span.begin < one.wide.end for one in marks.forbidden)


def given_though_forbidden(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A drug or measure that the text forbids wherever it names it, and the tree gives; or names with one that the node forbids."""
    decided = [held for held in cover.held if held.objects and not cover.tree.nodes[held.node].is_condition]
    for held in decided:
        if held.relation not in GIVES or _is_negated(held.triple.object):
            continue
        said = [place for place in held.objects if not marks.in_condition(place.begin)] or list(held.objects)
        cues = [_forbidden_at(marks, place) for place in said]
        beside = [one for one in decided if one.node == held.node and one.relation == AVOIDS and held.relation == GIVES[0]]
        if all(cues) and (cue := cues[0]) is not None and not marks.has_exception(cue.begin):
            sentence = f"The tree gives {quoted(held.triple.object)}, which the text forbids: {{words}}."
            yield Finding(hull(cue, said[0]), held.node, sentence)
        elif (pair := next((pair for one in beside if (pair := _in_one_list(marks, held, one))), None)) is not None:
            sentence = (
                f"The tree gives {quoted(held.triple.object)}, which the text names beside one that the tree forbids: {{words}}."
            )
            yield Finding(hull(*pair), held.node, sentence)


def _in_one_list(marks: Marks, given: Held, avoided: Held) -> tuple[Span, Span] | None:
    """Where two drugs stand beside each other in what may be forbidden."""
    for one in given.objects:
        for other in avoided.objects:
            first, second = sorted((one, other))
            if (
                not one.overlaps(other)
                and LISTING.fullmatch(marks.text, first.end, second.begin)
                and _may_be_forbidden(marks, first)
            ):
                return first, second
    return None


def forbidden_though_given(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A drug that the tree forbids and the text nowhere."""
    for held in cover.held:
        if held.relation == AVOIDS and held.objects and not any(_may_be_forbidden(marks, place) for place in held.objects):
            yield Finding(held.objects[0], held.node, "The tree forbids {words}, and the text does not.")


def lost_prohibitions(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """Words that forbid and that no triple has, as a prohibited drug or as words; or a drug of the tree that they are about."""
    avoided = [place for held in cover.held if held.relation == AVOIDS for place in held.objects or cover.parts(held.triple.object)]
    given = sorted(place for held in cover.held if held.relation == GIVES[0] for place in held.objects)
    for cue, scope, wide in marks.forbidden:
        word = _NEGATED.search(marks.text, *cue)
        if cover.touches(Span(*word.span()) if word else cue):
            continue
        named = [place for place in given if scope.holds(place) and not marks.in_condition(place.begin)]
        lost = [place for place in named if not any(map(place.overlaps, avoided))]
        if not any(wide.begin <= place.begin < wide.end for place in avoided):
            yield Finding(hull(cue, scope), None, "The text forbids, and no triple does: {words}.")
        elif lost and not marks.has_exception(cue.begin):
            yield Finding(hull(cue, lost[0]), None, "The text forbids, and no triple does: {words}.")


_NOT_BEFORE = re.compile(
    r"(?:(?<![a-z-])(?:no|not|without|never|cannot|no longer|absence of|lack of|non-?|[a-z]+n't|neither|nor) ?"
    r"(?:be |have |had |any |a |an |the |to |been ){0,3}"
    r"|(?<![有除])[不无未非](?:[能宜应]|存在|伴有?|合并)?|没有)$"
)


def lost_negations(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A phrase that stands in the text behind a "not" everywhere, without it in the tree."""
    for held in cover.held:
        if held.relation == AVOIDS or _is_negated(held.triple.object) or not held.objects:
            continue
        cues = [_NOT_BEFORE.search(marks.text, max(0, place.begin - 24), place.begin) for place in held.objects]
        if all(cues) and (cue := cues[0]) is not None and not cover.touches(letters(marks.text, Span(*cue.span()))):
            yield Finding(
                Span(cue.start(), held.objects[0].end),
                held.node,
                f"The tree says {quoted(held.triple.object)}, the text {{words}}.",
            )
