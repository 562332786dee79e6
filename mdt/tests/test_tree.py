import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, read_trees
from gatewise_mdt.checks import MAX_DEPTH, TreeError, check_node, fitting_join, tree_parts
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import JUNK, gout, node, preorders, properties, published, swapped_root, triple

from gatewise.errors import GatewiseError


def test_importing_the_package_leaves_torch_alone() -> None:
    code = "import sys, gatewise_mdt; sys.exit('torch' in sys.modules or 'fhir' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Strictness -----------------------------------------------------------------------------------------------------------

WRONG = [
    (lambda nodes: nodes.pop(), ["the tree ends after 4 nodes", "1 child missing"]),
    (lambda nodes: nodes.append(node("D")), ["node 6", "complete with node 5", "1 more node follows"]),
    (lambda nodes: nodes.__setitem__(0, node("D")), ["node 2", "4 more nodes follow"]),
    (lambda nodes: nodes[2].update(triples=[]), ["node 3", "condition (role C) without triples", "only a decision"]),
    (lambda nodes: nodes[2].update(logical_rel="and"), ["node 3", '"and" with one triple', 'expected "null"']),
    (lambda nodes: nodes[4].update(logical_rel="or"), ["node 5", '"or" with no triples', 'expected "null"']),
    (lambda nodes: nodes[1].update(logical_rel="null"), ["node 2", '"null" with 3 triples', 'expected "and" or "or"']),
    (lambda nodes: nodes[1].update(logical_rel="xor"), ["node 2", "'xor'", '"and", "or" or "null"']),
    (lambda nodes: nodes[3].update(role="E"), ["node 4", "role is 'E'", '"C" (condition) or "D" (decision)']),
    (lambda nodes: nodes[3].pop("role"), ["node 4", 'the key "role" is missing']),
    (lambda nodes: nodes.__setitem__(3, "D"), ["node 4", "the node is 'D'", "expected an object"]),
    (lambda nodes: nodes[3].update(triples={"a": 1}), ["node 4", "triples is", "expected a list"]),
    (lambda nodes: nodes[3]["triples"].append(["a", "b"]), ["node 4", "2 parts", "expected three"]),
    (lambda nodes: nodes[3]["triples"].__setitem__(0, "abc"), ["node 4", "a triple is 'abc'"]),
    (lambda nodes: nodes[3]["triples"].__setitem__(0, triple(7)), ["node 4", "object of a triple is 7", "expected text"]),  # type: ignore[arg-type]
    (lambda nodes: nodes[3]["triples"].__setitem__(0, triple(" ")), ["node 4", "object", "is empty"]),
    (lambda nodes: nodes[3]["triples"].__setitem__(0, triple("x", "cures")), ["node 4", "'cures'", "drug therapy (治疗药物)"]),
    (lambda nodes: nodes[3]["triples"].__setitem__(0, triple("\ud800")), ["node 4", "half of a surrogate pair"]),
    (lambda nodes: nodes[0]["triples"].append(triple(" acute flare ")), ["node 1", "comes twice"]),
    (lambda nodes: nodes.clear(), ["has no nodes"]),
]


@pytest.mark.parametrize(("spoil", "said"), WRONG)
def test_faults_are_named_with_their_place(spoil: Any, said: list[str]) -> None:
    nodes = gout()
    spoil(nodes)
    with pytest.raises(GatewiseError) as caught:
        DecisionTree.from_preorder(nodes, "trees.json, record 7")
    message = str(caught.value)
    assert message.startswith("trees.json, record 7")
    assert "\n" not in message
    for text in said:
        assert text in message


@properties
@given(JUNK)
def test_junk_is_a_tree_or_a_gatewise_error(junk: Any) -> None:
    for make in (DecisionTree.from_preorder, DecisionTree.repaired):
        with suppress(GatewiseError):
            make(junk)


def test_too_deep_a_tree_is_refused_at_once() -> None:
    condition = node("C", triple("x"))
    fine = [condition] * (MAX_DEPTH - 1) + [node("D")] * MAX_DEPTH
    tree = DecisionTree.from_preorder(fine)
    assert len(tree.nodes) == 2 * MAX_DEPTH - 1
    with pytest.raises(GatewiseError, match=f"deeper than {MAX_DEPTH} levels"):
        DecisionTree.from_preorder([condition] * 10_000)


def test_an_empty_leaf_alone_recommends_nothing_and_is_a_tree() -> None:
    assert DecisionTree.from_preorder([node("D")]).nodes[0].is_empty


def test_repair_puts_right_what_has_one_meaning_and_says_so() -> None:
    nodes = gout()
    nodes[1]["logical_rel"] = "null"
    nodes[2]["logical_rel"] = "or"
    nodes[4]["logical_rel"] = "and"
    nodes[3]["triples"] = [triple("check uric acid", "therapeutic schedule")] * 2
    tree, notes = DecisionTree.repaired(nodes, "record 2")
    assert [node.logical_rel for node in tree.nodes] == ["and", "and", "null", "null", "null"]
    assert tree.nodes[3] == DecisionTree.from_preorder(gout()).nodes[3]
    assert [note.split(": ")[:2] for note in notes] == [["record 2", f"node {i}"] for i in (2, 3, 4, 5)]
    with pytest.raises(GatewiseError, match="one of clinical"):
        DecisionTree.repaired([node("D", triple("x", "drug therapie"))])


def test_two_triples_that_are_one_in_a_language_are_one_there() -> None:
    twice = node("D", triple("colchicine", "drug therapy"), triple("colchicine", "治疗药物"), joined="or")
    for language, relation in (("en", "drug therapy"), ("zh", "治疗药物")):
        made = DecisionTree.from_preorder([twice]).in_language(language)  # type: ignore[arg-type]
        assert made == DecisionTree.from_preorder([node("D", triple("colchicine", relation))])


# Shapes ---------------------------------------------------------------------------------------------------------------


@properties
@given(preorders())
def test_every_shape_leads_back_to_the_same_tree(nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)
    assert tree.to_preorder() == nodes
    assert tree.in_language("zh").in_language("en").in_language(tree.language) == tree
    assert DecisionTree.repaired(nodes) == (tree, [])


@properties
@given(preorders())
def test_children_are_those_of_a_slow_walk(nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)

    def end_of(i: int) -> int:
        """The position after the subtree at i."""
        if nodes[i]["role"] == "D":
            assert tree.children[i] is None
            return i + 1
        middle = end_of(i + 1)
        assert tree.children[i] == (i + 1, middle)
        return end_of(middle)

    assert end_of(0) == len(nodes)


OUTLINE = """\
if all:
  - adults with gout | clinical manifestation | acute flare
  - adults with gout | basic condition | normal kidney function
yes:
  do any:
    - adults with gout | drug therapy | colchicine
    - colchicine | dosage and administration | 0.5 mg twice daily
    - adults with gout | drug therapy | naproxen
no:
  if:
    - adults with gout | clinical manifestation | Without a flare
  yes:
    # confidence 41%
    do:
      - adults with gout | therapeutic schedule | check uric acid
  no:
    no recommendation
"""


def test_the_outline_shows_all_of_a_tree() -> None:
    assert DecisionTree.from_preorder(gout()).to_outline(["", "", "", "confidence 41%", ""]) == OUTLINE
    assert (
        "  - a\\|b | drug therapy | c\\nd"
        in DecisionTree.from_preorder([node("D", triple("c\nd", "drug therapy", "a|b"))]).to_outline()
    )


def test_the_order_of_triples_does_not_matter_and_nothing_else_is_the_same() -> None:
    tree = DecisionTree.from_preorder(gout())
    nodes = gout()
    nodes[1]["triples"].reverse()
    assert DecisionTree.from_preorder(nodes) == tree
    assert hash(DecisionTree.from_preorder(nodes)) == hash(tree)
    nodes[1]["logical_rel"] = "and"
    assert DecisionTree.from_preorder(nodes) != tree
    assert swapped_root(tree) != tree


def test_relations_change_their_language() -> None:
    tree = DecisionTree.from_preorder(gout())
    chinese = tree.in_language("zh")
    assert (tree.language, chinese.language) == ("en", "zh")
    assert chinese.nodes[1].triples[0].relation == "治疗药物"


def test_published_trees_are_read_and_only_their_joints_and_doubles_need_repair() -> None:
    for file in published():
        strict, repaired = read_trees(file), read_trees(file, repair=True)
        assert not repaired.faults
        assert len(repaired.records) == repaired.count
        assert len(strict.records) >= 0.85 * strict.count
        for message in strict.faults.values():
            assert "logical_rel" in message or "comes twice" in message


# One validation -------------------------------------------------------------------------------------------------------


def test_what_is_unfinished_or_foreign_is_held_to_fewer_rules() -> None:
    empty, unknown = [node("D", triple(" "))], [node("D", triple("x", "cures"), triple("x", "cures"), joined="XOR")]
    bare = [node("C"), node("D"), node("D")]
    assert tree_parts(empty, unfinished=True) == tree_parts(empty, foreign=True)
    tree_parts(bare, unfinished=True)
    tree_parts(unknown, foreign=True)
    tree_parts([node("d")], foreign=True)
    for nodes, how in (
        (empty, {}),
        (bare, {"foreign": True}),
        (unknown, {"unfinished": True}),
        ([node("d")], {"unfinished": True}),
    ):
        with pytest.raises(TreeError):
            tree_parts(nodes, **how)


@properties
@given(preorders(), st.sampled_from(["and", "or", "null"]))
def test_a_join_that_fits_is_one_that_a_node_may_have(nodes: list[dict[str, Any]], joined: str) -> None:
    for one in nodes:
        fitting = fitting_join(joined, len(one["triples"]))
        check_node(one["role"], [tuple(parts) for parts in one["triples"]], fitting)
        assert fitting_join(fitting, len(one["triples"])) == fitting
