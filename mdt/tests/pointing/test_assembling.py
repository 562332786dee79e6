"""Nodes and trees against all groupings and all trees, one by one."""

import math
import random
from collections.abc import Iterator
from itertools import combinations

import pytest
from gatewise_mdt.pointing import assembling
from gatewise_mdt.pointing.assembling import MOST_EXACT, NONE, Tree, best_groups, best_tree

INFINITY = float("inf")
Scores = tuple[list[bool], list[float], list[list[list[float]]], list[list[float]]]
Children = dict[int, tuple[int, int] | None]


# ---- groups ----


def groupings(n: int) -> Iterator[list[list[int]]]:
    if n == 0:
        yield []
        return
    for before in groupings(n - 1):
        yield [*before, [n - 1]]
        for i, group in enumerate(before):
            yield [*before[:i], [*group, n - 1], *before[i + 1 :]]


def pairs(n: int, seed: int, impossible: float = 0.0) -> list[list[float]]:
    draw = random.Random(seed)
    scores = [[0.0] * n for _ in range(n)]
    for a, b in combinations(range(n), 2):
        scores[a][b] = scores[b][a] = -INFINITY if draw.random() < impossible else draw.gauss(0, 1)
    return scores


def score_of_groups(scores: list[list[float]], groups: list[list[int]]) -> float:
    return sum(scores[a][b] for group in groups for a, b in combinations(group, 2))


@pytest.mark.parametrize("n", range(7))
@pytest.mark.parametrize("impossible", [0.0, 0.3, 1.0])
def test_groups_are_the_best_of_all(n: int, impossible: float) -> None:
    for seed in range(5):
        scores = pairs(n, seed, impossible)
        every = sorted((sorted(groups) for groups in groupings(n)), key=lambda groups: score_of_groups(scores, groups))
        assert best_groups(scores) == every[-1]


@pytest.mark.parametrize("swaps", [1, 3])
@pytest.mark.parametrize("n", [MOST_EXACT + 1, MOST_EXACT + 6])
def test_of_many_nodes_in_another_order_the_tree_that_all_speaks_for_is_found(n: int, swaps: int) -> None:
    draw = random.Random(n + swaps)
    for _ in range(10):
        order = list(range(n))
        for _ in range(swaps):
            at = draw.randrange(n - 1)
            order[at], order[at + 1] = order[at + 1], order[at]
        # In pre-order a chain: each condition has a decision as its yes child, and the next condition as its no child.
        role = [i % 2 == 0 and i < n - 1 for i in range(n)]
        children = {order[i]: (order[i + 1], order[i + 2] if i + 2 < n else NONE) for i in range(n) if role[i]}
        conditions = [False] * n
        for i in range(n):
            conditions[order[i]] = role[i]
        arcs = [
            [[0.0 if children.get(i, (NONE, NONE))[side] == j else -9.0 for j in range(n)] for side in (0, 1)] for i in range(n)
        ]
        empty = [[0.0 if i in children and children[i][side] == NONE else -9.0 for side in (0, 1)] for i in range(n)]
        roots = [0.0 if i == order[0] else -9.0 for i in range(n)]
        assert best_tree(conditions, roots, arcs, empty) == (0.0, (order[0], tuple(children.get(i) for i in range(n))))


def test_of_many_phrases_a_node_need_be_no_stretch() -> None:
    n = MOST_EXACT + 1
    for node_of in ([i % 2 for i in range(n)], [int(i == 5) for i in range(n)]):
        scores = [[3.0 if node_of[a] == node_of[b] else -3.0 for b in range(n)] for a in range(n)]
        assert best_groups(scores) == sorted([[i for i in range(n) if node_of[i] == node] for node in (0, 1)])


@pytest.mark.parametrize("n", [5, MOST_EXACT + 1])
def test_phrases_that_nothing_speaks_for_stay_alone(n: int) -> None:
    for score in (0.0, -1.0, -INFINITY, float("nan")):
        groups = best_groups([[score] * n for _ in range(n)])
        assert sorted(member for group in groups for member in group) == list(range(n))
        assert score == 0.0 or groups == [[i] for i in range(n)]


# ---- trees ----


def random_scores(conditions: list[bool], seed: int, impossible: float = 0.0) -> Scores:
    draw = random.Random(seed)
    n = len(conditions)

    def one() -> float:
        return -INFINITY if draw.random() < impossible else -4 * draw.random()

    return (
        conditions,
        [one() for _ in range(n)],
        [[[one() for _ in range(n)] for _ in range(2)] for _ in range(n)],
        [[one() for _ in range(2)] for _ in range(n)],
    )


def random_roles(n: int, seed: int) -> list[bool]:
    draw = random.Random(seed)
    share = draw.choice([0.2, 0.5, 0.8])
    return [draw.random() < share for _ in range(n)]


def score_of_tree(scores: Scores, root: int, children: Children) -> float:
    _, roots, arcs, empty = scores
    total = roots[root]
    for node, both in children.items():
        for side, child in enumerate(both or ()):
            total += empty[node][side] if child == NONE else arcs[node][side][child]
    return total


def subtrees(conditions: list[bool], held: frozenset[int]) -> Iterator[tuple[int, Children]]:
    """All trees of exactly these nodes; none at all is NONE."""
    if not held:
        yield NONE, {}
    for root in held:
        rest = sorted(held - {root})
        if not conditions[root]:
            if not rest:
                yield root, {root: None}
            continue
        for k in range(len(rest) + 1):
            for left in combinations(rest, k):
                for yes, below_yes in subtrees(conditions, frozenset(left)):
                    for no, below_no in subtrees(conditions, frozenset(rest) - frozenset(left)):
                        yield root, {root: (yes, no), **below_yes, **below_no}


def all_trees(conditions: list[bool]) -> Iterator[tuple[int, Children]]:
    n = len(conditions)
    for k in range(1, n + 1):
        for held in combinations(range(n), k):
            yield from subtrees(conditions, frozenset(held))


def best_of(scores: Scores, trees: Iterator[tuple[int, Children]]) -> tuple[int, float]:
    """How many nodes the largest trees have, and the score of the best of these; (0, -inf) if none is possible."""
    every = [(len(children), score_of_tree(scores, root, children)) for root, children in trees if root != NONE]
    return max(((size, score) for size, score in every if score > -INFINITY), default=(0, -INFINITY))


def check(scores: Scores, score: float, tree: Tree) -> int:
    """That it is a tree, with its score. Returns how many nodes it has."""
    conditions = scores[0]
    root, children = tree
    assert len(children) == len(conditions)
    seen: list[int] = []
    to_do = [root]
    while to_do:
        node = to_do.pop()
        if node != NONE:
            seen.append(node)
            both = children[node]
            assert (both is not None) == conditions[node]
            to_do += both or ()
    assert len(set(seen)) == len(seen)
    assert all(children[node] is None for node in range(len(conditions)) if node not in seen)
    if not math.isnan(score):
        assert score == pytest.approx(score_of_tree(scores, root, {node: children[node] for node in seen}))
    return len(seen)


@pytest.fixture(params=["sets", "root"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How trees are looked for, whatever the number of nodes."""
    how: str = request.param
    if how != "sets":
        monkeypatch.setattr(assembling, "MOST_EXACT", 0)
    return how


CASES = [(n, seed, impossible) for n in range(1, 6) for seed in range(6) for impossible in (0.0, 0.4)]


@pytest.mark.parametrize(("n", "seed", "impossible"), CASES)
def test_trees_are_the_best_of_those_that_leave_out_the_fewest(by: str, n: int, seed: int, impossible: float) -> None:
    scores = random_scores(random_roles(n, 10 * n + seed), seed, impossible)
    score, tree = best_tree(*scores)
    size, expected = best_of(scores, all_trees(scores[0]))
    found = check(scores, score, tree)
    if by == "sets":
        assert score == pytest.approx(expected)
        assert found == max(size, 1)
        return
    assert score == -INFINITY or (found, score - 1e-9) <= (size, expected)


def test_as_many_nodes_as_have_a_place_are_in_the_tree(by: str) -> None:
    for seed in range(60):
        conditions = random_roles(1 + seed % 8, seed)
        scores = random_scores(conditions, seed)
        assert check(scores, *best_tree(*scores)) == min(len(conditions), 2 * sum(conditions) + 1)


@pytest.mark.parametrize("n", [1, 4, MOST_EXACT + 5])
def test_conditions_alone_and_decisions_alone(n: int) -> None:
    scores = random_scores([True] * n, n)
    assert check(scores, *best_tree(*scores)) == n
    scores = random_scores([False] * n, n)
    score, (root, children) = best_tree(*scores)
    assert (score, root) == (max(scores[1]), scores[1].index(max(scores[1])))
    assert children == (None,) * n


def test_of_too_many_decisions_the_worst_are_left_out(by: str) -> None:
    scores = random_scores([True, False, False, False], 0)
    for side in range(2):
        scores[2][0][side] = [-INFINITY, -1.0, -50.0, -2.0]
    assert sorted(best_tree(*scores)[1][1][0] or ()) == [1, 3]


def test_no_nodes_are_an_empty_leaf() -> None:
    assert best_tree([], [], [], []) == (0.0, (NONE, ()))


@pytest.mark.parametrize("n", [1, 5, MOST_EXACT + 2])
@pytest.mark.parametrize("value", [-INFINITY, INFINITY, float("nan"), 0.0])
def test_whatever_the_scores_there_is_a_tree(n: int, value: float) -> None:
    conditions = random_roles(n, n)
    scores = (conditions, [value] * n, [[[value] * n] * 2] * n, [[value] * 2] * n)
    score, tree = best_tree(*scores)
    size = check(scores, math.nan, tree)
    if value == 0.0:
        assert (score, size) == (0.0, min(n, 2 * sum(conditions) + 1))
    if value == -INFINITY:
        assert (score, size) == (-INFINITY, 1)
