"""What goes out to systems that run it: approved trees whose items are all ticked, and drafts that say so."""

import base64
import hashlib
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from fhir_rules import faults_of
from gatewise_mdt import DecisionTree, TreeRecord, open_items, render, write_view
from gatewise_mdt.checking.ticks import key_of
from gatewise_mdt.formats.gate import RUN, check_documents
from mdt_trees import node, triple
from refusals import assert_refused
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.errors import GatewiseError

FORBIDDEN = "gout@Do not give naproxen."
TREE = [node("D", triple("naproxen", "drug therapy"))]


def record(number: int = 1, text: str = "adults with gout@Give naproxen.", **more: Any) -> TreeRecord:
    """A record; an approval is of it, unless ``more`` says of what."""
    made = TreeRecord(text, DecisionTree.from_preorder(TREE), number, more)
    approved = {"reviewed": {"of": made.digest}} if more.get("review") == "approved" else {}
    return TreeRecord(text, made.tree, number, approved | more)


def ticked(one: TreeRecord) -> TreeRecord:
    ticks = [{**key_of(item, one.text), "why": "said elsewhere", "by": "Ada"} for item in open_items(one)]
    return TreeRecord(one.text, one.tree, one.number, {**one.more, "ticks": ticks})


def written(one: TreeRecord, format: str, folder: Path, drafts: bool = False) -> str:
    """A tree in a format, as text."""
    if format == "dak":
        book = openpyxl.load_workbook(write_view([one], format, folder / "x.xlsx", drafts=drafts))
        return "\n".join(str(cell.value) for sheet in book for row in sheet.iter_rows() for cell in row if cell.value)
    return render([one], format, drafts=drafts)


@pytest.mark.parametrize("format", RUN)
def test_what_runs_takes_approved_trees_without_open_items(format: str, tmp_path: Path) -> None:
    for review in (None, "corrected", ["approved"]):
        with pytest.raises(
            GatewiseError, match=rf'{format} takes approved trees alone, and passage 4 \("adults with gout@Give napr'
        ):
            written(record(4, review=review), format, tmp_path)
    assert "DRAFT" not in written(record(review="approved"), format, tmp_path)
    held = record(4, FORBIDDEN, review="approved")
    with pytest.raises(
        GatewiseError,
        match=r'open items.* passage 4 \("gout@Do not give naproxen."\): given though forbidden "Do not give naproxen"',
    ):
        written(held, format, tmp_path)
    assert "naproxen" in written(ticked(held), format, tmp_path)
    for one in (held, record()):
        assert "DRAFT" in written(one, format, tmp_path, drafts=True)


@pytest.mark.parametrize(
    "more",
    [
        {"reviewed": {"by": "Ada"}},  # of an earlier version: nothing says of which tree
        {"reviewed": {"by": "Ada", "of": None}},
        {"reviewed": "Ada"},
        {"changed": {"by": "Ada"}},
    ],
)
def test_an_approval_of_nobody_knows_what_and_of_a_tree_that_was_changed_since_runs_nowhere(more: dict[str, Any]) -> None:
    one = record(4, review="approved", **more)
    with pytest.raises(
        GatewiseError, match=r"dmn takes approved trees alone, and passage 4 .* is not approved as it is: approve it"
    ):
        render([one], "dmn")
    assert "DRAFT" in render([one], "dmn", drafts=True)
    assert render([one], "text")


def test_every_copy_of_the_document_that_is_at_hand_has_to_be_the_one_that_was_read(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    named, beside = tmp_path / "src" / "g.md", tmp_path / "g.md"
    named.write_text("Give naproxen.")
    of_it = {"source": str(named), "sha256": hashlib.sha256(named.read_bytes()).hexdigest()}
    one = record(review="approved", **of_it)
    beside.write_bytes(named.read_bytes())
    check_documents(tmp_path / "g.review.jsonl", [one])
    named.write_text("Never give naproxen.")
    with pytest.raises(GatewiseError, match=f"{named} has changed since its review was saved"):
        check_documents(tmp_path / "g.review.jsonl", [one])


def test_a_draft_says_so_in_every_resource_and_sheet(tmp_path: Path) -> None:
    nodes = [node("C", triple("flare")), *TREE, node("D", triple("rest", "therapeutic schedule"))]
    one = TreeRecord("adults with gout@For a flare give naproxen, else rest.", DecisionTree.from_preorder(nodes))
    for release in ("R4", "R5"):
        bundle = json.loads(render([one], f"fhir-{release.lower()}", drafts=True))
        assert faults_of(bundle, release) == []
        assert bundle["meta"]["tag"][0]["code"] == "DRAFT"
        resources = [entry["resource"] for entry in bundle["entry"]]
        assert [resource["resourceType"] for resource in resources] == ["PlanDefinition", "Library", *["ActivityDefinition"] * 2]
        for resource in resources:
            assert resource["status"] == "draft"
            assert all(resource[name].startswith("DRAFT: ") for name in ("title", "description"))
            assert "DRAFT" in resource["text"]["div"]
        assert "\n// DRAFT: " in base64.b64decode(resources[1]["content"][0]["data"]).decode()
    root = ET.fromstring(render([one, one], "dmn", drafts=True))
    decisions = root.findall("{*}decision")
    assert len(decisions) == 2
    assert [part.get(name, "")[:7] for part, name in ((root, "name"), *((one, "label") for one in decisions))] == ["DRAFT: "] * 3
    assert all((part.findtext("{*}description") or "").startswith("DRAFT: ") for part in (root, *decisions))
    book = openpyxl.load_workbook(write_view([one, one], "dak", tmp_path / "x.xlsx", drafts=True))
    assert all(any("DRAFT: " in str(cell.value) for row in sheet.iter_rows() for cell in row) for sheet in book)
    assert len(book.sheetnames) == 4


def test_show_takes_the_approved_trees_of_a_file_and_stops_at_open_items(tmp_path: Path) -> None:
    file = tmp_path / "guide.review.jsonl"

    def show(*records: TreeRecord, more: tuple[str, ...] = ()) -> Any:
        file.write_text("".join(json.dumps(one.to_json()) + "\n" for one in records))
        return CliRunner().invoke(app, ["mdt", "show", str(file), "--format", "dmn", *more])

    fine, held = record(review="approved"), record(2, FORBIDDEN, review="approved")
    result = show(fine, record(text="adults@Give aspirin or naproxen."))
    assert (result.exit_code, result.stdout.count("<decision ")) == (0, 1)
    assert 'note: left out, as not approved: passage 2 ("adults@Give aspirin' in result.stderr
    result = show(fine, held, more=("--out", str(tmp_path / "x.dmn")))
    assert_refused(
        result, 'in passage 2 ("gout@Do not give naproxen."): given though forbidden "Do not give naproxen", prohibition'
    )
    assert not (tmp_path / "x.dmn").exists()
    assert_refused(show(record()), "dmn takes approved trees alone, and passage 1")
    result = show(fine, ticked(held), record(3), more=("--drafts",))
    assert (result.exit_code, result.stdout.count('label="DRAFT: ')) == (0, 3)
