"""Trees as decision tables: DMN, on an engine and by hand, and workbooks."""

import io
import itertools
import re
import types
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from gatewise_mdt import DecisionTree, TreeRecord, sample
from gatewise_mdt.formats.tables import dak_of, dmn_of, notes_of
from hypothesis import given
from mdt_trees import TEXT, gout, node, preorders, properties, triple

TREE = DecisionTree.from_preorder(gout())
RECORD = TreeRecord(TEXT, TREE)
NS = {"": "https://www.omg.org/spec/DMN/20191111/MODEL/"}
HOSTILE = "=1+1 <b>\"'&\\ ]]> \x00\ufffe { } ? \n"

Run = Callable[[dict[str, bool]], dict[str, Any]]


def combinations(tree: DecisionTree) -> Iterator[tuple[bool, ...]]:
    return itertools.product((True, False), repeat=len(tree.facts))


def wanted(tree: DecisionTree, values: tuple[bool, ...]) -> int:
    """The number of the leaf that our own walk comes to."""
    return tree.decide(dict(zip(tree.facts, values, strict=True))).leaf + 1


def engine(xml: str) -> Run:
    """SpiffWorkflow on a file of DMN with one decision. Its expressions are Python's, so FEEL's true and false are given to it."""
    pytest.importorskip("SpiffWorkflow", reason="SpiffWorkflow is not installed: pip install 'gatewise-mdt[dev]'")
    from lxml import etree
    from SpiffWorkflow.bpmn.script_engine import PythonScriptEngine, TaskDataEnvironment
    from SpiffWorkflow.dmn.engine.DMNEngine import DMNEngine
    from SpiffWorkflow.dmn.parser.BpmnDmnParser import BpmnDmnParser

    reader = BpmnDmnParser()
    reader.add_dmn_xml(etree.fromstring(xml.encode()))
    (parser,) = reader.dmn_parsers.values()
    parser.parse()
    (table,) = parser.decision.decisionTables
    workflow = types.SimpleNamespace(script_engine=PythonScriptEngine(TaskDataEnvironment({"true": True, "false": False})))
    return lambda facts: DMNEngine(table).result(types.SimpleNamespace(data=dict(facts), workflow=workflow))


# DMN ------------------------------------------------------------------------------------------------------------------------


def test_a_condition_is_a_column_and_a_way_a_rule() -> None:
    assert TREE.ways == {1: {0: True}, 3: {0: False, 2: True}, 4: {0: False, 2: False}}
    root = ET.fromstring(dmn_of([RECORD]))
    assert [one.attrib["name"] for one in root.findall("inputData", NS)] == ["tree_1_fact_1", "tree_1_fact_2", "tree_1_fact_3"]
    assert root.findtext("inputData/description", namespaces=NS) == "adults with gout | clinical manifestation | acute flare"
    columns = root.findall("decision/decisionTable/input", NS)
    assert [one.findtext("inputExpression/text", namespaces=NS) for one in columns] == [
        "tree_1_fact_1 and tree_1_fact_2",
        "tree_1_fact_3",
    ]
    description = str(root.findtext("decision/description", namespaces=NS))
    assert "review by a clinician" in description
    assert TEXT.split("@")[1] in description


@properties
@given(nodes=preorders(most_conditions=2))
def test_any_tree_comes_to_our_own_decision(nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)
    evaluate = engine(dmn_of([TreeRecord("", tree)]))
    for values in combinations(tree):
        made = evaluate({f"tree_1_fact_{i}": value for i, value in enumerate(values, start=1)})
        assert made["node"] == wanted(tree, values)


def test_texts_stay_texts() -> None:
    nodes = [node("C", triple(HOSTILE, subject=HOSTILE)), node("D", triple(HOSTILE, "drug therapy", HOSTILE)), node("D")]
    record = TreeRecord(f"{HOSTILE}@{HOSTILE}", DecisionTree.from_preorder(nodes), 1, {"warnings": [HOSTILE]})
    evaluate = engine(dmn_of([record]))
    shown = " ".join(HOSTILE.replace("\x00", "\ufffd").replace("\ufffe", "\ufffd").split())
    assert evaluate({"tree_1_fact_1": True})["recommendation"] == f"{shown} (drug therapy; {shown})"
    assert evaluate({"tree_1_fact_1": False}) == {"node": 3, "recommendation": "no recommendation"}


def test_several_trees_are_decisions_of_one_file() -> None:
    root = ET.fromstring(dmn_of(sample()))
    assert len(root.findall("decision", NS)) == len(sample())
    ids = [one.attrib["id"] for one in root.iter() if "id" in one.attrib]
    assert len(set(ids)) == len(ids)
    needed = {one.attrib["href"][1:] for one in root.iter(f"{{{NS['']}}}requiredInput")}
    assert needed == {one.attrib["id"] for one in root.findall("inputData", NS)}
    assert len(ET.fromstring(dmn_of([RECORD, RECORD])).findall("decision", NS)) == 2


def test_dmn_keeps_the_schema_of_dmn_1_3() -> None:
    schema = Path(__file__).parent / "engines/node_modules/dmn-moddle/resources/dmn/xsd/DMN13.xsd"
    if not schema.exists():
        pytest.skip("the schema of DMN 1.3 is not here: npm install --ignore-scripts --prefix mdt/tests/formats/engines")
    etree = pytest.importorskip("lxml.etree")
    checker = etree.XMLSchema(etree.parse(schema))
    nothing = TreeRecord("", DecisionTree.from_preorder([node("D")]), 99)
    checker.assertValid(etree.fromstring(dmn_of([*sample(), nothing]).encode()))


def test_a_choice_is_said_in_words_and_in_a_note() -> None:
    (note,) = notes_of(RECORD)
    assert note.startswith("node 2: ")
    assert note in dmn_of([RECORD])
    assert notes_of(TreeRecord("", DecisionTree.from_preorder([node("D")]))) == []


# Workbooks ------------------------------------------------------------------------------------------------------------------


def sheets(records: list[TreeRecord]) -> Any:
    return openpyxl.load_workbook(io.BytesIO(dak_of(records)))


COVER = [
    "Activity ID.Activity name",
    "Tab name",
    "Decision-support table (DT), contraindications table and scheduling-logic table (S) identification (ID)",
    "Table description",
    "Reference/source",
]
HEADS = ["Output", "Guidance displayed to health worker", "Annotations", "Reference(s)"]


def read_as_who_does(content: bytes) -> dict[str, dict[str, Any]]:
    """What WHO's reader of DAK workbooks takes from one, by its rules: ID of a decision -> its inputs and rows.

    The decisions are those of the sheet COVER, down to the first empty row. In a decision's sheet stand below each other "Decision
    ID", "Business rule", "Trigger" and "Inputs", each with something beside it; right of "Inputs" the heads of the outputs. In the
    next row are the inputs, a name and a definition each; then rules, of texts only, down to an empty row.
    """
    pandas = pytest.importorskip("pandas")
    read = lambda sheet, header=None: pandas.read_excel(io.BytesIO(content), sheet_name=sheet, header=header)  # noqa: E731
    cover = next(frame for row in range(20) if list(frame := read("COVER", row))[: len(COVER)] == COVER)
    found = {}
    for _, line in cover.iterrows():
        activity, tab, decision = line[COVER[0]], line[COVER[1]], line[COVER[2]]
        if not isinstance(activity, str) or not isinstance(tab, str):
            break
        assert len(activity.split(" ", 1)) == 2
        cells = [["" if value != value else value for value in row] for row in read(tab).to_numpy().tolist()]  # NaN is empty
        top = next(i for i, row in enumerate(cells) if row[0] == "Decision ID")
        assert cells[top][1] == decision
        assert [row[0] for row in cells[top + 1 : top + 4]] == ["Business rule", "Trigger", "Inputs"]
        assert all(row[1] for row in cells[top : top + 3])
        heads = cells[top + 3]
        output = heads.index("Output")
        names = cells[top + 4]
        # One input and nothing beside it would be an annotation that goes over all columns.
        assert any(names[1:output]) or any(names[output : output + 3])
        lasts = [i for i, row in enumerate(cells) if i >= top + 5 and not any(row[: output + 3])]
        rules = cells[top + 5 : min(lasts, default=None)]
        assert all(isinstance(cell, str) for rule in rules for cell in rule)
        assert all(rule[output] for rule in rules)
        columns = {head: [rule[heads.index(head)] for rule in rules] for head in HEADS}
        found[decision] = {"inputs": names[:output], "rules": [rule[:output] for rule in rules], **columns, "cover": line.tolist()}
    return found


def workbook_by_hand(table: dict[str, Any]) -> Run:
    def holds(cell: str, facts: dict[str, bool]) -> bool:
        if cell == "-":
            return True
        _, asked = cell.split("\n")
        expression, _, value = asked.rpartition(" = ")
        joined = all if " and " in expression else any
        return joined(facts[name] for name in re.findall(r"fact_\d+", expression)) == (value == "TRUE")

    def run(facts: dict[str, bool]) -> dict[str, Any]:
        (row,) = [i for i, cells in enumerate(table["rules"]) if all(holds(cell, facts) for cell in cells)]
        node_ = re.search(r"^node (\d+)", table["Annotations"][row])
        assert node_
        return {"node": int(node_[1]), "recommendation": table["Output"][row].split("\n")[0]}

    return run


def test_a_workbook_decides_as_we_do() -> None:
    alone = DecisionTree.from_preorder([node("D", triple("rest", "therapeutic schedule"))])
    records = [*sample()[::5], TreeRecord(TEXT, TREE, 99), TreeRecord("", alone, 100)]
    tables = read_as_who_does(dak_of(records))
    assert list(tables) == [f"tree_{record.number}" for record in records]
    for record in records:
        evaluate = workbook_by_hand(tables[f"tree_{record.number}"])
        for values in combinations(record.tree):
            made = evaluate({f"fact_{i}": value for i, value in enumerate(values, start=1)})
            assert made["node"] == wanted(record.tree, values)


def test_a_sheet_has_what_a_dak_asks_for() -> None:
    record = TreeRecord(TEXT, TREE, 1, {"headings": ["Gout", "Flares"], "source": "gout.pdf", "place": "page 3"})
    book = sheets([record])
    table = read_as_who_does(dak_of([record]))["tree_1"]
    assert table["cover"] == ["tree_1 adults with gout", "DT 1", "tree_1", "adults with gout", "gout.pdf, page 3"]
    assert book["DT 1"]["B2"].value == TEXT.replace("@", ": ")
    assert table["inputs"][0].splitlines()[1] == "fact_1 and fact_2"
    assert table["rules"][0][0].splitlines()[1] == "(fact_1 and fact_2) = TRUE"
    assert table["rules"][1][0].startswith("Not: ")
    assert table["rules"][0][1] == "-"
    assert table[HEADS[1]][0].splitlines() == [
        "colchicine: 0.5 mg twice daily (drug therapy; adults with gout)",
        "naproxen (drug therapy; adults with gout)",
    ]
    assert "any of the actions" in table["Annotations"][0]
    assert "naproxen" in table["Reference(s)"][0]
    assert table["Output"][-1].splitlines() == ["no recommendation", "node 5 of tree_1"]
    assert [row[0] for row in book["Facts"].iter_rows(values_only=True)] == ["Fact", "fact_1", "fact_2", "fact_3"]
    said = [str(row[0]) for row in book["COVER"].iter_rows(values_only=True)]
    assert "review by a clinician" in said[0]
    assert any("joined by 'or'" in one for one in said)
    assert "tree_1: Headings: Gout › Flares" in said


def test_what_is_not_in_the_text_is_marked_with_the_reason() -> None:
    """In a decision beside its rule, in a condition beside its fact; and for the whole tree where it begins."""
    text = "adults with gout@For an acute flare give colchicine 0.5-1 mg."
    drug, dose = triple("colchicine", "drug therapy"), triple("1 mg", "dosage and administration", "colchicine")
    nodes = [node("C", triple("acute\nflare"), triple("fever"), joined="or"), node("D", drug, dose, joined="and"), node("D")]
    record = TreeRecord(text, DecisionTree.from_preorder(nodes), 7)
    part = "'1 mg' stands in the text only as part of '0.5-1 mg': colchicine | dosage and administration | 1 mg"
    fever = "not in the text: adults with gout | clinical manifestation | fever"

    root = ET.fromstring(dmn_of([record]))
    (whole,) = (str(one.text) for one in root.findall("decision/description", NS))
    assert part in whole
    assert fever in whole
    assert [one.text for one in root.findall("decision/decisionTable/rule/description", NS)] == [part]
    rule = root.find("decision/decisionTable/rule", NS)
    assert rule is not None
    assert rule[0].tag.endswith("}description")  # the schema wants it first
    facts = [str(one.text) for one in root.findall("inputData/description", NS)]
    assert facts == [
        "adults with gout | clinical manifestation | acute\nflare",
        f"adults with gout | clinical manifestation | fever\n{fever}",
    ]

    (column,) = read_as_who_does(dak_of([record]))["tree_7"]["inputs"]
    assert column.endswith(f"; {fever}\nfact_1 or fact_2")
    for without in (TreeRecord("", record.tree), RECORD):  # nothing can be absent from no text
        assert "in the text" not in dmn_of([without])


def test_prohibitions_are_no_choice() -> None:
    """They always hold, whatever joins them."""
    tree = DecisionTree.from_preorder([node("D", *(triple(drug, "prohibited drugs") for drug in "ab"), joined="or")])
    table = read_as_who_does(dak_of([TreeRecord("", tree)]))["tree_1"]
    assert table["Annotations"] == ["node 1; all of the actions"]
    assert " and DO NOT USE: b" in table["Output"][0]
    assert all("said in words" not in note for note in notes_of(TreeRecord("", tree)))
    assert any("prohibited drugs are none of the choices" in note for note in notes_of(TreeRecord("", tree)))


def test_no_text_is_a_formula() -> None:
    nodes = [node("C", triple(HOSTILE, subject="=A1")), node("D", triple("=cmd", "drug therapy")), node("D")]
    book = sheets([TreeRecord("", DecisionTree.from_preorder(nodes), 1, {"warnings": [HOSTILE]})])
    cells = [cell for sheet in book for row in sheet.iter_rows() for cell in row if cell.value is not None]
    assert {cell.data_type for cell in cells} == {"s"}
