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
from typing import NamedTuple

from gatewise_mdt.checks import MAX_DEPTH
from gatewise_mdt.pointing.units import Units
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.relations import RELATIONS, Language, relation_in
from gatewise_mdt.spans import find, locate_tree
from gatewise_mdt.tree import DecisionTree

KINDS: tuple[tuple[str, str], ...] = tuple((relation, role) for relation in RELATIONS for role in "CD")
"""(relation, role) of each kind of mention, by number."""
SUBJECT = len(KINDS)
"""The kind of a phrase that is the subject of a triple and the object of none."""
POPULATION, NOBODY = -1, -2
"""In :attr:`Pointed.subjects`: the population; nothing known."""
EMPTY, LOST = -1, -2
"""In :attr:`Pointed.children` EMPTY is a leaf without a recommendation. As :attr:`Pointed.root` it is a tree that is nothing else,
and LOST is a tree that has no place here."""
JOINS = ("and", "or")
_Place = tuple[int, int]
"""Units: the first, and the one after the last."""


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
        root: number of a node, EMPTY or LOST.
        children: for each node None, or its (yes, no) children: numbers of nodes, or EMPTY. Nothing where the tree is LOST.
        left_out: triples of which the object or the subject has no place here.
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
        return self.root != LOST


NOTHING = Pointed((), (), (), (), (), -1, ())
"""Of a text in which nothing is found."""


def pointed_at(record: TreeRecord, units: Units, longest: int = 10**6) -> Pointed:
    """The places of a tree's phrases in its text.

    An object that comes several times is taken where it likeliest is (:func:`gatewise_mdt.spans.locate_tree`), unless it overlaps
    with another there, or has another relation, role or subject, or is all that two nodes have. Objects that come once go before
    them.

    A triple is left out whose object does not stand in the text, or has no place of at most ``longest`` units left, or whose
    subject has none. Of a tree that loses a whole node by that, only the mentions remain.
    """
    text, nodes = record.text, record.tree.nodes
    before, mark, _ = text.partition("@")
    population = _plain(before) if mark else ""
    taken: dict[int, _Place] = {}  # unit -> the mention that it is of
    kinds: dict[_Place, int] = {}
    held: dict[_Place, list[_Object]] = defaultdict(list)

    def may(place: _Place, kind: int) -> bool:
        fits = place[1] - place[0] <= longest and kinds.get(place, kind) == kind
        return fits and all(taken.get(unit, place) == place for unit in range(*place))

    def take(place: _Place, kind: int) -> None:
        kinds[place] = kind
        taken.update(dict.fromkeys(range(*place), place))

    for one in _objects(record, units):
        possible = [place for place in one.places if may(place, one.kind)]
        # Beside another subject the triple is lost, but its phrase is still in its node.
        same = [place for place in possible if all(other.subject == one.subject for other in held.get(place, ()))]
        for place in (same or possible)[:1]:
            take(place, one.kind)
            held[place].append(one)
    owners = _owners(held)
    for place, one in [(place, one) for place, here in held.items() for one in here]:
        free = [other for other in one.places if other not in kinds and may(other, one.kind)]
        if free and one.node not in owners.values():
            take(free[0], one.kind)
            held[place].remove(one)
            held[free[0]], owners[free[0]] = [one], one.node
    subjects: dict[_Place, _Place | int] = {}
    for place, here in held.items():
        subjects[place] = POPULATION
        if not units.population or here[0].subject != population:
            found = [at for at in map(units.of_span, find(text, here[0].subject)) if at and at != place]
            found.sort(key=lambda at: max(at[0] - place[1], place[0] - at[1]))
            at = next((at for at in found if at in kinds or may(at, SUBJECT)), None)
            subjects[place] = NOBODY if at is None else at
            if at is not None and at not in kinds:
                take(at, SUBJECT)
    mentions = sorted(Mention(*place, kind) for place, kind in kinds.items())
    places = [(one.begin, one.end) for one in mentions]
    linked = [subjects.get(place, NOBODY) for place in places]
    kept = [one for place, here in held.items() for one in here if subjects[place] != NOBODY and one.subject == here[0].subject]
    return _with_tree(
        record.tree,
        mentions,
        [subject if isinstance(subject, int) else places.index(subject) for subject in linked],
        [sorted({one.node for one in held.get(place, ())}) for place in places],
        [owners.get(place) for place in places],
        sum(len(node.triples) for node in nodes) - len(kept),
    )


class _Object(NamedTuple):
    """A triple: its node, kind and subject, and the places where its object stands, the likeliest first."""

    node: int
    kind: int
    subject: str
    places: list[_Place]


def _objects(record: TreeRecord, units: Units) -> list[_Object]:
    """The triples in the order in which they look for a place."""
    text, made = record.text, []
    for number, (node, spans) in enumerate(zip(record.tree.nodes, locate_tree(text, record.tree), strict=True)):
        for triple, where in zip(node.triples, spans, strict=True):
            likeliest = where.object.start if where.object else 0
            found = sorted(find(text, triple.object), key=lambda span: abs(span.start - likeliest))
            kind = KINDS.index((relation_in(triple.relation, "en"), node.role))
            made.append(_Object(number, kind, _plain(triple.subject), [at for at in map(units.of_span, found) if at]))
    return sorted(made, key=lambda one: len(one.places))


def _owners(held: dict[_Place, list[_Object]]) -> dict[_Place, int]:
    """A place for each node, none for two, as far as there are such; those with few places first."""
    by_node: dict[int, list[_Place]] = defaultdict(list)
    for place, here in sorted(held.items()):
        for node in {one.node for one in here}:
            by_node[node].append(place)
    owners: dict[_Place, int] = {}
    for node in sorted(by_node, key=lambda node: len(by_node[node])):
        free = next((place for place in by_node[node] if place not in owners), None)
        if free is not None:
            owners[free] = node
    return owners


def _with_tree(
    tree: DecisionTree,
    mentions: list[Mention],
    subjects: list[int],
    in_nodes: list[list[int]],
    owners: list[int | None],
    left_out: int,
) -> Pointed:
    """Nodes get their numbers anew, in the order of the text."""
    owned = [owner if owner is not None else nodes[0] if nodes else -1 for owner, nodes in zip(owners, in_nodes, strict=True)]
    order = [node for node in dict.fromkeys(owned) if node >= 0]
    new = {node: i for i, node in enumerate(order)}
    nodes = tuple(tuple(m for m, of in enumerate(in_nodes) if node in of) for node in order)
    joins = tuple(tree.nodes[node].logical_rel if len(held) > 1 else "null" for node, held in zip(order, nodes, strict=True))
    root = LOST
    children: list[tuple[int, int] | None] = []
    if all(node.is_empty or number in new for number, node in enumerate(tree.nodes)):
        root = new.get(0, EMPTY)
        for both in (tree.children[node] for node in order):
            children.append(None if both is None else (new.get(both[0], EMPTY), new.get(both[1], EMPTY)))
    own = tuple(new.get(node, -1) for node in owned)
    return Pointed(tuple(mentions), tuple(subjects), nodes, own, joins, root, tuple(children), left_out)


def tree_of(pointed: Pointed, units: Units, language: Language) -> DecisionTree:
    """The tree that is pointed at; mentions without a subject are left out, and so is what :func:`preorder` does not go to."""
    nodes: list[dict[str, object]] = []
    for at in preorder(pointed):
        told = [triple_of(pointed, m, units, language) for m in pointed.nodes[at]] if at != EMPTY else []
        triples = list(dict.fromkeys(triple for triple in told if triple is not None))
        join = pointed.joins[at] if len(triples) > 1 else "null"
        role = "D" if at == EMPTY or pointed.children[at] is None else "C"
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
    """The numbers of the nodes in the order of :func:`tree_of`, EMPTY for each leaf without a recommendation.

    Such leaves are nodes without a triple, too, whatever is below them, conditions deeper than a tree may be, and a LOST tree.
    """
    to_do = [(pointed.root, 1)]
    while to_do:
        at, depth = to_do.pop()
        both = pointed.children[at] if at >= 0 else None
        if at < 0 or not _has_triple(pointed, at) or (both is not None and depth == MAX_DEPTH):
            yield EMPTY
            continue
        yield at
        if both is not None:
            to_do += [(both[1], depth + 1), (both[0], depth + 1)]


def unplaced(pointed: Pointed) -> int:
    """How many nodes with a triple are nowhere in the tree, which has too few places for them or would be too deep."""
    return sum(_has_triple(pointed, at) for at in range(len(pointed.nodes))) - sum(at >= 0 for at in preorder(pointed))


def _has_triple(pointed: Pointed, at: int) -> bool:
    return any(pointed.subjects[mention] != NOBODY for mention in pointed.nodes[at])


def _plain(phrase: str) -> str:
    return " ".join(phrase.casefold().split())
