"""Trees by places in their text, and back."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from gatewise_mdt import RELATIONS, DecisionTree, TreeRecord, locate_tree, read_trees, sample
from gatewise_mdt.checks import MAX_DEPTH
from gatewise_mdt.pointing.targets import (
    EMPTY,
    KINDS,
    LOST,
    NOBODY,
    POPULATION,
    SUBJECT,
    Mention,
    Pointed,
    pointed_at,
    preorder,
    tree_of,
    triple_of,
)
from gatewise_mdt.pointing.units import Units
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import TEXT, gout, node, properties, published, triple

Nodes = list[dict[str, Any]]
DRUG, DOSE = "drug therapy", "dosage and administration"


def placed(text: str, nodes: Nodes, longest: int = 10**6) -> tuple[Pointed, Units]:
    """A tree by its places, which are checked."""
    units = Units.of(text)
    made = pointed_at(TreeRecord(text, DecisionTree.from_preorder(nodes)), units, longest)
    check(made, units)
    return made, units


def back(text: str, nodes: Nodes, longest: int = 10**6) -> Nodes:
    made, units = placed(text, nodes, longest)
    return tree_of(made, units, "en").to_preorder()


def check(made: Pointed, units: Units) -> None:
    """What every Pointed keeps to."""
    mentions = made.mentions
    assert list(mentions) == sorted(mentions)
    assert all(one.end <= following.begin for one, following in pairwise(mentions))
    assert all(0 <= one.begin < one.end <= len(units) for one in mentions)
    assert len(made.subjects) == len(made.own) == len(mentions)
    for number, (one, subject, own) in enumerate(zip(mentions, made.subjects, made.own, strict=True)):
        assert subject in (NOBODY, *[POPULATION] * (units.population > 0), *range(len(mentions)))
        assert subject != number
        assert (own == -1) == (one.kind == SUBJECT)
        assert own == -1 or number in made.nodes[own]
        assert one.kind != SUBJECT or subject == NOBODY
    firsts = [made.own.index(number) for number in range(len(made.nodes))]  # each has one of its own
    assert firsts == sorted(firsts)
    for held, join in zip(made.nodes, made.joins, strict=True):
        assert list(held) == sorted(set(held))
        assert len({mentions[m].role for m in held}) == 1
        assert (join == "null") == (len(held) == 1)
    assert len(made.children) == (len(made.nodes) if made.has_tree else 0)
    for held, both in zip(made.nodes, made.children, strict=made.has_tree):
        assert (both is not None) == (mentions[held[0]].role == "C")


def simple(condition: Sequence[list[str]], yes: Sequence[list[str]], no: Sequence[list[str]] = (), joined: str = "and") -> Nodes:
    return [
        node(role, *held, joined=joined if len(held) > 1 else "null") for role, held in (("C", condition), ("D", yes), ("D", no))
    ]


def kinds_of(made: Pointed) -> list[str]:
    return ["subject" if one.kind == SUBJECT else KINDS[one.kind][0] for one in made.mentions]


# ---- there and back ----


def test_the_tree_by_hand_in_places() -> None:
    made, units = placed(TEXT, gout())
    phrases = [units.phrase(one.begin, one.end) for one in made.mentions]
    assert phrases == [
        "acute flare",
        "normal kidney function",
        "colchicine",
        "0.5 mg twice daily",
        "naproxen",
        "Without a flare",
        "check uric acid",
    ]
    assert made.subjects == (POPULATION, POPULATION, POPULATION, 2, POPULATION, POPULATION, POPULATION)
    assert made.nodes == ((0, 1), (2, 3, 4), (5,), (6,))
    assert made.own == (0, 0, 1, 1, 1, 2, 3)
    assert made.joins == ("and", "or", "null", "null")
    assert (made.root, made.children, made.left_out) == (0, ((1, 2), None, (3, EMPTY), None), 0)
    assert list(preorder(made)) == [0, 1, 2, 3, EMPTY]
    assert tree_of(made, units, "en") == DecisionTree.from_preorder(gout())
    assert tree_of(made, units, "zh") == DecisionTree.from_preorder(gout()).in_language("zh")


def stands_apart(record: TreeRecord) -> bool:
    """Whether all phrases stand in the text, no object overlaps with another or is of two relations or subjects, and each node has
    one that no other has."""
    objects: dict[tuple[int, int], set[tuple[str, str, str]]] = {}
    nodes: list[set[tuple[int, int]]] = []
    for one, row in zip(record.tree.nodes, locate_tree(record.text, record.tree), strict=True):
        nodes.append({tuple(spans.object) for spans in row if spans.object})
        for told, spans in zip(one.triples, row, strict=True):
            if spans.subject is None or spans.object is None:
                return False
            objects.setdefault(tuple(spans.object), set()).add((told.subject, told.relation, one.role))
    if any(held and held <= set().union(*nodes[:i], *nodes[i + 1 :]) for i, held in enumerate(nodes)):
        return False
    return all(a[1] <= b[0] for a, b in pairwise(sorted(objects))) and all(len(kinds) == 1 for kinds in objects.values())


def test_sample_trees_come_back() -> None:
    apart = 0
    for record in sample():
        units = Units.of(record.text)
        made = pointed_at(record, units)
        check(made, units)
        found = tree_of(made, units, record.tree.language)
        assert len(list(preorder(made))) == len(found.nodes)
        if stands_apart(record):
            apart += 1
            assert made.left_out == 0
            assert found == record.tree
        elif made.has_tree:
            kept = [told for one in found.nodes for told in one.triples]
            assert made.left_out == sum(len(one.triples) for one in record.tree.nodes) - len(kept)
    assert apart >= len(sample()) / 2


def test_most_published_trees_come_back() -> None:
    for file in published():
        records = read_trees(file, repair=True).records
        same = 0
        for record in records:
            units = Units.of(record.text)
            made = pointed_at(record, units)
            check(made, units)
            found = tree_of(made, units, record.tree.language)
            same += [plain(one) for one in found.nodes] == [plain(one) for one in record.tree.nodes]
        # In the Chinese all phrases are verbatim; in the English some were put into other words by the annotators.
        assert same / len(records) >= (0.94 if file.name.startswith("zh") else 0.85), file.name


def plain(one: Any) -> tuple[str, str, frozenset[tuple[str, str, str]]]:
    return one.role, one.logical_rel, frozenset(told.key for told in one.triples)


@st.composite
def written(draw: st.DrawFn) -> tuple[str, Nodes]:
    """A tree, and a text in which each of its phrases stands once: words that are all different."""
    words = (f"{letter}{other}word" for letter in "bcdfghjklmnp" for other in "aeiouy")
    pieces = [draw(st.sampled_from(["For", "If", "give", "then,"]))]
    known = ["people"]

    def phrase() -> str:
        made = " ".join(next(words) for _ in range(draw(st.integers(1, 2))))
        pieces.append(made)
        return made

    nodes: Nodes = []
    waiting, left = 1, draw(st.integers(0, 4))
    while waiting:
        condition = left > 0 and (waiting == 1 or draw(st.booleans()))
        left -= condition
        held = []
        for _ in range(draw(st.integers(1 if condition else 0, 3))):
            alone = draw(st.integers(0, 9)) == 0
            subject = phrase() if alone else draw(st.sampled_from(known))
            held.append([subject, draw(st.sampled_from(list(RELATIONS))), phrase()])
            known.append(held[-1][2])
        joined = draw(st.sampled_from(["and", "or"])) if len(held) > 1 else "null"
        nodes.append(node("C" if condition else "D", *held, joined=joined))
        waiting += 1 if condition else -1
    rest = draw(st.permutations(pieces))
    return f"people@{' . '.join(rest)}", nodes


@properties
@given(written())
def test_trees_whose_phrases_stand_apart_come_back(given: tuple[str, Nodes]) -> None:
    text, nodes = given
    made, units = placed(text, nodes)
    assert made.left_out == 0
    assert tree_of(made, units, "en") == DecisionTree.from_preorder(nodes)


def test_an_empty_tree_is_something_to_learn() -> None:
    for text in (TEXT, "", "no mark"):
        made, units = placed(text, [node("D")])
        assert made == Pointed((), (), (), (), (), EMPTY, ())
        assert made.has_tree
        assert list(preorder(made)) == [EMPTY]
        assert tree_of(made, units, "en").to_preorder() == [node("D")]


def test_a_tree_that_loses_a_node_is_lost() -> None:
    made, units = placed(TEXT, simple([triple("acute flare")], [triple("aspirin", DRUG)]))
    assert (made.root, made.has_tree, made.left_out) == (LOST, False, 1)
    assert kinds_of(made) == ["clinical manifestation"]
    assert made.nodes == ((0,),)
    assert list(preorder(made)) == [EMPTY]
    assert tree_of(made, units, "en").to_preorder() == [node("D")]
    made, _ = placed(TEXT, [node("D", triple("aspirin", DRUG))])
    assert (made.root, made.mentions, made.left_out) == (LOST, (), 1)


# ---- one phrase in several nodes ----


def test_a_shared_mention_is_counted_to_the_node_that_has_no_other() -> None:
    nodes = simple([triple("acute flare")], [triple("naproxen", DRUG), triple("colchicine", DRUG)], [triple("colchicine", DRUG)])
    made, units = placed(TEXT, nodes)
    assert made.nodes == ((0,), (1,), (1, 2))
    assert made.own == (0, 1, 2)
    assert tree_of(made, units, "en") == DecisionTree.from_preorder(nodes)


def test_mentions_are_counted_so_that_as_many_nodes_as_can_have_one() -> None:
    text = "people@rash: zinc, iron or cream; fever: more; cough: less."
    told = {name: triple(name, DRUG, "people") for name in ("zinc", "iron", "cream")}
    # Zinc and iron, iron and cream, zinc and cream: each has two, and each of them has another one.
    nodes = [
        node("C", triple("rash", subject="people")),
        node("D", told["zinc"], told["iron"], joined="and"),
        node("C", triple("fever", subject="people")),
        node("D", told["iron"], told["cream"], joined="and"),
        node("D", told["zinc"], told["cream"], joined="or"),
    ]
    made, units = placed(text, nodes)
    assert made.has_tree
    assert tree_of(made, units, "en") == DecisionTree.from_preorder(nodes)


def test_two_nodes_with_the_same_single_phrase() -> None:
    nodes = simple([triple("rash", subject="people")], [triple("zinc", DRUG, "people")], [triple("zinc", DRUG, "people")])
    made, _ = placed("people@For a rash give zinc.", nodes)
    assert not made.has_tree  # there is one phrase for two nodes
    assert made.left_out == 0
    assert back("people@For a rash give zinc, else zinc, too.", nodes) == nodes


# ---- where phrases are in each other's way ----


def test_objects_that_overlap_are_taken_where_they_do_not() -> None:
    nodes = simple([triple("iron deficiency", subject="people")], [triple("iron", DRUG, "people")])
    text = "people@In iron deficiency give iron."
    assert back(text, nodes) == nodes
    made, units = placed(text, nodes)
    assert [units.phrase(one.begin, one.end) for one in made.mentions] == ["iron deficiency", "iron"]
    assert not placed("people@In iron deficiency.", nodes)[0].has_tree


def test_a_phrase_of_two_relations_or_roles_or_subjects_is_taken_at_two_places() -> None:
    relations = simple(
        [triple("children", "basic condition", "people")],
        [triple("zinc", DRUG, "people")],
        [triple("zinc", "prohibited drugs", "people")],
    )
    assert back("people@Give zinc to children. Others: avoid zinc.", relations) == relations
    assert not placed("people@Give zinc to children.", relations)[0].has_tree
    roles = simple([triple("zinc", DRUG, "people")], [triple("zinc", DRUG, "people")])
    assert back("people@If zinc helps, give zinc.", roles) == roles
    subjects = simple(
        [triple("rash", subject="people")],
        [
            triple("zinc", DRUG, "people"),
            triple("iron", DRUG, "people"),
            triple("5 mg", DOSE, "zinc"),
            triple("5 mg", DOSE, "iron"),
        ],
    )
    assert DecisionTree.from_preorder(back("people@rash: zinc 5 mg, iron 5 mg", subjects)) == DecisionTree.from_preorder(subjects)
    # With one place alone the second triple is lost, and is counted.
    made, units = placed("people@rash: zinc, iron 5 mg", subjects)
    assert made.left_out == 1
    assert len(tree_of(made, units, "en").triples) == 4


def test_longest() -> None:
    made, units = placed(TEXT, gout(), longest=2)
    assert made.left_out == 3
    assert [units.phrase(one.begin, one.end) for one in made.mentions] == [
        "acute flare",
        "colchicine",
        "0.5 mg twice daily",
        "naproxen",
    ]
    text = "people@rash, zinc and iron tablets: 5 mg"
    nodes = simple([triple("rash", subject="people")], [triple("5 mg", DOSE, "zinc and iron tablets")])
    assert back(text, nodes) == nodes
    made, _ = placed(text, nodes, longest=3)
    assert (made.subjects, made.left_out) == ((POPULATION, NOBODY), 1)


# ---- subjects ----


def test_subjects_of_every_kind() -> None:
    text = "adults with gout@A flare: colchicine, 0.5 mg daily. The swollen knee: rest."
    nodes = simple(
        [triple("flare")],
        [
            triple("colchicine", DRUG),
            triple("0.5 mg daily", DOSE, "Colchicine"),
            triple("rest", "therapeutic schedule", "swollen knee"),
        ],
    )
    made, units = placed(text, nodes)
    assert kinds_of(made) == ["clinical manifestation", DRUG, DOSE, "subject", "therapeutic schedule"]
    assert made.subjects == (POPULATION, POPULATION, 1, NOBODY, 3)
    assert made.own == (0, 1, 1, -1, 1)
    assert triple_of(made, 2, units, "en") == ("colchicine", DOSE, "0.5 mg daily")
    assert triple_of(made, 3, units, "en") is None
    # An unknown subject loses its triple, and the node stays.
    nodes[1]["triples"][2][0] = "swollen elbow"
    made, units = placed(text, nodes)
    assert (made.subjects[-1], made.left_out, made.has_tree) == (NOBODY, 1, True)
    assert [told.object for told in tree_of(made, units, "en").nodes[1].triples] == ["colchicine", "0.5 mg daily"]


def test_a_phrase_is_not_its_own_subject() -> None:
    nodes = simple([triple("rash", subject="people")], [triple("zinc", DRUG, "zinc")])
    made, _ = placed("people@rash: zinc", nodes)
    assert (made.subjects, made.left_out) == ((POPULATION, NOBODY), 1)
    assert back("people@rash: zinc, zinc", nodes) == nodes


def test_two_phrases_may_be_each_others_subject() -> None:
    nodes = simple([triple("rash", subject="fever"), triple("fever", subject="rash")], [triple("zinc", DRUG, "rash")])
    assert back("people@rash or fever: zinc", nodes) == nodes


@pytest.mark.parametrize(
    "text",
    [
        "For an acute flare of gout, give colchicine.",
        "@For an acute flare of gout, give colchicine.",
        " @ acute flare: colchicine. gout",
    ],
)
def test_texts_without_a_population(text: str) -> None:
    nodes = simple([triple("acute flare", subject="gout")], [triple("colchicine", DRUG, "gout")])
    made, _ = placed(text, nodes)
    assert POPULATION not in made.subjects
    assert back(text, nodes) == nodes


def test_a_population_between_spaces_and_in_other_letters() -> None:
    text = " Adults  with\ngout @For an acute flare, give colchicine@home."
    nodes = simple([triple("acute flare")], [triple("colchicine", DRUG)])
    made, units = placed(text, nodes)
    assert set(made.subjects) == {POPULATION}
    assert tree_of(made, units, "en").triples[0].subject == "Adults with gout"


# ---- what a model may say ----


def test_nodes_without_a_triple_are_empty_leaves() -> None:
    made, units = placed(TEXT, gout())
    lost = replace(made, subjects=(*made.subjects[:5], NOBODY, POPULATION))  # the second condition has no triple
    assert list(preorder(lost)) == [0, 1, EMPTY]
    assert [one.is_empty for one in tree_of(lost, units, "en").nodes] == [False, False, True]
    one = replace(made, subjects=(NOBODY, *made.subjects[1:]))
    assert tree_of(one, units, "en").nodes[0].logical_rel == "null"


def test_the_same_triple_twice_counts_once() -> None:
    units = Units.of("people@zinc and zinc")
    drug = KINDS.index((DRUG, "D"))
    made = Pointed((Mention(2, 3, drug), Mention(4, 5, drug)), (POPULATION,) * 2, ((0, 1),), (0, 0), ("and",), 0, (None,))
    assert tree_of(made, units, "en").to_preorder() == [node("D", triple("zinc", DRUG, "people"))]


def test_a_tree_is_no_deeper_than_trees_may_be() -> None:
    n = MAX_DEPTH + 20
    units = Units.of("people@" + " ".join(f"w{i}x" for i in range(n)))
    kind = KINDS.index(("clinical manifestation", "C"))
    made = Pointed(
        tuple(Mention(2 + i, 3 + i, kind) for i in range(n)),
        (POPULATION,) * n,
        tuple((i,) for i in range(n)),
        tuple(range(n)),
        ("null",) * n,
        0,
        tuple((i + 1 if i + 1 < n else EMPTY, EMPTY) for i in range(n)),
    )
    tree = tree_of(made, units, "en")
    assert len(tree.nodes) == 2 * MAX_DEPTH - 1
    assert len(list(preorder(made))) == len(tree.nodes)
