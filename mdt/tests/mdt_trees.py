"""Trees for the tests: one by hand, any number by Hypothesis, and the published ones where they are at hand."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import RELATIONS, DecisionTree
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Time says nothing about these properties, and a busy machine must not fail them.
properties = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

POPULATION = "adults with gout"
TEXT = (
    "adults with gout@For an acute flare with normal kidney function, give colchicine 0.5 mg twice daily or naproxen. "
    "Without a flare, check uric acid."
)


def triple(object_: str, relation: str = "clinical manifestation", subject: str = POPULATION) -> list[str]:
    return [subject, relation, object_]


def node(role: str, *triples: list[str], joined: str = "null") -> dict[str, Any]:
    return {"role": role, "triples": list(triples), "logical_rel": joined}


def gout() -> list[dict[str, Any]]:
    """Five nodes: a condition joined by "and", one alone, a decision joined by "or", one alone, and an empty one."""
    return [
        node("C", triple("acute flare"), triple("normal kidney function", "basic condition"), joined="and"),
        node(
            "D",
            triple("colchicine", "drug therapy"),
            triple("0.5 mg twice daily", "dosage and administration", "colchicine"),
            triple("naproxen", "drug therapy"),
            joined="or",
        ),
        node("C", triple("Without a flare")),
        node("D", triple("check uric acid", "therapeutic schedule")),
        node("D"),
    ]


# Signs that the formats use themselves, line breaks of all kinds, full-width forms, and characters outside the basic plane.
_TEXTS = st.one_of(
    st.text(st.sampled_from("ab ~|;\\n\n\r\t.:-#@\"'<>&药１。\x1f\u2028é😀"), min_size=1, max_size=12),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.sampled_from(["adults with gout", "~", "C:", "D", "1", "A", "tree:", "- x", "yes:", "---", "text: x"]),
).filter(lambda text: bool(text.strip()))


def triples(chinese: bool) -> st.SearchStrategy[list[str]]:
    names = list(RELATIONS.values() if chinese else RELATIONS)
    return st.tuples(_TEXTS, st.sampled_from(names), _TEXTS).map(lambda parts: [part.strip() for part in parts])


@st.composite
def preorders(draw: st.DrawFn, most_conditions: int = 5) -> list[dict[str, Any]]:
    """Any tree in the published format."""
    chinese = draw(st.booleans())
    some = st.lists(triples(chinese), min_size=1, max_size=3, unique_by=tuple)
    conditions = draw(st.integers(0, most_conditions))
    nodes: list[dict[str, Any]] = []
    waiting = 1
    while waiting:
        condition = conditions > 0 and (waiting == 1 or draw(st.booleans()))
        conditions -= condition
        held = draw(some if condition else st.one_of(st.just([]), some))
        joined = "null" if len(held) <= 1 else draw(st.sampled_from(["and", "or"]))
        nodes.append(node("C" if condition else "D", *held, joined=joined))
        waiting += 1 if condition else -1
    return nodes


trees = preorders().map(DecisionTree.from_preorder)


def random_tree(draw: random.Random) -> DecisionTree:
    """A tree of few different facts, so that one often comes in several conditions, which then may contradict each other."""
    facts = [triple(name) for name in "abcd"[: draw.randint(2, 4)]]
    nodes: list[dict[str, Any]] = []
    waiting, conditions = 1, draw.randint(1, 5)
    while waiting:
        condition = conditions > 0 and (waiting == 1 or draw.random() < 0.5)
        conditions -= condition
        held = draw.sample(facts, draw.randint(1, 2))
        orders = [triple(f"drug {len(nodes)}", "drug therapy")][: draw.randint(0, 3)]
        joined = draw.choice(["and", "or"]) if condition and len(held) > 1 else "null"
        nodes.append(node("C", *held, joined=joined) if condition else node("D", *orders))
        waiting += 1 if condition else -1
    return DecisionTree.from_preorder(nodes)


def swapped_root(tree: DecisionTree) -> DecisionTree:
    """The tree with the branches of its root exchanged."""
    nodes = tree.to_preorder()
    both = tree.children[0]
    assert both is not None
    return DecisionTree.from_preorder([nodes[0], *nodes[both[1] :], *nodes[1 : both[1]]])


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["C", "D", "and", "null"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "triples", "logical_rel", "tree", "true", "false", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def published() -> list[Path]:
    """The files of the published data; the test that asks for them is skipped where they are not."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("GATEWISE_DATA", root.parent / "shared" / "data")) / "text2mdt"
    files = sorted(folder.glob("*.json"))
    if not files:
        pytest.skip("the published Text2MDT data are not here: name their folder in GATEWISE_DATA")
    return files
