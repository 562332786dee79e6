"""From the scores of the heads to trees: phrases, then their subjects and nodes, then the tree, each the best of its kind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gatewise_mdt.pointing.assembling import best_groups, best_tree
from gatewise_mdt.pointing.chart import best_phrases, marginals
from gatewise_mdt.pointing.heads import JOINS, Places, PointingHeads, UnitStates, member_rows, mention_rows, padded
from gatewise_mdt.pointing.targets import EMPTY, NOBODY, POPULATION, SUBJECT, Mention, Pointed


@dataclass(frozen=True)
class Found:
    """A tree on its way, and how sure the heads are, as log-probabilities.

    Attributes:
        phrases: of each mention, that it and its subject are right.
        groups: of each node, that its mentions belong together and the others of its role do not.
        joins: of each node, that its join is right.
        arcs: of each node, that its parent is right and so are its children.
    """

    pointed: Pointed
    phrases: tuple[float, ...] = ()
    groups: tuple[float, ...] = ()
    joins: tuple[float, ...] = ()
    arcs: tuple[float, ...] = ()

    def of_node(self, node: int) -> tuple[float, float, float, float]:
        """The four of one node; its phrases together."""
        return (
            sum(self.phrases[mention] for mention in self.pointed.nodes[node]),
            self.groups[node],
            self.joins[node],
            self.arcs[node],
        )


def phrases(heads: PointingHeads, units: UnitStates) -> list[Found]:
    """The phrases of texts, which are all that is known of their trees."""
    scores, lengths = heads.phrases(units), units.places.lengths
    likely = marginals(scores, lengths)
    found = []
    for row, spans in enumerate(best_phrases(scores, lengths)):
        logs = tuple(math.log(max(float(likely[row, begin, end - begin - 1, kind]), 1e-12)) for begin, end, kind in spans)
        found.append(Found(Pointed(tuple(Mention(*one) for one in spans), (), (), (), (), -1, ()), logs))
    return found


def nodes(heads: PointingHeads, units: UnitStates, found: Sequence[Found]) -> list[Found]:
    """Phrases with their subjects, and the nodes that they make."""
    places = _places(found, units)
    vectors = heads.mentions(units, places)
    subjects = heads.subjects(vectors, units, places.mask)
    known = subjects.isfinite().any(dim=-1, keepdim=True)
    logs = subjects.masked_fill(~known, 0.0).log_softmax(dim=-1).tolist()
    possible, pairs = known.squeeze(-1).tolist(), heads.pairs(vectors, units, places).tolist()
    return [_grouped(one, logs[row], possible[row], pairs[row]) for row, one in enumerate(found)]


def trees(heads: PointingHeads, units: UnitStates, found: Sequence[Found]) -> list[Found]:
    """Nodes with their joins, and the tree that they make."""
    places = _places(found, units)
    vectors = heads.mentions(units, places)
    members = padded([member_rows(one.pointed) for one in found], places.begin.shape[1], 0).bool().to(vectors.device)
    rows = [[one.pointed.mentions[held[0]].role == "C" for held in one.pointed.nodes] for one in found]
    conditions = padded([[row] for row in rows], members.shape[1], 0)[:, 0].bool().to(vectors.device)
    made = heads.nodes(vectors, members)
    joins = heads.joins(made, units, places, members).log_softmax(dim=-1).tolist()
    arcs = heads.arcs(made, units, places, members, conditions)
    by_side, by_node = arcs.by_side.tolist(), arcs.by_node.tolist()
    roots, empty = arcs.root.tolist(), arcs.empty.tolist()
    return [
        _assembled(one, rows[i], joins[i], roots[i], by_side[i], by_node[i], empty[i]) if rows[i] else one
        for i, one in enumerate(found)
    ]


def _places(found: Sequence[Found], units: UnitStates) -> Places:
    return Places.of(padded([mention_rows(one.pointed) for one in found], 5, -1).to(units.first.device))


def _grouped(found: Found, subjects: list[list[float]], possible: list[bool], pairs: list[list[list[float]]]) -> Found:
    mentions, linked, sure = found.pointed.mentions, [], []
    for i, one in enumerate(mentions):
        best = max(range(len(subjects[i])), key=lambda k: subjects[i][k])
        linked.append((POPULATION if best == 0 else best - 1) if possible[i] and one.kind != SUBJECT else NOBODY)
        sure.append(subjects[i][best] + found.phrases[i])
    groups: list[list[int]] = []
    for role in "CD":
        # A triple without a subject is none.
        members = [i for i, one in enumerate(mentions) if one.role == role and linked[i] != NOBODY]
        groups += [[members[k] for k in group] for group in best_groups([[pairs[a][b][0] for b in members] for a in members])]
    groups.sort(key=lambda group: group[0])
    own = [-1] * len(mentions)
    for node, group in enumerate(groups):
        for i in group:
            own[i] = node
    held, logs = [], []
    for node, group in enumerate(groups):
        role = mentions[group[0]].role
        others = [j for j, one in enumerate(mentions) if own[j] not in (-1, node) and one.role == role]
        shares = {j: sum(pairs[i][j][1] for i in group) / len(group) for j in others}
        held.append(tuple(sorted([*group, *(j for j in others if shares[j] > 0)])))
        log = sum(_log_sigmoid(pairs[a][b][0]) for k, a in enumerate(group) for b in group[k + 1 :])
        log += sum(_log_sigmoid(-max(pairs[i][j][0] for i in group)) for j in others)
        logs.append(log + sum(_log_sigmoid(abs(share)) for share in shares.values()))
    made = Pointed(mentions, tuple(linked), tuple(held), tuple(own), (), -1, ())
    return replace(found, pointed=made, phrases=tuple(sure), groups=tuple(logs))


def _assembled(
    found: Found,
    conditions: list[bool],
    joins: list[list[float]],
    roots: list[float],
    by_side: list[list[list[float]]],
    by_node: list[list[list[float]]],
    empty: list[list[float]],
) -> Found:
    one = found.pointed
    n = len(one.nodes)
    scores = [[[by_side[i][side][j] + by_node[i][side][j] for j in range(n)] for side in (0, 1)] for i in range(n)]
    _, (root, children) = best_tree(conditions, roots[:n], scores, empty[:n])
    best = [max((0, 1), key=lambda k: joins[node][k]) for node in range(n)]
    joined = [len(held) > 1 for held in one.nodes]
    told = tuple(JOINS[best[node]] if joined[node] else "null" for node in range(n))
    sure = tuple(joins[node][best[node]] if joined[node] else 0.0 for node in range(n))
    logs = [0.0] * n
    logs[root] = roots[root]
    for node, both in enumerate(children):
        for side, child in enumerate(both or ()):
            logs[node] += empty[node][side] if child == EMPTY else by_side[node][side][child]
            if child != EMPTY:
                logs[child] += by_node[node][side][child]
    return replace(found, pointed=replace(one, joins=told, root=root, children=children), joins=sure, arcs=tuple(logs))


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x
