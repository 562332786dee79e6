"""What is wrong with predicted trees, by kind, so that the commonest can be acted on.

Triples, of the whole tree. A gold and a predicted triple that are not found on the other side are paired when they are alike, each
with one other at most, the most alike first; phrases are alike when one contains the other or half of their words are the same run.

| kind            | the two triples                                                          |
|-----------------|--------------------------------------------------------------------------|
| wrong relation  | same subject and object                                                  |
| wrong subject   | same relation and object, and the subjects are not alike                 |
| wrong span      | same relation; subjects and objects are the same or alike                |
| several parts   | objects are the same or alike, and more than one part is wrong           |
| missed triple   | a gold triple that is left                                               |
| invented triple | a predicted triple that is left                                          |

Nodes, without their triples that are not right (those are already counted), as far as any are left.

| kind            | a gold node                                                                          |
|-----------------|--------------------------------------------------------------------------------------|
| wrong side      | is there, as deep in the tree as it should be, but after other turns                 |
| wrong depth     | is there, at another depth                                                           |
| wrong join      | is there but for its logical_rel; not asked where triples were left out              |
| wrong role      | is there but for its role: a condition for a decision, or the other way round        |
| wrong grouping  | is not there, and its triples stand in other company                                 |
| missed node     | is not there, and its triples stand only where other gold nodes have them            |
| extra node      | (a predicted node) is there beside all gold nodes with its triples                   |

A prediction that is no tree is one mistake, ``malformed``. A tree without a mistake is the gold tree, and the other way round; what
logical_rel an empty leaf has does not count.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple, TypeVar

from gatewise.errors import GatewiseError
from gatewise_mdt import checks
from gatewise_mdt.evaluation.metrics import PlainNode, PlainTriple, plain_tree

KINDS = (
    "malformed",
    "missed triple",
    "invented triple",
    "wrong span",
    "wrong subject",
    "wrong relation",
    "several parts",
    "wrong grouping",
    "wrong join",
    "wrong role",
    "wrong side",
    "wrong depth",
    "missed node",
    "extra node",
)
_WORDS = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|(?:(?![\u3400-\u9fff\uf900-\ufaff])\w)+|[^\w\s]")


_Pair = TypeVar("_Pair", bound=tuple[Any, ...])


class Mistake(NamedTuple):
    """One mistake in a tree.

    Attributes:
        kind: one of :data:`KINDS`.
        gold: the triple or node that should be there; empty for what should not be there at all.
        predicted: the triple or node that stands there instead; empty for what is missing.
    """

    kind: str
    gold: str = ""
    predicted: str = ""


def mistakes(gold: Any, predicted: Any, *, repair: bool = False) -> list[Mistake]:
    """All mistakes of a prediction.

    Args:
        gold: a :class:`DecisionTree`, a list of nodes in pre-order or a record with one under "tree".
        predicted: the same, or anything at all.
        repair: as for :func:`gatewise_mdt.evaluate`.

    Raises:
        GatewiseError: the gold tree is none.
    """
    try:
        wanted, wanted_children = plain_tree(gold, repair)
    except checks.TreeError as fault:
        raise GatewiseError(fault.at("gold")) from None
    try:
        found, found_children = plain_tree(predicted, repair)
    except checks.TreeError as fault:
        return [Mistake("malformed", predicted=str(fault))]
    all_wanted, all_found = (frozenset(triple for node in nodes for triple in node[2]) for nodes in (wanted, found))
    right = all_wanted & all_found
    nodes, there = _placed(wanted, wanted_children, right), _placed(found, found_children, right)
    return [*_triple_mistakes(wanted, found, right), *_node_mistakes(nodes, there)]


def count_mistakes(gold: Sequence[Any], predicted: Sequence[Any], *, repair: bool = False) -> dict[str, dict[str, int]]:
    """How often each kind comes, with the arguments of :func:`gatewise_mdt.evaluate`.

    Returns:
        For each of :data:`KINDS`: ``count``; ``trees``, in how many predictions; and ``alone``, in how many of them no other kind
        does, which would be right without it.

    Raises:
        GatewiseError: a gold tree is none.
    """
    counts = {kind: {"count": 0, "trees": 0, "alone": 0} for kind in KINDS}
    for wanted, found in zip(gold, predicted, strict=True):
        made = [mistake.kind for mistake in mistakes(wanted, found, repair=repair)]
        for kind in set(made):
            counts[kind]["count"] += made.count(kind)
            counts[kind]["trees"] += 1
            counts[kind]["alone"] += len(set(made)) == 1
    return counts


# ---- triples ----


def _triple_mistakes(wanted: Sequence[PlainNode], found: Sequence[PlainNode], right: frozenset[PlainTriple]) -> Iterator[Mistake]:
    missing, over = (
        [one for one in dict.fromkeys(triple for node in nodes for triple in sorted(node[2])) if one not in right]
        for nodes in (wanted, found)
    )
    pairs = [(*rank, i, j) for i, one in enumerate(missing) for j, other in enumerate(over) if (rank := _likeness(one, other))]
    paired = {i: (kind, j) for _, _, kind, i, j in best_pairs(pairs)}
    for i, triple in enumerate(missing):
        kind, other = paired.get(i, ("missed triple", None))
        yield Mistake(kind, " | ".join(triple), "" if other is None else " | ".join(over[other]))
    taken = {j for _, j in paired.values()}
    for j, triple in enumerate(over):
        if j not in taken:
            yield Mistake("invented triple", predicted=" | ".join(triple))


def _likeness(one: PlainTriple, other: PlainTriple) -> tuple[int, float, str] | None:
    """How far two triples are from each other (the kind first, then how unlike the phrases are), or None if they are not alike."""
    subjects, objects = alike(one[0], other[0]), alike(one[2], other[2])
    if not objects:
        return None
    unlike, same_relation = 2.0 - subjects - objects, one[1] == other[1]
    if subjects == objects == 1:
        return 0, unlike, "wrong relation"
    if same_relation and subjects:
        return 0, unlike, "wrong span"
    if same_relation and objects == 1:
        return 1, unlike, "wrong subject"
    return 2, unlike, "several parts"


def best_pairs(pairs: Iterable[_Pair]) -> Iterator[_Pair]:
    """Of pairs that end in their two numbers, the least first, those of which neither is in one before."""
    ones: set[int] = set()
    others: set[int] = set()
    for pair in sorted(pairs):
        *_, i, j = pair
        if i not in ones and j not in others:
            ones.add(i)
            others.add(j)
            yield pair


def alike(one: str, other: str) -> float:
    """1 for the same phrase, less for phrases that share a run of words, 0 for phrases that are not alike."""
    if one == other:
        return 1.0
    a, b = _WORDS.findall(one), _WORDS.findall(other)
    run = SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
    alike = bool(run) and (run == min(len(a), len(b)) or 2 * run >= max(len(a), len(b)))
    return 0.99 * run / max(len(a), len(b)) if alike else 0.0


# ---- nodes ----


class _Placed(NamedTuple):
    """A node in its tree.

    Attributes:
        joined: its logical_rel; empty where triples were left out, of whose join nothing can be said.
        triples: those that are right.
        way: the answers that lead to it, "yes" or "no" each.
        shown: the whole node.
    """

    role: str
    joined: str
    triples: frozenset[PlainTriple]
    way: tuple[str, ...]
    shown: str


def _placed(nodes: Sequence[PlainNode], children: Sequence[tuple[int, int] | None], right: frozenset[PlainTriple]) -> list[_Placed]:
    """The nodes with right triples."""
    ways: list[tuple[str, ...]] = [()] * len(nodes)
    for i, both in enumerate(children):
        for child, answer in zip(both or (), ("yes", "no"), strict=False):
            ways[child] = (*ways[i], answer)
    return [
        _Placed(role, joined if triples <= right else "", triples & right, way, _shown(role, joined, triples, way))
        for (role, joined, triples), way in zip(nodes, ways, strict=True)
        if triples & right
    ]


def _explanation(one: _Placed, other: _Placed) -> str | None:
    """What is wrong if the one stands for the other, which has the same triples; empty for nothing, None where it cannot."""
    if one.triples != other.triples:
        return None
    if one.role != other.role:
        return "wrong role"
    if one.joined != other.joined and one.joined and other.joined:
        return "wrong join"
    if len(one.way) != len(other.way):
        return "wrong depth"
    return "" if one.way == other.way else "wrong side"


def _node_mistakes(wanted: list[_Placed], found: list[_Placed]) -> Iterator[Mistake]:
    # The least wrong explanation first, so that twins of a node do not take each other's place.
    for kind in ("", "wrong side", "wrong depth", "wrong join", "wrong role"):
        for one in list(wanted):
            other = next((other for other in found if _explanation(one, other) == kind), None)
            if other is not None:
                wanted.remove(one)
                found.remove(other)
                if kind:
                    yield Mistake(kind, one.shown, other.shown)
    for one in wanted:
        company = [other.shown for other in found if other.triples & one.triples]
        yield Mistake("wrong grouping" if company else "missed node", one.shown, " + ".join(company))
    for other in found:
        if not any(other.triples & one.triples for one in wanted):
            yield Mistake("extra node", predicted=other.shown)


def _shown(role: str, joined: str, triples: frozenset[PlainTriple], way: tuple[str, ...]) -> str:
    """A node on one line, with the answers that lead to it."""
    head = role if joined == "null" else f"{role} {joined}"
    return f"{' > '.join(way) or 'root'} {head}: {'; '.join(' | '.join(triple) for triple in sorted(triples))}"
