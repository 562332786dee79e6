"""A tree as a few patients: quicker to read than the tree, and to be run on whatever runs it.

A vignette is one patient, with what the tree recommends, and another who differs in one fact and is recommended something else.
Each way through the tree that a patient can take is that of one of the two; a vignette covers two ways where that can be, so that
there are about half as many as ways. A patient has only the facts that matter to either; the others are not known.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gatewise_mdt.formats.orders import Order, choices_of, orders_of
from gatewise_mdt.formats.origin import BEFORE_USE, origin_of, sentences_beside
from gatewise_mdt.formats.svg import main_subject
from gatewise_mdt.formats.words import Words, words_for
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.relations import relation_in
from gatewise_mdt.tree import DecisionTree, Node, Triple

_OF_PATIENTS = ("clinical manifestation", "basic condition")
"""What a patient has, whose name says no more than the words themselves."""
Known = dict[Triple, bool]


class Patient(NamedTuple):
    """Some facts, true or false, and the decision that they lead to.

    Attributes:
        leaf: position of the decision in the tree's pre-order, from 0.
    """

    facts: Known
    leaf: int


class Vignette(NamedTuple):
    """A patient, and where there is one, another who differs in one fact and comes to another decision.

    Attributes:
        differs: the fact; None where every patient comes to the same decision.
    """

    patient: Patient
    differs: Triple | None = None
    other: Patient | None = None


def vignettes(tree: DecisionTree) -> list[Vignette]:
    """As few vignettes as cover each way that a patient can take, in the order of the tree."""
    made: list[Vignette] = []
    waiting: list[list[int]] = [[] for _ in tree.nodes]  # below each node the leaves that no vignette has yet
    for at in range(len(tree.nodes) - 1, -1, -1):
        if (both := tree.children[at]) is None:
            waiting[at] = [at]
            continue
        waiting[at] = waiting[both[0]] + waiting[both[1]]
        for leaf in waiting[both[0]]:
            pairs = (one for other in waiting[both[1]] if (one := _pair(tree, at, leaf, other)))
            if found := next(pairs, None):
                made.append(found)
                waiting[at] = [one for one in waiting[at] if one not in (leaf, found.other and found.other.leaf)]
    made += [one for leaf in waiting[0] if (one := _alone(tree, leaf))]
    return sorted(made, key=lambda one: one.patient.leaf)


def unreachable(tree: DecisionTree) -> list[int]:
    """The leaves that no patient comes to, since the conditions on the way contradict each other."""
    return [leaf for leaf, way in tree.ways.items() if next(_fitting(tree, list(way.items()), {}), None) is None]


def _alone(tree: DecisionTree, leaf: int) -> Vignette | None:
    """A vignette for a leaf, with whichever other leaf takes the fewest facts; None where nobody comes to the leaf."""
    pairs = []
    for at, side in tree.ways[leaf].items():
        others = (other for other, way in tree.ways.items() if way.get(at, side) is not side)
        pairs += [one for other in others if (one := _pair(tree, at, leaf, other))]
    if pairs:
        return min(pairs, key=lambda one: (len(one.patient.facts), sum(one.patient.facts.values())))
    facts = next(_fitting(tree, list(tree.ways[leaf].items()), {}), None)
    return None if facts is None else Vignette(_patient(tree, facts, leaf))


def _patient(tree: DecisionTree, facts: Known, leaf: int) -> Patient:
    """With the facts in the tree's order."""
    return Patient({fact: facts[fact] for fact in tree.facts if fact in facts}, leaf)


def _pair(tree: DecisionTree, at: int, leaf: int, other: int) -> Vignette | None:
    """Two patients, of two leaves on the two sides of a condition, who differ in one of its facts; None where there are none.

    The last fact of the condition is taken where it can be: the first often says what the condition is about.
    """
    first_of = {fact.key: fact for fact in tree.facts}
    rest = [[(node, side) for node, side in tree.ways[one].items() if node != at] for one in (leaf, other)]
    node, side = tree.nodes[at], tree.ways[leaf][at]
    for triple in reversed(node.triples):
        fact = first_of[triple.key]
        # All other facts of the condition are such that this one decides it.
        held = {first_of[one.key]: node.logical_rel != "or" for one in node.triples}
        if next(_fitting(tree, rest[1], held | {fact: not side}), None) is None:
            continue  # not to be found out once for each way in which the first patient can be
        for some in _fitting(tree, rest[0], held | {fact: side}):
            if (facts := next(_fitting(tree, rest[1], some | {fact: not side}), None)) is not None:
                return Vignette(_patient(tree, facts | {fact: side}, leaf), fact, _patient(tree, facts, other))
    return None


def _fitting(tree: DecisionTree, way: Sequence[tuple[int, bool]], facts: Known) -> Iterator[Known]:
    """The facts with as few others as make all conditions of a way come out, in every way in which that can be."""
    first_of = {fact.key: fact for fact in tree.facts}

    def known(left: Sequence[tuple[int, bool]], facts: Known) -> Iterator[Known]:
        if not left:
            yield facts
            return
        (at, side), *after = left
        asked = [first_of[triple.key] for triple in tree.nodes[at].triples]
        if side is (tree.nodes[at].logical_rel == "or") and len(asked) > 1:  # one fact is enough
            if side in (facts.get(fact) for fact in asked):
                yield from known(after, facts)
            else:
                for fact in asked:
                    if fact not in facts:
                        yield from known(after, {**facts, fact: side})
        elif all(facts.get(fact, side) is side for fact in asked):
            yield from known(after, {**facts, **dict.fromkeys(asked, side)})

    def free(one: tuple[int, bool]) -> bool:
        return len(tree.nodes[one[0]].triples) > 1 and one[1] is (tree.nodes[one[0]].logical_rel == "or")

    yield from known(sorted(way, key=free), facts)  # what leaves no choice comes first


# ---- in words ----


def vignettes_text(records: Sequence[TreeRecord]) -> str:
    """The vignettes of records as text that people read."""
    made = [words_for(records[0].tree.language).notice]
    for record in records:
        words = words_for(record.tree.language)
        told = _Told(record.tree, words)
        made += ["", words.record.format(number=record.number) + words.colon + " ".join(record.text.split())]
        beside = [(words.headings, (" › ".join(record.headings),)), (words.notes, record.notes), (words.warnings, record.warnings)]
        made += [f"  {name}{words.colon}{said}" for name, several in beside for said in several if said]
        made += [f"  {phrase}" for phrase in origin_of(record, words)]
        for number, one in enumerate(vignettes(record.tree), start=1):
            made += [f"  {number}. {told.patient(one.patient)}{words.stop}", f"     {told.expected(one.patient)}"]
            if one.differs and one.other:
                made += [f"     {told.differs(one.differs, one.other)}"]
        made += [f"  {told.nobody(leaf)}" for leaf in unreachable(record.tree)]
    return "\n".join(made) + "\n"


def vignettes_json(records: Sequence[TreeRecord]) -> list[dict[str, Any]]:
    """The vignettes of records for programs: facts are triples with whether they hold, nodes counted from 1."""
    made: list[dict[str, Any]] = []
    for record in records:
        told = _Told(record.tree, words_for(record.tree.language))
        known: dict[str, Any] = {key: record.more[key] for key in ("passage_id", "sha256") if key in record.more}
        said = {"text": record.text, "notice": BEFORE_USE, "beside": sentences_beside(record)}
        found = [told.as_json(one) for one in vignettes(record.tree)]
        nobody = [leaf + 1 for leaf in unreachable(record.tree)]
        made.append({"record": record.number, **known, **said, "vignettes": found, "unreachable": nobody})
    return made


class _Told:
    """Vignettes of a tree in words, which name a subject only where it is not that of most triples."""

    def __init__(self, tree: DecisionTree, words: Words) -> None:
        self.tree, self.words, self.main = tree, words, main_subject(tree)

    def patient(self, one: Patient) -> str:
        who = self.words.patient.format(who=self.main) if self.main else self.words.anybody
        return (
            who + self.words.colon + (self.words.semicolon.join(self._fact(*fact) for fact in one.facts.items()) or self.words.any)
        )

    def differs(self, fact: Triple, other: Patient) -> str:
        return f"{self.words.same[other.facts[fact]].format(fact=self._fact(fact, True))} {self.expected(other)}"

    def expected(self, one: Patient) -> str:
        return self.words.expected.format(what=self.decision(self.tree.nodes[one.leaf]), node=one.leaf + 1)

    def nobody(self, leaf: int) -> str:
        return self.words.nobody.format(what=self.decision(self.tree.nodes[leaf]), node=leaf + 1)

    def as_json(self, one: Vignette) -> dict[str, Any]:
        said: dict[str, Any] = {"patient": self._patient_as_json(one.patient)}
        if one.differs and one.other:
            said |= {"differs": list(one.differs), "other": self._patient_as_json(one.other)}
        return said

    def _patient_as_json(self, one: Patient) -> dict[str, Any]:
        facts = [{"fact": list(fact), "holds": holds} for fact, holds in one.facts.items()]
        return {
            "words": self.patient(one),
            "facts": facts,
            "expected": self.decision(self.tree.nodes[one.leaf]),
            "node": one.leaf + 1,
        }

    def _fact(self, fact: Triple, holds: bool) -> str:
        said = self._about(fact, "" if relation_in(fact.relation, "en") in _OF_PATIENTS else fact.relation)
        return said if holds else self.words.fact_not.format(fact=said)

    def decision(self, node: Node) -> str:
        """What a decision recommends, each dose with its drug."""
        if node.is_empty:
            return self.words.nothing
        orders = orders_of(node)
        said = [
            (self._order(order, node), choice) for order, choice in zip(orders, choices_of(orders, node.logical_rel), strict=True)
        ]
        choices = f" {self.words.joins['or']} ".join(one for one, choice in said if choice)
        return self.words.semicolon.join(filter(None, (choices, *(one for one, choice in said if not choice))))

    def _order(self, order: Order, node: Node) -> str:
        relation = order.triple.relation if order.kind == "text" else self.words.avoid if order.kind == "avoid" else ""
        join = self.words.joins.get(node.logical_rel, "")
        return " ".join([self._about(order.triple, relation), f" {join} ".join(dose.object for dose in order.doses)]).strip()

    def _about(self, triple: Triple, relation: str) -> str:
        about = triple.subject if triple.subject != self.main else ""
        return " ".join(self.words.colon.join(filter(None, (about, relation, triple.object))).split())
