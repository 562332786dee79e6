"""``gatewise mdt agree``: what it prints and refuses, and that no adjudicator's work is lost."""

import copy
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import read_trees
from gatewise_mdt.review.session import Session
from gatewise_mdt.review.shown import passage_json
from mdt_trees import TEXT, gout, node, triple
from refusals import assert_refused
from typer.testing import CliRunner

from gatewise.cli.main import app

Gatewise = Callable[..., Any]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "quality.md"
THIRD = "third.review.jsonl"


def items(by: str, trees: list[list[dict[str, Any]]], states: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "text": f"{TEXT} Passage {i}.",
            "tree": tree,
            "review": state,
            "source": "g.pdf",
            "reviewed": {"by": by, "at": "2026-11-27"},
        }
        for i, (tree, state) in enumerate(zip(trees, states, strict=True), start=1)
    ]


@pytest.fixture
def gatewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gatewise:
    """gatewise("a.jsonl", ...) -> the result of `gatewise mdt agree a.jsonl ...`, in a folder with the reviews of Ada and Ben.

    They differ in the second of three passages; Ada has one more.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    other = copy.deepcopy(gout())
    other[1]["triples"][0][2] = "low-dose colchicine"
    ada = items("Ada", [gout()] * 4, ["approved", "approved", "corrected", "approved"])
    ben = items("Ben", [gout(), other, gout()], ["approved"] * 3)
    for name, held in (("ada", ada), ("ben", ben)):
        (tmp_path / f"{name}.review.jsonl").write_text("".join(json.dumps(one) + "\n" for one in held))
    return lambda *words: CliRunner().invoke(app, ["mdt", "agree", *map(str, words)])


BOTH = ("ada.review.jsonl", "ben.review.jsonl")


def test_agree_prints_measures_and_what_differs(gatewise: Gatewise) -> None:
    result = gatewise(*BOTH)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Ada and Ben: 3 passages in both, 2 with the same tree\n")
    # Triples: 7 + 6 + 7 of 21 are shared; trees: 2 of 3.
    for said in ("F1 of triples", "0.952", "same trees", "0.667", "kappa of characters", "Only Ada has record 4"):
        assert said in result.stdout
    words = "adults with gout | drug therapy |"
    differs = f"\nother dose: 1\n  2 (amount): {TEXT[:69]}…\n     Ada, node 2: {words} colchicine\n"
    differs += f"     Ben, node 2: {words} low-dose colchicine\n"
    assert result.stdout.partition("F1 of triples")[0].count(differs) == 1  # what differs comes before the figures
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_agree_prints_json_and_nothing_else(gatewise: Gatewise, tmp_path: Path) -> None:
    values = json.loads(gatewise(*BOTH, "--json").stdout)["pairs"]
    assert len(values) == 1
    assert values[0]["triplet_f1"] == pytest.approx(20 / 21)
    assert values[0]["a"] == {"name": "Ada", "file": "ada.review.jsonl"}
    assert values[0]["intervals"]["triplet_f1"]["high"] == 1
    assert [one["same"] for one in values[0]["by_passage"]] == [True, False, True]
    assert values[0]["only_a"][0]["record"] == 4
    with_third = gatewise(*BOTH, "--json", "--adjudicate", THIRD)
    assert json.loads(with_third.stdout)["pairs"] == values
    assert "to adjudicate: gatewise mdt review third.review.jsonl" in with_third.stderr


def test_agree_takes_more_files_in_pairs(gatewise: Gatewise) -> None:
    words = (*BOTH, "third.jsonl")
    Path("third.jsonl").write_text(Path(BOTH[0]).read_text().replace("Ada", "Cy"))
    pairs = json.loads(gatewise(*words, "--json").stdout)["pairs"]
    assert [(one["a"]["name"], one["b"]["name"]) for one in pairs] == [("Ada", "Ben"), ("Ada", "Cy"), ("Ben", "Cy")]
    assert [one["tree_agreement"] for one in pairs] == pytest.approx([2 / 3, 1, 2 / 3])
    assert gatewise(*words).stdout.count("same trees") == 3
    assert_refused(gatewise(*words, "--adjudicate", THIRD), "--adjudicate takes two files, and 3 were given")


def test_agree_refuses_in_one_sentence(gatewise: Gatewise, tmp_path: Path) -> None:
    ada, _ = BOTH
    assert_refused(gatewise(ada), "ada.review.jsonl is the only file, expected two")
    assert_refused(gatewise(ada, "none.jsonl"), "none.jsonl: there is no such file")
    assert_refused(gatewise(ada, "sample:guidelines"), "Ada and sample:guidelines have no passage in common")
    (tmp_path / "texts.jsonl").write_text('{"text": "x"}\n')
    assert_refused(gatewise(ada, "texts.jsonl"), 'texts.jsonl, record 1: the key "tree" is missing')
    (tmp_path / "empty.jsonl").write_text("")
    assert_refused(gatewise(ada, "empty.jsonl"), "empty.jsonl has no records")


def test_malformed_records_are_named_and_left_out(gatewise: Gatewise, tmp_path: Path) -> None:
    with (tmp_path / BOTH[1]).open("a") as stream:
        stream.write("nonsense\n" + json.dumps({"text": TEXT, "tree": [node("D", triple("x"), joined="and")]}) + "\n")
    result = gatewise(*BOTH, "--json", "--strict", "--adjudicate", THIRD)
    assert_refused(result, "2 of the 5 records of ben.review.jsonl were left out: 4, 5", "; third.review.jsonl was not prepared")
    assert not Path(THIRD).exists()
    assert "failed: ben.review.jsonl, line 4: not valid JSON" in result.stderr
    assert "failed: ben.review.jsonl, record 5, node 1: " in result.stderr
    assert json.loads(result.stdout)["pairs"][0]["passages"] == 3
    taken = gatewise(*BOTH, "--json").stderr
    assert 'note: ben.review.jsonl: once "and" or "or" over at most one triple read as "null"; --strict refuses such trees' in taken


# Adjudication ---------------------------------------------------------------------------------------------------------


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_adjudication_begins_with_both_trees(gatewise: Gatewise) -> None:
    result = gatewise(*BOTH, "--adjudicate", THIRD, "--reviewer", "Cy")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(
        "written: third.review.jsonl: passages to decide: 1, with the same tree: 2 (1 approved by both), that only one has: 1\n"
        "to adjudicate: gatewise mdt review third.review.jsonl\n"
    )
    # Who has which tree stands in the history from the start, beside the name of whoever prepared it.
    history = rows("third.review.history.jsonl")
    assert [(row["action"], row["reviewer"], row.get("comment")) for row in history] == [
        ("open", "Cy", None),
        ("add", "Cy", "the tree of Ada and Ben"),
        ("add", "Cy", "Ada's tree; beside it Ben's tree"),
        ("add", "Cy", "the tree of Ada and Ben"),
        ("add", "Cy", "Ada's tree; there is no other"),
        ("save", "Cy", None),
    ]
    saved = rows(THIRD)
    assert len(saved) == 1
    by = [{"by": name, "at": "2026-11-27"} for name in ("Ada", "Ben")]
    assert saved[0]["adjudicated"] == {"files": list(BOTH), "names": ["Ada", "Ben"], "reviewed": by, "agreed": True}
    assert saved[0]["reviewed"] == by[0]
    assert (saved[0]["review"], saved[0]["source"], saved[0]["tree"]) == ("approved", "g.pdf", gout())

    session = Session.open(THIRD)
    try:
        assert [passage.now.state for passage in session.passages] == ["approved", "drafted", "drafted", "drafted"]
        assert [passage.now.reviewed for passage in session.passages] == [by[0], None, None, None]
        assert [passage.beside is not None for passage in session.passages] == [False, True, False, False]
        differing = session.passages[1]
        assert (differing.now.nodes, differing.beside and differing.beside.nodes) == (gout(), rows(BOTH[1])[1]["tree"])
        assert [passage.more["adjudicated"]["agreed"] for passage in session.passages] == [True, False, True, False]
        shown = [passage_json(passage) for passage in session.passages]
        assert "low-dose" in shown[1]["extraction"]["drawing"]
        assert [one["adjudicated"] for one in shown[1:]] == [
            {"names": ["Ada", "Ben"], "agreed": False},
            {"names": ["Ada", "Ben"], "agreed": True},
            {"names": ["Ada"], "agreed": False},
        ]
        assert shown[1]["extraction"]["of"] == "Ben"
        assert [(one["kind"], one["what"]) for one in shown[1]["extraction"]["differences"]] == [("other dose", "amount")]
    finally:
        session.close()


def test_a_million_units_and_a_thousandth_of_one_are_decided_on_by_the_third(gatewise: Gatewise) -> None:
    """The measures, which are published ones, leave case out."""
    for name, dose in zip(BOTH, ("10 MU", "10 mU"), strict=True):
        tree = [
            node("D", triple(dose, "dosage and administration", "colchicine"), triple("Colchicine", "drug therapy"), joined="and")
        ]
        if dose == "10 mU":
            tree[0]["triples"][1][2] = "colchicine"  # which is the same for any reader
        same = [node("D", triple("rest" if dose == "10 mU" else "Rest", "therapeutic schedule"))]
        held = items(name, [tree, same], ["approved", "approved"])
        Path(name).write_text("".join(json.dumps(one) + "\n" for one in held))
    result = gatewise(*BOTH, "--adjudicate", THIRD)
    assert "passages to decide: 1, with the same tree: 1 (1 approved by both)" in result.stdout
    assert [row["text"] for row in rows(THIRD)] == [f"{TEXT} Passage 2."]
    session = Session.open(THIRD)
    assert [passage.now.state for passage in session.passages] == ["drafted", "approved"]
    assert [passage.beside is not None for passage in session.passages] == [True, False]
    assert [passage.more["adjudicated"]["agreed"] for passage in session.passages] == [False, True]
    session.close()


def test_what_an_adjudicator_decides_is_kept_and_can_be_compared(gatewise: Gatewise) -> None:
    gatewise(*BOTH, "--adjudicate", THIRD)
    session = Session.open(THIRD, reviewer="Cy")
    taken = session.take(2, session.passage(2).version, session.passage(2).extractions)
    session.approve(2, taken.version)
    session.approve(3, session.passage(3).version)
    session.save()
    session.close()
    # Opened again, everything is there, and the passage that only one had is still to review.
    session = Session.open(THIRD)
    assert [passage.now.state for passage in session.passages] == ["approved", "approved", "approved", "drafted"]
    session.close()
    decided = read_trees(THIRD).records
    assert [(record.reviewed or {})["by"] for record in decided] == ["Ada", "Cy", "Cy"]
    assert json.loads(gatewise(THIRD, BOTH[1], "--json").stdout)["pairs"][0]["tree_agreement"] == 1
    against_ada = gatewise(THIRD, BOTH[0])
    assert against_ada.exit_code == 0, against_ada.output
    assert (
        "third.review.jsonl, node 2: adults with gout | drug therapy | low-dose colchicine\n     Ada, node 2: "
        in against_ada.stdout
    )


def test_an_adjudicators_files_are_never_written_over(gatewise: Gatewise, tmp_path: Path) -> None:
    gatewise(*BOTH, "--adjudicate", THIRD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert_refused(gatewise(*BOTH, "--adjudicate", THIRD), "third.review.jsonl is there already", "name another file")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for file in BOTH:
        assert_refused(gatewise(*BOTH, "--adjudicate", file), f"{file} is there already")
    assert_refused(gatewise(*BOTH, "--adjudicate", "third.json"), "expected .jsonl")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# The documentation ----------------------------------------------------------------------------------------------------


def test_the_page_on_quality_prints_what_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands, in order: what the page shows of each are lines of what it prints, in that order; some end with "…"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    page = DOCS.read_text(encoding="utf-8")
    [(show, sed)] = re.findall(r"```bash\n(.*)\n(sed .*)\n```", page)
    shown = re.findall(r"^    (gatewise mdt [^\n]*)\n\n```text\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    assert len(shown) == 3
    for number, (command, text) in enumerate([(show, ""), *shown]):
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code in (0, 1), result.output
        printed = iter(result.output.splitlines())
        lost = [line for line in text.splitlines() if not any(one.strip().startswith(line.strip(" …")) for one in printed)]
        assert lost == [], result.output
        if number == 0:
            subprocess.run(["bash", "-c", sed], check=True)
