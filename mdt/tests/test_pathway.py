"""A guideline as one pathway: what is proposed, who decides, and what follows."""

import json
import random
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fhir_rules import faults_of
from gatewise_mdt import DecisionTree, Link, Pathway, TreeRecord, propose_links, read_links, render, write_links, write_trees
from mdt_trees import node, triple
from pathway_trees import guideline, random_pathway
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.errors import GatewiseError

LINKS = [(1, 1, 3), (1, 1, 4), (1, 2, 2), (3, 2, 4)]
DMN = {"": "https://www.omg.org/spec/DMN/20191111/MODEL/"}


def accepted() -> list[Link]:
    return [link._replace(state="accepted") for link in propose_links(guideline())]


def known(*true: str, false: tuple[str, ...] = ()) -> dict[Any, bool]:
    people = "adults with type 2 diabetes"
    return {tuple(triple(one, subject=people)): one in true for one in (*true, *false)}


# What is proposed ---------------------------------------------------------------------------------------------------------


def test_links_are_proposed_with_their_reasons() -> None:
    links = propose_links(guideline())
    assert [link[:3] for link in links] == LINKS
    assert {link.state for link in links} == {"proposed"}
    named = 'the decision names "Chronic kidney disease"; another section'
    assert [link.reason for link in links] == [
        named,
        named,
        'the condition speaks of "metformin", which the decision gives; another section',
        "nothing is recommended, and it follows; the same section",
    ]


@pytest.mark.parametrize("number", ["2.1 ", "3. ", "(a) ", "二、", "第三章 "])
def test_the_number_of_a_heading_is_no_part_of_its_name(number: str) -> None:
    one, *others = guideline()
    numbered = [replace(other, more={**other.more, "headings": [number + name for name in other.headings]}) for other in others]
    assert 'the decision names "Chronic kidney disease"; another section' in [
        link.reason for link in propose_links([one, *numbered])
    ]


def test_what_holds_on_the_way_leads_to_the_passage_about_it_but_not_in_another_document() -> None:
    one, other, *_ = guideline()
    two = [one, TreeRecord("adults with eGFR is below 30@Rest.", other.tree, 2, {"sha256": one.sha256})]
    (link,) = propose_links(two)
    assert 'it is about "adults with eGFR is below 30", and "eGFR is below 30" holds on the way' in link.reason
    assert link.node == 1
    assert propose_links([one, TreeRecord(two[1].text, other.tree, 2, {"sha256": "cd" * 32})]) == []


def test_chinese_passages_are_joined_too() -> None:
    treat = node("D", ["糖尿病患者", "治疗方案", "按慢性肾病处理"])
    one = TreeRecord("糖尿病患者@若肾功能下降，按慢性肾病处理。", DecisionTree.from_preorder([treat]), 1, {"headings": ["糖尿病"]})
    other = TreeRecord(
        "糖尿病患者@慢性肾病：复查。", DecisionTree.from_preorder([node("D")]), 2, {"headings": ["糖尿病", "慢性肾病"]}
    )
    (link,) = propose_links([one, other])
    assert link.reason == 'the decision names "慢性肾病"; a section within its own'


# Who decides --------------------------------------------------------------------------------------------------------------


def test_a_person_accepts_and_refuses_links_and_keeps_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_trees("trees.json", guideline())

    def mdt(*words: str) -> Any:
        return CliRunner().invoke(app, ["mdt", *words])

    result = mdt("pathway", "trees.json", "--out", "pathway.json")
    assert result.exit_code == 0, result.output
    assert '3. passage 1, node 3, to passage 2 (proposed): the condition speaks of "metformin"' in result.stdout
    held = json.loads(Path("pathway.json").read_text())
    assert held["links"][0]["from"] | {"text": ""} == {
        "record": 1,
        "passage_id": f"{1:016x}",
        "source": "diabetes.pdf",
        "sha256": "ab" * 32,
        "place": "page 1",
        "text": "",
        "node": 2,
        "decision": "adults with type 2 diabetes | therapeutic schedule | treat as in chronic kidney disease",
        "way": ["adults with type 2 diabetes | clinical manifestation | eGFR is below 30: yes"],
    }
    drawn = mdt("show", "trees.json", "--pathway", "pathway.json", "--format", "svg", "--drafts").stdout
    assert drawn.count('stroke-dasharray="6 4"/></g>') == len(LINKS)
    assert "data-link" not in mdt("show", "trees.json", "--pathway", "pathway.json", "--format", "svg").stdout
    held["links"][0]["state"], held["links"][1]["state"] = "accepted", "refused"
    held["links"].append({"state": "accepted", "from": {"record": 2, "node": 5}, "to": {"record": 4}})
    asked = {"state": "proposed", "reason": "Ben?", "from": {"record": 2, "node": 5}, "to": {"record": 3}}
    Path("pathway.json").write_text(json.dumps({**held, "links": [*held["links"], asked]}))
    for _ in range(2):  # a link that a person proposes stays too
        assert "6 links, 3 of them to be accepted" in (told := mdt("pathway", "trees.json", "--out", "pathway.json").stdout)
        assert "to passage 3 (proposed): Ben?" in told
    whole, trees = Path("pathway.json").read_bytes(), json.loads(Path("trees.json").read_text())
    broken = [{**trees[0], "tree": trees[0]["tree"][:-1]}, *trees[1:]]
    Path("trees.json").write_text(json.dumps(broken))
    assert mdt("pathway", "trees.json", "--out", "pathway.json").exit_code == 2
    assert Path("pathway.json").read_bytes() == whole  # links of a passage that cannot be read are not given up
    Path("trees.json").write_text(json.dumps(trees))
    Path("pathway.json").write_text(json.dumps(held))
    assert "5 links, 2 of them to be accepted" in mdt("pathway", "trees.json", "--out", "pathway.json").stdout
    shown = mdt("show", "trees.json", "--pathway", "pathway.json", "--format", "svg", "--out", "pathway.svg")
    assert shown.exit_code == 0, shown.output
    assert re.findall('data-link="(.*?)"', Path("pathway.svg").read_text()) == ["1.1.3", "2.4.4"]


def test_a_link_does_not_outlive_the_words_it_was_decided_over(tmp_path: Path) -> None:
    path, records = tmp_path / "pathway.json", guideline()
    write_links(path, records, accepted())
    assert [link[:3] for link in read_links(path, records)] == LINKS
    assert [link[:3] for link in read_links(path, records[::-1])] == LINKS
    other = [records[0], TreeRecord(records[1].text, records[3].tree, 2, records[1].more), *records[2:]]
    with pytest.raises(GatewiseError, match=r'link 3: "begins" is .*metformin is not tolerated.* look at the link again'):
        read_links(path, other)
    outdated: list[dict[str, Any]] = []
    assert [link[:3] for link in read_links(path, other, outdated=outdated)] == [*LINKS[:2], LINKS[3]]
    write_links(path, other, [], outdated)
    assert json.loads(path.read_text())["outdated"][0]["to"]["record"] == 2
    path.write_text(json.dumps({"links": [], "outdated": 5}))
    assert read_links(path, other, outdated=[]) == []
    other = [records[0], replace(records[1], text=f"{records[1].text} Or wait.", more={"sha256": records[1].sha256}), *records[2:]]
    write_links(path, [records[0], replace(other[1], text=records[1].text), *records[2:]], accepted())
    with pytest.raises(GatewiseError, match=r"passage 2 has another text now: look at the link again"):
        read_links(path, other)
    # The decision says the same, but under another condition.
    write_links(path, records, accepted())
    nodes = records[0].tree.to_preorder()
    nodes[0]["triples"][0][2] = "eGFR is below 60"
    other = [TreeRecord(records[0].text, DecisionTree.from_preorder(nodes), 1, records[0].more), *records[1:]]
    with pytest.raises(GatewiseError, match=r'link 1: "way" is .*below 30: yes.*below 60: yes.* look at the link again'):
        read_links(path, other)


def test_a_link_is_not_both_accepted_and_refused_and_no_refused_one_is_followed(tmp_path: Path) -> None:
    records, (link, *_) = guideline(), accepted()
    refused = link._replace(state="refused")
    write_links(tmp_path / "pathway.json", records, [link, refused])
    with pytest.raises(GatewiseError, match=r"link 2: the link from passage .* is decided twice"):
        read_links(tmp_path / "pathway.json", records)
    with pytest.raises(GatewiseError, match="is refused, so it is not followed"):
        Pathway(tuple(records), (refused,))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", 'expected JSON with a list of "links"'),
        ("{", 'expected JSON with a list of "links"'),
        ('{"links": [3]}', 'link 1: expected an object with "state", "from" and "to"'),
        ('{"links": [{"state": "yes", "from": {}, "to": {}}]}', "expected one of proposed, accepted, refused"),
        ('{"links": [{"state": "accepted", "from": {"record": 9}, "to": {}}]}', "0 of the trees have the record 9"),
        ('{"links": [{"state": "accepted", "from": {"record": 1, "node": 0}, "to": {"record": 2}}]}', "the node is 0"),
    ],
)
def test_a_file_that_is_none_of_links_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "pathway.json"
    path.write_text(content)
    with pytest.raises(GatewiseError, match=re.escape(said)):
        read_links(path, guideline())


def test_a_circle_a_condition_and_a_passage_that_is_left_out_are_refused() -> None:
    records = tuple(guideline())
    circle = [Link(1, 2, 2), Link(2, 4, 3), Link(3, 1, 1)]
    with pytest.raises(GatewiseError, match=r"in a circle, from passage \d to passage \d to passage \d to passage \d: refuse one"):
        Pathway(records, tuple(circle))
    with pytest.raises(GatewiseError, match="from passage 1, node 1, to passage 2 begins at a node that is no decision"):
        Pathway(records, (Link(1, 0, 2),))
    with pytest.raises(GatewiseError, match="passage 3 is not among the trees that are taken: approve it, or refuse the link"):
        Pathway(records[:2], (Link(1, 1, 3),))
    with pytest.raises(GatewiseError, match="cannot be shown as html: expected one of svg, fhir-r4, fhir-r5, dmn"):
        render(records, "html", links=[])


# What follows -------------------------------------------------------------------------------------------------------------


def test_a_passage_is_decided_where_a_link_comes_to_it() -> None:
    pathway = Pathway(tuple(guideline()), tuple(accepted()))
    assert len(pathway.facts) == 4  # the eGFR is one fact of two passages

    def leaves(facts: dict[Any, bool]) -> dict[int, int]:
        return {number: one.leaf for number, one in pathway.decide(facts).decisions.items()}

    assert leaves(known("eGFR is below 30", "albuminuria")) == {1: 1, 3: 1, 4: 0}
    assert leaves(known("eGFR is below 30", false=("albuminuria",))) == {1: 1, 3: 2, 4: 0}
    assert leaves(known("metformin is not tolerated", false=("eGFR is below 30", "obesity"))) == {1: 2, 2: 3}
    decided = pathway.decide(known(false=("eGFR is below 30",)))
    assert decided.open[2].startswith("node 1: it is not known whether this holds: adults with type 2 diabetes")
    assert decided.explanation.count("Needs review by a clinician") == 1
    assert "passage 2: node 1: it is not known" in decided.explanation
    with pytest.raises(GatewiseError, match="expected true or false"):
        pathway.decide({tuple(triple("eGFR is below 30", subject="adults with type 2 diabetes")): "no"})  # type: ignore[dict-item]


def test_any_pathway_is_decided_passage_by_passage() -> None:
    draw = random.Random(3)
    for _ in range(50):
        pathway = random_pathway(draw)
        facts = {fact.key: draw.random() < 0.5 for fact in pathway.facts}
        came: dict[int, int] = {}
        for _ in pathway.records:  # until nothing new is come to
            for record in pathway.records:
                links = [link for link in pathway.links if link.end == record.number]
                if not links or any(came.get(link.start) == link.node for link in links):
                    came[record.number] = record.tree.decide(lambda fact, facts=facts: facts[fact.key]).leaf
        decided = pathway.decide(lambda fact, facts=facts: facts[fact.key])
        assert {number: one.leaf for number, one in decided.decisions.items()} == came
        assert decided.open == {}


# What is exported ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["R4", "R5"])
def test_fhir_has_one_plan_in_which_each_passage_says_where_it_comes_from(release: Any) -> None:
    bundle = json.loads(render(guideline(), f"fhir-{release.lower()}", drafts=True, links=accepted()))
    assert faults_of(bundle, release) == []
    plan, library = (one["resource"] for one in bundle["entry"][:2])
    assert [one["resource"]["resourceType"] for one in bundle["entry"]].count("PlanDefinition") == 1
    assert [action["id"] for action in plan["action"]] == [f"Passage{number}" for number in (1, 2, 3, 4)]
    third = plan["action"][2]
    assert third["condition"][0]["expression"]["expression"] == "Passage3IsReached"
    assert third["relatedAction"] == [{"actionId" if release == "R4" else "targetId": "Passage1", "relationship": "after"}]
    text, document = third["documentation"]
    assert text["display"] == f"Source text, passage {3:016x}"
    assert document["citation"] == f"diabetes.pdf: page 3, SHA-256 {'ab' * 32}"
    assert plan["title"].startswith("DRAFT")
    assert len(library["parameter"]) == 4


def test_dmn_has_a_decision_a_passage_that_requires_those_before_it() -> None:
    root = ET.fromstring(render(guideline(), "dmn", drafts=True, links=accepted()))
    assert len(root.findall("inputData", DMN)) == 4
    third = root.findall("decision", DMN)[2]
    assert [one.attrib["href"] for one in third.iterfind(".//requiredDecision", DMN)] == ["#tree_1"]
    first = third.find("decisionTable/input", DMN)
    assert first is not None
    assert first.findtext("inputExpression/text", namespaces=DMN) == "tree_1.node = 2"
    said = str(third.findtext("description", namespaces=DMN))
    assert f"Passage id: {3:016x}" in said
    assert f"diabetes.pdf: page 3, SHA-256 {'ab' * 32}" in said


def test_the_picture_has_every_passage_and_every_link() -> None:
    svg = ET.fromstring(render(guideline(), "svg", links=accepted()))
    groups = [one for one in svg if one.get("class") == "passage"]
    assert [one.get("data-passage") for one in groups] == [f"{number:016x}" for number in (1, 2, 3, 4)]
    top = re.search(r" ([\d.]+)\)$", groups[-1].attrib["transform"])
    assert top is not None
    assert float(svg.attrib["height"]) > float(top[1]) + 100
    assert [one.get("data-link") for one in svg if one.get("data-link")] == ["1.2.2", "1.1.3", "1.1.4", "3.2.4"]
    assert "from diabetes.pdf, page 3, SHA-256 abababababab…" in "".join(svg.itertext())


def test_what_is_not_approved_leads_nowhere() -> None:
    records = guideline()
    records[2] = TreeRecord(records[2].text, records[2].tree, 3, {**records[2].more, "review": "corrected"})
    with pytest.raises(GatewiseError, match="not approved"):
        render(records, "dmn", links=accepted())
