"""Exported trees on engines of others: the translator of CQL, engines of CQL, FHIR's $apply, FHIRPath and FEEL.

They are packages of npm, none of which gatewise needs. To fetch them:
``npm install --ignore-scripts --prefix mdt/tests/formats/engines``.
"""

import itertools
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, Pathway, Patient, TreeRecord, propose_links, sample, vignettes
from gatewise_mdt.formats.cpg import bundle_of, pathway_bundle_of
from gatewise_mdt.formats.tables import dmn_of, pathway_dmn_of
from mdt_trees import TEXT, gout, node, random_tree, triple
from pathway_trees import guideline, random_pathway

from gatewise.errors import GatewiseError

ENGINES = Path(__file__).parent / "engines"
MOST = 81  # combinations of facts with "not known" of one tree


def runs(records: list[TreeRecord], release: Any) -> list[tuple[TreeRecord, list[tuple[Any, ...]], dict[str, Any]]]:
    """For each record the combinations of facts, and what the engines made of them; with the patients of its vignettes."""
    jobs, given = [], []
    for record in records:
        values = (True, False, None) if 3 ** len(record.tree.facts) <= MOST else (True, False)
        combinations = list(itertools.product(values, repeat=len(record.tree.facts)))
        if release == "R5":  # whose logic is that of R4, to the letter
            combinations = combinations[:: max(1, len(combinations) // 4)]
        combinations += [tuple(map(one.facts.get, record.tree.facts)) for one in patients(record.tree)]
        given.append(combinations)
        jobs.append({"bundle": bundle_of([record], release), "dmn": dmn_of([record]), "combinations": combinations})
    results = node_js("run.mjs", jobs)
    for made in (made for result in results for made in result["runs"]):
        (made["dmn"],) = made["dmn"].values()
    return list(zip(records, given, results, strict=True))


def patients(tree: DecisionTree) -> list[Patient]:
    return [one for pair in vignettes(tree) for one in (pair.patient, pair.other) if one]


def node_js(script: str, given: Any, *words: str) -> Any:
    if not (ENGINES / "node_modules").exists() or shutil.which("node") is None:
        pytest.skip("the engines are not here (Node.js): npm install --ignore-scripts --prefix mdt/tests/formats/engines")
    command = ["node", script, *words]
    done = subprocess.run(command, cwd=ENGINES, input=json.dumps(given), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hostile() -> TreeRecord:
    bad = "\"'\\ ]]> <b> 血压 \n\t //* \u2028 😀 \\u0041"
    nodes = [
        node("C", triple(bad, subject=bad), triple("fever"), joined="or"),
        node("D", triple(bad, "drug therapy", bad)),
        node("D"),
    ]
    reviewed = {"by": bad, "at": "2026-11-27T19:50:01.123+00:00", "comment": bad}
    made = {"base": bad, "adapter": {"name": bad}}
    origin = {"source": bad, "sha256": "a" * 64, "place": bad, "offsets": [0, 5], "extraction": made}
    more = {**origin, "review": "approved", "reviewed": reviewed}
    return TreeRecord(f"{bad}@{bad}", DecisionTree.from_preorder(nodes), more=more)


def several() -> TreeRecord:
    """A fact in two conditions, both joins, and in one decision all kinds of orders."""
    orders = [
        triple("colchicine", "drug therapy"),
        triple("1 mg", "dosage and administration", "colchicine"),
        triple("rest", "therapeutic schedule"),
        triple("naproxen", "prohibited drugs"),
        triple("severe", "basic condition"),
    ]
    nodes = [
        node("C", triple("a"), triple("b"), joined="or"),
        node("C", triple("A"), triple("c"), joined="and"),
        node("D", *orders, joined="or"),
        node("D"),
        node("D", triple("wait", "therapeutic schedule")),
    ]
    return TreeRecord("", DecisionTree.from_preorder(nodes))


@pytest.mark.parametrize("release", ["R4", "R5"])
def test_engines_come_to_our_own_decision(release: Any) -> None:
    alone = TreeRecord("", DecisionTree.from_preorder([node("D", triple("rest", "therapeutic schedule"))]))
    draw = random.Random(1)
    drawn = [TreeRecord("", random_tree(draw)) for _ in range(20)]
    of_each_kind = several()
    records = [*sample(), TreeRecord(TEXT, DecisionTree.from_preorder(gout())), hostile(), of_each_kind, alone, *drawn]
    count = 0
    for record, combinations, result in runs(records, release):
        tree = record.tree
        assert result["errors"] == []
        for values, made in zip(combinations, result["runs"], strict=True):
            known = {fact.key: value for fact, value in zip(tree.facts, values, strict=True)}
            count += 1
            try:
                decision = tree.decide(lambda fact, known=known: known[fact.key])
            except GatewiseError:  # it is not known which way to go: nobody decides anything
                assert made["apply"]["ids"] == []
                assert made["dmn"] == []
                continue
            for turn in decision.turns:
                assert made["cql"][f"Node{turn.node + 1}Holds"] is turn.holds
                assert made["cql"][f"Node{turn.node + 1}DoesNotHold"] is not turn.holds
            number = str(decision.leaf + 1)
            assert {one.split("-")[1] for one in made["apply"]["ids"]} == (set() if decision.node.is_empty else {number})
            assert [one["node"] for one in made["dmn"]] == [decision.leaf + 1]
            (words,) = [one["recommendation"] for one in made["dmn"]]
            assert all(" ".join(part.object.split()) in words for part in decision.node.triples)
        if record is of_each_kind:  # $apply makes a request of each order
            made = result["runs"][combinations.index((True, True, True))]["apply"]
            assert made["ids"] == ["node-3-order-1", "node-3-order-2", "node-3-order-3", "node-3-order-4"]
            assert made["made"] == ["MedicationRequest", "MedicationRequest", "ServiceRequest"]
        expected = [one.leaf + 1 for one in patients(tree)]
        assert [one["dmn"][0]["node"] for one in result["runs"][-len(expected) :]] == expected
    assert count > (700 if release == "R4" else 200)


def test_engines_come_to_our_own_decisions_in_a_pathway() -> None:
    draw = random.Random(2)
    guided = Pathway(tuple(guideline()), tuple(link._replace(state="accepted") for link in propose_links(guideline())))
    pathways = [guided, *(random_pathway(draw) for _ in range(2))]
    jobs = []
    for pathway in pathways:
        given = [[draw.choice((True, False, None)) for _ in pathway.facts] for _ in range(30)]
        jobs.append({"bundle": pathway_bundle_of(pathway, "R4"), "dmn": pathway_dmn_of(pathway), "combinations": given})
    count = 0
    for pathway, job, result in zip(pathways, jobs, node_js("run.mjs", jobs), strict=True):
        assert result["errors"] == []
        for values, made in zip(job["combinations"], result["runs"], strict=True):
            known = {fact.key: value for fact, value in zip(pathway.facts, values, strict=True)}
            decided = pathway.decide(lambda fact, known=known: known[fact.key])
            leaves = {f"tree_{number}": [one.leaf + 1] for number, one in decided.decisions.items()}
            assert {name: [one["node"] for one in rows] for name, rows in made["dmn"].items() if rows} == leaves
            done = {f"Passage{number}-node-{one.leaf + 1}" for number, one in decided.decisions.items() if not one.node.is_empty}
            assert {one.partition("-order")[0] for one in made["apply"]["ids"]} == done
            count += bool(decided.open) and len(decided.decisions) > 1
    assert count > 10


@pytest.mark.parametrize("release", ["R4", "R5"])
def test_no_invariant_of_fhir_is_broken(release: Any) -> None:
    bundle = bundle_of([*sample(), hostile(), several()], release)
    result = node_js("invariants.mjs", bundle, release)
    assert result["broken"] == []
    assert result["checked"] > 100_000
    del bundle["entry"][0]["resource"]["action"][0]["action"][0]["condition"][0]["expression"]["expression"]
    assert {one["key"] for one in node_js("invariants.mjs", bundle, release)["broken"]} == {"exp-1"}
