"""The best nodes of some phrases, and the best tree of some nodes, by dynamic programming.

The score of a grouping is the sum over all pairs within groups of the pairs' scores. That of a tree is the sum over its
conditions and their two sides of the score of the child there, or of none, and of the score of its root. Everything is compared
that has each phrase (each node, as far as there are places) once, conditions with two children and decisions without: over sets,
in O(3^n) for n of them.

Of more than ``MOST_EXACT``, which few passages have, groups are joined two by two, those that gain most first, and a tree is built
from its root downwards, each time with the child that fits best.

A score of -inf says that something cannot be; so does one that is no number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gatewise_mdt.pointing.targets import EMPTY

MOST_EXACT = 10
NONE = EMPTY  # a leaf without a recommendation
Tree = tuple[int, tuple[tuple[int, int] | None, ...]]
"""The root, and for each node None or its (yes, no) children, NONE for an empty leaf."""
_Scores = NDArray[np.float64]
_Marks = NDArray[np.bool_]
_Children = dict[int, tuple[int, int]]


def best_groups(scores: Sequence[Sequence[float]]) -> list[list[int]]:
    """The grouping with the largest score: groups of numbers from 0, in the order of their first members.

    Args:
        scores: (n, n) of each pair, the same both ways.
    """
    numbers = _numbers(scores, (len(scores), len(scores)))
    return sorted(_groups_by_sets(numbers) if len(scores) <= MOST_EXACT else _groups_by_joining(numbers))


def _groups_by_sets(scores: _Scores) -> list[list[int]]:
    n = len(scores)
    inside, best, group = np.zeros(1 << n), np.zeros(1 << n), [0] * (1 << n)
    parts = _subsets(n)
    for held in range(1, 1 << n):
        rest = held & (held - 1)
        inside[held] = inside[rest] + scores[_members(held)[0], _members(rest)].sum()
        groups = parts[rest] | (held ^ rest)  # the group of the first member: with any of the others
        found = inside[groups] + best[held ^ groups]
        at = int(found.argmax())
        best[held], group[held] = found[at], int(groups[at])
    made, held = [], (1 << n) - 1
    while held:
        made.append(_members(group[held]))
        held ^= group[held]
    return made


def _groups_by_joining(scores: _Scores) -> list[list[int]]:
    """Two groups after another are joined, those that gain most by it, until none gain."""
    groups, gains = [[i] for i in range(len(scores))], scores.copy()
    np.fill_diagonal(gains, -np.inf)
    while len(groups) > 1 and gains.max() > 0:
        a, b = sorted(map(int, np.unravel_index(gains.argmax(), gains.shape)))
        groups[a] += groups.pop(b)
        gains[a] += gains[b]
        gains[:, a] += gains[:, b]
        gains = np.delete(np.delete(gains, b, axis=0), b, axis=1)
        gains[a, a] = -np.inf
    return [sorted(group) for group in groups]


def best_tree(
    conditions: Sequence[bool],
    roots: Sequence[float],
    arcs: Sequence[Sequence[Sequence[float]]],
    empty: Sequence[Sequence[float]],
) -> tuple[float, Tree]:
    """The tree with the largest score among those that leave out the fewest nodes.

    Nodes must be left out where there are more decisions than the conditions have places for, n conditions having n + 1, or where
    scores of -inf part them from the rest. Who they are is a question of the score as well. They have None for children and are
    nobody's child.

    Args:
        conditions: whether each of n nodes is a condition.
        roots: (n,) scores for being the root.
        arcs: (n, 2, n) score of node j as the yes (0) or no (1) child of node i.
        empty: (n, 2) score of an empty leaf there.

    Returns:
        The score and the tree. Of no nodes it is an empty leaf, (NONE, ()), with the score 0. Where every tree has a score of -inf,
        it is a node alone.
    """
    n = len(conditions)
    if not n:
        return 0.0, (NONE, ())
    may = np.array(conditions, dtype=bool)
    of_root, of_child, of_none = _numbers(roots, (n,)), _numbers(arcs, (n, 2, n)), _numbers(empty, (n, 2))
    root, children = (_by_sets if n <= MOST_EXACT else _from_the_root)(may, of_root, of_child, of_none)
    if may[root]:
        children.setdefault(root, (NONE, NONE))
    sides = [(node, which, child) for node, both in children.items() for which, child in enumerate(both)]
    score = of_root[root] + sum(of_none[a, which] if c == NONE else of_child[a, which, c] for a, which, c in sides)
    return float(score), (root, tuple(map(children.get, range(n))))


def _by_sets(conditions: _Marks, roots: _Scores, arcs: _Scores, empty: _Scores) -> tuple[int, _Children]:
    n = len(conditions)
    bits, sets, parts = 1 << np.arange(n), np.arange(1 << n), _subsets(n)
    side = np.empty((1 << n, 2, n))  # the best child of a node on a side, with all the nodes of a set below it
    below = np.full((1 << n, n), -np.inf)  # the best way to put a set below a node

    def children(node: Any, which: Any, held: int) -> _Scores:
        members = _members(held)
        return arcs[node, which][..., members] + below[held ^ bits[members], members]

    def splits(node: Any, held: int) -> _Scores:
        return side[parts[held], 0][:, node] + side[held ^ parts[held], 1][:, node]

    side[0], below[0, ~conditions] = empty.T, 0.0
    for held in range(1 << n):
        if held:
            side[held] = children(slice(None), slice(None), held).max(axis=-1).T
        below[held, conditions] = splits(conditions, held).max(axis=0)
    trees = np.full((1 << n, n), -np.inf)
    for node in range(n):
        held = sets[sets & bits[node] != 0]
        trees[held, node] = roots[node] + below[held ^ bits[node], node]
    # Of the sets of which there are trees the largest, of these the one with the best tree.
    sizes = np.where(np.isfinite(trees.max(axis=1)), (sets[:, None] & bits != 0).sum(axis=1), 0)
    chosen = int(np.where(sizes == sizes.max(), trees.max(axis=1), -np.inf).argmax())
    if not sizes[chosen]:
        return int(roots.argmax()), {}
    root = int(trees[chosen].argmax())
    found: _Children = {}
    to_do = [(root, chosen ^ 1 << root)]
    while to_do:
        node, held = to_do.pop()
        if not conditions[node]:
            continue
        yes = int(parts[held][splits(node, held).argmax()])
        both = []
        for which, part in enumerate((yes, held ^ yes)):
            both.append(_members(part)[int(children(node, which, part).argmax())] if part else NONE)
            if part:
                to_do.append((both[-1], part ^ 1 << both[-1]))
        found[node] = (both[0], both[1])
    return root, found


def _from_the_root(conditions: _Marks, roots: _Scores, arcs: _Scores, empty: _Scores) -> tuple[int, _Children]:
    """Conditions first, so that there are places for the decisions; each time what adds most over an empty leaf."""
    gain = np.subtract(arcs, empty[:, :, None], out=np.full(arcs.shape, -np.inf), where=arcs > -np.inf)
    among = np.flatnonzero(conditions) if conditions.any() else np.arange(len(roots))
    root = int(among[roots[among].argmax()])
    free = np.zeros(empty.shape, dtype=bool)  # sides that have no child yet
    found = {}

    def add(node: int) -> None:
        if conditions[node]:
            free[node], found[node] = True, [NONE, NONE]

    add(root)
    for kind in (conditions, ~conditions):
        left = kind.copy()
        left[root] = False
        while left.any() and free.any():
            possible = np.where(free[:, :, None] & left, gain, -np.inf)
            at = int(possible.argmax())
            if possible.flat[at] == -np.inf:
                break
            node, which, child = (int(one) for one in np.unravel_index(at, possible.shape))
            found[node][which], free[node, which], left[child] = child, False, False
            add(child)
    return root, {node: (both[0], both[1]) for node, both in found.items()}


def _numbers(scores: Sequence[Any], shape: tuple[int, ...]) -> _Scores:
    """As an array in which nothing is nan or inf."""
    return np.nan_to_num(np.array(scores, dtype=np.float64).reshape(shape), nan=-np.inf, posinf=1e30, neginf=-np.inf)


def _members(held: int) -> list[int]:
    return [i for i in range(held.bit_length()) if held >> i & 1]


def _subsets(n: int) -> list[NDArray[np.int64]]:
    """For each set of n (its members the bits of a number) all sets within it, the smallest number first."""
    made = [np.zeros(1, dtype=np.int64)]
    for held in range(1, 1 << n):
        high = 1 << held.bit_length() - 1
        made.append(np.concatenate([made[held ^ high], made[held ^ high] | high]))
    return made
