"""Trees as FHIR R4 and R5 that runs."""

import base64
import copy
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from fhir_rules import faults_of
from gatewise_mdt import DecisionTree, TreeRecord, sample
from gatewise_mdt.formats.cpg import bundle_of, library_of, notes_of
from hypothesis import given
from mdt_trees import TEXT, gout, node, preorders, properties, triple

from gatewise.errors import GatewiseError

TREE = DecisionTree.from_preorder(gout())
RECORD = TreeRecord(TEXT, TREE)
RELEASES = ("R4", "R5")


def resources(record: TreeRecord, kind: str, release: Any = "R5") -> list[dict[str, Any]]:
    return [one["resource"] for one in bundle_of([record], release)["entry"] if one["resource"]["resourceType"] == kind]


def decision(*triples: list[str], joined: str = "null") -> TreeRecord:
    return TreeRecord("", DecisionTree.from_preorder([node("D", *triples, joined=joined)]))


def everything(actions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for action in actions for one in (action, *everything(action.get("action", [])))]


# What is made -------------------------------------------------------------------------------------------------------------


def test_a_plan_is_a_draft_for_its_population_with_its_source() -> None:
    (plan,) = resources(RECORD, "PlanDefinition")
    assert (plan["status"], plan["experimental"]) == ("draft", True)
    assert "review by a clinician" in plan["description"]
    (context,) = plan["useContext"]
    assert (context["code"]["code"], context["valueCodeableConcept"]["text"]) == ("focus", "adults with gout")
    assert base64.b64decode(plan["relatedArtifact"][0]["document"]["data"]).decode() == TEXT


def test_the_context_of_a_plan_has_the_headings_as_the_disease_may_stand_in_one() -> None:
    (plan,) = resources(TreeRecord(TEXT, TREE, more={"headings": ["Asthma", "Step 1"]}), "PlanDefinition")
    assert plan["useContext"][0]["valueCodeableConcept"]["text"] == "Asthma › Step 1 › adults with gout"


@pytest.mark.parametrize("release", RELEASES)
def test_branches_are_actions_under_conditions_that_the_library_defines(release: Any) -> None:
    (plan,) = resources(RECORD, "PlanDefinition", release)
    (root,) = plan["action"]
    yes, no = root["action"]
    assert root["selectionBehavior"] == "exactly-one"
    assert [side["condition"][0]["expression"]["expression"] for side in (yes, no)] == ["Node1Holds", "Node1DoesNotHold"]
    assert {side["condition"][0]["expression"]["language"] for side in (yes, no)} == {"text/cql-identifier"}
    # "No recommendation" is no action: of the two branches inside, only one has something to do.
    (inner,) = no["action"]
    assert (inner["id"], no["selectionBehavior"]) == ("node-3-yes", "at-most-one")
    assert ("linkId" in root) is (release == "R5")
    (library,) = resources(RECORD, "Library", release)
    cql = base64.b64decode(library["content"][0]["data"]).decode()
    assert library["content"][0]["contentType"] == "text/cql"
    assert cql == library_of(TREE, plan["name"], plan["version"], release)
    assert f"library {library['name']} version '{library['version']}'" in cql
    assert [one["documentation"] for one in library["parameter"]] == [str(fact) for fact in TREE.facts]


def test_cql_has_one_define_a_fact_and_a_not_for_each_no() -> None:
    cql = library_of(TREE, "Gout", "0.1.0", "R4")
    first, second = (
        f'"Fact {i}: adults with gout | {rest}"'
        for i, rest in ((1, "clinical manifestation | acute flare"), (2, "basic condition | normal kidney function"))
    )
    assert f"define {first}:\n  Fact1\n" in cql
    assert f"define Node1Holds:\n  {first}\n    and {second}\n" in cql
    assert "define Node1DoesNotHold:\n  not Node1Holds\n" in cql
    assert "using FHIR version '4.0.1'" in cql
    assert cql.count("\nparameter ") == cql.count('\ndefine "') == 3


def test_a_dose_goes_with_its_drug() -> None:
    colchicine, naproxen = resources(RECORD, "ActivityDefinition")[:2]
    assert (colchicine["kind"], colchicine["productCodeableConcept"]["text"]) == ("MedicationRequest", "colchicine")
    assert colchicine["dosage"] == [{"text": "0.5 mg twice daily"}]
    assert "dosage" not in naproxen
    yes = resources(RECORD, "PlanDefinition")[0]["action"][0]["action"][0]
    assert [action["title"] for action in yes["action"]] == [
        "colchicine: 0.5 mg twice daily (drug therapy; adults with gout)",
        "naproxen (drug therapy; adults with gout)",
    ]
    assert yes["selectionBehavior"] == "one-or-more"


def test_a_dose_of_a_drug_that_comes_twice_is_text() -> None:
    """Otherwise trees that are equal would give it to the adults or to the children."""
    dose = triple("1 g three times daily", "dosage and administration", "amoxicillin")
    groups = [triple("amoxicillin", "drug therapy", people) for people in ("adults", "children")]
    for order in itertools.permutations([dose, *groups]):
        record = decision(*order, joined="and")
        assert not any("dosage" in one for one in resources(record, "ActivityDefinition"))
        assert "not certain which drug" in notes_of(record)[0]
    other = decision(dose, groups[0], triple("ibuprofen", "drug therapy", "children"), joined="and")
    assert [one["title"].partition(" (")[0] for one in resources(other, "ActivityDefinition")] == [
        "amoxicillin: 1 g three times daily",
        "ibuprofen",
    ]


@pytest.mark.parametrize(
    "others",
    [
        [triple("colchicine", "therapeutic schedule"), triple("NSAIDs", "prohibited drugs")],
        [triple("NSAIDs", "prohibited drugs")],
        [triple("cisplatin", "drug therapy"), triple("radiotherapy", "therapeutic schedule")],
        [triple("cisplatin", "drug therapy"), triple("NSAIDs", "prohibited drugs")],
        [triple("cisplatin", "drug therapy", "children")],
        [triple("do not give cisplatin", "drug therapy")],
    ],
)
def test_a_dose_of_the_people_is_text_where_it_may_be_of_something_else(others: list[list[str]]) -> None:
    record = decision(*others, triple("60 Gy", "dosage and administration"), joined="and")
    assert not any("dosage" in one for one in resources(record, "ActivityDefinition"))
    assert any(
        "'adults with gout | dosage and administration | 60 Gy'" in one and "not certain which" in one for one in notes_of(record)
    )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_prohibited_drug_is_not_to_be_performed(language: Any) -> None:
    tree = DecisionTree.from_preorder([node("D", triple("naproxen", "prohibited drugs"))]).in_language(language)
    (activity,) = resources(TreeRecord("", tree), "ActivityDefinition")
    assert activity["doNotPerform"] is True
    assert activity["title"].startswith("DO NOT USE: naproxen")
    assert notes_of(TreeRecord("", tree)) == []


def test_doses_that_or_joins_are_noted() -> None:
    doses = [triple(one, "dosage and administration", "voriconazole") for one in ("3-4 mg/kg", "twice daily")]
    drug = triple("voriconazole", "drug therapy")
    (note,) = notes_of(decision(drug, *doses, joined="or"))
    assert note.startswith("node 1: the doses of 'voriconazole' are joined by 'or', as all of the node is")
    assert notes_of(decision(drug, *doses, joined="and")) == []


def test_prohibitions_are_no_choice() -> None:
    record = decision(triple("a", "drug therapy"), triple("b", "drug therapy"), triple("c", "prohibited drugs"), joined="or")
    (root,) = resources(record, "PlanDefinition")[0]["action"]
    choice, never = root["action"]
    assert (root["selectionBehavior"], choice["selectionBehavior"]) == ("all", "one-or-more")
    assert [one["title"][0] for one in choice["action"]] == ["a", "b"]
    assert never["title"].startswith("DO NOT USE: c")
    (note,) = notes_of(record)
    assert "node 1" in note
    assert note in resources(record, "PlanDefinition")[0]["description"]
    only = decision(triple("b", "prohibited drugs"), triple("c", "prohibited drugs"), joined="or")
    assert resources(only, "PlanDefinition")[0]["action"][0]["selectionBehavior"] == "all"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (triple("2 mg", "dosage and administration", "aspirin"), "is a dose of which it is not certain"),
        (triple("severe", "basic condition"), "is no order (basic condition)"),
        (triple("No antibiotic", "therapeutic schedule"), "has a negation"),
        (triple("do not give NSAIDs", "drug therapy"), "has a negation"),
        (triple("不推荐使用抗生素", "治疗方案"), "has a negation"),
    ],
)
def test_what_is_no_order_is_text_with_a_note(said: list[str], why: str) -> None:
    record = decision(said)
    assert resources(record, "ActivityDefinition") == []
    plan = resources(record, "PlanDefinition")[0]
    (action,) = plan["action"][0]["action"]
    assert said[2] in action["textEquivalent"]
    (note,) = notes_of(record)
    assert why in note
    assert note in plan["description"]
    assert resources(decision(triple("normal saline", "drug therapy")), "ActivityDefinition") != []


@pytest.mark.parametrize(
    "said",
    [
        "stop aspirin",
        "Discontinue aspirin",
        "withhold aspirin",
        "aspirin withheld",
        "avoid aspirin",
        "cessation of aspirin",
        "withdrawal of aspirin",
        "aspirin should be suspended",
        "aspirin should not be given",
        "aspirin is contraindicated",
        "aspirin is contra-indicated",
        "aspirin isn’t given",
        "there is no need for aspirin",
        "NEVER aspirin",
        "advise against aspirin",
        "停用阿司匹林",
        "立即停阿司匹林",
        "阿司匹林禁用",
        "应避免阿司匹林",
        "暂不用阿司匹林",
        "切勿使用阿司匹林",
        "不适宜使用阿司匹林",
        "中断阿司匹林",
        "Antibiotics: no",
        "Antibiotics: No.",
        "aspirin - NO!",
        "Nothing by mouth",
        "donʼt use aspirin",
        "don’t use aspirin",
        "unnecessary antibiotics",
        "aspirin is generally inappropriate",
        "aspirin if contraindicated",
        "patients advised to stop aspirin",
        "aspirin to stop 7 days before surgery",
        "aspirin: discontinue to avoid bleeding",
        "NSAIDs to avoid in bleeding",
        "plan for withdrawal of aspirin",
        "aspirin until surgery, then stop",
        "不适于手术者用紫杉醇",
        "不同时使用阿司匹林",
        "应不同时使用阿司匹林",
        "不全身使用激素",
        "暂不全身使用激素",
        "不断药",
        "停阿司匹林",
        "出血者停阿司匹林",
        "阿司匹林停7天",
        "终止使用胺碘酮",
        "若出血停止用阿司匹林",
    ],
)
def test_a_drug_that_is_not_given_or_is_stopped_is_no_order(said: str) -> None:
    for relation in ("drug therapy", "prohibited drugs"):  # "prohibited: do not use NSAIDs" would be negated twice
        record = decision(triple(said, relation))
        assert resources(record, "ActivityDefinition") == []
        assert "has a negation" in notes_of(record)[0]
        assert "DO NOT USE" not in json.dumps(bundle_of([record], "R4"))


@pytest.mark.parametrize(
    "name",
    [
        "non-steroidal anti-inflammatory drugs",
        "non-selective beta blockers",
        "stop-smoking aids",
        "smoking cessation drugs",
        "No-Spa",
        "inhaled NO",
        "noradrenaline",
        "nortriptyline",
        "oral suspension of amoxicillin",
        "aspirin suspended in water",
        "not only aspirin but clopidogrel",
        "not more than 100 mg of aspirin",
        "tranexamic acid to stop bleeding",
        "vaccine against hepatitis E",
        "ceftriaxone",
        "非甾体抗炎药",
        "多不饱和脂肪酸",
        "避孕药",
        "双嘧达莫",
        "西罗莫司",
        "别嘌醇",
        "心脏停搏液",
        "两种不同的抗生素",
        "不可逆性质子泵抑制剂",
        "不超过100mg的阿司匹林",
        "心功能不全者用地高辛",
        "无禁忌者阿司匹林",
        "nitric oxide (NO)",
        "vitamin B no. 1",
        "paracetamol, no more than 4 g daily",
        "paracetamol, no longer than 5 days",
        "aspirin no later than 24 hours after the event",
        "NSAIDs for not longer than 5 days",
        "paracetamol not over 4 g per day",
        "noradrenaline, pressure not below 65 mmHg",
        "paracetamol, 4 g not to be exceeded",
        "对乙酰氨基酚每日不得超过4g",
        "对乙酰氨基酚每日不应超过4g",
        "泼尼松疗程不短于6周",
        "aspirin unless contraindicated",
        "warfarin, if not contraindicated",
        "tolvaptan for inappropriate ADH secretion",
        "octreotide until bleeding stops",
        "tranexamic acid to stop menstrual bleeding",
        "nifedipine to stop contractions",
        "varenicline for cessation of smoking",
        "lorazepam for withdrawal of alcohol",
        "PPI to avoid bleeding",
        "易蒙停",
        "泻停封胶囊",
        "痛停",
        "维拉帕米终止心动过速",
        "胺碘酮终止房颤",
        "心脏骤停者用肾上腺素",
        "不稳定型心绞痛者用阿司匹林",
        "胃部不适者用多潘立酮",
        "阿司匹林不断加量",
    ],
)
def test_names_amounts_and_purposes_are_no_negations(name: str) -> None:
    for relation, avoided in (("drug therapy", False), ("prohibited drugs", True)):
        record = decision(triple(name, relation))
        (activity,) = resources(record, "ActivityDefinition")
        assert (activity["kind"], activity["doNotPerform"]) == ("MedicationRequest", avoided)
        assert notes_of(record) == []


@pytest.mark.parametrize(
    ("said", "is_order"),
    [
        ("stop smoking", True),
        ("discontinuation of diuretics", True),
        ("conservative treatment without dialysis", True),
        ("延长禁食时间", True),
        ("排除禁忌证", True),
        ("surgery should be avoided", False),
        ("exercise is strictly prohibited", False),
        ("应避免剧烈运动", False),
        ("手术禁忌", False),
        ("removal of unnecessary catheters", True),
        ("treatment of inappropriate antidiuretic hormone secretion", True),
        ("surgery no later than 24 hours after admission", True),
        ("surgery is unnecessary in children", False),
        ("不适于手术", False),
        ("不限制活动", False),
        ("不断奶", False),
        ("暂不溶栓", False),
        ("停用雾化药物", True),
        ("surgery is generally not the preferred initial option", False),
        ("long-term bed rest is not recommended", False),
        ("暂不手术", False),
        ("禁食", False),
    ],
)
def test_to_stop_something_may_be_a_measure_and_not_to_do_it_is_none(said: str, is_order: bool) -> None:
    record = decision(triple(said, "therapeutic schedule"))
    assert bool(resources(record, "ActivityDefinition")) is is_order
    assert bool(notes_of(record)) is not is_order


@pytest.mark.parametrize(
    ("drugs", "dose"),
    [
        (
            [triple("aspirin", "drug therapy"), triple("aspirin", "drug therapy", "children")],
            triple("100 mg", "dosage and administration", "aspirin"),
        ),
        (
            [triple("cisplatin", "drug therapy"), triple("radiotherapy", "therapeutic schedule")],
            triple("60 Gy", "dosage and administration"),
        ),
    ],
)
def test_a_dose_is_no_alternative_to_a_drug(drugs: list[list[str]], dose: list[str]) -> None:
    record = decision(*drugs, dose, joined="or")
    plan = resources(record, "PlanDefinition")[0]
    (root,) = plan["action"]
    choice, beside = root["action"]
    assert (root["selectionBehavior"], choice["selectionBehavior"]) == ("all", "one-or-more")
    assert [one["title"].split(" (")[0] for one in choice["action"]] == [drug[2] for drug in drugs]
    assert beside["title"].startswith(dose[2])
    assert "none of the choices" in plan["description"]


def test_names_stay_with_the_text_and_versions_change_with_the_tree() -> None:
    other = TreeRecord(TEXT, DecisionTree.from_preorder([node("D")]))
    one, two = (resources(record, "PlanDefinition")[0] for record in (RECORD, other))
    assert one["url"] == two["url"]
    assert one["version"] != two["version"]
    twice = bundle_of([RECORD, other], "R5")
    assert faults_of(twice, "R5") == []
    assert len({entry["fullUrl"] for entry in twice["entry"]}) == len(twice["entry"])


# What runs ----------------------------------------------------------------------------------------------------------------


def orders(actions: list[dict[str, Any]], holds: Callable[[str], bool | None]) -> list[str]:
    """The ids of the atomic actions that apply: FHIR's $apply, as far as a choice is not made."""
    found = []
    for action in actions:
        if all(holds(condition["expression"]["expression"]) for condition in action.get("condition", [])):
            found += orders(action["action"], holds) if "action" in action else [action["id"]]
    return found


def kleene(tree: DecisionTree, facts: dict[Any, bool | None]) -> Callable[[str], bool | None]:
    """What the expressions of the CQL are, by the truth tables of CQL's "and", "or" and "not"."""
    values: dict[str, bool | None] = {}
    for number, one in enumerate(tree.nodes, start=1):
        known = [facts[fact.key] for fact in one.triples] if one.is_condition else []
        decisive = one.logical_rel == "or"
        value = decisive if decisive in known else None if None in known else not decisive
        values |= {f"Node{number}Holds": value, f"Node{number}DoesNotHold": None if value is None else not value}
    return values.__getitem__


@properties
@given(preorders(most_conditions=4))
def test_the_actions_that_apply_are_those_of_the_decision(nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)
    (plan,) = resources(TreeRecord("", tree), "PlanDefinition")
    combinations = itertools.islice(itertools.product((True, False, None), repeat=len(tree.facts)), 729)
    for values in combinations:
        facts = {fact.key: value for fact, value in zip(tree.facts, values, strict=True)}
        applied = orders(plan.get("action", []), kleene(tree, facts))
        try:
            leaf = tree.decide(lambda fact, facts=facts: facts[fact.key]).leaf
        except GatewiseError:
            assert applied == []  # nothing is recommended where it is not known which way to go
            continue
        assert {one.split("-")[1] for one in applied} == ({str(leaf + 1)} if tree.nodes[leaf].triples else set())


# What is valid ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_the_whole_sample_keeps_the_rules_of_fhir(release: Any) -> None:
    assert faults_of(bundle_of(sample(), release), release) == []


@pytest.mark.parametrize("release", RELEASES)
@properties
@given(nodes=preorders(most_conditions=3))
def test_any_tree_keeps_the_rules_of_fhir(release: Any, nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)
    for record in (TreeRecord("", tree), TreeRecord("\x00 a\x0b@b", tree, more={"warnings": ["x\x01"]})):
        assert faults_of(bundle_of([record], release), release) == []


def change(bundle: dict[str, Any], how: Callable[[dict[str, dict[str, Any]]], Any]) -> dict[str, Any]:
    changed = copy.deepcopy(bundle)
    first: dict[str, dict[str, Any]] = {"Bundle": changed}
    for entry in changed["entry"]:
        first.setdefault(entry["resource"]["resourceType"], entry["resource"])
    first["Action"] = first["PlanDefinition"]["action"][0]
    first["Branch"] = first["Action"]["action"][0]
    how(first)
    return changed


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda one: one["Action"].update(selectionBehavior="banana"), "'banana' is none of the codes"),
        (lambda one: one["Branch"]["condition"][0].update(kind="maybe"), "'maybe' is none of the codes"),
        (lambda one: one["ActivityDefinition"].update(kind="Medication"), "'Medication' is none of the codes"),
        (lambda one: one["PlanDefinition"].update(status="ready"), "'ready' is none of the codes"),
        (lambda one: one["Bundle"].update(type="bag"), "'bag' is none of the codes"),
        (lambda one: one["PlanDefinition"].pop("status"), "PlanDefinition.status is missing|resource.status is missing"),
        (lambda one: one["Library"].pop("type"), "type is missing"),
        (lambda one: one["PlanDefinition"].pop("version"), "version is missing|version of http"),
        (lambda one: one["PlanDefinition"].pop("library"), "library"),
        (lambda one: one["PlanDefinition"].update(libary=[]), "no element 'libary'"),
        (lambda one: one["Action"].update(doNotPerform=True), "no element 'doNotPerform'"),
        (lambda one: one["PlanDefinition"].update(experimental="yes"), "'yes' is no boolean"),
        (lambda one: one["PlanDefinition"].update(name="my plan"), "no name that a program can take"),
        (lambda one: one["PlanDefinition"].update(id="a b"), "'a b' is no"),
        (lambda one: one["Bundle"]["entry"][0].pop("fullUrl"), "no fullUrl"),
        (lambda one: one["Bundle"]["entry"].pop(), "is not in the bundle"),
        (lambda one: one["Bundle"]["entry"][1].update(fullUrl="http://example.org/fhir/Library/Other"), "the entry"),
        (lambda one: one["Branch"]["condition"][0]["expression"].pop("expression"), "exp-1"),
        (lambda one: one["Branch"].update(id="tree"), "two actions have one id"),
        (lambda one: one["Library"]["text"].update(div="<div>a & b</div>"), "is no XHTML"),
        (lambda one: one["PlanDefinition"]["meta"].update(profile=["http://x"]), "profile http://x is not known"),
    ],
)
@pytest.mark.parametrize("release", RELEASES)
def test_what_breaks_a_rule_is_found(release: Any, how: Callable[..., Any], said: str) -> None:
    faults = faults_of(change(bundle_of([RECORD], release), how), release)
    assert any(re.search(said, fault) for fault in faults), faults


CPG = "http://hl7.org/fhir/uv/cpg/StructureDefinition/cpg-"


def test_profiles_of_cpg_are_of_r4_only() -> None:
    entries = [entry["resource"] for entry in bundle_of([RECORD], "R4")["entry"]]
    profiles = {one["resourceType"]: one["meta"]["profile"][-1] for one in entries}
    assert profiles == {
        "PlanDefinition": f"{CPG}recommendationdefinition",
        "Library": f"{CPG}computablelibrary",
        "ActivityDefinition": f"{CPG}servicerequestactivity",
    }
    nothing = TreeRecord("", DecisionTree.from_preorder([node("D")]))
    assert resources(nothing, "PlanDefinition", "R4")[0]["meta"]["profile"][-1] == f"{CPG}shareableplandefinition"
    assert "uv/cpg" not in json.dumps(bundle_of([RECORD], "R5"))
