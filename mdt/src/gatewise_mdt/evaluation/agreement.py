"""Whether people, or a person and a model, agree who made trees for the same passages: measures, and what differs.

**Which passages belong together** is told by their texts, in which runs of white space and Unicode's canonical forms (NFC) do not
count. Passages of one text are told apart by where they stand (``sha256``, ``source``, ``offsets``, ``place``, ``headings`` of
their records), and else by their order, which a note then says, but never where ``offsets`` of one ``sha256`` say that they are
two. Phrases are compared in the same way, and without case.

**F1, not kappa, is the measure of triples, nodes and paths.** Cohen's kappa corrects the observed agreement by what chance gives,
for which it has to count what neither has. For triples that is all that could have been written down and was not: nobody can count
it, and as it grows kappa goes to F1 (Hripcsak and Rothschild, JAMIA 12:296, 2005). F1 = 2 |A and B| / (|A| + |B|) is the same
whichever of the two is called right; it and the tree edit ratio are those of :mod:`gatewise_mdt.evaluation.metrics`. Tree agreement
is the share of passages whose trees are the same.

**Kappa where units and classes are fixed beforehand** (Cohen, Educational and Psychological Measurement 20:37, 1960): each
character of a passage, but no white space, is in a phrase of conditions, of decisions, of both or of neither. Of n characters,
n_ij are put into class i by A and into class j by B; with p_o = sum_i n_ii / n and p_e = sum_i (n_i. / n) (n_.i / n), kappa =
(p_o - p_e) / (1 - p_e). Where both put all into one class, p_e is 1 and kappa is not defined, whatever the agreement. A
character is in a phrase where subject or object of a triple stands in the text (:mod:`gatewise_mdt.spans`). The population
before the "@" is left out, as nobody had to find it. Long phrases weigh more than short ones. Two things have no kappa: which
nodes there are at a place depends on what was decided above it, so places are no units that were fixed beforehand; and
"approved" and "corrected" say how far a review is, not what the two think of the same question. They are counted.

Intervals are those of :mod:`gatewise_mdt.evaluation.intervals`, of passages drawn, so that characters of one passage, which are not
independent, come and go together. This whole module is ours but for the two formulas.
"""

import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np

from gatewise.checks import printable, writable
from gatewise.errors import GatewiseError
from gatewise_mdt.evaluation.intervals import intervals
from gatewise_mdt.evaluation.metrics import Counts, PlainNode, PlainTriple, count_trees, plain_tree, rates
from gatewise_mdt.evaluation.mistakes import placed, shared_triples, unlike_nodes, unlike_triples
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.relations import Language, relation_in
from gatewise_mdt.spans import Span, locate_tree
from gatewise_mdt.tree import DecisionTree

MEASURES = ("triplet_f1", "node_f1", "path_f1", "tree_agreement", "ter")
CLASSES = ("neither", "condition", "decision", "both")
"""Of characters: the phrases that each is in."""
STATES = ("approved", "corrected", "to review")
KINDS = {
    "missed triple": "one only",
    "invented triple": "one only",
    "wrong span": "span",
    "wrong subject": "subject",
    "wrong relation": "relation",
    "several parts": "several parts",
    "wrong grouping": "grouping",
    "wrong join": "join",
    "wrong role": "role",
    "wrong side": "place",
    "wrong depth": "place",
    "missed node": "node of one",
    "extra node": "node of one",
}
"""Kinds of mistakes -> what they are called where neither of the two trees is the right one."""
# What tells passages of one text apart, the surest first: all of a row has to be the same.
_PLACES = (("sha256", "source", "offsets", "place", "headings"), ("offsets",), ("place", "headings"), ("place",), ("headings",))
_LONGEST_NAME = 40


class Part(NamedTuple):
    """Triples of a node, all or one.

    Attributes:
        node: its position in the tree's pre-order, from 0.
        turns: the answers on the way to it, True for yes.
    """

    node: int
    turns: tuple[bool, ...]
    role: str
    join: str
    triples: tuple[tuple[str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """As in ``gatewise mdt agree --json``; nodes count from 1."""
        return {
            "node": self.node + 1,
            "turns": ["yes" if turn else "no" for turn in self.turns],
            "role": self.role,
            "logical_rel": self.join,
            "triples": [list(triple) for triple in self.triples],
        }


class Difference(NamedTuple):
    """Where two trees differ.

    Attributes:
        kind: "one only", a triple that one tree has; "span", "subject", "relation" or "several parts", two triples that are alike
            (or, for "span", have objects that overlap in the text) and differ in this; or of nodes "grouping", other triples
            together; "join", "role", "place" (after other answers; not said again of what moved with the node above it), and "node
            of one", which one tree has once more.
        a: what A has there; nothing where only B has something.
        b: what B has there.
    """

    kind: str
    a: tuple[Part, ...]
    b: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        """As in ``gatewise mdt agree --json``."""
        return {"kind": self.kind, "a": [part.to_json() for part in self.a], "b": [part.to_json() for part in self.b]}


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa of two raters, see the module.

    Attributes:
        table: characters by the class of CLASSES that A (rows) and B (columns) put them into.
    """

    table: tuple[tuple[int, ...], ...]

    @property
    def units(self) -> int:
        """How many characters there are."""
        return sum(map(sum, self.table))

    @property
    def value(self) -> float | None:
        """Kappa; None where it is not defined: there is no unit, or both gave all the same class."""
        value = float(_kappa(np.array(self.table)))
        return None if np.isnan(value) else value

    def to_json(self) -> dict[str, Any]:
        """As in ``gatewise mdt agree --json``; null where kappa is not defined."""
        return {
            "kappa": self.value,
            "units": self.units,
            "classes": list(CLASSES),
            "table": [list(row) for row in self.table],
        }


@dataclass(frozen=True)
class PassageAgreement:
    """Two trees of one passage.

    Attributes:
        a: the record as A's file has it.
        trees: both trees as they are compared: A's words for relations, phrases in NFC with single spaces.
        text: the text that they are of, in the same form.
        values: the :data:`MEASURES`.
        kappa: over its characters.
        differences: none exactly where the trees are the same.
    """

    a: TreeRecord
    b: TreeRecord
    text: str
    trees: tuple[DecisionTree, DecisionTree]
    values: dict[str, float]
    kappa: Kappa
    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """As in ``gatewise mdt agree --json``."""
        return {
            "a": _who(self.a),
            "b": _who(self.b),
            "text": self.a.text,
            "same": self.same,
            **{name: value for name, value in self.values.items() if name != "tree_agreement"},
            "kappa": self.kappa.value,
            "differences": [difference.to_json() for difference in self.differences],
        }


@dataclass(frozen=True)
class Agreement:
    """Two sets of trees, A's and B's.

    Attributes:
        names: who made them.
        files: what they were read from, as they were named.
        passages: those that both have, in A's order.
        only_a: records of passages that only A has.
        values: the :data:`MEASURES` over all passages that both have.
        kappa: over the characters of all passages.
        intervals: 95%, measure or "kappa" -> ``low`` and ``high``.
        states: how many of the passages are in which review state (rows A, columns B, both in the order of :data:`STATES`).
        notes: what has to be known of how passages were paired, a sentence each.
    """

    names: tuple[str, str]
    files: tuple[str, str]
    passages: tuple[PassageAgreement, ...]
    only_a: tuple[TreeRecord, ...]
    only_b: tuple[TreeRecord, ...]
    values: dict[str, float]
    kappa: Kappa
    intervals: dict[str, dict[str, float]]
    states: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As in ``gatewise mdt agree --json``."""
        a, b = ({"name": name, "file": file} for name, file in zip(self.names, self.files, strict=True))
        return {
            "a": a,
            "b": b,
            "passages": len(self.passages),
            "same": sum(passage.same for passage in self.passages),
            **self.values,
            "kappa": self.kappa.to_json(),
            "intervals": self.intervals,
            "states": {"names": list(STATES), "table": [list(row) for row in self.states]},
            "by_passage": [passage.to_json() for passage in self.passages],
            "only_a": [{**_who(record), "text": record.text} for record in self.only_a],
            "only_b": [{**_who(record), "text": record.text} for record in self.only_b],
            "notes": list(self.notes),
        }


def agree(
    a: Sequence[TreeRecord], b: Sequence[TreeRecord], *, names: tuple[str, str] = ("A", "B"), files: tuple[str, str] = ("", "")
) -> Agreement:
    """Measures whether two sets of trees agree, and says where they differ.

    Args:
        a: trees with their texts, in any order; the other set may have other passages too.
        names: who made them, for notes and what is shown; :func:`names_of` finds them in the records.
        files: what they were read from.

    Raises:
        GatewiseError: no passage is in both.
    """
    pairs, only_a, only_b, notes = _paired(a, b, names)
    if not pairs:
        raise GatewiseError(
            f"{names[0]} and {names[1]} have no passage in common: expected two files of trees for the same texts"
            " (white space and Unicode's normal form do not count), at the same places where a text comes several times"
        )
    compared = [_compared(one, other) for one, other in pairs]
    ones, others = ([trees[side].to_preorder() for _, trees in compared] for side in (0, 1))
    counts = count_trees(ones, others, repair=True)
    tables = np.stack([_table(text, trees) for text, trees in compared])
    counts |= {f"kappa {i}": column for i, column in enumerate(tables.reshape(len(tables), -1).T)}
    passages = [
        PassageAgreement(
            one,
            other,
            text,
            trees,
            _measures({name: column[i] for name, column in counts.items()}),
            _kappa_of(tables[i]),
            tuple(_differences(text, *trees)),
        )
        for i, ((one, other), (text, trees)) in enumerate(zip(pairs, compared, strict=True))
    ]
    totals = {name: column.sum() for name, column in counts.items()}
    kappa = _kappa_of(tables.sum(axis=0))
    ends = intervals(counts, of=_all_measures)
    if kappa.value is None:
        ends.pop("kappa", None)
    states = Counter((state_of(one), state_of(other)) for one, other in pairs)
    return Agreement(
        names,
        files,
        tuple(passages),
        tuple(only_a),
        tuple(only_b),
        _measures(totals),
        kappa,
        ends,
        tuple(tuple(states[one, other] for other in STATES) for one in STATES),
        tuple(notes),
    )


# ---- who made the trees ----


def state_of(record: TreeRecord) -> str:
    """How far its review is, one of :data:`STATES`."""
    state = record.more.get("review")
    return state if state in ("approved", "corrected") else "to review"


def reviewer_of(record: TreeRecord) -> str:
    """Who approved or corrected it last; empty where it does not say."""
    name = (record.reviewed or {}).get("by")
    return " ".join(printable(name).split())[:_LONGEST_NAME] if isinstance(name, str) else ""


def names_of(*files: tuple[str, Sequence[TreeRecord]]) -> tuple[str, ...]:
    """What to call those who made the trees of some files: by the one reviewer of all records that name one, else by the file.

    Args:
        files: each with its records.
    """
    made = []
    for file, records in files:
        reviewers = {reviewer for record in records if (reviewer := reviewer_of(record))}
        made.append(reviewers.pop() if len(reviewers) == 1 else _named(Path(file).name))
    twice = {name for name, times in Counter(made).items() if times > 1}
    named = [f"{name} ({_named(Path(file).name)})" if name in twice else name for name, (file, _) in zip(made, files, strict=True)]
    return tuple(named) if len(set(named)) == len(named) else tuple(_named(file) for file, _ in files)


def _named(file: str) -> str:
    """The name of a file, which may hold anything, as it can be shown."""
    return printable(str(writable(file)))


def _who(record: TreeRecord) -> dict[str, Any]:
    return {"record": record.number, "review": record.more.get("review"), "reviewed": record.reviewed}


# ---- which passages belong together ----


_Pairing = tuple[list[tuple[TreeRecord, TreeRecord]], list[TreeRecord], list[TreeRecord], list[str]]


def _paired(a: Sequence[TreeRecord], b: Sequence[TreeRecord], names: tuple[str, str]) -> _Pairing:
    """Pairs of records of one passage, the records of A alone and of B alone, and what has to be known of how they were paired."""
    notes: list[str] = []
    for records, name in ((a, names[0]), (b, names[1])):
        without = [str(record.number) for record in records if not record.text.strip()]
        if without:
            notes.append(f"{name} has trees without a text, which belong to no passage: records {', '.join(without)}")
    found: dict[int, int] = {}  # positions in a -> in b
    of_b = _grouped([_plain_text(record) or None for record in b])
    for key, here in _grouped([_plain_text(record) or None for record in a]).items():
        there = of_b.get(key, [])
        by_place = _at_one_place([a[i] for i in here], [b[j] for j in there])
        found |= {here[i]: there[j] for i, j in by_place.items()}
        taken = {there[j] for j in by_place.values()}
        left_b = [j for j in there if j not in taken]
        by_order: list[tuple[int, int]] = []
        for i in (i for i in here if i not in found):
            j = next((j for j in left_b if not _are_two(a[i], b[j])), None)
            if j is not None:
                left_b.remove(j)
                by_order.append((i, j))
        found.update(by_order)
        if by_order:
            of_one, of_other = ", ".join(str(a[i].number) for i, _ in by_order), ", ".join(str(b[j].number) for _, j in by_order)
            notes.append(
                f'"{shorten(a[here[0]].text, 40, placeholder="…")}" comes several times, and nothing else tells its passages apart:'
                f" they were paired by their order, {names[0]}'s records {of_one} with {names[1]}'s {of_other}"
            )
    taken = set(found.values())
    return (
        [(a[i], b[found[i]]) for i in sorted(found)],
        [record for i, record in enumerate(a) if i not in found],
        [record for j, record in enumerate(b) if j not in taken],
        notes,
    )


def _at_one_place(ours: Sequence[TreeRecord], theirs: Sequence[TreeRecord]) -> dict[int, int]:
    """Which of the records of one text belong together for sure, by position."""
    if len(ours) == len(theirs) == 1:
        return {0: 0}
    found: dict[int, int] = {}
    for keys in _PLACES:
        taken = set(found.values())
        places_a = _grouped([None if i in found else _place(record, keys) for i, record in enumerate(ours)])
        places_b = _grouped([None if j in taken else _place(record, keys) for j, record in enumerate(theirs)])
        both = [(here, places_b.get(place, [])) for place, here in places_a.items()]
        sure = [(here[0], there[0]) for here, there in both if len(here) == len(there) == 1]
        found |= {i: j for i, j in sure if not _are_two(ours[i], theirs[j])}
    return found


def _are_two(one: TreeRecord, other: TreeRecord) -> bool:
    """Whether two records of one text are of two passages of a document for sure."""
    ends = [record.more.get("offsets") for record in (one, other)]
    return bool(one.sha256) and one.sha256 == other.sha256 and all(isinstance(pair, list) for pair in ends) and ends[0] != ends[1]


def _grouped(names: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Positions by name; None is no name."""
    made: dict[Hashable, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        if name is not None:
            made[name].append(i)
    return made


def _place(record: TreeRecord, keys: Sequence[str]) -> Hashable:
    """What a record says of its place: of several ways to say it any, of one it has to say it."""
    held = [record.more.get(key) for key in keys]
    enough = any(held) if len(keys) > 2 else all(held)
    return json.dumps(held, sort_keys=True) if enough else None


# ---- two trees as they are compared ----


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _plain_text(record: TreeRecord) -> str:
    population, passage = _plain(record.population), _plain(record.passage)
    return f"{population}@{passage}" if "@" in record.text else passage


def _compared(a: TreeRecord, b: TreeRecord) -> tuple[str, tuple[DecisionTree, DecisionTree]]:
    language = (a.tree if a.tree.triples else b.tree).language
    return _plain_text(a), (_plain_tree(a.tree, language), _plain_tree(b.tree, language))


def _plain_tree(tree: DecisionTree, language: Language) -> DecisionTree:
    nodes = [
        {**node.to_json(), "triples": [[_plain(s), relation_in(r, language), _plain(o)] for s, r, o in node.triples]}
        for node in tree.nodes
    ]
    return DecisionTree.repaired(nodes)[0]  # in this form two triples of a node may be one


def _measures(totals: Counts) -> dict[str, float]:
    made = rates(totals)
    shares = {name: made[name] for name in MEASURES if name in made}
    return {name: float(value) for name, value in {**shares, "tree_agreement": made["tree_acc"], "ter": made["ter"]}.items()}


def _all_measures(totals: Counts) -> Counts:
    """Measures and kappa of counts summed up over passages, for many draws at once."""
    made = rates(totals)
    cells = np.stack([totals[f"kappa {i}"] for i in range(len(CLASSES) ** 2)], axis=-1)
    kappa = _kappa(cells.reshape(*cells.shape[:-1], len(CLASSES), len(CLASSES)))
    return {**{name: made[name] for name in MEASURES if name in made}, "tree_agreement": made["tree_acc"], "kappa": kappa}


# ---- kappa ----


def _kappa(table: Any) -> Any:
    """Kappa of tables, (..., classes, classes); NaN where it is not defined.

    Multiplied by n squared above and below, so that all is whole numbers and "not defined" is exact.
    """
    units = table.sum(axis=(-2, -1))
    same = np.trace(table, axis1=-2, axis2=-1)
    chance = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1)
    above, below = units * same - chance, units * units - chance
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below != 0)


def _kappa_of(table: Any) -> Kappa:
    return Kappa(tuple(tuple(int(cell) for cell in row) for row in table))


def _table(text: str, trees: tuple[DecisionTree, DecisionTree]) -> Any:
    """(4, 4): the characters of a passage by the class that each of the two trees gives them."""
    one, other = (_character_classes(text, tree) for tree in trees)
    return np.bincount(len(CLASSES) * one + other, minlength=len(CLASSES) ** 2).reshape(len(CLASSES), -1)


def _character_classes(text: str, tree: DecisionTree) -> Any:
    """The number in CLASSES of each character of the passage that is no white space."""
    classes = np.zeros(len(text), dtype=np.int64)
    for node, row in zip(tree.nodes, locate_tree(text, tree), strict=True):
        for span in (span for spans in row for span in spans if span is not None):
            classes[span.start : span.end] |= 1 if node.is_condition else 2
    return classes[[i for i in range(text.find("@") + 1, len(text)) if not text[i].isspace()]]


# ---- what differs ----


_Unlike = tuple[str, PlainTriple | None, PlainTriple | None]
"""As of ``unlike_triples``: the kind, what A has and what B has."""
_Places = dict[PlainTriple, Span]


class _Side:
    """A tree as it is compared with another: in small letters, and what stands for each triple in its own."""

    def __init__(self, tree: DecisionTree) -> None:
        self.tree = tree
        self.nodes, self.children = plain_tree(tree, True)
        self.turns: list[tuple[bool, ...]] = [()] * len(self.nodes)
        for i, both in enumerate(self.children):
            for child, turn in zip(both or (), (True, False), strict=False):
                self.turns[child] = (*self.turns[i], turn)

    def of_triple(self, triple: PlainTriple | None) -> tuple[Part, ...]:
        """The first node with a triple, with this triple alone."""
        return () if triple is None else (self._part(next(i for i, node in enumerate(self.nodes) if triple in node[2]), triple),)

    def of_node(self, i: int) -> Part:
        return self._part(i, None)

    def _part(self, i: int, triple: PlainTriple | None) -> Part:
        role, join, _ = self.nodes[i]
        own = [(t.subject, t.relation, t.object) for t in self.tree.nodes[i].triples]
        held = [parts for parts in own if triple is None or _lower(parts) == triple][: None if triple is None else 1]
        return Part(i, self.turns[i], "condition" if role == "C" else "decision", join if triple is None else "null", tuple(held))


def _lower(parts: tuple[str, str, str]) -> PlainTriple:
    subject, relation, object_ = (part.lower() for part in parts)
    return subject, relation, object_


def _differences(text: str, one: DecisionTree, other: DecisionTree) -> list[Difference]:
    a, b = _Side(one), _Side(other)
    unlike = list(unlike_triples(a.nodes, b.nodes))
    if {"missed triple", "invented triple"} <= {kind for kind, _, _ in unlike}:
        unlike = _with_overlaps(unlike, _places(text, one), _places(text, other))
    made = [Difference(KINDS[kind], a.of_triple(ours), b.of_triple(theirs)) for kind, ours, theirs in unlike]
    shared = shared_triples(a.nodes, b.nodes)
    for kind, node, nodes in unlike_nodes(placed(a.nodes, a.children, shared), placed(b.nodes, b.children, shared)):
        parts = () if node is None else (a.of_node(node.at),)
        made.append(Difference(KINDS[kind], parts, tuple(b.of_node(one.at) for one in nodes)))
    moved = {(one.a[0].turns, one.b[0].turns) for one in made if one.kind == "place"}
    made = [one for one in made if one.kind != "place" or not _went_along(one.a[0].turns, one.b[0].turns, moved)]
    # How triples are joined of which one side has more is no mistake of its own, but a reader has to see it.
    told_a = {part.node for difference in made for part in difference.a if len(part.triples) > 1}
    told_b = {part.node for difference in made for part in difference.b if len(part.triples) > 1}
    places = {turns: j for j, turns in enumerate(b.turns)}
    for i, turns in enumerate(a.turns):
        j = places.get(turns)
        if j is not None and i not in told_a and j not in told_b and _joined_otherwise(a.nodes[i], b.nodes[j]):
            made.append(Difference("join", (a.of_node(i),), (b.of_node(j),)))
    return made


def _joined_otherwise(one: PlainNode, other: PlainNode) -> bool:
    return one[1] != other[1] and "null" not in (one[1], other[1]) and bool(one[2] & other[2])


def _with_overlaps(unlike: Sequence[_Unlike], places_a: _Places, places_b: _Places) -> list[_Unlike]:
    """In pairs those that only one has and that have one relation and objects that overlap in the text, those that do most first.

    Mistakes are told by words, so that "fever above 38" and "38 degrees or more" are not alike.
    """
    shared = [
        (-common, i, j)
        for i, (_, one, none) in enumerate(unlike)
        for j, (_, nothing, other) in enumerate(unlike)
        if one is not None and none is nothing is None and other is not None and one[1] == other[1]
        if one in places_a and other in places_b and (common := _common(places_a[one], places_b[other])) > 0
    ]
    pairs: dict[int, int] = {}
    for _, i, j in sorted(shared):
        if i not in pairs and j not in pairs.values():
            pairs[i] = j
    gone = set(pairs.values())
    return [
        ("wrong span", one, unlike[pairs[i]][2]) if i in pairs else (kind, one, other)
        for i, (kind, one, other) in enumerate(unlike)
        if i not in gone
    ]


def _common(one: Span, other: Span) -> int:
    """How many characters two spans share."""
    return min(one.end, other.end) - max(one.start, other.start)


def _places(text: str, tree: DecisionTree) -> _Places:
    """Where the objects of the triples stand, as far as they do; of one that comes several times, the first."""
    made: _Places = {}
    for node, row in zip(tree.nodes, locate_tree(text, tree), strict=True):
        for one, spans in zip(node.triples, row, strict=True):
            if spans.object is not None:
                made.setdefault(_lower((one.subject, one.relation, one.object)), spans.object)
    return made


def _went_along(
    one: tuple[bool, ...], other: tuple[bool, ...], moved: Container[tuple[tuple[bool, ...], tuple[bool, ...]]]
) -> bool:
    """Whether a node that stands elsewhere stands as before under one that does."""
    return one[-1:] == other[-1:] != () and (one[:-1], other[:-1]) in moved
