"""From the scores of the heads to trees."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatewise.mdt.pointing.assembling import NONE, best_groups, best_tree
from gatewise.mdt.pointing.chart import best_phrases
from gatewise.mdt.pointing.heads import JOINS, Mentions, PointingHeads, UnitStates, mentions_of, spans_of, units_of
from gatewise.mdt.pointing.targets import EMPTY, NOBODY, POPULATION, SUBJECT, Mention, Pointed


@torch.no_grad()
def decode(heads: PointingHeads, states: Tensor, features: Sequence[dict[str, Any]]) -> list[Pointed]:
    units = heads.units(states, units_of(features))
    found = best_phrases(heads.phrases(units), units.batch.lengths)
    bare = [Pointed(tuple(Mention(*one) for one in row), (), (), (), (), -1, ()) for row in found]
    return with_nodes(heads, units, bare)


def with_nodes(heads: PointingHeads, units: UnitStates, bare: Sequence[Pointed]) -> list[Pointed]:
    places = mentions_of(bare)
    vectors = heads.mentions(units, places.begin, places.end, places.kind, places.mask)
    subjects = heads.subjects(vectors, units, places.mask)
    pairs = heads.pairs(vectors, units, places.begin, places.end)
    grouped = []
    for row, one in enumerate(bare):
        grouped.append(_grouped(one.mentions, subjects[row], pairs[row]))
    return with_trees(heads, units, places, vectors, grouped)


def _grouped(mentions: tuple[Mention, ...], subjects: Tensor, pairs: Tensor) -> Pointed:
    linked = []
    for i, one in enumerate(mentions):
        best = int(subjects[i].argmax()) if bool(torch.isfinite(subjects[i]).any()) else None
        linked.append(NOBODY if one.kind == SUBJECT or best is None else POPULATION if best == 0 else best - 1)
    same = pairs[..., 0].tolist()
    own = [-1] * len(mentions)
    groups: list[list[int]] = []
    for role in "CD":
        members = [i for i, one in enumerate(mentions) if one.role == role]
        made = best_groups([[same[a][b] for b in members] for a in members])
        groups += [[members[k] for k in group] for group in made]
    groups.sort(key=lambda group: group[0])
    for node, group in enumerate(groups):
        for i in group:
            own[i] = node
    nodes = []
    for node, group in enumerate(groups):
        shared = [
            j
            for j, one in enumerate(mentions)
            if own[j] not in (-1, node) and one.role == mentions[group[0]].role and float(pairs[group, j, 1].mean()) > 0
        ]
        nodes.append(tuple(sorted([*group, *shared])))
    return Pointed(mentions, tuple(linked), tuple(nodes), tuple(own), ("null",) * len(nodes), -1, ())


def with_trees(
    heads: PointingHeads, units: UnitStates, places: Mentions, vectors: Tensor, grouped: Sequence[Pointed]
) -> list[Pointed]:
    g = max([1, *(len(one.nodes) for one in grouped)])
    members = torch.zeros(len(grouped), g, places.begin.shape[1], dtype=torch.bool)
    conditions = torch.zeros(len(grouped), g, dtype=torch.bool)
    for row, one in enumerate(grouped):
        for node, held in enumerate(one.nodes):
            members[row, node, list(held)] = True
            conditions[row, node] = one.mentions[held[0]].role == "C"
    members, conditions = members.to(vectors.device), conditions.to(vectors.device)
    nodes = heads.nodes(vectors, members)
    joins = heads.joins(nodes, units, places.begin, places.end, members)
    first, last = spans_of(members, places.begin, places.end)
    arcs = heads.arcs(nodes, units, first, last, members.any(dim=-1), conditions)
    scores = (arcs.by_side + arcs.by_node).tolist()
    roots, empty = arcs.root.tolist(), arcs.empty.tolist()
    made = []
    for row, one in enumerate(grouped):
        n = len(one.nodes)
        if not n:
            made.append(one)
            continue
        total, (root, children) = best_tree(
            conditions[row, :n].tolist(),
            roots[row][:n],
            [[side[:n] for side in sides] for sides in scores[row][:n]],
            empty[row][:n],
        )
        told = tuple(JOINS[int(joins[row, node].argmax())] if len(one.nodes[node]) > 1 else "null" for node in range(n))
        kept = tuple(None if both is None else tuple(EMPTY if c == NONE else c for c in both) for both in children)
        made.append(Pointed(one.mentions, one.subjects, one.nodes, one.own, told, root, kept, total))
    return made
