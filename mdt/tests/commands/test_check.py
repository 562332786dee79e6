"""``gatewise mdt check``: items as text and as JSON, and files with faults."""

import json
from pathlib import Path
from typing import Any

from mdt_trees import TEXT, gout, node, triple
from refusals import assert_refused
from typer.testing import CliRunner

from gatewise.cli.main import app


def check(*words: object) -> Any:
    return CliRunner().invoke(app, ["mdt", "check", *map(str, words)])


def files(folder: Path) -> Path:
    given = [
        node("D", triple("colchicine", "drug therapy"), triple("0.5 mg", "dosage and administration", "colchicine"), joined="and")
    ]
    records = [
        {"text": TEXT, "tree": gout()},
        {"text": "adults with gout@Do not give colchicine 0.5 mg.", "tree": given, "passage_id": "p1"},
        {"text": "adults with gout@Give colchicine 0.5 mg.", "tree": [node("D", joined="or")]},
    ]
    (folder / "trees.json").write_text(json.dumps(records))
    return folder / "trees.json"


def test_items_are_printed_with_their_nodes_and_hints_on_request(tmp_path: Path) -> None:
    result = check(files(tmp_path))
    assert_refused(result, "1 of the 3 records", "left out: 3")
    assert "2. adults with gout@Do not give colchicine 0.5 mg.\n  given though forbidden, node 1: The tree gives" in result.stdout
    assert "hint" not in result.stdout.partition("records")[0]
    result = check(files(tmp_path), "--repair", "--hints")
    assert result.exit_code == 0, result.output
    assert "3. adults with gout@Give colchicine 0.5 mg.\n  empty tree, node 1: The tree recommends nothing" in result.stdout
    assert "of 3 records" in result.stdout


def test_json_has_the_places_and_every_record(tmp_path: Path) -> None:
    result = check(files(tmp_path), "--repair", "--json")
    records = json.loads(result.stdout)["records"]
    assert [record["number"] for record in records] == [1, 2, 3]
    assert records[1]["passage_id"] == "p1"
    item = next(item for item in records[1]["items"] if item["kind"] == "given though forbidden")
    start, end = item["place"]
    assert records[1]["passage"][start:end] == item["words"] == "Do not give colchicine"
    assert (item["node"], item["hint"]) == (0, False)
    assert 0 < item["sure"] <= 1
