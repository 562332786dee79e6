"""Agreement of two people: each measure against a slow, obvious reference; which passages belong together; what differs."""

import copy
import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from gatewise_mdt import DecisionTree, TreeRecord, agree, evaluate
from gatewise_mdt.evaluation import agreement as module
from gatewise_mdt.evaluation.agreement import CLASSES, MEASURES, Agreement, Kappa, names_of
from gatewise_mdt.evaluation.comparison import lines_of, page_of, remarks_of, rows_of
from gatewise_mdt.evaluation.intervals import intervals
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import TEXT, gout, node, preorders, properties, swapped_root, triple

from gatewise.errors import GatewiseError

Nodes = list[dict[str, Any]]
DRUG = "drug therapy"


def record(nodes: Nodes, text: str = TEXT, number: int = 1, **more: Any) -> TreeRecord:
    return TreeRecord(text, DecisionTree.from_preorder(nodes), number, more)


def records(*trees: Nodes) -> list[TreeRecord]:
    """Trees of different passages."""
    return [record(nodes, f"{TEXT} Passage {i}.", i) for i, nodes in enumerate(trees, start=1)]


def one(a: Nodes, b: Nodes) -> Agreement:
    return agree([record(a)], [record(b)], names=("Ada", "Ben"))


def edited(change: Callable[[Nodes], Any]) -> Nodes:
    """The tree of gout after a change."""
    tree = copy.deepcopy(gout())
    change(tree)
    return tree


def lines(a: Nodes, b: Nodes) -> list[str]:
    """What is said to differ, as printed."""
    return [f"{line.label} | {''.join(text for text, _ in line.words)}" for line in lines_of(one(a, b).passages[0], ("Ada", "Ben"))]


# Cohen's kappa --------------------------------------------------------------------------------------------------------


def slow_kappa(pairs: list[tuple[str, str]]) -> float | None:
    """From the definition, with fractions: observed and chance agreement, unit by unit and class by class."""
    if not pairs:
        return None
    n = len(pairs)
    observed = Fraction(sum(a == b for a, b in pairs), n)
    expected = sum(
        (
            Fraction(sum(a == name for a, _ in pairs), n) * Fraction(sum(b == name for _, b in pairs), n)
            for name in {*sum(pairs, ())}
        ),
        Fraction(0),
    )
    return None if expected == 1 else float((observed - expected) / (1 - expected))


def kappa_of(pairs: list[tuple[str, str]], classes: str = "xyz") -> Kappa:
    return Kappa(tuple(tuple(pairs.count((a, b)) for b in classes) for a in classes))


@properties
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("xyz")), max_size=12))
def test_kappa_is_that_of_the_definition(pairs: list[tuple[str, str]]) -> None:
    kappa = kappa_of(pairs)
    expected = slow_kappa(pairs)
    assert kappa.value == (None if expected is None else pytest.approx(expected))
    assert kappa.units == len(pairs)
    assert kappa_of([(b, a) for a, b in pairs]).value == (None if expected is None else pytest.approx(expected))


def test_the_example_of_cohens_paper_in_every_text_book() -> None:
    # Fifty units: both yes 20, both no 15, A alone 5, B alone 10. p_o = 0.7, p_e = 0.5.
    kappa = kappa_of([("x", "x")] * 20 + [("y", "y")] * 15 + [("x", "y")] * 5 + [("y", "x")] * 10)
    assert kappa.value == pytest.approx(0.4)


def test_kappa_of_one_class_is_not_defined_and_never_one() -> None:
    assert kappa_of([("x", "x")] * 7).value is None
    assert kappa_of([]).to_json()["kappa"] is None
    assert kappa_of([("x", "y")] * 7).value == 0  # each one class, but not the same: chance would give no agreement either


# The measures of trees ------------------------------------------------------------------------------------------------


@properties
@given(st.lists(st.tuples(preorders(), preorders()), min_size=1, max_size=4))
def test_f1_and_ter_are_those_of_evaluate_whichever_is_gold(pairs: list[tuple[Nodes, Nodes]]) -> None:
    a, b = records(*(one for one, _ in pairs)), records(*(other for _, other in pairs))
    found, back = agree(a, b), agree(b, a)
    # Phrases that differ in white space only are the same here, and foreign names of relations.
    plain_a, plain_b = ([passage.trees[side] for passage in found.passages] for side in (0, 1))
    for gold, other in ((plain_a, plain_b), (plain_b, plain_a)):
        metrics = evaluate(gold, other, repair=True).to_json()
        for name, value in found.values.items():
            assert value == pytest.approx(metrics["tree_acc" if name == "tree_agreement" else name]), name
    assert back.values == pytest.approx(found.values)
    for passage, gold_tree, tree in zip(found.passages, plain_a, plain_b, strict=True):
        assert passage.values["node_f1"] == pytest.approx(evaluate([gold_tree], [tree], repair=True).node_f1)


def test_f1_of_triples_by_hand() -> None:
    b = edited(lambda tree: tree[1]["triples"].pop())
    found = one(gout(), b)
    # Seven triples and six of them: 2 * 6 / 13. Four nodes with triples on both sides, three the same.
    assert found.values["triplet_f1"] == pytest.approx(12 / 13)
    assert found.values["node_f1"] == pytest.approx(3 / 4)
    assert found.values["path_f1"] == pytest.approx(2 / 3)
    assert found.values["tree_agreement"] == 0
    assert set(found.values) == set(MEASURES)


@properties
@given(preorders(), preorders(), st.booleans())
def test_nothing_differs_exactly_where_the_trees_are_the_same(a: Nodes, b: Nodes, same: bool) -> None:
    found = one(a, a if same else b)
    assert found.passages[0].same == (found.values["tree_agreement"] == 1)
    assert found.passages[0].same or not same
    assert (found.values["ter"] == 0) >= found.passages[0].same
    lines_of(found.passages[0], found.names)


@properties
@given(preorders(), st.data())
def test_a_small_change_is_seen(nodes: Nodes, data: st.DataObject) -> None:
    tree = DecisionTree.from_preorder(nodes)
    conditions = [i for i, both in enumerate(tree.children) if both is not None]
    if not conditions:
        return
    swapped = swapped_root(tree)
    found = agree([TreeRecord(TEXT, tree)], [TreeRecord(TEXT, swapped)])
    assert found.passages[0].same == (found.values["tree_agreement"] == 1)
    assert not [d for d in found.passages[0].differences if d.kind in ("one only", "span", "subject", "relation", "several parts")]


# The units of kappa ----------------------------------------------------------------------------------------------


def slow_classes(text: str, nodes: Nodes) -> list[str]:
    """Each character by itself: is it in a phrase of a condition, of a decision? For phrases that stand in the text once."""
    made = []
    for at in range(text.index("@") + 1, len(text)):
        if text[at].isspace():
            continue
        roles = set()
        for one in nodes:
            for subject, _, object_ in one["triples"]:
                for phrase in (subject, object_):
                    begin = text.lower().find(phrase.lower())
                    if begin >= 0 and begin <= at < begin + len(phrase):
                        roles.add(one["role"])
        made.append({"C": "condition", "D": "decision", "CD": "both", "": "neither"}["".join(sorted(roles))])
    return made


def test_kappa_of_characters_by_looking_at_each() -> None:
    # Phrases that overlap with two conditions, and with a decision.
    overlapping = [triple("acute flare with normal"), triple("or naproxen")]
    a = edited(lambda tree: tree[2].update(triples=overlapping, logical_rel="and"))
    b = edited(lambda tree: tree[1].update(triples=[triple("naproxen", DRUG), triple("acute flare", DRUG)]))
    b[3]["triples"] = [triple("not in the text", DRUG)]
    text = TEXT.replace("an acute", "an  acute")  # white space is no unit
    found = agree([record(a, text)], [record(b, text)]).kappa
    plain = " ".join(text.split())
    pairs = list(zip(slow_classes(plain, a), slow_classes(plain, b), strict=True))
    assert found.table == tuple(tuple(pairs.count((i, j)) for j in CLASSES) for i in CLASSES)
    assert all(any(row) for row in found.table)
    assert found.value == pytest.approx(slow_kappa(pairs))
    assert found.units == len("".join(TEXT.partition("@")[2].split()))


def test_all_the_same_is_no_kappa() -> None:
    trees = records([node("D")], [node("D")])
    found = agree(trees, trees)
    assert found.kappa.value is None
    assert "kappa" not in found.intervals
    assert [row.value for row in rows_of(found) if row.name == "kappa of characters"] == ["not defined"]
    assert any("not defined" in said for said in remarks_of(found))
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["kappa"]["kappa"] is None


# Intervals ------------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_passages_drawn_and_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = 40
    monkeypatch.setattr(module, "intervals", partial(intervals, draws=draws, seed=5))
    leaf = [node("D", triple("rest", DRUG))]
    a = records(gout(), gout(), leaf, gout(), [node("D")])
    b = records(
        gout(),
        edited(lambda tree: tree[1].update(logical_rel="and")),
        leaf,
        edited(lambda tree: tree[0]["triples"][0].__setitem__(2, "acute")),
        leaf,
    )
    made = agree(a, b).intervals
    monkeypatch.setattr(module, "intervals", lambda *_, **__: {})
    random = np.random.default_rng(5)
    drawn: dict[str, list[float]] = {}
    for some in random.integers(5, size=(draws, 5)):
        # Copies of one passage are all alike, so that it does not matter in which order they are paired.
        found = agree([a[i] for i in some], [b[i] for i in some])
        values = {**found.values, "kappa": found.kappa.value}
        for name, value in values.items():
            drawn.setdefault(name, []).extend([] if value is None else [value])
    assert set(made) == set(drawn)
    for name, ends in made.items():
        assert (ends["low"], ends["high"]) == pytest.approx(tuple(np.percentile(drawn[name], (2.5, 97.5)))), name


def test_one_passage_has_no_interval() -> None:
    assert one(gout(), [node("D")]).intervals == {}


# Which passages belong together ---------------------------------------------------------------------------------------


def test_white_space_and_normal_forms_do_not_count() -> None:
    text = "Kinder mit Ödem@Bei  Ödem\n½ Tablette geben."
    tree = [node("D", ["Kinder mit Ödem", DRUG, "½ Tablette"])]
    apart = [node("D", [unicodedata.normalize("NFD", part) for part in ["Kinder mit  Ödem", DRUG, "½ Tablette"]])]
    other = unicodedata.normalize("NFD", "Kinder mit Ödem @ Bei Ödem ½ Tablette geben. ")
    found = agree([record(tree, text)], [record(apart, other)])
    assert found.passages[0].same
    assert (found.values["triplet_f1"], found.kappa.value) == (1, 1)
    # A compatibility form is another text: "10⁹" is not "109".
    with pytest.raises(GatewiseError, match="no passage in common"):
        agree([record(tree, "x@10⁹ platelets")], [record(tree, "x@109 platelets")])
    with pytest.raises(GatewiseError, match="no passage in common"):
        agree([], [record(tree)])


def test_case_and_the_language_of_relations_do_not_count() -> None:
    chinese = [
        {**one, "triples": [[s.upper(), {DRUG: "治疗药物"}[r], o] for s, r, o in one["triples"]]}
        for one in [node("D", triple("naproxen", DRUG))]
    ]
    found = one([node("D", triple("naproxen", DRUG))], chinese)
    assert found.passages[0].same
    assert found.passages[0].trees[1].triples[0].relation == DRUG


def test_what_stands_in_one_file_only_is_listed() -> None:
    a, b = records(gout(), gout(), gout()), records(gout(), gout(), gout(), gout())[1:]
    found = agree(a, b, names=("Ada", "Ben"))
    assert [one.a.number for one in found.passages] == [2, 3]
    assert ([one.number for one in found.only_a], [one.number for one in found.only_b]) == ([1], [4])
    assert found.notes == ()
    assert any(said.startswith("Only Ada has record 1,") for said in remarks_of(found))
    without = [record(gout(), "", 7)]
    assert agree(a + without, b + without, names=("Ada", "Ben")).notes[0].startswith("Ada has trees without a text")
    assert len(agree(a + without, b + without).passages) == 2


def pairs_of(a: list[TreeRecord], b: list[TreeRecord]) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    found = agree(a, b, names=("Ada", "Ben"))
    return [(passage.a.number, passage.b.number) for passage in found.passages], found.notes


def test_passages_of_one_text_are_paired_by_their_place() -> None:
    def there(number: int, **more: Any) -> TreeRecord:
        return record(gout(), number=number, **more)

    a = [there(1, source="g.pdf", offsets=[0, 9]), there(2, source="g.pdf", offsets=[50, 59]), there(3, place="page 9")]
    b = [there(1, offsets=[50, 59]), there(2, place="page 9"), there(3, offsets=[0, 9])]
    assert pairs_of(a, b) == ([(1, 3), (2, 1), (3, 2)], ())
    a = [there(1, headings=["Adults"]), there(2, headings=["Children"])]
    b = [there(1, headings=["Children"]), there(2, headings=["Adults"])]
    assert pairs_of(a, b) == ([(1, 2), (2, 1)], ())
    # Each alone with its text: where it stands does not matter.
    assert pairs_of([there(1, place="page 1")], [there(1, place="page 2")]) == ([(1, 1)], ())


def test_passages_of_one_text_without_places_are_paired_by_order_and_a_note_says_so() -> None:
    a, b = [record(gout(), number=n) for n in (1, 4, 6)], [record(gout(), number=n) for n in (2, 3)]
    found, notes = pairs_of(a, b)
    assert found == [(1, 2), (4, 3)]
    assert len(notes) == 1
    assert "Ada's records 1, 4 with Ben's 2, 3" in notes[0]
    # Two at one and the same place are told apart by nothing either.
    a, b = ([record(gout(), number=n, place="page 1") for n in (1, 2)] for _ in "ab")
    assert pairs_of(a, b)[0] == [(1, 1), (2, 2)]
    assert len(pairs_of(a, b)[1]) == 1
    # What is sure comes first, and the rest by order.
    a = [record(gout(), number=1), record(gout(), number=2, place="page 2")]
    b = [record(gout(), number=1, place="page 2"), record(gout(), number=2)]
    found, notes = pairs_of(a, b)
    assert found == [(1, 2), (2, 1)]
    assert len(notes) == 1


def test_passages_of_one_text_at_other_places_of_one_document_are_never_paired() -> None:
    def there(number: int, start: int, sha256: str = "aa", **more: Any) -> TreeRecord:
        return record(gout(), number=number, sha256=sha256, offsets=[start, start + 20], **more)

    a, b = [there(1, 0), there(2, 500)], [there(1, 900), there(2, 0)]
    found = agree(a, b, names=("Ada", "Ben"))
    assert [(one.a.number, one.b.number) for one in found.passages] == [(1, 2)]
    assert ([one.number for one in found.only_a], [one.number for one in found.only_b], found.notes) == ([2], [1], ())
    # One that does not say where it stands may be any that is left.
    found = agree([*a, record(gout(), number=3)], b, names=("Ada", "Ben"))
    assert [(one.a.number, one.b.number) for one in found.passages] == [(1, 2), (3, 1)]
    assert len(found.notes) == 1
    # In another document the offsets say nothing.
    assert pairs_of(a, [there(1, 900, "bb"), there(2, 0, "bb")])[0] == [(1, 2), (2, 1)]
    # Nor does the same page make one passage of two.
    a, b = [there(1, 0), there(2, 500, place="page 3")], [there(1, 900, place="page 3"), there(2, 0)]
    assert pairs_of(a, b) == ([(1, 2)], ())


# What differs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda tree: tree[1]["triples"].pop(), "one only", ["only Ada | drug therapy: naproxen (decision)"]),
        (
            lambda tree: tree[1]["triples"][0].__setitem__(2, "low-dose colchicine"),
            "span",
            ['other words | Ada "colchicine", Ben "low-dose colchicine": drug therapy'],
        ),
        (
            lambda tree: tree[1]["triples"][1].__setitem__(0, "naproxen"),
            "subject",
            ['other subject | Ada "colchicine", Ben "naproxen": dosage and administration of 0.5 mg twice daily'],
        ),
        (
            lambda tree: tree[3]["triples"][0].__setitem__(1, "basic condition"),
            "relation",
            ["other relation | Ada therapeutic schedule, Ben basic condition: check uric acid"],
        ),
        (
            lambda tree: tree[0].update(logical_rel="or"),
            "join",
            [
                "and / or | Ada all of them, Ben any of them: clinical manifestation: acute flare;"
                " basic condition: normal kidney function"
            ],
        ),
        (
            lambda tree: tree.__setitem__(slice(3, 5), [tree[4], tree[3]]),
            "place",
            [
                'other branch | Ada no › yes (at "Without a flare"), Ben no › no (at "Without a flare"):'
                " therapeutic schedule: check uric acid"
            ],
        ),
        (
            lambda tree: tree.__setitem__(
                slice(2, 5),
                [node("D", triple("Without a flare")), node("D", triple("check uric acid", "therapeutic schedule"))][:1],
            ),
            "role",
            [
                "only Ada | therapeutic schedule: check uric acid (decision)",
                "condition or decision | Ada condition, Ben decision: clinical manifestation: Without a flare",
            ],
        ),
    ],
)
def test_each_kind_of_difference_is_one_line(change: Callable[[Nodes], Any], kind: str, said: list[str]) -> None:
    other = edited(change)
    found = one(gout(), other).passages[0].differences
    assert found[-1].kind == kind
    assert lines(gout(), other) == said
    back = one(other, gout()).passages[0].differences
    assert [(d.kind, d.b, d.a) for d in back] == [tuple(d) for d in found]


def test_phrases_that_overlap_in_the_text_are_one_difference() -> None:
    # "acute flare with" and "with normal kidney function" have one word in common, which stands in the text once.
    a, b = [node("D", triple("acute flare with", DRUG))], [node("D", triple("with normal kidney function", DRUG))]
    assert lines(a, b) == ['other words | Ada "acute flare with", Ben "with normal kidney function": drug therapy']
    apart = [node("D", triple("normal kidney function", DRUG))]
    assert [line.partition(" | ")[0] for line in lines(a, apart)] == ["only Ada", "only Ben"]
    # Of two that overlap with one, that which has more in common.
    two = [node("D", triple("flare with normal", DRUG), triple("acute flare with normal kidney", DRUG), joined="and")]
    one_more = [node("D", triple("normal kidney function, give colchicine", DRUG))]
    assert lines(two, one_more) == [
        'other words | Ada "acute flare with normal kidney", Ben "normal kidney function, give colchicine": drug therapy',
        "only Ada | drug therapy: flare with normal (decision)",
    ]


def test_triples_that_stand_together_otherwise() -> None:
    a = [node("D", triple("a", DRUG), triple("b", DRUG), joined="and")]
    b = [node("C", triple("x")), node("D", triple("a", DRUG)), node("D", triple("b", DRUG))]
    said = lines(a, b)
    assert said == [
        "only Ben | clinical manifestation: x (condition)",
        "other grouping | Ada all of (drug therapy: a; drug therapy: b), Ben drug therapy: a and apart drug therapy: b",
    ]


def test_a_join_is_told_of_nodes_of_which_one_has_more_triples() -> None:
    def change(tree: Nodes) -> None:
        tree[0]["triples"].append(triple("fever"))
        tree[0]["logical_rel"] = "or"

    assert lines(gout(), edited(change)) == [
        "only Ben | clinical manifestation: fever (condition)",
        "and / or | Ada all of them, Ben any of them: clinical manifestation: acute flare; basic condition: normal kidney function",
    ]


def test_what_moves_with_the_node_above_is_said_once() -> None:
    a = gout()
    b = [a[0], *a[2:5], a[1]]  # the branches of the root
    found = one(a, b).passages[0].differences
    assert [(d.kind, d.a[0].node, d.b[0].node) for d in found] == [("place", 1, 4), ("place", 2, 1)]
    twice = [node("C", triple("x")), node("D", triple("a", DRUG)), node("D", triple("a", DRUG))]
    assert lines(twice, [*twice[:2], node("D")]) == ['only Ada, once more | drug therapy: a (no (at "x"))']


def test_phrases_are_shown_as_they_were_written() -> None:
    other = edited(lambda tree: tree[1]["triples"][2].__setitem__(2, "NAPROXEN Sodium"))
    assert lines(gout(), other) == ['other words | Ada "naproxen", Ben "NAPROXEN Sodium": drug therapy']


# Names, states, JSON, the page ----------------------------------------------------------------------------------------


def test_names_are_the_reviewers_else_the_files() -> None:
    def by(*names: Any) -> list[TreeRecord]:
        return [record(gout(), reviewed={"by": name}) if name else record(gout()) for name in names]

    assert names_of(("x/a.jsonl", by("Ada", None)), ("b.jsonl", by("Ben\x1b[2J ", "Ben[2J"))) == ("Ada", "Ben[2J")
    assert names_of(("x/a.jsonl", by("Ada", "Eve")), ("b.jsonl", by(None))) == ("a.jsonl", "b.jsonl")
    assert names_of(("a.jsonl", by("Ada")), ("b.jsonl", by("Ada"))) == ("Ada (a.jsonl)", "Ada (b.jsonl)")
    assert names_of(("x/a.jsonl", by(None)), ("y/a.jsonl", by(None))) == ("x/a.jsonl", "y/a.jsonl")
    assert names_of(("a.jsonl", [record(gout(), reviewed=said) for said in (3, {"by": 4}, None)])) == ("a.jsonl",)


def test_review_states_are_counted() -> None:
    states = [("approved", "approved"), ("approved", "corrected"), (None, "approved"), ("odd", "corrected")]
    a, b = records(*[gout()] * 4), records(*[gout()] * 4)
    given_a, given_b = (
        [replace(item, more={"review": pair[side]}) for item, pair in zip(items, states, strict=True)]
        for side, items in ((0, a), (1, b))
    )
    found = agree(given_a, given_b, names=("Ada", "Ben"))
    assert found.states == ((1, 1, 0), (0, 0, 0), (1, 1, 0))
    assert "Approved: 2 by Ada, 2 by Ben, 1 by both." in remarks_of(found)


def test_json_has_everything_and_the_page_escapes_it() -> None:
    hostile = "<script>alert(1)</script>"
    text = f"adults with gout@Give {hostile}."
    a, b = [node("D", triple(hostile, DRUG))], [node("D", triple("x" + hostile, DRUG))]
    found = agree(
        [record(a, text, headings=[hostile]), *records(gout())],
        [record(b, text), *records(gout())],
        names=(hostile, "Ben"),
        files=("a.jsonl", "b.jsonl"),
    )
    made = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (made["passages"], made["same"], made["a"]) == (2, 1, {"name": hostile, "file": "a.jsonl"})
    assert made["by_passage"][0]["differences"][0]["a"][0]["triples"] == [["adults with gout", DRUG, hostile]]
    assert made["by_passage"][1]["differences"] == []
    page = page_of(found)
    assert "<script" not in page
    assert "unsafe-inline" not in page
    assert "script-src" not in page  # none at all: default-src is 'none'
    assert page.count("<svg") == 3  # the same tree is drawn once
    assert page == page_of(found)
