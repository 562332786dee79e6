"""Numbers: those that no triple has, those that the text has not, limits, frequencies, and whose dose it is."""

import re
from collections.abc import Iterator

from gatewise_mdt.checking.cover import Cover, Held
from gatewise_mdt.checking.finding import Finding, hull, letters, node_of, quoted
from gatewise_mdt.checking.marks import DIGITS, HAN, HAN_DIGITS, SPELT, Marks, Number, Span, quantities
from gatewise_mdt.relations import AVOIDS, DOSE
from gatewise_mdt.wholes import fold

# ---- numbers ----


def lost_doses(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A dose that no triple has, or only without its "per kg"."""
    yield from (_lost(one) for one in marks.numbers if one.kind == "dose" and not _has(cover, one))
    for number in marks.numbers:
        if number.per_weight and _has(cover, number) and not cover.has(letters(marks.text, number.per_weight)):
            whole, node = hull(number.span, number.per_weight), node_of(cover, number.digits[-1])
            yield Finding(whole, node, "The text says {words}: the tree has it without what it is per.")


def lost_numbers(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """Any other number that no triple has, but for sentences that advise nothing."""
    others = (one for one in marks.numbers if one.kind != "dose" and not cover.is_background(one.begin))
    yield from (_lost(one) for one in others if not (_has(cover, one) or _is_note(marks, one)))


def _is_note(marks: Marks, number: Number) -> bool:
    """Whether a number at the beginning of a sentence is the mark of a note, to which "[1]" refers."""
    text, first = marks.text, marks.sentence_at(number.begin).begin
    return not text[first : number.begin].strip() and f"[{text[number.begin : number.end]}]" in text


def _has(cover: Cover, number: Number) -> bool:
    if number in cover.implied:
        return True
    unit = Span(number.digits[-1].end, number.end)
    return all(map(cover.has, number.digits)) and (number.kind != "dose" or cover.has(unit))


def _lost(number: Number) -> Finding:
    return Finding(number.span, None, "No triple has {words}.")


def other_numbers(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A phrase with a number that does not stand in the passage as it is."""
    known, known_words = quantities(marks.text), set(_IN_WORDS.findall(marks.text))
    for held in cover.held:
        if held.objects:
            continue
        phrase = fold(held.triple.object).text
        own = quantities(phrase)
        lost = sorted(f"{number} {unit}".strip() for number, unit in own if not _stands(known, number, unit))
        lost += [one for one in _IN_WORDS.findall(phrase) if one not in known_words]
        if lost:
            yield Finding(None, held.node, f"The tree says {{words}}, but the text has no {lost[0]}.", held.triple.object)
        elif own or re.search(DIGITS, held.triple.object):
            yield Finding(None, held.node, "The tree says {words}, but the text says it otherwise.", held.triple.object)


_IN_WORDS = re.compile(
    rf"(?<![a-z])(?:{SPELT}|once|twice|thrice|half|twenty|thirty)(?![a-z])"
    rf"|{HAN_DIGITS}+(?=个?(?:月|周|天|日|年|岁|次|小时|分钟|疗程|周期|[片粒滴喷揿]))"
)


def _stands(known: set[tuple[str, str]], number: str, unit: str) -> bool:
    return any(one == number and (not unit or other.rstrip("s") == unit.rstrip("s")) for one, other in known)


# ---- limits and frequencies ----


_LEAST = re.compile(  # "at least once a week"
    r"(?<![a-z])(at (?:least|most)|(?:no|not) (?:more|less) than|up to|(?:more|less) than|至[少多]|不超过) ?$"
)


def lost_limits(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A number in the tree without the words that make it a limit in the text."""
    for limit in marks.limits:
        for node in _nodes_without(cover, limit.number, limit.words):
            yield Finding(hull(limit.words, limit.number.span), node, "The text says {words}: the limit is not in the tree.")
    for often, _ in marks.frequencies:
        words = _LEAST.search(marks.text, max(0, often.begin - 20), often.begin)
        if words and cover.touches(often) and not cover.touches(Span(*words.span(1))):
            yield Finding(Span(words.start(1), often.end), None, "The text says {words}: the limit is not in the tree.")


def lost_frequencies(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """How often something is done: in no triple, or not with the dose that it stands beside."""
    for span, number in marks.frequencies:
        if not _says(cover, span):
            yield Finding(span, None, "No triple says how often: {words}.")
        elif number is not None:
            for node in _nodes_without(cover, number, span):
                yield Finding(hull(span, number.span), node, "The text says {words}: how often is not in the tree.")
    for span, number in marks.daily:
        for node in _nodes_without(cover, number, span):
            yield Finding(hull(span, number.span), node, "The text says {words}: how often is not in the tree.")


def lost_routes(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """By which way a dose is given: not with the dose."""
    for span, number in marks.routes:
        for node in _nodes_without(cover, number, span):
            yield Finding(hull(span, number.span), node, "The text says {words}: by which way it is given is not in the tree.")


def _nodes_without(cover: Cover, number: Number, words: Span) -> Iterator[int]:
    """The nodes that have a number, wherever it stands with these words, without the words."""
    for node in range(len(cover.tree.nodes)):
        own = cover.in_node(node)
        if all(all(own[span.begin : span.end]) for span in number.digits) and not any(own[words.begin : words.end]):
            places = [place for held in cover.held if held.node == node for place in held.objects if _holds(place, number)]
            if len({place.begin for place in places}) <= 1 or _alone(cover, node, number):
                yield node


def _alone(cover: Cover, node: int, number: Number) -> bool:
    """Whether every phrase of a node that has this number stands nowhere else."""
    return all(
        len(held.objects) == 1 for held in cover.held if held.node == node and any(_holds(one, number) for one in held.objects)
    )


def _holds(place: Span, number: Number) -> bool:
    return place.holds(hull(number.digits[0], number.digits[-1]))


_SMALL = frozenset(["a", "an", "the", "per", "each", "or", "to", "of", "in", "once", "times"])


def _says(cover: Cover, span: Span) -> bool:
    """Whether a tree has every word of how often, the "twice" of "twice weekly" too, but for small ones."""
    words = [one for one in re.finditer(r"[^\s/]+", cover.marks.text[span.begin : span.end]) if one[0] not in _SMALL]
    return all(cover.has(Span(span.begin + one.start(), span.begin + one.end())) for one in words)


# ---- whose dose ----

LISTING = re.compile(r"[ ,、/+(]*(?:and|or|和|或|及|与|联合|combined with|plus|with|such as|e\.g\.|,|如|等)?[ ,、/+)(]*")
_OF = re.compile(r"[ (]*(?:of|的)? ?(?:oral |intravenous )?")


def other_drugs_doses(marks: Marks, cover: Cover) -> Iterator[Finding]:
    """A dose that stands, wherever it does, with another drug than the triple's."""
    names = _drugs(marks, cover)
    for held in cover.held:
        if held.relation != DOSE or not held.objects or not held.subjects or not re.search(DIGITS, fold(held.triple.object).text):
            continue
        if cover.tree.nodes[held.node].is_condition:
            continue
        owners = [_owner(marks, place, names, held) for place in held.objects]
        if all(owner is not None for owner in owners):
            owner, said = owners[0] or held.objects[0], quoted(held.triple.object)
            sentence = f"The dose {said} is given to {quoted(held.triple.subject)}, but stands with another drug: {{words}}."
            yield Finding(hull(owner, held.objects[0]), held.node, sentence)


def _owner(marks: Marks, dose: Span, names: list[Span], held: Held) -> Span | None:
    """The other drug that a dose belongs to; None where it is the triple's own, or nothing is certain."""
    text, sentence = marks.text, marks.sentence_at(dose.begin)
    own = [place for place in held.subjects if not place.overlaps(dose)]
    if any(_OF.fullmatch(text, one.end, dose.begin) or _OF.fullmatch(text, dose.end, one.begin) for one in own):
        return None
    near = [one for one in names if sentence.begin <= one.begin < sentence.end and not one.overlaps(dose)]
    near = near or _of_row(marks, sentence, names)
    if (one := _respective(marks, dose, sentence, near)) is not None:
        return None if any(map(one.overlaps, own)) else one
    before = [one for one in near if one.end <= dose.begin and not re.search("[;；]", text[one.end : dose.begin])]
    after = [one for one in near if one.begin >= dose.end and _OF.fullmatch(text, dose.end, one.begin)]
    if after and (not before or re.search("of|的", text[dose.end : after[0].begin])):
        group = _listed(marks, after[0], near)
    elif before:
        group = _listed(marks, before[-1], near)
    else:
        return None
    words = fold(held.triple.subject).text
    if any(one.overlaps(place) for one in group for place in own) or any(text[one.begin : one.end] in words for one in group):
        return None
    return group[0]


def _of_row(marks: Marks, sentence: Span, names: list[Span]) -> list[Span]:
    """The drugs that a row of a table named last before one of its cells, "Drug: ramipril. Dose: 2.5 mg."; none if it is no row."""
    named = {one.end for _, _, one in marks.named}
    for one in reversed([one for one in marks.sentences if one.begin <= sentence.begin]):
        if one.end not in named:
            return []
        if found := [name for name in names if one.holds(name)]:
            return found
    return []


def _respective(marks: Marks, dose: Span, sentence: Span, names: list[Span]) -> Span | None:
    """The drug of a dose in "A and B, 5 mg and 10 mg respectively"."""
    if not re.search("respectively|分别", marks.text[sentence.begin : sentence.end]):
        return None
    doses = [span for one in marks.numbers if one.kind == "dose" and sentence.holds(one.span) for span in one.digits]
    before = [one for one in names if doses and one.end <= doses[0].begin]
    place = next((at for at, one in enumerate(doses) if dose.holds(one)), None)
    return before[place] if place is not None and len(before) == len(doses) > 1 else None


def _listed(marks: Marks, name: Span, names: list[Span]) -> list[Span]:
    """A drug with those that stand beside it in a list."""
    group = [name]
    for one in sorted(names, key=lambda other: -other.end):
        if one.end <= group[-1].begin and LISTING.fullmatch(marks.text, one.end, group[-1].begin):
            group.append(one)
    last = name
    for one in names:
        if one.begin >= last.end and LISTING.fullmatch(marks.text, last.end, one.begin):
            group.append(one)
            last = one
    return group


DRUG_STEM = re.compile(  # the stems of international nonproprietary names
    r"(?<![a-z])[a-z]{2,}(?:pril|prilat|olol|sartan|statin|dipine|mab|nib|cillin|mycin|micin|floxacin|cycline|azole|prazole|oxetine|triptan|parin"
    r"|xaban|gatran|gliptin|gliflozin|glitazone|glutide|tidine|setron|sone|solone|nisolone|amide|thiazide|azepam|zolam|caine|vir|vudine|fungin"
    r"|profen|coxib|fenac|trexate|purine|mustine|platin|taxel|rubicin|afil|dronate|phylline|terol|tropium|lukast|iptyline|ipramine|idone|apine"
    r"|warfarin|aspirin|metformin|colchicine|allopurinol|digoxin|insulin|heparin|naproxen)(?![a-z])"
    rf"|[{HAN}]{{1,4}}(?:普利|洛尔|沙坦|他汀|单抗|替尼|西林|霉素|康唑|拉唑|沙星|地平|环素|尼松|米松|芬净|列汀|列净|格列\w|双胍|肝素|华法林|西泮|唑仑|韦|胺碘酮)"
)
_BEFORE_DOSE = re.compile(r"(?:give|administer|use|start|take|prescribe|add|offer) (?:oral |intravenous )?([a-z][a-z-]{3,}) (?=\d)")


def _drugs(marks: Marks, cover: Cover) -> list[Span]:
    """Where drugs stand: those of the tree, and words that are built like one. The longest of those that overlap."""
    found = {place for held in cover.held if held.relation in ("drug therapy", AVOIDS) for place in held.objects}
    found |= {place for held in cover.held if held.relation == DOSE for place in held.subjects}
    found |= {Span(*match.span()) for match in DRUG_STEM.finditer(marks.text)}
    found |= {Span(*match.span(1)) for match in _BEFORE_DOSE.finditer(marks.text)}
    kept: list[Span] = []
    for one in sorted(found, key=lambda span: (span.begin - span.end, span.begin)):
        if not any(map(one.overlaps, kept)):
            kept.append(one)
    return sorted(kept)
