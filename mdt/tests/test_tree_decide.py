from itertools import product
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, Triple
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import POPULATION, gout, node, properties, trees, triple

from gatewise.errors import GatewiseError

FLARE = (POPULATION, "clinical manifestation", "acute flare")
KIDNEY = (POPULATION, "basic condition", "normal kidney function")
QUIET = (POPULATION, "clinical manifestation", "Without a flare")


def test_the_way_taken_is_explained() -> None:
    decision = DecisionTree.from_preorder(gout()).decide({FLARE: True, KIDNEY: False, QUIET: True})
    assert decision.leaf == 3
    assert [(turn.node, turn.holds) for turn in decision.turns] == [(0, False), (2, True)]
    assert decision.explanation.splitlines() == [
        f"node 1: ({' | '.join(FLARE)}) and ({' | '.join(KIDNEY)}) is false (acute flare: yes, normal kidney function: no)",
        f"node 3: {' | '.join(QUIET)} is true (Without a flare: yes)",
        "node 4: adults with gout | therapeutic schedule | check uric acid",
        "Needs review by a clinician; not medical advice.",
    ]


def test_facts_may_be_written_otherwise() -> None:
    facts: dict[Any, bool] = {
        ("Adults  with GOUT", "临床表现", "acute flare "): True,
        (POPULATION, "basic condition", "Normal kidney function"): True,
        Triple(subject="nobody", relation="basic condition", object="x"): False,
    }
    assert DecisionTree.from_preorder(gout()).decide(facts).leaf == 1
    assert DecisionTree.from_preorder(gout()).decide(lambda fact: False).leaf == 4
    assert "no recommendation" in DecisionTree.from_preorder(gout()).decide(lambda fact: False).explanation


def test_what_is_not_known_stops_the_walk_only_where_it_matters() -> None:
    tree = DecisionTree.from_preorder(gout())
    assert tree.decide({KIDNEY: False, QUIET: False}).leaf == 4
    assert "acute flare: not known" in tree.decide({KIDNEY: False, QUIET: False}).explanation
    with pytest.raises(GatewiseError, match=r"node 1: it is not known .* acute flare"):
        tree.decide({KIDNEY: True})
    with pytest.raises(GatewiseError, match="'maybe', expected true or false"):
        tree.decide({FLARE: "maybe"})  # type: ignore[dict-item]
    with pytest.raises(GatewiseError, match="as true and as false"):
        tree.decide({FLARE: True, (POPULATION, "clinical manifestation", "Acute  flare"): False})


def test_a_fact_of_no_relation_is_refused() -> None:
    with pytest.raises(GatewiseError, match="'no relation' is no relation: expected one of clinical manifestation"):
        DecisionTree.from_preorder(gout()).decide({FLARE: True, (POPULATION, "no relation", "acute flare"): False})
    with pytest.raises(GatewiseError, match=r"the fact \('a', 'b'\) is no triple"):
        DecisionTree.from_preorder(gout()).decide({("a", "b"): True})


def test_facts_that_case_alone_parts_as_units_are_two() -> None:
    insulin = [triple(f"insulin 10 {unit}", "dosage and administration") for unit in ("MU", "mU")]
    tree = DecisionTree.from_preorder(
        [node("C", *insulin, joined="and"), node("D", triple("rest", "therapeutic schedule")), node("D")]
    )
    assert len(tree.facts) == 2
    many, few = map(tuple, insulin)
    assert tree.decide({many: True, few: False}).leaf == 2
    assert tree.decide({many: True, few: True}).leaf == 1
    with pytest.raises(GatewiseError, match="insulin 10 mU"):
        tree.decide({many: True})


@properties
@given(trees, st.randoms(use_true_random=False))
def test_the_decision_is_that_of_a_slow_walk(tree: DecisionTree, random: Any) -> None:
    facts = {fact.key: random.random() < 0.5 for fact in tree.triples}
    join = {"and": all, "or": any, "null": all}

    def walk(at: int) -> tuple[list[tuple[int, bool]], int]:
        node, both = tree.nodes[at], tree.children[at]
        if both is None:
            return [], at
        holds = join[node.logical_rel](facts[fact.key] for fact in node.triples)
        turns, leaf = walk(both[not holds])
        return [(at, holds), *turns], leaf

    decision = tree.decide(lambda fact: facts[fact.key])
    assert ([(turn.node, turn.holds) for turn in decision.turns], decision.leaf) == walk(0)


@pytest.mark.parametrize("joined", ["and", "or"])
def test_three_valued_logic_agrees_with_every_way_to_fill_the_gaps(joined: str) -> None:
    names = ["a", "b", "c"]
    nodes = [
        {"role": "C", "triples": [triple(name) for name in names], "logical_rel": joined},
        {"role": "D", "triples": [triple("yes", "drug therapy")], "logical_rel": "null"},
        {"role": "D", "triples": [], "logical_rel": "null"},
    ]
    tree = DecisionTree.from_preorder(nodes)
    for known in product([True, False, None], repeat=3):
        filled = [
            (all if joined == "and" else any)(values)
            for values in product([True, False], repeat=3)
            if all(one is None or one == other for one, other in zip(known, values, strict=True))
        ]
        facts = {tuple(triple(name)): value for name, value in zip(names, known, strict=True) if value is not None}
        if len(set(filled)) == 1:
            assert tree.decide(facts).leaf == (1 if filled[0] else 2)
        else:
            with pytest.raises(GatewiseError, match="not known"):
                tree.decide(facts)
