"""Agreement of two people: each measure against a slow, obvious reference; which passages belong together; what differs."""

import copy
import json
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from gatewise_mdt import DecisionTree, TreeRecord, agree, evaluate
from gatewise_mdt.evaluation import agreement as module
from gatewise_mdt.evaluation.agreement import MEASURES, Agreement, kappa_of, names_of
from gatewise_mdt.evaluation.intervals import intervals
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import TEXT, gout, node, preorders, properties, triple

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


def value_of(pairs: list[tuple[str, str]]) -> float | None:
    value = float(kappa_of(np.array([[pairs.count((a, b)) for b in "xyz"] for a in "xyz"])))
    return None if np.isnan(value) else value


@properties
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("xyz")), max_size=12))
def test_kappa_is_that_of_the_definition(pairs: list[tuple[str, str]]) -> None:
    expected = slow_kappa(pairs)
    for drawn in (pairs, [(b, a) for a, b in pairs]):
        assert value_of(drawn) == (None if expected is None else pytest.approx(expected))


def test_kappa_of_known_tables() -> None:
    # The example of Cohen's paper. Fifty units: both yes 20, both no 15, A alone 5, B alone 10. p_o = 0.7, p_e = 0.5.
    assert value_of([("x", "x")] * 20 + [("y", "y")] * 15 + [("x", "y")] * 5 + [("y", "x")] * 10) == pytest.approx(0.4)
    assert value_of([("x", "x")] * 7) is None  # one class: not defined, and never 1
    assert value_of([("x", "y")] * 7) == 0  # each one class, but not the same: chance would give no agreement either


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
        made.append("".join(sorted(roles)))
    return made


def test_kappa_of_characters_by_looking_at_each() -> None:
    # Phrases that overlap with two conditions, and with a decision.
    overlapping = [triple("acute flare with normal"), triple("or naproxen")]
    a = edited(lambda tree: tree[2].update(triples=overlapping, logical_rel="and"))
    b = edited(lambda tree: tree[1].update(triples=[triple("naproxen", DRUG), triple("acute flare", DRUG)]))
    b[3]["triples"] = [triple("not in the text", DRUG)]
    text = TEXT.replace("an acute", "an  acute")  # white space is no unit
    plain = " ".join(text.split())
    pairs = list(zip(slow_classes(plain, a), slow_classes(plain, b), strict=True))
    assert {one for one, _ in pairs} == {"", "C", "D", "CD"}
    assert agree([record(a, text)], [record(b, text)]).kappa == pytest.approx(slow_kappa(pairs))


def test_all_the_same_is_no_kappa() -> None:
    trees = records([node("D")], [node("D")])
    found = agree(trees, trees)
    assert found.kappa is None
    assert "kappa" not in found.intervals
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["kappa"] is None


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
        values = {**found.values, "kappa": found.kappa}
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
    assert (found.values["triplet_f1"], found.kappa) == (1, 1)
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
    without = [record(gout(), "", 7)]  # belongs to no passage
    found = agree(a + without, b + without)
    assert (len(found.passages), [one.number for one in found.only_a]) == (2, [1, 7])


def pairs_of(a: list[TreeRecord], b: list[TreeRecord]) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    found = agree(a, b, names=("Ada", "Ben"))
    return [(passage.a.number, passage.b.number) for passage in found.passages], found.notes


def test_passages_of_one_text_are_paired_by_their_ids() -> None:
    def there(number: int, name: str = "") -> TreeRecord:
        return record(gout(), number=number, **({"passage_id": name} if name else {}))

    a, b = [there(1, "p"), there(2, "q"), there(3, "r")], [there(1, "q"), there(2, "r"), there(3, "s")]
    assert pairs_of(a, b) == ([(2, 1), (3, 2)], ())  # two ids are two passages
    # Where one side has no ids they are paired by their order, which a note says; ids that fit come first.
    found, notes = pairs_of([there(1, "p"), there(2, "q")], [there(1), there(2, "p")])
    assert found == [(1, 2), (2, 1)]
    assert "Ada's records 2 with Ben's 1" in notes[0]
    found, notes = pairs_of([there(n) for n in (1, 4, 6)], [there(n) for n in (2, 3)])
    assert found == [(1, 2), (4, 3)]
    assert "Ada's records 1, 4 with Ben's 2, 3" in notes[0]
    # Each alone with its text: there is nothing to say.
    assert pairs_of([there(1, "p")], [there(1)]) == ([(1, 1)], ())


# What differs ---------------------------------------------------------------------------------------------------------


def test_differences_of_all_passages_come_by_danger() -> None:
    """F1 is 0.86 for each of the four; what would be done is another thing each time."""
    worded = edited(lambda tree: tree[1]["triples"][2].__setitem__(2, "use of naproxen"))
    prohibited = edited(lambda tree: tree[1]["triples"][2].__setitem__(1, "prohibited drugs"))
    threefold = edited(lambda tree: tree[1]["triples"][1].__setitem__(2, "1.5 mg twice daily"))
    found = agree(records(*[gout()] * 4), records(worded, gout(), threefold, prohibited))
    assert [(passage.a.number, one.kind) for passage, one in found.differences] == [
        (4, "contrary orders"),
        (3, "other dose"),
        (1, "wording"),
    ]
    assert {round(passage.values["triplet_f1"], 2) for passage in found.passages} == {1, 0.86}
    assert found.to_json()["differences"][1] == {
        "kind": "other dose",
        "what": "number",
        "a": "colchicine | dosage and administration | 0.5 mg twice daily",
        "b": "colchicine | dosage and administration | 1.5 mg twice daily",
        "nodes": (1, 1),
        "records": [3, 3],
    }


def test_names_are_the_reviewers_else_the_files() -> None:
    def by(*names: Any) -> list[TreeRecord]:
        return [record(gout(), reviewed={"by": name}) if name else record(gout()) for name in names]

    assert names_of(("x/a.jsonl", by("Ada", None)), ("b.jsonl", by("Ben\x1b[2J ", "Ben[2J"))) == ("Ada", "Ben[2J")
    assert names_of(("x/a.jsonl", by("Ada", "Eve")), ("b.jsonl", by(None))) == ("x/a.jsonl", "b.jsonl")
    assert names_of(("a.jsonl", by("Ada")), ("b.jsonl", by("Ada"))) == ("a.jsonl", "b.jsonl")
    assert names_of(("a.jsonl", [record(gout(), reviewed=said) for said in (3, {"by": 4}, None)])) == ("a.jsonl",)
