import base64
import json
import sys
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, render, sample
from gatewise_mdt.formats.fhir import plan_of
from gatewise_mdt.formats.views import notes_of
from hypothesis import given
from mdt_trees import TEXT, gout, node, preorders, properties, triple

from gatewise.errors import GatewiseError

fhir = pytest.importorskip("fhir.resources")
TREE = DecisionTree.from_preorder(gout())
RECORD = TreeRecord(TEXT, TREE)


def checked(resource: dict[str, Any]) -> Any:
    return fhir.get_fhir_model_class(resource["resourceType"]).model_validate(resource)


def test_the_plan_is_a_draft_that_needs_review_with_its_source() -> None:
    plan = plan_of(RECORD)
    assert plan["status"] == "draft"
    assert plan["experimental"] is True
    assert "review by a clinician" in plan["description"]
    assert plan["subjectCodeableConcept"]["text"] == "adults with gout"
    (source,) = plan["relatedArtifact"]
    assert source["type"] == "documentation"
    assert base64.b64decode(source["document"]["data"]).decode() == TEXT
    assert checked(plan).get_resource_type() == "PlanDefinition"


def test_actions_are_nested_as_the_tree_is() -> None:
    (root,) = plan_of(RECORD)["action"]
    assert root["selectionBehavior"] == "exactly-one"
    true, false = root["action"]
    for side, opening in ((true, "(adults"), (false, "not (")):
        (condition,) = side["condition"]
        assert condition["kind"] == "applicability"
        assert condition["expression"]["language"] == "text/plain"
        assert condition["expression"]["expression"].startswith(opening)
    (decision,) = true["action"]
    assert decision["selectionBehavior"] == "one-or-more"
    assert [action["title"] for action in decision["action"]] == [
        "colchicine: 0.5 mg twice daily (drug therapy; adults with gout)",
        "naproxen (drug therapy; adults with gout)",
    ]
    start = TEXT.index("naproxen") + 1
    assert any("0.5 mg twice daily" in one["display"] for one in decision["action"][0]["documentation"])
    assert decision["action"][1]["documentation"][1]["display"] == f"source text, characters {start} to {start + 7}: naproxen"
    assert false["action"][0]["action"][1]["action"][0]["title"] == "No recommendation"


def test_prohibitions_and_doses_are_no_choice() -> None:
    """Of drugs joined by "or" one is enough, but what is not to be done is never chosen from, and a dose goes with its drug."""
    drugs = (triple("a", "drug therapy"), triple("20 mg", "dosage and administration", subject="a"), triple("b", "drug therapy"))
    record = TreeRecord("", DecisionTree.from_preorder([node("D", *drugs, triple("c", "prohibited drugs"), joined="or")]))
    (decision,) = plan_of(record)["action"]
    choice, never = decision["action"]
    assert (decision["selectionBehavior"], choice["selectionBehavior"]) == ("all", "one-or-more")
    assert [one["title"].partition(" (")[0] for one in choice["action"]] == ["a: 20 mg", "b"]
    assert never["title"].startswith("DO NOT USE: c")
    (note,) = notes_of([record], "fhir")
    assert note.removeprefix("record 1, ") in plan_of(record)["description"]
    both = [triple(drug, "prohibited drugs") for drug in "ab"]
    only = TreeRecord("", DecisionTree.from_preorder([node("D", *both, joined="or")]))
    assert plan_of(only)["action"][0]["selectionBehavior"] == "all"


def test_prohibited_drugs_are_not_recommended() -> None:
    for language in ("en", "zh"):
        tree = DecisionTree.from_preorder([node("D", triple("naproxen", "prohibited drugs"))]).in_language(language)
        assert plan_of(TreeRecord("", tree))["action"][0]["action"][0]["title"].startswith("DO NOT USE: naproxen")


def test_several_records_are_a_bundle() -> None:
    bundle = json.loads(render([RECORD, RECORD], "fhir"))
    assert bundle["type"] == "collection"
    assert len(checked(bundle).entry) == 2
    assert json.loads(render([RECORD], "fhir"))["resourceType"] == "PlanDefinition"


def test_the_whole_sample_is_valid() -> None:
    for record in sample():
        checked(plan_of(record))


@properties
@given(preorders(most_conditions=3))
def test_any_tree_is_valid(nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)
    links: list[str] = []

    def collect(actions: list[dict[str, Any]]) -> None:
        for action in actions:
            links.append(action["linkId"])
            collect(action.get("action", []))

    plan = plan_of(TreeRecord("some text", tree))
    collect(plan["action"])
    assert len(set(links)) == len(links)


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fhir.resources", None)
    with pytest.raises(GatewiseError, match=r"pip install 'gatewise\[mdt\]'"):
        plan_of(RECORD)


def test_a_tree_too_deep_for_the_library_is_refused_in_a_sentence() -> None:
    depth = 90
    nodes = [node("C", triple(f"sign {i}")) for i in range(depth)] + [node("D")] * (depth + 1)
    with pytest.raises(GatewiseError, match="too deep for a FHIR PlanDefinition"):
        plan_of(TreeRecord("", DecisionTree.from_preorder(nodes)))


def test_the_plan_says_of_which_words_a_dose_is_but_a_part() -> None:
    dose = triple("20 mg", "dosage and administration", "colchicine")
    record = TreeRecord("adults@give colchicine 10-20 mg", DecisionTree.from_preorder([node("D", dose)]))
    assert "object in the source text only as part of '10-20 mg': 20 mg" in json.dumps(plan_of(record))
