"""A tree as places in its text: what the pointing model learns, and what it says.

| part        | what it is                                                                                  |
|-------------|---------------------------------------------------------------------------------------------|
| mention     | a phrase of the text that is the object of a triple, of a kind: a relation and a role        |
| subject     | of each mention: the population, another mention, or a phrase that is a subject alone         |
| node        | mentions of one role, with their join; one mention may be in several nodes                  |
| tree        | the root, and for each condition which node is its yes child and which its no child, if any |
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from gatewise.mdt.pointing.units import Units
from gatewise.mdt.records import TreeRecord
from gatewise.mdt.relations import RELATIONS, Language, relation_in
from gatewise.mdt.spans import Span, find, locate_tree
from gatewise.mdt.tree import DecisionTree

KINDS: tuple[tuple[str, str], ...] = tuple((relation, role) for relation in RELATIONS for role in "CD")
"""(relation, role) of each kind of mention, by number."""
SUBJECT = len(KINDS)
"""The kind of a phrase that is the subject of a triple and the object of none."""
POPULATION, NOBODY = -1, -2
"""In :attr:`Pointed.subjects`: the population; nothing known."""
EMPTY = -1
"""In :attr:`Pointed.children`: a leaf without a recommendation."""
JOINS = ("and", "or")


@dataclass(frozen=True, order=True)
class Mention:
    """Units ``begin`` to ``end - 1`` of a text, and the kind of what they are."""

    begin: int
    end: int
    kind: int

    @property
    def role(self) -> str:
        """ "C" or "D"; empty for a subject."""
        return KINDS[self.kind][1] if self.kind != SUBJECT else ""


@dataclass(frozen=True)
class Pointed:
    """A tree by places in its text.

    Attributes:
        mentions: in the order of the text, of which no two overlap.
        subjects: for each mention the number of the mention that is its subject, POPULATION or NOBODY.
        nodes: for each node the numbers of its mentions in order, the nodes in the order of their own first mentions.
        own: for each mention the node that it is counted to; for a subject -1.
        joins: "and" or "or" for each node; "null" with one mention.
        root: number of a node; -1 for a tree without any.
        children: for each node None, or its (yes, no) children: numbers of nodes, or EMPTY.
        left_out: triples that have no place here.
    """

    mentions: tuple[Mention, ...]
    subjects: tuple[int, ...]
    nodes: tuple[tuple[int, ...], ...]
    own: tuple[int, ...]
    joins: tuple[str, ...]
    root: int
    children: tuple[tuple[int, int] | None, ...]
    left_out: int = 0

    @property
    def has_tree(self) -> bool:
        """Whether nodes and tree are whole, so that they can be learnt."""
        return self.root >= 0


def pointed_at(record: TreeRecord, units: Units, longest: int = 10**6) -> Pointed:
    """The places of a tree's phrases in its text.

    A triple is left out whose object does not stand in the text, overlaps with one that came before, is of two relations, or is
    longer than ``longest`` units. Of a tree that loses a whole node by that, only the mentions remain.
    """
    tree, located = record.tree, locate_tree(record.text, record.tree)
    taken: dict[int, tuple[int, int]] = {}  # unit -> the mention that it is of
    kinds: dict[tuple[int, int], int] = {}
    in_nodes: dict[tuple[int, int], dict[int, None]] = defaultdict(dict)
    subject_at: dict[tuple[int, int], tuple[int, int] | int] = {}

    def take(place: tuple[int, int] | None, kind: int) -> bool:
        """Whether a mention may be here, and is."""
        if place is None or place[1] - place[0] > longest:
            return False
        if kinds.get(place, kind) != kind or any(taken.get(unit, place) != place for unit in range(*place)):
            return False
        kinds[place] = kind
        taken.update(dict.fromkeys(range(*place), place))
        return True

    left_out = 0
    subjects: list[tuple[tuple[int, int], Span | None, str]] = []
    for number, (node, spans) in enumerate(zip(tree.nodes, located, strict=True)):
        for triple, where in zip(node.triples, spans, strict=True):
            place = units.of_span(where.object) if where.object else None
            kind = KINDS.index((relation_in(triple.relation, "en"), node.role))
            if not take(place, kind):
                left_out += 1
                continue
            assert place is not None
            in_nodes[place][number] = None
            subjects.append((place, where.subject, triple.subject))
    mark = record.text.find("@")
    for place, span, phrase in subjects:
        if place in subject_at:
            continue
        if mark >= 0 and Span(0, mark) and _plain(phrase) == _plain(record.population):
            subject_at[place] = POPULATION
            continue
        at = units.of_span(span) if span else None
        if at is not None and (at in kinds or take(at, SUBJECT)):
            subject_at[place] = at
        else:
            at = next((one for one in map(units.of_span, find(record.text, phrase)) if one in kinds), None)
            subject_at[place] = NOBODY if at is None else at
    mentions = sorted(Mention(*place, kind) for place, kind in kinds.items())
    number_of = {(one.begin, one.end): i for i, one in enumerate(mentions)}
    linked = []
    for one in mentions:
        subject = subject_at.get((one.begin, one.end), NOBODY)
        linked.append(subject if isinstance(subject, int) else number_of[subject])
    return _with_tree(tree, mentions, linked, {number_of[place]: list(nodes) for place, nodes in in_nodes.items()}, left_out)


def _with_tree(
    tree: DecisionTree, mentions: list[Mention], subjects: list[int], in_nodes: dict[int, list[int]], left_out: int
) -> Pointed:
    # A mention of several nodes is counted to one that would else have none of its own.
    own_old: dict[int, int] = {}
    for node, held in sorted(_by_node(in_nodes).items(), key=lambda item: len(item[1])):
        if (mention := next((one for one in held if one not in own_old), None)) is not None:
            own_old[mention] = node
    own_old = {mention: own_old.get(mention, nodes[0]) for mention, nodes in in_nodes.items()}
    firsts: dict[int, int] = {}
    for mention, node in sorted(own_old.items()):
        firsts.setdefault(node, mention)
    order = sorted(firsts, key=lambda node: firsts[node])
    new = {node: i for i, node in enumerate(order)}
    own = tuple(new[own_old[i]] if i in own_old else -1 for i in range(len(mentions)))
    nodes = tuple(tuple(m for m in sorted(in_nodes) if node in in_nodes[m]) for node in order)
    joins = tuple(tree.nodes[node].logical_rel if len(held) > 1 else "null" for node, held in zip(order, nodes, strict=True))
    filled = [i for i, node in enumerate(tree.nodes) if not node.is_empty]
    children: list[tuple[int, int] | None] = []
    root = new.get(0, -1) if set(filled) == set(order) else -1
    for node in order if root >= 0 else ():
        both = tree.children[node]
        children.append(None if both is None else (new.get(both[0], EMPTY), new.get(both[1], EMPTY)))
    return Pointed(tuple(mentions), tuple(subjects), nodes, own, joins, root, tuple(children), left_out)


def _by_node(in_nodes: dict[int, list[int]]) -> dict[int, list[int]]:
    held: dict[int, list[int]] = defaultdict(list)
    for mention, nodes in sorted(in_nodes.items()):
        for node in nodes:
            held[node].append(mention)
    return held


def tree_of(pointed: Pointed, units: Units, language: Language) -> DecisionTree:
    """The tree that is pointed at; mentions without a subject are left out, and nodes without a triple are empty leaves.

    A tree without nodes is a single empty leaf.
    """
    nodes: list[dict[str, object]] = []
    for at in preorder(pointed):
        if at == EMPTY:
            nodes.append({"role": "D", "triples": [], "logical_rel": "null"})
            continue
        triples = list(dict.fromkeys(triple for m in pointed.nodes[at] if (triple := triple_of(pointed, m, units, language))))
        join = pointed.joins[at] if len(triples) > 1 else "null"
        role = pointed.mentions[pointed.nodes[at][0]].role
        nodes.append({"role": role, "triples": [list(one) for one in triples], "logical_rel": join})
    return DecisionTree.from_preorder(nodes)


def triple_of(pointed: Pointed, mention: int, units: Units, language: Language) -> tuple[str, str, str] | None:
    """Subject, relation and object of a mention; None for one that has no subject."""
    one, subject = pointed.mentions[mention], pointed.subjects[mention]
    if subject == NOBODY or one.kind == SUBJECT:
        return None
    if subject == POPULATION:
        phrase = units.phrase(0, units.population)
    else:
        of = pointed.mentions[subject]
        phrase = units.phrase(of.begin, of.end)
    return phrase, relation_in(KINDS[one.kind][0], language), units.phrase(one.begin, one.end)


def preorder(pointed: Pointed) -> Iterator[int]:
    to_do = [pointed.root]
    while to_do:
        at = to_do.pop()
        yield at
        both = pointed.children[at] if at >= 0 else None
        if both is not None:
            to_do += [both[1], both[0]]


def _plain(phrase: str) -> str:
    return " ".join(phrase.casefold().split())
