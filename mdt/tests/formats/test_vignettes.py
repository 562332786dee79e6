"""A tree as a few patients."""

import itertools
import json
import random

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, render, sample, vignettes
from gatewise_mdt.formats.vignettes import Patient, unreachable
from mdt_trees import TEXT, gout, node, random_tree, triple

TREE = DecisionTree.from_preorder(gout())


def reached(tree: DecisionTree) -> set[int]:
    """The decisions that some patient comes to."""
    values = itertools.product((True, False), repeat=len(tree.facts))
    return {tree.decide(dict(zip(tree.facts, one, strict=True))).leaf for one in values}


def test_each_way_is_a_patients_and_another_differs_in_one_fact() -> None:
    draw = random.Random(0)
    trees = [*(record.tree for record in sample()), *(random_tree(draw) for _ in range(300))]
    for tree in trees:
        made, ways = vignettes(tree), reached(tree)
        seen: list[Patient] = []
        for one in made:
            seen.append(one.patient)
            assert (one.other is None) is (one.differs is None) is (len(ways) == 1)
            if one.other and one.differs:
                seen.append(one.other)
                assert one.patient.leaf != one.other.leaf
                assert one.other.facts == one.patient.facts | {one.differs: not one.patient.facts[one.differs]}
        assert all(tree.decide(one.facts).leaf == one.leaf for one in seen)
        assert {one.leaf for one in seen} == ways
        assert {*ways, *unreachable(tree)} == {i for i, one in enumerate(tree.nodes) if not one.is_condition}
    assert sum(bool(unreachable(tree)) for tree in trees) > 50


def test_one_covers_two_ways_where_the_facts_are_different_ones() -> None:
    for record in sample():
        leaves = sum(not one.is_condition for one in record.tree.nodes)
        assert len(vignettes(record.tree)) == -(-leaves // 2)


def test_a_contradiction_at_the_end_of_a_long_tree_is_found_at_once() -> None:
    asked = [node("C", *(triple(f"{i} {name}") for name in "abc"), joined="and") for i in range(30)]
    again = [
        node("C", triple("x")),
        node("D", triple("rest", "therapeutic schedule")),
        node("C", triple("x")),
        node("D"),
        node("D"),
    ]
    nodes = [one for condition in asked for one in (condition, node("D"))] + again
    tree = DecisionTree.from_preorder(nodes)
    assert unreachable(tree) == [len(nodes) - 2]
    assert len(vignettes(tree)) == 16


@pytest.mark.parametrize(
    ("language", "said"),
    [
        (
            "en",
            [
                "1. A patient (adults with gout): acute flare; normal kidney function; not: Without a flare.",
                "Expected: colchicine 0.5 mg twice daily or naproxen (node 2).",
                "The same patient, but not: normal kidney function. Expected: No recommendation (node 5).",
                "2. A patient (adults with gout): not: acute flare; Without a flare.",
            ],
        ),
        (
            "zh",
            [
                "1. 患者（adults with gout）：acute flare；normal kidney function；不符合：Without a flare。",
                "预期：colchicine 0.5 mg twice daily 或 naproxen（节点 2）。",
                "其他相同，但不符合：normal kidney function。 预期：无推荐（节点 5）。",
                "2. 患者（adults with gout）：不符合：acute flare；Without a flare。",
            ],
        ),
    ],
)
def test_vignettes_are_read_in_words(language: str, said: list[str]) -> None:
    shown = render([TreeRecord(TEXT, TREE.in_language(language))], "vignettes")  # type: ignore[arg-type]
    lines = [line.strip() for line in shown.splitlines()]
    first = lines.index(said[0])
    assert lines[first : first + len(said)] == said


def test_programs_read_them_too_and_what_nobody_comes_to_is_said() -> None:
    avoid = node("D", triple("naproxen", "prohibited drugs"))
    never = TreeRecord(
        "", DecisionTree.from_preorder([node("C", triple("a")), node("C", triple("A")), avoid, node("D"), node("D")])
    )
    assert "No patient comes to node 4 (No recommendation)" in render([never], "vignettes")
    left = DecisionTree.from_preorder([node("C", triple("a"), triple("b"), joined="or"), node("D"), node("D")])
    assert "The same patient, but not: b." in render([TreeRecord("", left)], "vignettes")
    right = DecisionTree.from_preorder([node("C", triple("a")), node("C", triple("b")), node("D"), node("D"), avoid])
    assert "The same patient, but with: a. Expected" in render([TreeRecord("", right)], "vignettes")
    (made,) = json.loads(render([never], "vignettes-json"))
    assert made["unreachable"] == [4]
    (one,) = made["vignettes"]
    assert one["patient"]["facts"] == [{"fact": triple("a"), "holds": True}]
    assert (one["patient"]["expected"], one["other"]["node"], one["differs"]) == ("do not use: naproxen", 5, triple("a"))
