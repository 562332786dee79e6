"""``gatewise mdt``: what it prints where, its exit codes, and one sentence for everything a user can put right."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mdt_trees import TEXT, gout, node
from typer.testing import CliRunner

from gatewise.cli import app

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


def assert_refused(result: Any, *said: str) -> None:
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for text in said:
        assert text in last


def test_show_prints_the_outline(gatewise: Gatewise) -> None:
    result = gatewise("show", "one.json")
    assert result.exit_code == 0, result.output
    assert "review by a clinician" in result.stdout.splitlines()[0]
    assert "if all:\n  - adults with gout | clinical manifestation | acute flare" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("format", ["text", "json", "mermaid", "svg", "html", "fhir"])
def test_show_writes_every_format(gatewise: Gatewise, tmp_path: Path, format: str) -> None:
    if format == "fhir":
        pytest.importorskip("fhir.resources")
    result = gatewise("show", "sample:guidelines", "--record", 3, "--format", format, "--out", "made/tree")
    assert result.exit_code == 0, result.output
    assert result.stdout == "written: made/tree\n"
    content = (tmp_path / "made" / "tree").read_text(encoding="utf-8")
    assert content == gatewise("show", "sample:guidelines", "--record", 3, "-f", format).stdout
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["tree"]


def test_show_of_several_as_svg_fills_a_folder(gatewise: Gatewise, tmp_path: Path) -> None:
    result = gatewise("show", "good.json", "--format", "svg", "--out", "drawings")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "drawings").iterdir()) == ["record-0001.svg", "record-0002.svg"]
    assert_refused(gatewise("show", "good.json", "--format", "svg", "--out", "drawings"), "not empty")
    assert_refused(gatewise("show", "good.json", "--format", "svg"), "--record")


def test_show_goes_on_and_says_at_the_end_what_failed(gatewise: Gatewise, tmp_path: Path) -> None:
    result = gatewise("show", "mixed.json", "--format", "json", "--out", "made.json")
    assert_refused(result, "2 of the 4 records of mixed.json could not be shown: 2, 4")
    assert "failed: mixed.json, record 2, node 6: " in result.stderr
    assert "failed: mixed.json, record 4, node 1: " in result.stderr
    assert len(json.loads((tmp_path / "made.json").read_text())) == 2

    repaired = gatewise("show", "mixed.json", "--repair", "--format", "json")
    assert_refused(repaired, "1 of the 4 records of mixed.json could not be shown: 2")
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


def test_show_without_the_fhir_library_says_what_to_install(gatewise: Gatewise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fhir.resources", None)
    assert_refused(gatewise("show", "one.json", "--format", "fhir"), "pip install 'gatewise[mdt]'")


def test_evaluate_prints_a_table_or_json(gatewise: Gatewise, tmp_path: Path) -> None:
    (tmp_path / "pred.json").write_text(json.dumps([{"text": TEXT, "tree": gout()}, {"text": TEXT, "tree": [node("C")] * 9}]))
    result = gatewise("evaluate", "--gold", "good.json", "--pred", "pred.json")
    assert result.exit_code == 0, result.output
    for text in ("triplet", "node", "path", "0.6667", "tree accuracy: 0.5000", "tree edit ratio: 0.3333", "1 are no trees"):
        assert text in result.stdout
    values = json.loads(gatewise("evaluate", "--gold", "good.json", "--pred", "pred.json", "--json").stdout)
    assert values["triplet_f1"] == pytest.approx(2 / 3)
    assert values["malformed"] == 1
    assert values["n"] == 2


def test_evaluate_shows_errors_by_kind(gatewise: Gatewise, tmp_path: Path) -> None:
    wrong = gout()
    wrong[0]["triples"][0][2] = "flare"
    (tmp_path / "pred.json").write_text(json.dumps([{"text": TEXT, "tree": wrong}, {"text": TEXT, "tree": []}]))
    said = gatewise("evaluate", "--gold", "good.json", "--pred", "pred.json", "--errors").stdout
    rows = [line.split() for line in said.splitlines()]
    assert ["wrong", "span", "1", "1", "1"] in rows
    assert ["malformed", "1", "1", "1"] in rows
    assert "grouping" not in said
    values = json.loads(gatewise("evaluate", "--gold", "good.json", "--pred", "pred.json", "--errors", "--json").stdout)
    assert values["errors"]["wrong span"] == {"count": 1, "trees": 1, "alone": 1}
    assert "nothing is wrong" in gatewise("evaluate", "--gold", "good.json", "--pred", "good.json", "--errors").stdout
    assert "errors" not in json.loads(gatewise("evaluate", "--gold", "good.json", "--pred", "good.json", "--json").stdout)


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
