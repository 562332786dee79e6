"""``gatewise mdt``: what it prints where, its exit codes, and one sentence for everything a user can put right."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt.formats.views import FORMATS
from mdt_trees import TEXT, gout, node, triple
from refusals import assert_refused
from typer.testing import CliRunner

from gatewise.cli.main import app

Gatewise = Callable[..., Any]


@pytest.fixture
def gatewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gatewise:
    """gatewise("show", ...) -> the result of `gatewise mdt show ...`, run in a folder with some files of trees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    good, wrong = {"text": TEXT, "tree": gout()}, {"text": TEXT, "tree": [*gout(), node("D")]}
    joined = {"text": TEXT, "tree": [node("D", joined="or")]}
    for name, items in {"good": [good, good], "one": [good], "mixed": [good, wrong, good, joined], "wrong": [wrong]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(items))
    return lambda *words: CliRunner().invoke(app, ["mdt", *map(str, words)])


def test_show_prints_the_outline(gatewise: Gatewise) -> None:
    result = gatewise("show", "one.json")
    assert result.exit_code == 0, result.output
    assert "review by a clinician" in result.stdout.splitlines()[0]
    assert "if all:\n  - adults with gout | clinical manifestation | acute flare" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("format", list(FORMATS))
def test_show_writes_every_format(gatewise: Gatewise, tmp_path: Path, format: str) -> None:
    result = gatewise("show", "sample:guidelines", "--record", 3, "--format", format, "--drafts", "--out", "made/tree")
    assert result.exit_code == 0, result.output
    assert result.stdout == "written: made/tree\n"
    content = (tmp_path / "made" / "tree").read_text(encoding="utf-8")
    assert content == gatewise("show", "sample:guidelines", "--record", 3, "-f", format, "--drafts").stdout
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["tree"]


def test_what_a_format_cannot_say_is_said_beside_it(gatewise: Gatewise, tmp_path: Path) -> None:
    for record, format, said in ((1, "dmn", "joined by 'or'"), (28, "fhir-r4", "has a negation")):
        result = gatewise("show", "sample:guidelines", "--record", record, "--format", format, "--drafts", "--out", "made")
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith(f"note: record {record}, node")
        assert said in result.stderr
        assert said in (tmp_path / "made").read_text(encoding="utf-8")
    assert gatewise("show", "sample:guidelines", "--record", 1, "--format", "fhir-r5", "--drafts").stderr == ""


def test_a_workbook_needs_a_file(gatewise: Gatewise, tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    assert_refused(gatewise("show", "good.json", "--format", "dak", "--drafts"), "write it to a file, with --out")
    result = gatewise("show", "good.json", "--format", "dak", "--drafts", "--out", "trees.xlsx")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "trees.xlsx").read_bytes()[:2] == b"PK"


def test_show_of_several_as_svg_fills_a_folder(gatewise: Gatewise, tmp_path: Path) -> None:
    result = gatewise("show", "good.json", "--format", "svg", "--out", "drawings")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "drawings").iterdir()) == ["record-0001.svg", "record-0002.svg"]
    assert_refused(gatewise("show", "good.json", "--format", "svg", "--out", "drawings"), "not empty")
    assert_refused(gatewise("show", "good.json", "--format", "svg"), "an SVG shows one tree, but 2 were given")


def test_show_goes_on_and_says_at_the_end_what_failed(gatewise: Gatewise, tmp_path: Path) -> None:
    result = gatewise("show", "mixed.json", "--format", "json", "--out", "made.json")
    assert_refused(result, "2 of the 4 records of mixed.json were left out: 2, 4; --repair may help")
    assert "failed: mixed.json, record 2, node 6: " in result.stderr
    assert "failed: mixed.json, record 4, node 1: " in result.stderr
    assert len(json.loads((tmp_path / "made.json").read_text())) == 2

    repaired = gatewise("show", "mixed.json", "--repair", "--format", "json")
    assert_refused(repaired, "1 of the 4 records of mixed.json were left out: 2")
    assert "repaired: mixed.json, record 4: node 1" in repaired.stderr
    assert len(json.loads(repaired.stdout)) == 3


def test_show_refuses_in_one_sentence(gatewise: Gatewise, tmp_path: Path) -> None:
    assert_refused(gatewise("show", "none.json"), "none.json: there is no such file")
    assert_refused(gatewise("show", "sample:trees"), "expected sample:guidelines")
    assert_refused(gatewise("show", "one.json", "--record", 2), "has 1 records", "number 2")
    assert_refused(gatewise("show", "mixed.json", "--record", 2, "--out", "x.txt"), "mixed.json, record 2, node 6")
    assert_refused(gatewise("show", "wrong.json", "--out", "x.txt"), "wrong.json, record 1, node 6")
    assert_refused(gatewise("show", "one.json", "--out", "one.json/x"), "cannot write")
    assert not (tmp_path / "x.txt").exists()
    one_good = gatewise("show", "mixed.json", "--record", 3)
    assert one_good.exit_code == 0
    assert one_good.stderr == ""


def test_options_that_would_mean_nothing_are_refused(gatewise: Gatewise, tmp_path: Path) -> None:
    (tmp_path / "trees.json").write_text("[]", encoding="utf-8")
    show = gatewise("show", "sample:guidelines", "--record", "3", "--pathway", "links.json", "--format", "svg")
    assert_refused(show, "--record shows one tree, and --pathway all that its links join: leave one of the two out")
    evaluate = gatewise("evaluate", "--gold", "sample:guidelines", "--pred", "trees.json", "--limit", "1")
    assert_refused(evaluate, "--limit is for trees that are extracted now, with --adapter")
    agree = gatewise("agree", "a.json", "b.json", "--reviewer", "Ada")
    assert_refused(agree, "--reviewer says whose third review --adjudicate prepares")


def test_evaluate_prints_a_table_or_json(gatewise: Gatewise, tmp_path: Path) -> None:
    (tmp_path / "pred.json").write_text(json.dumps([{"text": TEXT, "tree": gout()}, {"text": TEXT, "tree": [node("C")] * 9}]))
    result = gatewise("evaluate", "--gold", "good.json", "--pred", "pred.json")
    assert result.exit_code == 0, result.output
    for text in (
        "triplet",
        "node",
        "path",
        "0.6667",
        "tree accuracy: 0.5000",
        "tree edit ratio: 0.3333",
        "no trees: 1 (0 of them empty)",
    ):
        assert text in result.stdout
    values = json.loads(gatewise("evaluate", "--gold", "good.json", "--pred", "pred.json", "--json").stdout)
    assert values["triplet_f1"] == pytest.approx(2 / 3)
    assert values["malformed"] == 1
    assert values["n"] == 2
    # Both right, one or none: a draw of two passages is enough to say nothing.
    assert values["intervals"]["triplet_f1"] == {"low": 0, "high": 1}
    assert "0.6667 (0.000-1.000)" in result.stdout
    assert "95% intervals, from 2,000 bootstrap draws of the 2 passages" in result.stdout
    alone = gatewise("evaluate", "--gold", "one.json", "--pred", "one.json")
    assert "(" not in alone.stdout.split("trees:")[0]


def test_evaluate_takes_the_slips_of_published_trees_as_they_are_meant_and_counts_them(gatewise: Gatewise, tmp_path: Path) -> None:
    slips = gout()
    slips[1]["logical_rel"] = "null"
    slips[3]["triples"] = [[f"{part} " for part in slips[3]["triples"][0]], *slips[3]["triples"]]
    (tmp_path / "gold.json").write_text(json.dumps([{"text": TEXT, "tree": slips}]))
    meant = gout()
    meant[1]["logical_rel"] = "and"
    (tmp_path / "pred.json").write_text(json.dumps([{"text": TEXT, "tree": meant}]))
    result = gatewise("evaluate", "--gold", "gold.json", "--pred", "pred.json", "--json")
    values, said = (
        json.loads(result.stdout),
        {'"null" over several triples read as "and"': 1, "a triple given twice counted once": 1},
    )
    assert (values["tree_acc"], values["read_as"]) == (1, {"gold.json": said, "pred.json": {}})
    assert result.stderr == f"note: gold.json: {', '.join(f'once {kind}' for kind in said)}; --strict refuses such trees\n"
    assert (
        json.loads(gatewise("evaluate", "--gold", "gold.json", "--pred", "pred.json", "--json", "--strict").stdout)["tree_acc"] == 0
    )
    assert_refused(gatewise("agree", "gold.json", "pred.json", "--strict"), "gold.json, record 1, node 2: logical_rel")
    assert "note: gold.json: once " in gatewise("agree", "gold.json", "pred.json", "--repair").stderr
    prepared = gatewise("prepare", "gold.json", "--out", "rows.jsonl")
    assert (prepared.exit_code, len((tmp_path / "rows.jsonl").read_text().splitlines())) == (0, 1)
    assert_refused(gatewise("prepare", "gold.json", "--out", "rows.jsonl", "--strict"), "gold.json, record 1, node 2: logical_rel")


def test_evaluate_shows_errors_by_kind(gatewise: Gatewise, tmp_path: Path) -> None:
    wrong = gout()
    wrong[0]["triples"][0][2] = "flare"
    (tmp_path / "pred.json").write_text(json.dumps([{"text": TEXT, "tree": wrong}, {"text": TEXT, "tree": []}]))
    said = gatewise("evaluate", "--gold", "good.json", "--pred", "pred.json", "--errors").stdout
    rows = [line.split() for line in said.splitlines()]
    assert ["wrong", "span", "1", "1", "1"] in rows
    assert ["malformed", "1", "1", "1"] in rows
    assert "grouping" not in said
    values = json.loads(gatewise("evaluate", "--gold", "good.json", "--pred", "pred.json", "--mistakes", "--json").stdout)
    assert values["mistakes"]["wrong span"] == {"count": 1, "trees": 1, "alone": 1}
    assert "no mistakes" in gatewise("evaluate", "--gold", "good.json", "--pred", "good.json", "--mistakes").stdout
    assert "mistakes" not in json.loads(gatewise("evaluate", "--gold", "good.json", "--pred", "good.json", "--json").stdout)


def test_evaluate_takes_any_prediction_but_only_trees_as_gold(gatewise: Gatewise, tmp_path: Path) -> None:
    lines = "\n".join(["nonsense", json.dumps({"text": TEXT, "tree": "nonsense"})])
    (tmp_path / "pred.jsonl").write_text(lines)
    values = json.loads(gatewise("evaluate", "--gold", "good.json", "--pred", "pred.jsonl", "--json").stdout)
    assert (values["malformed"], values["ter"], values["path_f1"]) == (2, 1, 0)
    assert_refused(gatewise("evaluate", "--gold", "pred.jsonl", "--pred", "good.json"), "pred.jsonl, line 1")
    assert_refused(gatewise("evaluate", "--gold", "wrong.json", "--pred", "one.json"), "wrong.json, record 1, node 6")
    assert_refused(gatewise("evaluate", "--gold", "good.json", "--pred", "one.json"), "has 2 trees", "has 1")
    (tmp_path / "other.json").write_text(json.dumps([{"text": "something else", "tree": gout()}]))
    assert_refused(gatewise("evaluate", "--gold", "one.json", "--pred", "other.json"), "record 1 of other.json has another text")


def test_prepare_takes_only_what_was_approved(gatewise: Gatewise, tmp_path: Path) -> None:
    states = ["approved", None, "corrected", "approved", "approval", True]
    items = [{"text": f"{TEXT} {i}", "tree": gout(), **({"review": one} if one else {})} for i, one in enumerate(states)]
    (tmp_path / "a.review.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    result = gatewise("prepare", "a.review.jsonl", "--only", "approved", "--out", "train.jsonl")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "left out: 4 of 6 records, which no reviewer approved",
        "written: train.jsonl, 2 rows of 2 passages of 2 documents",
    ]
    rows = [json.loads(line)["source"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [f"{TEXT.partition('@')[2]} {i}" in row for i, row in zip((0, 3), rows, strict=True)] == [True, True]
    assert_refused(
        gatewise("prepare", "good.json", "--only", "approved", "--out", "none.jsonl"), "none of the 2 records", "leave --only out"
    )
    assert not (tmp_path / "none.jsonl").exists()


def test_prepare_splits_by_document(gatewise: Gatewise, tmp_path: Path) -> None:
    names = ["a.pdf"] * 6 + ["b.pdf"] * 2 + ["c.pdf"] * 2
    items = [{"text": f"{TEXT} {name} {i}", "tree": gout(), "source": name} for i, name in enumerate(names)]
    (tmp_path / "trees.json").write_text(json.dumps(items))
    words = ("prepare", "trees.json", "--out", "train.jsonl", "--dev", "dev.jsonl")
    result = gatewise(*words, "--swapped", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "written: dev.jsonl, 2 rows of 2 passages of 1 document",
        "written: train.jsonl, 16 rows of 8 passages of 2 documents",
    ]
    dev = (tmp_path / "dev.jsonl").read_text()
    name = "b.pdf" if "b.pdf" in dev else "c.pdf"
    assert dev.count(name) == 2
    assert name not in (tmp_path / "train.jsonl").read_text()
    assert "4 passages of 2 documents" in gatewise(*words, "--dev-share", 0.4).stdout
    assert_refused(gatewise(*words, "--dev-share", 1), "the share of dev is 1", "between 0 and 1")
    assert_refused(gatewise(*words[:4], "--dev-share", 0.4), "--dev-share needs --dev FILE")


@pytest.mark.parametrize("link", [False, True])
def test_what_is_read_is_not_written_over(gatewise: Gatewise, tmp_path: Path, link: bool) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT, "tree": gout()}))
    out = tmp_path / ("again.jsonl" if link else "rows.jsonl")
    if link:
        out.symlink_to(tmp_path / "rows.jsonl")
    before = out.read_bytes()
    assert_refused(gatewise("show", "rows.jsonl", "--format", "html", "--out", out), "is a file that is read")
    assert_refused(gatewise("prepare", "rows.jsonl", "--out", "x.jsonl", "--dev", out), "is a file that is read")
    assert out.read_bytes() == before


def test_what_a_review_wrote_is_not_written_over(gatewise: Gatewise, tmp_path: Path) -> None:
    (tmp_path / "g.md.review.jsonl").write_text("")
    (tmp_path / "mine.jsonl").write_text("")
    (tmp_path / "mine.history.jsonl").write_text("")
    for out in ("g.md.review.jsonl", "mine.jsonl"):
        said = f"--out {out} has the trees of a review, which would be lost"
        assert_refused(gatewise("prepare", "sample:guidelines", "--out", out), said)
        assert_refused(gatewise("show", "sample:guidelines", "--format", "json", "--out", out), said)
        assert (tmp_path / out).read_text() == ""
    assert gatewise("show", "sample:guidelines", "--format", "json", "--out", "mine.json").exit_code == 0


def test_prepare_writes_two_sides_into_two_files(gatewise: Gatewise, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.jsonl")
    for dev in ("data.jsonl", "./data.jsonl", tmp_path / "data.jsonl", "link.jsonl"):
        result = gatewise("prepare", "sample:guidelines", "--out", "data.jsonl", "--dev", dev)
        assert_refused(result, "--out data.jsonl and --dev ", "are one file: expected two files")
    assert not (tmp_path / "data.jsonl").exists()


def test_prepare_goes_on_where_a_record_gives_no_rows(gatewise: Gatewise, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(json.dumps([{"text": "1 2 3", "tree": [node("D")]}, {"text": TEXT, "tree": gout()}]))
    result = gatewise("prepare", "odd.json", "--out", "rows.jsonl")
    assert_refused(result, "1 of the 2 records of odd.json were left out: 1")
    assert "failed: record 1" in result.stderr
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_terminal_is_told_nothing_by_a_tree(gatewise: Gatewise, tmp_path: Path, format: str) -> None:
    """Control characters of a file, which could colour, clear, rewrite or turn what stands on a terminal, are not printed."""
    escapes = "\x1b[31m\x1b]0;title\x07\x9b2J\x00\x08\x7f\r\u0085\u202e\u2066"
    tree = [node("D", triple(f"rest{escapes} well", "therapeutic schedule"))]
    records = [{"text": f"adults{escapes}@Then{escapes} rest.", "tree": tree, "warnings": [escapes]}, {"text": escapes, "tree": 3}]
    (tmp_path / f"a{escapes[:5]}.json").write_text(json.dumps(records))
    shown, refused = (
        CliRunner().invoke(
            app, ["mdt", "show", f"a{escapes[:5]}.json", "--record", record, "--format", format, "--drafts"], color=True
        )
        for record in ("1", "2")
    )
    assert shown.exit_code == 0, shown.output
    assert "rest" in shown.stdout
    assert "record 2" in refused.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", shown.output + refused.output)
    assert r"\u202e" in shown.output
