"""What the text forbids and the tree gives, the other way round, and what is negated in one of the two."""

import re
from collections.abc import Iterator

from gatewise_mdt.checking.cover import Cover, Held
from gatewise_mdt.checking.finding import Finding, hull, letters, quoted
from gatewise_mdt.checking.marks import Marks, Span
from gatewise_mdt.checking.numbers import LISTING
from gatewise_mdt.relations import AVOIDS, GIVES
from gatewise_mdt.wholes import fold

_NEGATED = re.compile(
    r"\b(?:not|no|never|without|avoid(?:ed|ing)?|cannot|contra-?indicated|stop(?:ped|ping)?|discontinu\w+|withh\w+|prohibited|refrain|non(?!-)"
    r"|against|neither|nor|reduc\w+|limit\w*|restrict\w*)\b|n't\b|[不无未禁忌勿非免停]"
)


def _is_negated(phrase: str) -> bool:
    return bool(_NEGATED.search(fold(phrase).text))


def forbidden_at(marks: Marks, span: Span) -> Span | None:
    """The words that forbid what stands at a place."""
    cues = (one.cue for one in (*marks.forbidden, *marks.replaced) if one.scope.holds(span))
    return next(cues, None) or next((cue for cue, about in marks.bound if about.holds(span) and _is_bound(marks, span)), None)


def _is_bound(marks: Marks, span: Span) -> bool:
    """Whether a phrase says without what: "do not give X without Y" forbids "X without Y", and not X."""
    return re.search(r"(?<![a-z])without(?![a-z])", marks.text[span.begin : span.end]) is not None


def _may_be_forbidden(marks: Marks, cover: Cover, span: Span) -> bool:
    """Whether what stands at a place may be what some words forbid, if these name no other drug that the tree avoids."""
    avoided = [place for held in cover.held if held.relation == AVOIDS for place in held.objects if not place.overlaps(span)]
    for _, scope, wide in (*marks.forbidden, *marks.replaced):
        named = any(map(scope.holds, avoided)) and not any(_are_listed(marks, span, one) for one in avoided)
        if scope.holds(span) or (wide.holds(span) and not named):
            return True
    return forbidden_at(marks, span) is not None or marks.warns(span.begin) or marks.may_stop(span.begin)


def _are_listed(marks: Marks, one: Span, other: Span) -> bool:
    first, second = sorted((one, other))
    return LISTING.fullmatch(marks.text, first.end, second.begin) is not None


def given_though_forbidden(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A drug or measure that the text forbids wherever it names it, and the tree gives; or names with one that the node forbids."""
    decided = [held for held in cover.held if held.objects and not cover.tree.nodes[held.node].is_condition]
    for held in decided:
        bound = any(_is_bound(marks, place) for place in held.objects)
        if held.relation not in GIVES or (_is_negated(held.triple.object) and not bound):
            continue
        said = [place for place in held.objects if not marks.in_condition(place.begin)] or list(held.objects)
        cues = [forbidden_at(marks, place) for place in said]
        beside = [one for one in decided if one.node == held.node and one.relation == AVOIDS and held.relation == GIVES[0]]
        if all(cues) and (cue := cues[0]) is not None and not marks.has_exception(cue.begin):
            sentence = f"The tree gives {quoted(held.triple.object)}, which the text forbids: {{words}}."
            yield Finding(hull(cue, said[0]), held.node, sentence)
        elif (pair := next((pair for one in beside if (pair := _in_one_list(marks, cover, held, one))), None)) is not None:
            sentence = (
                f"The tree gives {quoted(held.triple.object)}, which the text names beside one that the tree forbids: {{words}}."
            )
            yield Finding(hull(*pair), held.node, sentence)


def _in_one_list(marks: Marks, cover: Cover, given: Held, avoided: Held) -> tuple[Span, Span] | None:
    """Where two drugs stand beside each other in what may be forbidden."""
    pairs = ((one, other) for one in given.objects for other in avoided.objects if not one.overlaps(other))
    found = (pair for pair in pairs if _are_listed(marks, *pair) and _may_be_forbidden(marks, cover, min(pair)))
    return next((pair for pair in found if not _is_exchange(marks, *pair)), None)


def _is_exchange(marks: Marks, one: Span, other: Span) -> bool:
    """Whether the text replaces one of two drugs by the other."""
    return any(scope.holds(one) != scope.holds(other) for _, scope, _ in marks.replaced)


def forbidden_though_given(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A drug that the tree forbids and the text nowhere; or that the text also gives, and no triple does."""
    given = [place for held in cover.held if held.relation in GIVES for place in (*held.objects, *cover.parts(held.triple.object))]
    for held in cover.held:
        if held.relation != AVOIDS or not held.objects:
            continue
        free = [place for place in held.objects if not _may_be_forbidden(marks, cover, place)]
        if len(free) == len(held.objects):
            yield Finding(free[0], held.node, "The tree forbids {words}, and the text does not.")
            continue
        for place in free:
            if marks.advises(place.begin) and not marks.in_condition(place.begin) and not any(map(place.overlaps, given)):
                yield Finding(place, held.node, "The tree forbids {words}, and the text also gives it, which no triple does.")
                break


def lost_prohibitions(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """Words that forbid and that no triple has, as a prohibited drug or as words; or a drug of the tree that they are about."""
    avoided = [place for held in cover.held if held.relation == AVOIDS for place in held.objects or cover.parts(held.triple.object)]
    given = sorted(place for held in cover.held if held.relation == GIVES[0] for place in held.objects)
    for cue, scope, wide in marks.forbidden:
        word = _NEGATED.search(marks.text, *cue)
        if cover.touches(Span(*word.span()) if word else cue):
            continue
        if marks.is_cell(cue):
            scope = Span(wide.begin, cue.end)
        named = [place for place in given if scope.holds(place) and not marks.in_condition(place.begin)]
        lost = [place for place in named if not any(map(place.overlaps, avoided))]
        if not any(wide.begin <= place.begin < wide.end for place in avoided):
            yield Finding(letters(marks.text, hull(cue, scope)), None, "The text forbids, and no triple does: {words}.")
        elif lost and not marks.has_exception(cue.begin):
            yield Finding(hull(cue, lost[0]), None, "The text forbids, and no triple does: {words}.")


_NO = r"(?<![a-z-])(?:no|not|without|never|cannot|no longer|absence of|lack of|non-?|[a-z]+n't|neither|nor)"
_HAN_NO = "(?:(?<![有除])[不无未非](?:[能宜应]|存在|伴有?|合并|明显|明确)?|没有)"
NOT = re.compile(rf"{_NO}(?![a-z])|{_HAN_NO}")
NOT_BEFORE = re.compile(  # "no X", and of "without X or Y" the Y
    rf"(?:{_NO} ?(?:be |have |had |any |a |an |the |to |been |known |current "
    rf"|(?:signs?|evidence|history|suspicion|features?) of ){{0,3}}|(?<![a-z-])without [^,.;:]{{1,40}} or |{_HAN_NO})$"
)


def lost_negations(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A phrase that stands behind a "not" where the text speaks of its node, without it in the tree."""
    whole = [place for held in cover.held for place in held.objects]
    for held in cover.held:
        if held.relation == AVOIDS or not held.objects:
            continue
        place = _meant(marks, cover, held)
        if (cue := NOT_BEFORE.search(marks.text, max(0, place.begin - 60), place.begin)) is not None:
            said = Span(cue.start(), place.end)
            if cue[0].startswith("without") and re.search(r"(?<![a-z])(?:not|never)(?![a-z])[^,;.]*$", marks.text[: cue.start()]):
                continue  # "should not be given without tests" asks for tests
            if not any(one.holds(said) for one in whole):
                yield Finding(said, held.node, f"The tree says {quoted(held.triple.object)}, the text {{words}}.")


def inner_negations(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A phrase that a sentence of the text has too, but with a "not" within it, or without the one that the phrase has."""
    sentences = [(one, *_with_and_without_not(marks.text[one.begin : one.end])) for one in marks.sentences]
    for held in cover.held:
        phrase = fold(held.triple.object).text
        if held.objects or _NO_AT_FIRST.match(phrase):  # see added_negations
            continue
        as_it_is, bare = _with_and_without_not(phrase)
        for one, text, bare_text in sentences if len(bare) >= 3 else ():
            if bare in bare_text and as_it_is not in text:  # a phrase that ends within a word stands in the text, too
                sentence = f'The tree says {quoted(held.triple.object)}, and the text has it with another "not": {{words}}.'
                yield Finding(one, held.node, sentence)
                break


def _with_and_without_not(text: str) -> tuple[str, str]:
    """A text without white space, as it is and without its "not"s."""
    return "".join(text.split()), "".join(NOT.sub("", text).split())


_NO_AT_FIRST = re.compile(rf"(?:{_NO}(?: (?:a|an|any|the))?|{_HAN_NO})(?= ?[^\W\d_]) ?")


def added_negations(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A phrase that says "no X" of an X that the text has, in no sentence with a "not"."""
    for held in cover.held:
        said = fold(held.triple.object).text
        if held.objects or (cue := _NO_AT_FIRST.match(said)) is None:
            continue
        places = cover.places(said[cue.end() :])
        if places and not any(NOT.search(marks.text, *marks.sentence_at(place.begin)) for place in places):
            yield Finding(places[0], held.node, f"The tree says {quoted(held.triple.object)}, the text {{words}}.")


def _meant(marks: Marks, cover: Cover, held: Held) -> Span:
    """Which place of a phrase is meant: the one that is nearest to the other phrases of its node and of the one that follows it."""
    both = cover.tree.children[held.node]
    nodes = (held.node,) if both is None else (held.node, both[0])
    others = [one.objects for one in cover.held if one.node in nodes and one is not held and one.objects]

    def away(place: Span) -> int:
        sentence = marks.sentence_at(place.begin)
        return sum(min(abs(place.begin - one.begin) + (0 if sentence.holds(one) else 500) for one in places) for places in others)

    return min(held.objects, key=away)
