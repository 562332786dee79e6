import time
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, evaluate, read_trees
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import JUNK, TEXT, gout, node, preorders, properties, published, swapped_root, triple

from gatewise.errors import GatewiseError

F1S = ("triplet_f1", "node_f1", "path_f1")


def nested(nodes: list[dict[str, Any]]) -> Any:
    """(role, logical_rel, set of triples, true child, false child) of a pre-order, by recursion."""
    rest = iter(nodes)

    def take() -> Any:
        made = next(rest)
        own = (made["role"], made["logical_rel"], {tuple(t.lower() for t in parts) for parts in made["triples"]})
        return (*own, take(), take()) if made["role"] == "C" else (*own, None, None)

    return take()


def slow_distance(one: Any, other: Any) -> int:
    """The tree edit distance by recursion, straight from its definition."""
    if one is None and other is None:
        return 0
    a, b = one or ("", "", set(), None, None), other or ("", "", set(), None, None)
    both_empty = not a[2] and not b[2]
    own = 0 if both_empty else (a[0] != b[0]) + (a[1] != b[1]) + len(a[2] ^ b[2])
    return own + slow_distance(a[3], b[3]) + slow_distance(a[4], b[4])


def slow_paths(tree: Any, before: str = "") -> set[str]:
    """All paths, each spelt out."""
    own = f"{before}/{tree[0]}{tree[1]}{sorted(tree[2])}"
    return {own} if tree[3] is None else slow_paths(tree[3], own + "L") | slow_paths(tree[4], own + "R")


def slow_ter(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    weight = sum(len({tuple(t.lower() for t in parts) for parts in node["triples"]}) + 2 for node in a + b if node["triples"])
    return slow_distance(nested(a), nested(b)) / weight if weight else 0.0


@properties
@given(preorders())
def test_a_tree_against_itself_is_perfect(nodes: list[dict[str, Any]]) -> None:
    metrics = evaluate([nodes], [DecisionTree.from_preorder(nodes)]).to_json()
    assert all(metrics[name] == 1 for name in (*F1S, "tree_acc", "tree_acc_nonempty"))
    assert metrics["ter"] == metrics["malformed"] == metrics["empty"] == 0


@properties
@given(preorders(), preorders())
def test_ter_and_paths_are_those_of_the_definition(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    ter = evaluate([b], [a]).ter
    assert ter == pytest.approx(slow_ter(a, b))
    assert 0 <= ter <= 1
    assert ter == evaluate([a], [b]).ter
    found, wanted = slow_paths(nested(a)), slow_paths(nested(b))
    assert evaluate([b], [a]).path_f1 == pytest.approx(2 * len(found & wanted) / (len(found) + len(wanted)))


@properties
@given(preorders().filter(lambda nodes: len(nodes) > 1))
def test_swapping_the_roots_children_is_seen_by_decision_paths(nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)
    swapped = swapped_root(tree)
    metrics = evaluate([tree], [swapped])
    assert metrics.triplet_f1 == metrics.node_f1 == 1
    # Every path now turns the other way at the root, so that none is left, unless both sides have one in common.
    assert (metrics.path_f1 == 1) == (tree == swapped)
    assert metrics.tree_acc == (tree == swapped)


@properties
@given(st.lists(st.tuples(preorders(), st.one_of(JUNK, preorders())), min_size=1, max_size=4))
def test_anything_may_be_predicted(pairs: list[tuple[Any, Any]]) -> None:
    metrics = evaluate([gold for gold, _ in pairs], [found for _, found in pairs]).to_json()
    assert all(0 <= value <= 1 for name, value in metrics.items() if name not in ("n", "malformed", "empty"))


@properties
@given(preorders(), st.integers(0, 10), st.sampled_from(["C", "D"]))
def test_an_invalid_preorder_counts_as_nothing_found(nodes: list[dict[str, Any]], place: int, role: str) -> None:
    broken = [*nodes[:place], node(role, triple("x")), *nodes[place:]]
    metrics = evaluate([nodes], [broken])
    assert metrics.malformed == 1
    assert metrics.tree_acc == 0
    assert metrics.ter == (1 if any(one["triples"] for one in nodes) else 0)
    held = any(one["triples"] for one in nodes)
    assert metrics.triplet_f1 == metrics.node_f1 == (0 if held else 1)
    assert metrics.path_f1 == 0


def test_conditions_without_end_end_at_once() -> None:
    endless = [node("C", triple("x"))] * 20_000
    before = time.process_time()
    assert evaluate([gout()], [endless]).malformed == 1
    assert time.process_time() - before < 5


def test_a_case_worked_out_by_hand() -> None:
    predicted = gout()
    predicted[1]["logical_rel"] = "and"
    predicted[3]["triples"] = [triple("rest", "therapeutic schedule")]
    metrics = evaluate([gout()], [predicted])
    # Seven triples, one of them wrong on each side; four nodes with triples, two of them right; three paths, one right.
    assert metrics.triplet_f1 == pytest.approx(6 / 7)
    assert metrics.node_f1 == pytest.approx(2 / 4)
    assert metrics.path_f1 == pytest.approx(1 / 3)
    # Distance: 1 for logical_rel, 2 for the triple gone and the triple new; weight: 2 · (7 triples + 2 · 4 nodes).
    assert metrics.ter == pytest.approx(3 / 30)
    assert metrics.tree_acc == 0


def test_a_missing_subtree_costs_its_distance_to_empty_nodes() -> None:
    stump = [node("D", triple("check uric acid", "therapeutic schedule"))]
    # Root: role, logical_rel and 1 + 2 triples; then (2 + 3), (2 + 1) and (2 + 1) for what is below; an empty leaf costs nothing.
    assert evaluate([stump], [gout()]).ter == pytest.approx((5 + 5 + 3 + 3) / (15 + 3))


def test_case_and_outer_spaces_do_not_count_but_logical_rel_does() -> None:
    loud = gout()
    loud[0]["triples"] = [[part.upper() + " " for part in one] for one in loud[0]["triples"]]
    assert evaluate([gout()], [loud]).tree_acc == 1
    one = [node("D", triple("x"), joined="or")]
    assert evaluate([one], [[node("D", triple("x"))]]).tree_acc == 0
    assert evaluate([one], [[node("D", triple("x"))]], repair=True).tree_acc == 1


def test_accuracies_differ_by_empty_predictions() -> None:
    metrics = evaluate([gout()] * 4, [gout(), [], None, [node("C", triple("x"))]])
    assert (metrics.tree_acc, metrics.tree_acc_nonempty) == (1 / 4, 1 / 2)
    assert (metrics.malformed, metrics.empty) == (3, 2)
    assert metrics.ter == pytest.approx(3 * 15 / (5 * 15))


def test_faults_of_the_gold_side_are_named() -> None:
    with pytest.raises(GatewiseError, match=r"gold, record 2, node 1: .*role is 'X'"):
        evaluate([gout(), [node("X")]], [gout()] * 2)
    with pytest.raises(GatewiseError, match="2 gold trees and 1 predictions"):
        evaluate([gout()] * 2, [gout()])
    with pytest.raises(GatewiseError, match="no gold trees"):
        evaluate([], [])


def test_published_trees_against_themselves_are_perfect() -> None:
    for file in published():
        trees = [record.tree for record in read_trees(file, repair=True).records]
        assert evaluate(trees, trees).tree_acc == 1


def test_trees_are_read_in_every_form_that_files_have() -> None:
    tree = DecisionTree.from_preorder(gout())
    forms = [tree, gout(), {"text": TEXT, "tree": gout()}, {"tree": gout()}, TreeRecord(TEXT, tree)]
    metrics = evaluate([gout()] * len(forms), forms)
    assert (metrics.tree_acc, metrics.ter, metrics.malformed) == (1, 0, 0)


def test_objects_are_no_triples_whatever_they_hold() -> None:
    # Iterating over a dictionary gives its keys, which are the same in all.
    nodes = [node("D", {"subject": "a", "relation": "drug therapy", "object": "b"})]  # type: ignore[arg-type]
    assert evaluate([[node("D", triple("x"))]], [nodes]).malformed == 1
    with pytest.raises(GatewiseError, match=r"record 1, node 1: a triple is .*expected a list of subject"):
        evaluate([nodes], [nodes])


def test_what_joins_nothing_is_not_compared() -> None:
    leaf, joined = [node("D")], [node("D", joined="or")]
    metrics = evaluate([leaf, joined], [joined, leaf])
    assert (metrics.tree_acc, metrics.path_f1, metrics.ter) == (1, 1, 0)
