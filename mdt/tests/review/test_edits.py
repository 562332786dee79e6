"""The edits that correct a tree: each keeps it whole, changes what it says and nothing else."""

from copy import deepcopy
from typing import Any

import pytest
from gatewise_mdt import DecisionTree
from gatewise_mdt.checks import check_preorder
from gatewise_mdt.formats.svg import drawing_of
from gatewise_mdt.review.edits import EDITS, apply, check_shape, drawable, empty_tree, fault_of, subtree_end
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import gout, node, preorders, properties, triple

from gatewise.errors import GatewiseError

Nodes = list[dict[str, Any]]


def nested(nodes: Nodes) -> dict[str, Any]:
    made, children = [{**node} for node in nodes], DecisionTree.from_preorder(nodes).children
    for one, both in zip(made, children, strict=True):
        one |= {} if both is None else {"true": made[both[0]], "false": made[both[1]]}
    return made[0]


def is_tree(nodes: Nodes) -> bool:
    try:
        DecisionTree.from_preorder(nodes)
    except GatewiseError:
        return False
    return True


@properties
@given(preorders(), st.data())
def test_every_edit_keeps_the_tree_whole_and_the_given_nodes_as_they_are(nodes: Nodes, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 4))):
        before = deepcopy(nodes)
        at = data.draw(st.integers(0, len(nodes) - 1))
        more = {"triple": 0, "parts": triple("x"), "join": "or", "side": data.draw(st.sampled_from(["true", "false"]))}
        edit = data.draw(st.sampled_from(sorted(EDITS)))
        try:
            made = apply(nodes, edit, {"node": at, **more})
        except GatewiseError:
            assert not nodes[at]["triples"] or nodes[at]["role"] == "D"  # it has no triple, or no branches
            continue
        assert nodes == before
        # What it leaves as it was is the same object: it writes one node anew at most, and adds two.
        same = [any(one is other for other in nodes) for one in made]
        assert same.count(False) <= 3
        check_preorder([one["role"] for one in made])
        assert check_shape(made) == made
        drawing_of(drawable(made), "some text", focusable=True)  # every draft can be drawn
        assert (fault_of(made) is None) == is_tree(made)
        nodes = made


def test_subtree_ends_where_the_next_begins() -> None:
    assert [subtree_end(gout(), i) for i in range(5)] == [5, 2, 5, 4, 5]


def test_a_branch_takes_the_place_of_its_condition() -> None:
    tree = gout()
    assert apply(tree, "keep_branch", {"node": 2, "side": "true"}) == [*tree[:2], tree[3]]
    assert apply(tree, "keep_branch", {"node": 0, "side": "false"}) == tree[2:]
    assert apply(tree, "keep_branch", {"node": 0, "side": "true"}) == [tree[1]]
    with pytest.raises(GatewiseError, match="node 2 is a decision, which has no branches"):
        apply(tree, "keep_branch", {"node": 1, "side": "true"})


def test_a_condition_put_above_a_node_waits_for_its_triple() -> None:
    tree = apply(gout(), "put_above", {"node": 1, "side": "false"})
    assert [one["role"] for one in tree] == ["C", "C", "D", "D", "C", "D", "D"]
    assert tree[3] == gout()[1]
    fault = fault_of(tree)
    assert fault is not None
    assert (fault.node, "without triples" in fault.message) == (1, True)
    # Dropping it again gives back the tree.
    assert apply(tree, "keep_branch", {"node": 1, "side": "false"}) == gout()


def test_leaf_to_condition_and_back() -> None:
    tree = apply(gout(), "to_condition", {"node": 3})
    assert [one["role"] for one in tree] == ["C", "D", "C", "C", "D", "D", "D"]
    assert fault_of(tree) is None
    assert apply(tree, "to_decision", {"node": 3}) == gout()
    assert apply(gout(), "to_decision", {"node": 0}) == [{**gout()[0], "role": "D"}]
    assert apply(gout(), "to_condition", {"node": 0}) == apply(gout(), "to_decision", {"node": 1}) == gout()


def test_deleting_leaves_an_empty_leaf() -> None:
    assert apply(gout(), "delete", {"node": 2}) == [*gout()[:2], node("D")]
    assert apply(gout(), "delete", {"node": 0}) == empty_tree()


def test_logical_rel_goes_with_the_number_of_triples() -> None:
    tree = apply(gout(), "add_triple", {"node": 3, "parts": triple("x")})
    assert tree[3]["logical_rel"] == "and"
    assert apply(tree, "remove_triple", {"node": 3, "triple": 1}) == gout()
    assert apply(gout(), "join", {"node": 0, "join": "or"})[0]["logical_rel"] == "or"
    assert apply(gout(), "join", {"node": 3, "join": "or"}) == gout()  # one triple: nothing to join
    assert apply(gout(), "remove_triple", {"node": 0, "triple": 0})[0]["logical_rel"] == "null"


def test_a_new_triple_has_the_relation_that_is_likely() -> None:
    assert apply(empty_tree(), "add_triple", {"node": 0}, "zh")[0]["triples"] == [["", "治疗方案", ""]]
    assert apply(gout(), "add_triple", {"node": 0, "parts": ["a", "", "b"]})[0]["triples"][2] == ["a", "basic condition", "b"]
    fault = fault_of(apply(gout(), "add_triple", {"node": 1}))
    assert fault is not None
    assert (fault.node, "subject" in fault.message) == (1, True)


@pytest.mark.parametrize(
    ("edit", "arguments", "said"),
    [
        ("explode", {"node": 0}, "the edit is 'explode': expected one of join, set_triple"),
        ("swap", {}, "no node None"),
        ("swap", {"node": 5}, "no node 5"),
        ("swap", {"node": True}, "no node True"),
        ("join", {"node": 0, "join": "xor"}, "join is 'xor'"),
        ("put_above", {"node": 0, "side": "left"}, "side is 'left'"),
        ("remove_triple", {"node": 0, "triple": 2}, "no triple 2"),
        ("set_triple", {"node": 0, "triple": 0, "parts": ["a", "b"]}, "expected three: subject, relation, object"),
        ("set_triple", {"node": 0, "triple": 0, "parts": ["a", "causes", "b"]}, "the relation is 'causes'"),
        ("set_triple", {"node": 0, "triple": 0, "parts": ["a", "drug therapy", 3]}, "the object of a triple is 3, expected text"),
        ("set_triple", {"node": 0, "triple": 0, "parts": ["a", "drug therapy", "\ud800"]}, "surrogate"),
        ("add_triple", {"node": 0, "parts": "text"}, "expected a list"),
    ],
)
def test_what_does_not_fit_is_refused(edit: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(GatewiseError, match=said):
        apply(gout(), edit, arguments)


@pytest.mark.parametrize("nodes", [None, {}, [1], [{"role": "X"}], [node("C")], gout()[:3], [{**node("D"), "triples": [["a"]]}]])
def test_nodes_that_cannot_be_worked_on_are_refused(nodes: Any) -> None:
    with pytest.raises(GatewiseError):
        check_shape(nodes)


@pytest.mark.parametrize(
    ("edit", "at", "more", "kept"),
    [
        ("set_triple", 1, {"triple": 0, "parts": triple("x")}, [0, None, 2, 3, 4]),
        ("set_triple", 1, {"triple": 0, "parts": [None, None, None]}, [0, 1, 2, 3, 4]),
        ("add_triple", 3, {}, [0, 1, 2, None, 4]),
        ("remove_triple", 0, {"triple": 1}, [None, 1, 2, 3, 4]),
        ("join", 0, {"join": "or"}, [None, 1, 2, 3, 4]),
        ("join", 0, {"join": "and"}, [0, 1, 2, 3, 4]),
        ("to_condition", 1, {}, [0, None, None, None, 2, 3, 4]),
        ("to_decision", 2, {}, [0, 1, None]),
        ("delete", 2, {}, [0, 1, None]),
        ("swap", 0, {}, [0, 2, 3, 4, 1]),
        ("keep_branch", 0, {"side": "false"}, [2, 3, 4]),
        ("put_above", 2, {"side": "true"}, [0, 1, None, 2, 3, 4, None]),
    ],
)
def test_which_nodes_an_edit_leaves_as_they_were(edit: str, at: int, more: dict[str, Any], kept: list[int | None]) -> None:
    nodes = gout()
    made = apply(nodes, edit, {"node": at, **more})
    assert [next((i for i, one in enumerate(nodes) if one is node), None) for node in made] == kept
