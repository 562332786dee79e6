"""The best nodes of some phrases, and the best tree of some nodes, by dynamic programming.

The score of a grouping is the sum over all pairs within groups of the pairs' scores. That of a tree is the sum over its
conditions and their two sides of the score of the child there, or of none, and of the score of its root. Everything is compared
that has each phrase (each node) once, conditions with two children and decisions without: over sets, in O(3^n) for n of them.
Of more than ``MOST_EXACT`` only those groupings (trees) are compared whose every group (subtree) is an unbroken stretch of the
text's order, in O(n^2) (O(n^4)).

That order is no rule for the others: in a third of the published trees pre-order is another one, in a tenth a node is no
stretch.
"""

from collections.abc import Sequence
from functools import cache

MOST_EXACT = 9
NONE = -1
Tree = tuple[int, tuple[tuple[int, int] | None, ...]]
"""The root, and for each node None or its (yes, no) children, NONE for an empty leaf."""


def best_groups(scores: Sequence[Sequence[float]]) -> list[list[int]]:
    """The grouping with the largest score: groups of numbers from 0, in the order of their first members.

    Args:
        scores: (n, n) of each pair, the same both ways.
    """
    made = (_groups_by_sets if len(scores) <= MOST_EXACT else _groups_by_stretches)(scores)
    return sorted(made)


def _groups_by_sets(scores: Sequence[Sequence[float]]) -> list[list[int]]:
    n = len(scores)
    inside = [0.0] * (1 << n)
    for held in range(1, 1 << n):
        rest = held & (held - 1)
        low = (held ^ rest).bit_length() - 1
        inside[held] = inside[rest] + sum(scores[low][other] for other in _members(rest))
    best: list[tuple[float, int]] = [(0.0, 0)] * (1 << n)
    for held in range(1, 1 << n):
        rest = held & (held - 1)
        others, top = rest, (float("-inf"), 0)
        while True:  # the group of the lowest member: with any of the others
            group = others | (held ^ rest)
            top = max(top, (inside[group] + best[held ^ group][0], group))
            if not others:
                break
            others = (others - 1) & rest
        best[held] = top
    made, held = [], (1 << n) - 1
    while held:
        made.append(_members(best[held][1]))
        held ^= best[held][1]
    return made


def _groups_by_stretches(scores: Sequence[Sequence[float]]) -> list[list[int]]:
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(scores) + 1):
        inside, top = 0.0, (float("-inf"), 0)
        for begin in range(end - 1, -1, -1):
            inside += sum(scores[begin][other] for other in range(begin + 1, end))
            top = max(top, (best[begin][0] + inside, begin))
        best.append(top)
    made, end = [], len(scores)
    while end:
        made.append(list(range(best[end][1], end)))
        end = best[end][1]
    return made


def best_tree(
    conditions: Sequence[bool],
    roots: Sequence[float],
    arcs: Sequence[Sequence[Sequence[float]]],
    empty: Sequence[Sequence[float]],
) -> tuple[float, Tree]:
    """The tree with the largest score.

    Args:
        conditions: whether each of n nodes is a condition.
        roots: (n,) scores for being the root.
        arcs: (n, 2, n) score of node j as the yes (0) or no (1) child of node i.
        empty: (n, 2) score of an empty leaf there.

    Returns:
        The score and the tree. Without a condition there is one only for a single node: of several decisions the one with the
        largest score is the tree, and the score is -inf for what is lost.
    """
    n = len(conditions)
    if not any(conditions):
        root = max(range(n), key=lambda i: roots[i])
        return (roots[root] if n == 1 else float("-inf")), (root, (None,) * n)
    made = _by_sets if n <= MOST_EXACT else _by_stretches
    return made(conditions, roots, arcs, empty)


def _by_sets(
    conditions: Sequence[bool],
    roots: Sequence[float],
    arcs: Sequence[Sequence[Sequence[float]]],
    empty: Sequence[Sequence[float]],
) -> tuple[float, Tree]:
    n = len(conditions)
    worst = float("-inf")

    @cache
    def side(parent: int, which: int, held: int) -> tuple[float, int]:
        """The best child of a node on a side, with all the nodes of a set below it."""
        if not held:
            return empty[parent][which], NONE
        return max((arcs[parent][which][child] + below(child, held & ~(1 << child))[0], child) for child in _members(held))

    @cache
    def below(node: int, held: int) -> tuple[float, int]:
        """The best way to put a set below a node, and what of it goes on the yes side."""
        if not conditions[node]:
            return (0.0 if not held else worst), 0
        best, part = worst, 0
        yes = held
        while True:
            score = side(node, 0, yes)[0] + side(node, 1, held & ~yes)[0]
            if score > best:
                best, part = score, yes
            if not yes:
                return best, part
            yes = (yes - 1) & held

    everything = (1 << n) - 1
    score, root = max((roots[i] + below(i, everything & ~(1 << i))[0], i) for i in range(n))
    children: list[tuple[int, int] | None] = [None] * n
    to_do = [(root, everything & ~(1 << root))]
    while to_do:
        node, held = to_do.pop()
        if not conditions[node]:
            continue
        yes = below(node, held)[1]
        found = []
        for which, part in ((0, yes), (1, held & ~yes)):
            child = side(node, which, part)[1]
            found.append(child)
            if child != NONE:
                to_do.append((child, part & ~(1 << child)))
        children[node] = (found[0], found[1])
    return score, (root, tuple(children))


def _members(held: int) -> list[int]:
    return [i for i in range(held.bit_length()) if held >> i & 1]


def _by_stretches(
    conditions: Sequence[bool],
    roots: Sequence[float],
    arcs: Sequence[Sequence[Sequence[float]]],
    empty: Sequence[Sequence[float]],
) -> tuple[float, Tree]:
    """Each subtree holds nodes i to j - 1, its root anywhere among them, the two sides the stretches before and after a cut."""
    n = len(conditions)
    worst = float("-inf")
    best: dict[tuple[int, int, int], tuple[float, tuple[tuple[int, int, int], tuple[int, int, int]] | None]] = {}

    def child(parent: int, which: int, stretch: tuple[int, int]) -> tuple[float, tuple[int, int, int]]:
        i, j = stretch
        if i == j:
            return empty[parent][which], (i, j, NONE)
        return max((arcs[parent][which][root] + best[i, j, root][0], (i, j, root)) for root in range(i, j))

    def splits(i: int, j: int, root: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """The two stretches below a root, which is the first, the last or between them; either may be the yes side."""
        if root == i:
            cuts = [((i + 1, cut), (cut, j)) for cut in range(i + 1, j + 1)]
        elif root == j - 1:
            cuts = [((i, cut), (cut, j - 1)) for cut in range(i, j)]
        else:
            cuts = [((i, root), (root + 1, j))]
        return [both for a, b in cuts for both in ((a, b), (b, a))]

    for length in range(1, n + 1):
        for i in range(n - length + 1):
            j = i + length
            for root in range(i, j):
                if not conditions[root]:
                    best[i, j, root] = (0.0 if length == 1 else worst), None
                    continue
                top: tuple[float, tuple[tuple[int, int, int], tuple[int, int, int]] | None] = (worst, None)
                for yes, no in splits(i, j, root):
                    (a, left), (b, right) = child(root, 0, yes), child(root, 1, no)
                    if a + b > top[0]:
                        top = (a + b, (left, right))
                best[i, j, root] = top
    score, root = max((roots[root] + best[0, n, root][0], root) for root in range(n))
    children: list[tuple[int, int] | None] = [None] * n
    to_do = [(0, n, root)]
    while to_do:
        at = to_do.pop()
        both = best[at][1] if at[2] != NONE else None
        if both is not None:
            children[at[2]] = (both[0][2], both[1][2])
            to_do += both
    return score, (root, tuple(children))
