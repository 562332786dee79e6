"""How well predicted trees match gold ones: the metrics of Text2MDT (Zhu et al., arXiv 2401.02034) and of CHIP-2022 Text2DT.

All are micro-averaged over the records; texts are stripped and lower-cased. With |·| for the size of a set, P predicted and G gold,
F1 = 2 |P ∩ G| / (|P| + |G|), over

- triplet: the triples of a tree;
- node: its nodes with at least one triple, each as often as it comes, a node being (role, logical_rel, set of triples);
- path: its root-to-leaf paths, a path being all its nodes with the turn taken at each.

Tree accuracy is the share of gold trees whose nodes are, in pre-order, those of the prediction. ``tree_acc_nonempty`` divides by
the number of predictions that are not empty, as a published script does. Tree edit ratio: both trees are walked from the root in
parallel; the distance of two nodes is [roles differ] + [logical_rel differs] + |symmetric difference of their triples|; where one
tree has no node, it counts as an empty one, and between two nodes without triples there is no distance. What joins no triples at
all says nothing, and is not compared. TER is the sum of all
distances ÷ the sum over both trees of (triples + 2 · nodes), for nodes with at least one triple. It is in [0, 1], lower is better.

A prediction that is no tree (wrong types, an incomplete pre-order, a condition without triples) counts as an empty one: nothing
found, all gold triples, nodes and paths missed. Everything runs in time linear in the size of the trees.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatewise.errors import GatewiseError
from gatewise_mdt import checks
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.tree import DecisionTree

PlainTriple = tuple[str, str, str]
PlainNode = tuple[str, str, frozenset[PlainTriple]]
"""What is compared of a node: role, logical_rel and triples."""
Counts = dict[str, NDArray[Any]]
"""By name, what was counted: (n,), a number for each record, or sums over records."""
_Children = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class TreeMetrics:
    """All metrics over a set of records; see the module for the formulas.

    Attributes:
        n: gold trees.
        malformed: predictions that are no tree.
        empty: predictions that are missing or have no nodes (they count as malformed, too).
    """

    triplet_precision: float
    triplet_recall: float
    triplet_f1: float
    node_precision: float
    node_recall: float
    node_f1: float
    path_precision: float
    path_recall: float
    path_f1: float
    tree_acc: float
    tree_acc_nonempty: float
    ter: float
    n: int
    malformed: int
    empty: int

    def to_json(self) -> dict[str, float]:
        """The metrics by name."""
        return asdict(self)


def evaluate(gold: Sequence[Any], predicted: Sequence[Any], *, repair: bool = False, source: str = "gold") -> TreeMetrics:
    """The metrics of predictions, each at the place of its gold tree.

    Args:
        gold: for each text a :class:`DecisionTree`, a list of nodes in pre-order, or a record with one
            of them under "tree".
        predicted: the same, or anything at all: what is no tree counts as wrong.
        repair: on both sides, read logical_rel "and" or "or" over at most one triple as "null", "null" over several as "and", and
            count a triple given twice once. The published data have such nodes.
        source: what messages call the gold trees, such as a file's name.

    Raises:
        GatewiseError: the numbers of trees differ, there is none, or a gold tree is none: names the record, counted from 1.
    """
    return metrics_of(count_trees(gold, predicted, repair=repair, source=source))


def count_trees(gold: Sequence[Any], predicted: Sequence[Any], *, repair: bool = False, source: str = "gold") -> Counts:
    """What :func:`metrics_of` sums up, by record; arguments and errors are those of :func:`evaluate`."""
    if len(gold) != len(predicted):
        raise GatewiseError(f"{len(gold)} gold trees and {len(predicted)} predictions, expected one prediction for each gold tree")
    if not gold:
        raise GatewiseError("there are no gold trees, expected at least one")
    rows = []
    for number, (gold_item, item) in enumerate(zip(gold, predicted, strict=True), start=1):
        try:
            wanted, wanted_children = plain_tree(gold_item, repair)
        except checks.TreeError as fault:
            raise GatewiseError(fault.at(f"{source}, record {number}")) from None
        try:
            found, found_children = plain_tree(item, repair)
            malformed = False
        except checks.TreeError:
            found, found_children, malformed = [], (), True
        known: dict[Any, int] = {}
        rows.append(
            {
                **_overlap(
                    "triplet",
                    {triple for node in wanted for triple in node[2]},
                    {triple for node in found for triple in node[2]},
                ),
                **_overlap("node", (node for node in wanted if node[2]), (node for node in found if node[2])),
                **_overlap("path", _paths(wanted, wanted_children, known), _paths(found, found_children, known)),
                "trees": 1,
                "right": found == wanted,
                "malformed": malformed,
                "empty": malformed and not (item.get("tree") if isinstance(item, dict) else item),
                "distance": _distance(found, found_children, wanted, wanted_children),
                "weight": sum(len(node[2]) + 2 for node in (*found, *wanted) if node[2]),
            }
        )
    return {name: np.array([row[name] for row in rows], dtype=np.int64) for name in rows[0]}


def metrics_of(counts: Counts) -> TreeMetrics:
    """The metrics of records that :func:`count_trees` counted."""
    totals = {name: column.sum() for name, column in counts.items()}
    shares = {name: float(value) for name, value in rates(totals).items()}
    return TreeMetrics(**shares, n=int(totals["trees"]), malformed=int(totals["malformed"]), empty=int(totals["empty"]))


def rates(totals: Counts) -> Counts:
    """All metrics that are shares, of counts summed up over records: arrays of one shape, such as a sum for each draw of records.

    Precision, recall and F1 are 1 where there was nothing to find and nothing was found.
    """
    made: Counts = {}
    for name in ("triplet", "node", "path"):
        found, wanted, both = (totals[f"{name}_{what}"] for what in ("found", "wanted", "both"))
        for kind, part, whole in (("precision", both, found), ("recall", both, wanted), ("f1", 2 * both, found + wanted)):
            made[f"{name}_{kind}"] = np.where(found + wanted == 0, 1.0, _share(part, whole))
    made["tree_acc"] = _share(totals["right"], totals["trees"])
    made["tree_acc_nonempty"] = _share(totals["right"], totals["trees"] - totals["empty"])
    made["ter"] = _share(totals["distance"], totals["weight"])
    return made


def _overlap(name: str, wanted: Iterable[Any], found: Iterable[Any]) -> dict[str, int]:
    there, made = Counter(wanted), Counter(found)
    return {f"{name}_found": made.total(), f"{name}_wanted": there.total(), f"{name}_both": (made & there).total()}


def _share(part: Any, whole: Any) -> NDArray[Any]:
    """0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) != 0)


def plain_tree(item: Any, repair: bool) -> tuple[list[PlainNode], _Children]:
    """Nodes and children of anything that is a tree, if only a foreign one, so that published data pass.

    Raises:
        TreeError: it is none.
    """
    if isinstance(item, TreeRecord):
        item = item.tree
    if isinstance(item, DecisionTree):
        item = item.to_preorder()
    if isinstance(item, dict):
        item = item.get("tree")
    nodes: list[PlainNode] = []
    for role, parts, joined in checks.tree_parts(item, foreign=True):
        triples = frozenset((s.lower(), r.lower(), o.lower()) for s, r, o in parts)
        join = joined.strip().lower() if triples else "null"  # in an empty leaf there is nothing to join
        nodes.append((role, checks.fitting_join(join, len(triples)) if repair else join, triples))
    return nodes, checks.children_of([role for role, _, _ in nodes])


def _paths(nodes: list[PlainNode], children: _Children, known: dict[Any, int]) -> set[int]:
    """A number for each path. Equal paths of two trees that share ``known`` have equal numbers, and no path is ever spelt out."""
    leaves: set[int] = set()
    to_do: list[tuple[int, int]] = [(0, -1)] if nodes else []
    while to_do:
        i, before = to_do.pop()
        at = known.setdefault((before, nodes[i]), len(known))
        both = children[i]
        if both is None:
            leaves.add(at)
            continue
        for child, turn in zip(both, "LR", strict=True):
            to_do.append((child, known.setdefault((at, turn), len(known))))
    return leaves


def _distance(a: list[PlainNode], a_children: _Children, b: list[PlainNode], b_children: _Children) -> int:
    total = 0
    to_do: list[tuple[int | None, int | None]] = [(0 if a else None, 0 if b else None)]
    while to_do:
        i, j = to_do.pop()
        total += _node_distance(_EMPTY if i is None else a[i], _EMPTY if j is None else b[j])
        a_both = (None, None) if i is None else a_children[i] or (None, None)
        b_both = (None, None) if j is None else b_children[j] or (None, None)
        to_do += [pair for pair in zip(a_both, b_both, strict=True) if pair != (None, None)]
    return total


_EMPTY: PlainNode = ("", "", frozenset())


def _node_distance(one: PlainNode, other: PlainNode) -> int:
    if not one[2] and not other[2]:
        return 0
    return (one[0] != other[0]) + (one[1] != other[1]) + len(one[2] ^ other[2])
