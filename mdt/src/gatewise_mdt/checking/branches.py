"""Conditions whose two branches stand the other way round in the text."""

import re
from collections.abc import Iterator, Sequence

from gatewise_mdt.checking.cover import Cover, Held
from gatewise_mdt.checking.finding import Finding, hull, letters, quoted
from gatewise_mdt.checking.marks import Marks, Span
from gatewise_mdt.checking.prohibitions import NOT_BEFORE, forbidden_at
from gatewise_mdt.relations import AVOIDS, GIVES

_UNLESS = re.compile(
    r"(?<![a-z])(?:unless|except (?:if|when|where|in|for|during|those|patients|people|adults|children|women))(?![a-z])|除非"
    r"|除[^,。;]{1,20}?外"
)
# With one of these before it, what the sentence says need not be said of the condition.
_NEGATED = re.compile(r"(?<![a-z])(?:no|not|without|unless|except)(?![a-z])|n't|[不无未非否]|没有")
_OTHERWISE = re.compile(r"(?<![a-z])(?:otherwise|if not|apart|other)(?![a-z])|否则|反之|其[他余]|外")
_PART_END = re.compile("[,;。]")


def turned_branches(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """What the text says where a condition holds, and the tree where it does not.

    That is what stands in the condition's sentence, of which nothing is in the branch where it holds; and after "unless" what the
    sentence says otherwise, in the branch where it holds.
    """
    for node, both in enumerate(cover.tree.children):
        places = [place for held in cover.held if held.node == node for place in held.objects]
        if both is None or not places:
            continue
        yes, no = (_decided(cover, root) for root in both)
        own = {held.triple[1:] for held in yes} ^ {held.triple[1:] for held in no}  # of one branch alone
        yes, no = ([held for held in branch if held.triple[1:] in own and held.objects] for branch in (yes, no))
        unless = [_unless(marks, marks.sentence_at(place.begin)) for place in places]
        if all(part is not None and part.holds(place) for part, place in zip(unless, places, strict=True)):
            found = _said_otherwise(marks, yes, places[0], unless[0] or places[0])
            sentence = "The tree says this where {0} holds, and the text unless it does: {{words}}."
        else:
            kinds = (marks.sentences, marks.rows, marks.parts)
            found = next((one for parts in kinds if (one := _said_of_it(marks, yes, no, places, parts))), None)
            found = found or _other_way_round(marks, yes, no, places)
            sentence = "The tree says this where {0} does not hold, and the text where it does: {{words}}."
        if found is not None:
            yield Finding(found, node, sentence.format(quoted(cover.tree.nodes[node].triples[0].object)))


def other_rows(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A dose of a table that stands in another row or column than the condition under which the tree has it."""
    for held in cover.held if marks.rows else ():
        if not re.search(r"\d", held.triple.object) or cover.tree.nodes[held.node].is_condition:
            continue
        for node in (above for above, holds in cover.tree.paths[held.node].items() if holds):
            facts = [one for one in cover.held if one.node == node]
            found = [_elsewhere(marks, held, fact) for fact in facts]
            if any(found) and (all(found) or cover.tree.nodes[node].logical_rel != "or"):
                fact, place = next((fact, one) for fact, one in zip(facts, found, strict=True) if one)
                said = (
                    f"The tree has {quoted(held.triple.object)} where {quoted(fact.triple.object)} holds, and the table elsewhere: "
                )
                yield Finding(place, held.node, f"{said}{{words}}.")
                break


def _elsewhere(marks: Marks, held: Held, fact: Held) -> Span | None:
    """Where a table has a dose, if that is in another row or column than a fact."""
    cells = [(name, sentence, row) for name, _, sentence in marks.named for row in marks.rows if row.holds(sentence)]
    of_drug = [row for row in marks.rows if any(map(row.holds, held.subjects))]
    own = [[one for one in cells if Span(one[0].end, one[1].end).holds(place)] for place in held.objects]
    if not own or not all(own) or not fact.objects:
        return None
    placed = [cell for found in own for cell in found if not of_drug or cell[2] in of_drug]
    names = [name for name, _, _ in cells if any(map(name.overlaps, fact.objects))]
    values = [row for name, sentence, row in cells if any(map(Span(name.end, sentence.end).holds, fact.objects))]
    if not placed or len(names) + len(values) < len(fact.objects) or (names and values):
        return None
    if names:  # a column; else a row
        columns = {marks.text[slice(*name)] for name in names}
        away = all(marks.text[slice(*name)] not in columns for name, _, _ in placed)
        known = all(any(name in names for name, _, other in cells if other == row) for _, _, row in placed)
    else:
        heads = {marks.text[slice(*name)] for name, _, _ in placed}
        away = all(row not in values for _, _, row in placed)
        known = any(marks.text[slice(*name)] in heads for name, _, row in cells if row in values)
    name, sentence, row = placed[0]
    return letters(marks.text, Span(name.begin if names else row.begin, sentence.end)) if away and known else None


def _decided(cover: Cover, root: int) -> list[Held]:
    """What is decided in a branch."""
    nodes = {node for node, above in enumerate(cover.tree.paths) if node == root or root in above}
    return [held for held in cover.held if held.node in nodes and not cover.tree.nodes[held.node].is_condition]


def _unless(marks: Marks, sentence: Span) -> Span | None:
    """From "unless" to the end of what it says. "除非 A, 才 B" is no exception."""
    found = _UNLESS.search(marks.text, *sentence)
    if found is None or "才" in marks.text[found.end() : sentence.end]:
        return None
    if found[0].endswith("外"):
        return Span(*found.span())
    begins = not marks.text[sentence.begin : found.start()].strip()
    end = _PART_END.search(marks.text, found.end(), sentence.end) if begins else None
    return Span(found.start(), end.start() if end else sentence.end)


def _said_otherwise(marks: Marks, yes: Sequence[Held], place: Span, unless: Span) -> Span | None:
    sentence = marks.sentence_at(place.begin)
    for held in yes:
        for one in held.objects:
            as_said = (held.relation == AVOIDS) == (forbidden_at(marks, one) is not None)
            as_said &= not NOT_BEFORE.search(marks.text, max(0, one.begin - 60), one.begin)
            if held.relation in (*GIVES, AVOIDS) and as_said and sentence.holds(one) and not one.overlaps(unless):
                return hull(place, one)
    return None


def _said_of_it(
    marks: Marks, yes: Sequence[Held], no: Sequence[Held], places: Sequence[Span], parts: Sequence[Span]
) -> Span | None:
    """Where a part of the text, a sentence or a row of a table, has a condition and what is said where it does not hold."""
    around = [(place, part) for place in places for part in parts if part.holds(place)]
    if not yes or any(part.holds(one) for _, part in around for held in yes for one in held.objects):
        return None
    if any(_is_negated(marks, place, part) for place, part in around):
        return None
    pairs = [(place, one) for place, part in around for held in no for one in held.objects if part.holds(one)]
    if parts is marks.parts:  # not what the condition is about ("beta blockers are not tolerated"), or what is forbidden there
        pairs = [(place, one) for place, one in pairs if not (any(map(one.overlaps, places)) or marks.doubts(one))]
    return hull(*pairs[0]) if pairs else None


def _other_way_round(marks: Marks, yes: Sequence[Held], no: Sequence[Held], places: Sequence[Span]) -> Span | None:
    """A condition where the text forbids what the tree gives there, and forbids where it does not hold."""
    given = {held.triple.object for held in yes if held.relation in GIVES}
    if not given & {held.triple.object for held in no if held.relation == AVOIDS}:
        return None
    for place in places:
        clause = next((one for one in marks.clauses if one.holds(place)), None)
        cue = next((cue for cue, _, _ in marks.forbidden if clause and clause.holds(cue)), None)
        if cue is not None and clause is not None and not _is_negated(marks, place, clause):
            return hull(cue, place)
    return None


def _is_negated(marks: Marks, place: Span, part: Span) -> bool:
    """Whether what a part of the text says need not be said of a condition in it."""
    condition = next((one for one in marks.conditions if one.holds(place)), part)
    begin = max(condition.begin, part.begin)
    return _OTHERWISE.search(marks.text, part.begin, place.begin) is not None or (
        _NEGATED.search(marks.text, begin, place.begin) is not None
    )
