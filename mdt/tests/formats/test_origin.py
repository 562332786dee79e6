"""Where a tree comes from: what every format says of who stands for it, of its document and of what drafted it."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import fhir_rules
import openpyxl
import pytest
from gatewise_mdt import DecisionTree, TreeRecord, render
from gatewise_mdt.formats.origin import origin_of
from gatewise_mdt.formats.views import write_view
from gatewise_mdt.formats.words import words_for
from mdt_trees import TEXT, gout

SHA256, OTHER, ADAPTER = "0123456789abcdef" * 4, "f" * 64, "ab" * 32
TREE = DecisionTree.from_preorder(gout())
EXTRACTION = {
    "base": "maker/model-1b",
    "adapter": {"name": "mdt-pi-lora", "sha256": ADAPTER},
    "gatewise": "0.1.0",
    "settings": {"level": None},
    "date": "2026-11-26T23:59:59+00:00",
}
REVIEWED = {"by": "Ada <b>L.</b>", "at": "2026-11-27T19:50:01.123+00:00", "comment": "see\x1b page 3\nand 4", "sha256": SHA256}
MORE: dict[str, Any] = {
    "source": "guide.pdf", "sha256": SHA256, "place": "page 3", "headings": [], "offsets": [33, 74],
    "extraction": EXTRACTION, "review": "approved", "reviewed": REVIEWED,
}  # fmt: skip
RECORD = TreeRecord(TEXT, TREE, more=MORE)
APPROVED = 'approved by Ada <b>L.</b>, 2026-11-27 19:50 UTC: "see page 3 and 4"'
DOCUMENT = "from guide.pdf, page 3, characters 33 to 74 of its text, SHA-256 0123456789ab…"
DRAFTED = "drafted by mdt-pi-lora (SHA-256 abababababab…) on maker/model-1b with gatewise 0.1.0, 2026-11-26 23:59 UTC"


def of(**more: Any) -> TreeRecord:
    """The record with other keys; None takes one out."""
    return TreeRecord(TEXT, TREE, more={key: value for key, value in {**MORE, **more}.items() if value is not None})


def test_it_is_said_in_three_phrases_of_one_line_each() -> None:
    assert origin_of(RECORD) == [APPROVED, DOCUMENT, DRAFTED]
    chinese = origin_of(RECORD, words_for("zh"))
    assert chinese[0] == "由 Ada <b>L.</b> 批准，2026-11-27 19:50 UTC：“see page 3 and 4”"
    assert chinese[1].startswith("来自 guide.pdf，page 3，")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict.fromkeys(MORE), []),
        ({"review": None}, [DOCUMENT, DRAFTED]),  # a draft
        ({"reviewed": None}, ["approved", DOCUMENT, DRAFTED]),  # of an earlier gatewise
        ({"review": "corrected", "reviewed": {"by": "Ben"}}, ["corrected by Ben", DOCUMENT, DRAFTED]),
        ({"reviewed": {"by": "Ben", "at": "yesterday"}}, ["approved by Ben, yesterday", DOCUMENT, DRAFTED]),
        (
            {"reviewed": {"by": "Ben", "at": "2026-11-27T01:00:00+02:00"}},
            ["approved by Ben, 2026-11-26 23:00 UTC", DOCUMENT, DRAFTED],
        ),
        (
            {"reviewed": {"by": "Ben", "sha256": OTHER}},
            ["approved by Ben, who read another version of the document (SHA-256 ffffffffffff…)", DOCUMENT, DRAFTED],
        ),
        (
            {"place": None, "sha256": None, "offsets": None, "extraction": None},
            [APPROVED, "from guide.pdf"],
        ),
        ({"extraction": {"base": "b"}}, [APPROVED, DOCUMENT, "drafted by b"]),
        ({"extraction": {"base": 1, "adapter": "x", "gatewise": []}}, [APPROVED, DOCUMENT]),
        ({"extraction": "by hand", "offsets": [1, True], "place": 3}, [APPROVED, "from guide.pdf, SHA-256 0123456789ab…"]),
        ({"source": ["a"], "reviewed": {"by": 1, "at": 2}}, ["approved", DRAFTED]),
    ],
)
def test_what_is_not_there_or_is_anything_else_is_not_said(more: dict[str, Any], said: list[str]) -> None:
    record = of(**more)
    assert origin_of(record) == said
    for format in ("text", "json", "html", "mermaid", "svg", "fhir-r4", "fhir-r5", "dmn"):
        assert render([record], format, drafts=True)
    for release in ("R4", "R5"):
        assert fhir_rules.faults_of(json.loads(render([record], f"fhir-{release.lower()}", drafts=True)), release) == []


def test_text_and_pages_say_it() -> None:
    said = [APPROVED, DOCUMENT, DRAFTED]
    assert render([RECORD], "text").splitlines()[-3:] == [f"# {one}" for one in said]
    assert "\x1b" not in render([RECORD], "text")
    page = render([RECORD], "html")
    (line,) = re.findall('<p class="origin">(.*?)</p>', page)
    assert [unescape(one) for one in re.findall("<span>(.*?)</span>", line)] == said
    assert "<b>L." not in page
    assert 'class="origin"' not in render([TreeRecord(TEXT, TREE)], "html")


def test_drawings_say_it_unseen() -> None:
    chart = render([RECORD], "mermaid").splitlines()
    assert [line[:5] for line in chart[1:4]] == ["  %% "] * 3
    assert chart[2] == f"  %% {DOCUMENT}"
    (hidden,) = (line for line in render([of(reviewed={"by": "%%{init: x}%%"})], "mermaid").splitlines() if "init" in line)
    assert hidden.count("%%") == 1
    assert not {"{", "}"} & set(hidden)
    assert render([RECORD], "svg").count("see page 3 and 4") == 1
    assert "<b>" not in render([RECORD], "svg")


@pytest.mark.parametrize("format", ["fhir-r4", "fhir-r5"])
def test_fhir_names_the_reviewer_and_the_document(format: str) -> None:
    def plan_of(record: TreeRecord) -> dict[str, Any]:
        made = json.loads(render([record], format, drafts=True))
        assert fhir_rules.faults_of(made, format[-2:].upper()) == []
        return dict(made["entry"][0]["resource"])

    plan = plan_of(RECORD)
    assert (plan["approvalDate"], plan["reviewer"], plan["status"]) == ("2026-11-27", [{"name": "Ada <b>L.</b>"}], "draft")
    text, document = plan["relatedArtifact"]
    assert text["type"] == "documentation"
    assert (document["type"], document["display"]) == ("derived-from", "guide.pdf")
    assert document["citation"] == f"guide.pdf: page 3, characters 33 to 74 of its text, SHA-256 {SHA256}"
    for phrase in (APPROVED, DOCUMENT, DRAFTED):
        assert f"Origin: {phrase}" in plan["description"]
    corrected = plan_of(of(review="corrected", reviewed={"by": "Ben", "at": REVIEWED["at"]}))
    assert corrected["editor"] == [{"name": "Ben"}]
    assert not {"approvalDate", "reviewer"} & corrected.keys()
    assert not {"approvalDate", "reviewer", "editor"} & plan_of(of(review=None)).keys()
    undated = plan_of(of(reviewed={"by": "Ben", "at": "yesterday"}))
    assert (undated["reviewer"], undated.get("approvalDate")) == ([{"name": "Ben"}], None)


def test_decision_tables_and_the_cover_of_workbooks_say_it(tmp_path: Path) -> None:
    cover = openpyxl.load_workbook(write_view([RECORD], "dak", tmp_path / "a.xlsx", drafts=True))["COVER"]
    said = [row[0].value for row in cover.iter_rows()]
    for phrase in (APPROVED, DOCUMENT, DRAFTED):
        assert f"tree_1: Origin: {phrase}" in said
        assert f"Origin: {phrase}" in unescape(render([RECORD], "dmn", drafts=True))
