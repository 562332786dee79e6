"""Mistakes by kind: pairs of trees made by hand, one mistake each, and what holds for all trees."""

import copy
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, count_mistakes, evaluate, mistakes
from gatewise_mdt.evaluation.mistakes import KINDS
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import JUNK, gout, node, preorders, properties, swapped_root, triple

from gatewise.errors import GatewiseError

DRUG = "drug therapy"
Nodes = list[dict[str, Any]]


def kinds(gold: Any, predicted: Any) -> list[str]:
    return [mistake.kind for mistake in mistakes(gold, predicted)]


def changed(place: int, at: int, part: int, text: str) -> Nodes:
    """The tree of gout with one part of one triple of one node in other words."""
    tree = copy.deepcopy(gout())
    tree[place]["triples"][at][part] = text
    return tree


@pytest.mark.parametrize(
    ("predicted", "kind"),
    [
        (changed(1, 0, 1, "therapeutic schedule"), "wrong relation"),
        (changed(1, 1, 0, "naproxen"), "wrong subject"),
        (changed(0, 1, 2, "kidney function"), "wrong span"),  # a part of it
        (changed(0, 0, 2, "acute flare with"), "wrong span"),  # more than it
        (changed(3, 0, 2, "check uric levels"), "wrong span"),  # two of three words
        (changed(0, 0, 0, "adults"), "wrong span"),  # of the subject
    ],
)
def test_a_triple_with_one_wrong_part(predicted: Nodes, kind: str) -> None:
    assert kinds(gout(), predicted) == [kind]


def test_a_triple_with_several_wrong_parts() -> None:
    predicted = changed(0, 1, 2, "kidney function")
    predicted[0]["triples"][1][1] = DRUG
    assert mistakes(gout(), predicted) == [
        (
            "several parts",
            "adults with gout | basic condition | normal kidney function",
            "adults with gout | drug therapy | kidney function",
        )
    ]


def test_triples_that_are_not_alike_are_missed_and_invented() -> None:
    without = gout()
    del without[1]["triples"][2]
    assert kinds(gout(), without) == ["missed triple"]
    assert kinds(without, gout()) == ["invented triple"]
    # "oral steroids" and "check uric acid" share nothing, and neither do "uric acid" and "folic acid and rest".
    assert kinds(gout(), changed(3, 0, 2, "oral steroids")) == ["missed triple", "invented triple"]
    assert kinds([node("D", triple("uric acid"))], [node("D", triple("folic acid and rest"))]) == [
        "missed triple",
        "invented triple",
    ]


def test_the_triples_most_alike_are_paired_whatever_their_order() -> None:
    gold = [node("D", triple("oral steroids for a week", DRUG), triple("oral steroids", DRUG), joined="and")]
    predicted = [node("D", triple("steroids", DRUG), triple("oral steroids for a", DRUG), joined="and")]
    said = {one.gold.rpartition(" | ")[2]: one.predicted.rpartition(" | ")[2] for one in mistakes(gold, predicted)}
    assert said == {"oral steroids for a week": "oral steroids for a", "oral steroids": "steroids"}
    assert kinds(gold, predicted) == ["wrong span", "wrong span"]


def test_chinese_phrases_are_compared_by_character() -> None:
    gold = [node("D", triple("糖皮质激素", "治疗药物", "患者"))]
    assert kinds(gold, [node("D", triple("口服糖皮质激素", "治疗药物", "患者"))]) == ["wrong span"]
    assert kinds(gold, [node("D", triple("生理盐水", "治疗药物", "患者"))]) == ["missed triple", "invented triple"]


def test_a_node_in_the_wrong_place() -> None:
    gold = DecisionTree.from_preorder(gout()[2:])
    assert kinds(gold, swapped_root(gold)) == ["wrong side"]
    a, b, c = (node("D", triple(text, DRUG)) for text in ("a", "b", "c"))
    x, y = node("C", triple("x")), node("C", triple("y"))
    # y under x on the other side takes its decisions with it, and c changes its depth and side.
    assert sorted(kinds([x, y, a, b, c], [x, c, y, a, b])) == ["wrong side"] * 4
    assert kinds([x, y, a, b, c], [x, c, a])[:2] == ["missed triple", "missed triple"]
    assert sorted(kinds([x, a, y, b, c], [y, b, x, a, c])) == ["wrong depth"] * 4


def test_nodes_with_the_right_triples_in_other_company() -> None:
    one, two, both = triple("a", DRUG), triple("b", DRUG), node("D", triple("a", DRUG), triple("b", DRUG), joined="or")
    x = node("C", triple("x"))
    apart, together = [x, node("D", one), node("D", two)], [x, both, node("D")]
    assert kinds(apart, together) == ["wrong grouping"] * 2
    assert kinds(together, apart) == ["wrong grouping"]
    assert mistakes(together, apart)[0].gold == "yes D or: adults with gout | drug therapy | a; adults with gout | drug therapy | b"
    joined = [x, {**both, "logical_rel": "and"}, node("D")]
    assert kinds(together, joined) == ["wrong join"]
    assert kinds([node("D", triple("x"))], [node("C", triple("x")), node("D"), node("D")]) == ["wrong role"]


def test_a_triple_that_is_wrong_does_not_hide_where_its_node_is() -> None:
    x, a, b = node("C", triple("x")), node("D", triple("a", DRUG), triple("rest", DRUG), joined="or"), node("D", triple("b", DRUG))
    more = node("D", *a["triples"], triple("tea", DRUG), joined="and")
    less = node("D", triple("a", DRUG))
    assert kinds([x, a, b], [x, more, b]) == ["invented triple"]
    assert kinds([x, a, b], [x, less, b]) == ["missed triple"]
    assert kinds([x, a, b], [x, b, more]) == ["invented triple", "wrong side", "wrong side"]
    both = node("D", *less["triples"], *b["triples"], joined="or")
    assert kinds([x, less, b], [x, both, more]) == ["invented triple"] * 2 + ["wrong side", "wrong grouping"]


def test_a_node_that_comes_too_often_or_not_often_enough() -> None:
    x, a = node("C", triple("x")), node("D", triple("a", DRUG))
    assert kinds([x, a, node("D")], [x, a, a]) == ["extra node"]
    assert kinds([x, a, a], [x, a, node("D")]) == ["missed node"]


def test_what_is_no_tree_is_one_mistake() -> None:
    (mistake,) = mistakes(gout(), gout()[:2])
    assert (mistake.kind, mistake.gold) == ("malformed", "")
    assert "ends after" in mistake.predicted
    with pytest.raises(GatewiseError, match="gold, node 1: "):
        mistakes([node("C")], gout())


def test_counts() -> None:
    without = gout()
    del without[1]["triples"][1:]
    without[1]["logical_rel"] = "null"
    counts = count_mistakes([gout()] * 4, [gout(), without, [], changed(3, 0, 2, "oral steroids")])
    assert list(counts) == list(KINDS)
    assert {kind: tuple(one.values()) for kind, one in counts.items() if one["count"]} == {
        "malformed": (1, 1, 1),
        "missed triple": (3, 2, 1),
        "invented triple": (1, 1, 0),
    }


def test_repair_reads_both_sides_alike() -> None:
    odd = [node("D", triple("x"), joined="or")]
    assert kinds(odd, [node("D", triple("x"))]) == ["wrong join"]
    assert mistakes(odd, [node("D", triple("x"))], repair=True) == []


@properties
@given(preorders(), st.one_of(preorders(), JUNK))
def test_no_mistake_means_the_same_tree(gold: Nodes, predicted: Any) -> None:
    assert mistakes(gold, gold) == []
    made = mistakes(gold, predicted)
    assert (not made) == (evaluate([gold], [predicted]).tree_acc == 1)
    assert {mistake.kind for mistake in made} <= set(KINDS)


@properties
@given(preorders(), st.randoms())
def test_each_triple_is_counted_once(gold: Nodes, draw: Any) -> None:
    """Whatever is made of the triples, those that are not right are paired, missed or invented."""
    predicted = copy.deepcopy(gold)
    for one in (one for place in predicted for one in place["triples"]):
        part = draw.choice([0, 0, 2, 2, None])
        if part is not None:
            one[part] = draw.choice([one[part] + " more", one[part][:-1] or "x", "else"])
    if any(len({tuple(one) for one in place["triples"]}) < len(place["triples"]) for place in predicted):
        return
    made = mistakes(gold, predicted)
    wanted, found = ({tuple(p.strip().lower() for p in t) for n in tree for t in n["triples"]} for tree in (gold, predicted))
    of_triples = [one for one in made if one.kind.endswith(("triple", "span", "subject", "relation", "parts"))]
    assert sum(bool(one.gold) for one in of_triples) == len(wanted - found)
    assert sum(bool(one.predicted) for one in of_triples) == len(found - wanted)
