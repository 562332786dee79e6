"""What people look at: layout, SVG, Mermaid, HTML."""

import base64
import hashlib
import html
import json
import re
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, render, write_view
from gatewise_mdt.formats.mermaid import mermaid_of
from gatewise_mdt.formats.svg import drawing_of, place_boxes, width_of, wrap
from gatewise_mdt.formats.views import FORMATS, notes_of
from hypothesis import given
from mdt_trees import TEXT, gout, node, preorders, properties, triple

from gatewise.errors import GatewiseError

TREE = DecisionTree.from_preorder(gout())
RECORD = TreeRecord(TEXT, TREE)
HOSTILE = "<script>alert(1)</script>\"'&--> ]]> \x00\x0b"


def hostile() -> TreeRecord:
    """A record whose every text tries to be something else."""
    nodes = [node("C", triple(HOSTILE, subject=HOSTILE + "1")), node("D", triple(HOSTILE + "2", "drug therapy")), node("D")]
    return TreeRecord(
        f"{HOSTILE}@{HOSTILE} and more",
        DecisionTree.from_preorder(nodes),
        1,
        {"headings": [HOSTILE], "notes": [HOSTILE], "note": HOSTILE},
    )


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


# Layout ---------------------------------------------------------------------------------------------------------------


@properties
@given(preorders(most_conditions=9))
def test_no_box_is_over_another_and_children_are_on_their_sides(nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)
    places = place_boxes(tree, [20.0 + 10 * len(one["triples"]) for one in nodes])
    assert min(place.x for place in places) == pytest.approx(0)
    for i, one in enumerate(places):
        for other in places[:i]:
            apart_across = one.x + one.width + 9.9 <= other.x or other.x + other.width + 9.9 <= one.x
            apart_down = one.y + one.height + 9.9 <= other.y or other.y + other.height + 9.9 <= one.y
            assert apart_across or apart_down
        if (both := tree.children[i]) is not None:
            true, false = (places[child] for child in both)
            assert true.middle < one.middle < false.middle
            assert true.y == false.y >= one.y + one.height + 29.9
            assert one.middle == pytest.approx((true.middle + false.middle) / 2)


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 60, ["one two", "three"]),
        ("", 50, [""]),
        ("a  b\nc", 200, ["a b c"]),
        ("血压控制不佳，且无禁忌", 60, ["血压控制", "不佳，且无", "禁忌"]),  # the comma does not begin a line
        ("antidisestablishment", 60, ["antidis", "establis", "hment"]),
        ("piperacillin-tazobactam", 100, ["piperacillin-", "tazobactam"]),
    ],
)
def test_text_is_wrapped(text: str, width: float, lines: list[str]) -> None:
    found = wrap(text, width, 12)
    assert "".join(found).replace(" ", "") == re.sub(r"\s", "", text)
    assert all(width_of(line, 12) <= width + 12 for line in found)
    assert len(found) == len(lines)
    assert not any(line.startswith(("，", " ")) for line in found)


# SVG ------------------------------------------------------------------------------------------------------------------


def shown(svg: str) -> list[str]:
    return [text.text or "" for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_svg_shows_the_whole_tree() -> None:
    svg = drawing_of(TREE, TEXT)
    texts = shown(svg)
    for text in ("adults with gout", "If all of these", "Then any of these", "acute flare", "and", "or", "No recommendation"):
        assert text in texts
    assert "colchicine \N{RIGHTWARDS ARROW} dosage and" in " ".join(texts)
    # Two edges with their labels below each condition.
    assert (texts.count("yes"), texts.count("no")) == (2, 2)
    assert "Needs review by a clinician. Not medical advice." in texts
    assert not re.search(r"(?:href|src|url)\s*[=(]", svg)
    assert "not in the text" not in svg


def test_every_view_says_of_which_words_a_dose_is_but_a_part() -> None:
    dose = triple("0.5 mg", "dosage and administration", "colchicine")
    record = TreeRecord(TEXT.replace("0.5 mg", "0.5 mg/kg"), DecisionTree.from_preorder([node("D", dose)]))
    said = "'0.5 mg' stands in the text only as part of '0.5 mg/kg'"
    assert f"# {said}: colchicine | dosage and administration | 0.5 mg\n" in render([record], "text")
    assert f"<br/>({said})" in render([record], "mermaid")
    for format in ("svg", "html"):
        assert said in " ".join(html.unescape(re.sub("<[^>]*>", " ", render([record], format))).split())
    (found,) = json.loads(render([record], "json"))[0]["spans"][0]
    assert (found["object"], found["object_part_of"]) == (None, "0.5 mg/kg")
    chinese = TreeRecord("成人@口服10~20mg。", DecisionTree.from_preorder([node("D", triple("20mg", "用法用量", "成人"))]))
    assert "# “20mg”在原文中只作为“10~20mg”的一部分出现: 成人 | 用法用量 | 20mg\n" in render([chinese], "text")


@pytest.mark.parametrize("format", ["fhir-r4", "fhir-r5", "dak"])
def test_a_phrase_that_comes_twice_is_cited_where_the_other_views_find_it(format: str, tmp_path: Path) -> None:
    """The second dose is that of the second drug."""
    nodes = [node("C", triple("mild pain"))]
    for drug, last in (("paracetamol", False), ("metamizole", True)):
        nodes.append(node("D", triple(drug, "drug therapy"), triple("1 g", "dosage and administration"), joined="and"))
        nodes += [node("D")] if last else [node("C", triple("severe pain"))]
    text = "adults with gout@For mild pain give paracetamol 1 g. For severe pain give metamizole 1 g."
    record = TreeRecord(text, DecisionTree.from_preorder(nodes))
    place = json.loads(render([record], "json"))[0]["spans"][3][1]["object"]
    assert place == [text.rindex("1 g"), len(text) - 1]
    if format == "dak":
        pytest.importorskip("openpyxl", reason="openpyxl is not installed: pip install gatewise-mdt")
        content = b"".join(sheets(write_view([record], format, tmp_path / "x.xlsx", drafts=True)).values()).decode()
    else:
        content = render([record], format, drafts=True)
    assert {int(start) for start in re.findall(r"characters (\d+) to \d+: 1 g", content)} == {text.index("1 g") + 1, place[0] + 1}


def test_svg_in_chinese_speaks_chinese() -> None:
    texts = shown(drawing_of(TREE.in_language("zh")))
    assert {"如果同时满足", "则任选其一", "是", "否", "无推荐"} <= set(texts)
    assert any("须经临床医生审核" in text for text in texts)


@properties
@given(preorders(most_conditions=4))
def test_svg_is_xml_whatever_the_texts(nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)
    for focusable in (False, True):
        root = ET.fromstring(drawing_of(tree, "some text", focusable=focusable))
        assert sum("node" in (group.get("class") or "").split() for group in root.iter()) == len(nodes)


# Mermaid --------------------------------------------------------------------------------------------------------------


def test_mermaid_has_a_line_for_each_node_and_edge() -> None:
    lines = mermaid_of(TreeRecord("", TREE)).splitlines()
    assert lines[0] == "flowchart TD"
    assert "Needs review by a clinician" in lines[1]
    assert sum(bool(re.match(r"  n\d+[\[(]", line)) for line in lines) == 5
    assert sum("-->|yes|" in line for line in lines) == sum("-.->|no|" in line for line in lines) == 2
    assert "  n3 -.->|no| n5" in lines


@pytest.mark.parametrize("begin", ["1. ", "12. ", " 3. ", "- ", "+ ", "* ", "# ", "1) ", "---", "==="])
def test_no_line_of_a_mermaid_label_is_a_list_or_heading_of_markdown(begin: str) -> None:
    """Builds that read labels as Markdown show no label with a list, and so no notice."""
    said = f"{begin}x" if begin.endswith(" ") else begin
    nodes = [
        node("C", triple(said, subject=said), triple("b", subject=said + "2"), joined="or"),
        node("D", triple(said, "drug therapy")),
    ]
    record = replace(RECORD, tree=DecisionTree.from_preorder([*nodes, node("D")]), more={"headings": [said], "warnings": [said]})
    source = render([record], "mermaid")
    labels = re.findall(r'^  \w+[\[(]"(.*)"[\])]:::', source, re.MULTILINE)
    assert labels[0].startswith("Needs review by a clinician")
    assert len(labels) == 4
    for line in (line for label in labels for line in label.split("<br/>")):
        assert not re.match(r"\s*(?:\d*[.)](?:\s|$)|[-+*](?:\s|$)|#+\s|-+$|=+$)", line), line
    seen = html.unescape(re.sub(r"#(\d+);", r"&#\1;", source))
    assert seen.count(said.strip()) >= 6
    assert "0.5 mg twice daily" in mermaid_of(TreeRecord("", TREE))  # which is no list


# HTML -----------------------------------------------------------------------------------------------------------------


def test_text_and_tree_of_the_page_name_each_other() -> None:
    page = Page(render([RECORD], "html"))
    marks = [attributes for tag, attributes in page.elements if tag == "mark"]
    boxes = [attributes for tag, attributes in page.elements if "node" in (attributes.get("class") or "").split()]
    parts = {attributes["data-triple"] for _, attributes in page.elements if "data-triple" in attributes}
    assert [box["data-node"] for box in boxes] == ["0", "1", "2", "3", "4"]
    assert all(item["tabindex"] == "0" for item in (*marks, *boxes))
    assert all(box["aria-label"] for box in boxes)
    named = {name for mark in marks for name in (mark["data-of"] or "").split()}
    assert named == parts == {"0.0", "0.1", "1.0", "1.1", "1.2", "2.0", "3.0"}
    assert page.open == []


def test_the_page_allows_its_own_style_and_script_and_no_others() -> None:
    for records in ([RECORD], [RECORD, hostile()]):
        content = render(records, "html")
        (policy,) = [one for one in re.findall(r'content="([^"]*)"', content) if "default-src" in one]
        assert "default-src 'none'; " in policy
        assert "unsafe" not in policy
        for tag, rule in (("style", "style-src"), ("script", "script-src")):
            (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", content, flags=re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
            assert f"{rule} 'sha256-{digest}';" in policy
    page = Page(content)
    assert page.text.count("<script>alert(1)</script>") >= 5  # script in a text stays text
    assert (page.count("script"), page.open) == (1, [])


@properties
@given(preorders(most_conditions=3))
def test_the_page_is_whole_whatever_the_texts(nodes: list[dict[str, Any]]) -> None:
    tree = DecisionTree.from_preorder(nodes)
    text = "@".join(part for one in tree.triples for part in (one.subject, one.object)) or "nothing"
    page = Page(render([TreeRecord(text, tree)], "html"))
    assert page.open == []
    assert page.count("script") == 1


# All formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_gives_the_warnings_of_the_extraction(name: str) -> None:
    warnings = ["the output was brought to a close before its end", HOSTILE]
    content = render([replace(RECORD, more={"warnings": warnings})], name, drafts=True)
    assert re.search("review by a clinician", content, re.IGNORECASE)
    assert content.endswith("\n")
    # Mermaid needs its own entities for brackets, none of which are in the sentence; drawings wrap it at spaces.
    plain = " ".join(shown(content)) if name == "svg" else content
    assert "the output was brought to a close before its end" in plain
    if name in ("html", "svg", "mermaid"):
        assert "<script>alert" not in content
    if name == "html":
        page = Page(content)
        assert "may be incomplete" in page.text
        assert HOSTILE.split(" ")[0] in page.text
        assert (page.count("script"), page.open) == (1, [])
    for nothing in ([], ["", " "], "text", None, [3], {"a": 1}):
        assert render([replace(RECORD, more={"warnings": nothing})], name, drafts=True).count("incomplete") == 0


def test_what_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(GatewiseError, match="an SVG shows one tree, but 2"):
        render([RECORD, RECORD], "svg")
    for name in ("text", "svg", "json", "dmn"):
        with pytest.raises(GatewiseError, match="there are no trees to write"):
            render([], name)


@pytest.mark.parametrize("format", list(FORMATS))
def test_the_headings_of_a_passage_are_in_every_view(format: str) -> None:
    more = {"headings": ["Asthma", "Renal failure"], "notes": ["no headers were found in the table"]}
    shown = render([TreeRecord("adults@Asthma: Renal failure: rest.", TREE, 1, more)], format, drafts=True)
    assert "Renal failure" in shown
    if format not in ("text", "json"):
        assert "Asthma › Renal failure" in shown
    if format not in ("text", "svg", "mermaid"):
        assert more["notes"][0] in shown


# How sure a model was of each node ------------------------------------------------------------------------------------

SURE = replace(RECORD, more={"confidence": [0.9, 0.41, 0.72, 0.4999, None]})


def test_views_show_the_confidence_of_each_node_and_what_it_means() -> None:
    said = ["confidence 90%", "confidence 41%, doubtful", "confidence 72%", "confidence 49%, doubtful"]
    svg = shown(render([SURE], "svg"))
    assert [line for line in svg if re.match("confidence \\d", line)] == said
    assert "as measured on dev passages" in " ".join(svg)
    page = Page(render([SURE], "html"))
    labels = [attrs["aria-label"] for _, attrs in page.elements if attrs.get("role") == "button"]
    assert [(label or "").partition(". ")[2] for label in labels] == [*said, ""]
    assert "as measured on dev passages" in page.text
    assert not any("style" in attrs for _, attrs in page.elements)
    mermaid = render([SURE], "mermaid").split("\n")
    assert [re.findall(r"<i>confidence ([^<]*)</i>", line) for line in mermaid if re.match(r"  n\d[(\[]", line)] == [
        ["90#37;"], ["41#37;, doubtful"], ["72#37;"], ["49#37;, doubtful"], []
    ]  # fmt: skip
    assert "dev passages" in mermaid[1]
    lines = [line.strip() for line in render([SURE], "text").split("\n")]
    assert [(lines[i], lines[i + 1]) for i, line in enumerate(lines) if line.startswith("# confidence")] == [
        ("# confidence 90%", "if all:"),
        ("# confidence 41%, doubtful", "do any:"),
        ("# confidence 72%", "if:"),
        ("# confidence 49%, doubtful", "do:"),
    ]
    assert any("dev passages" in line for line in lines)
    assert "置信度 41%，存疑" in render([replace(SURE, tree=TREE.in_language("zh"))], "svg")


@pytest.mark.parametrize("name", ["text", "svg", "html", "mermaid"])
def test_no_view_shows_what_is_no_confidence_or_was_approved(name: str) -> None:
    without = render([RECORD], name)
    for said in ("high", [0.5], [0.5, 0.5, 2, 0.5, None], [None] * 5):
        assert render([replace(RECORD, more={"confidence": said})], name) == without
    approved = {"review": "approved"}
    assert render([replace(SURE, more={**SURE.more, **approved})], name) == render([replace(RECORD, more=approved)], name)


def sheets(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as book:
        return {name: book.read(name) for name in book.namelist() if not name.startswith("docProps")}


def test_what_runs_has_no_confidence() -> None:
    assert json.loads(render([SURE], "json"))[0]["confidence"] == SURE.more["confidence"]
    for name in ("fhir-r4", "fhir-r5", "dmn"):
        assert render([SURE], name, drafts=True) == render([RECORD], name, drafts=True)


def test_a_note_that_is_true_of_several_records_is_one() -> None:
    nodes = [node("D", triple("colchicine", "drug therapy"), triple("prednisolone", "drug therapy"), joined="or")]
    records = [TreeRecord(TEXT, DecisionTree.from_preorder(nodes), number) for number in (3, 8)]
    (note,) = notes_of(records, "dmn")
    assert note.startswith("record 3, node 1; record 8, node 1: ")
    (nothing,) = notes_of([TreeRecord(TEXT, DecisionTree.from_preorder([node("D")]), 5)], "fhir-r4")
    assert nothing.startswith("record 5: the tree recommends nothing")
