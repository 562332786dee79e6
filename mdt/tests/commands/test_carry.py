"""``gatewise mdt carry``: what it does, shows and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import read_trees
from gatewise_mdt.review.passage import Version
from gatewise_mdt.review.session import Session
from mdt_trees import node, triple
from refusals import assert_refused
from typer.testing import CliRunner

from gatewise.cli.main import app

pytest.importorskip("markdown_it")

OLD = """# Adults with gout

## Flares

For an acute flare, give colchicine 0.5 mg twice daily.

## Kidneys

With renal failure, do not give naproxen. Refer to a nephrologist.

## Diet

Advise to drink less beer.
"""
NEW = OLD.replace("0.5 mg", "1 mg").replace(
    "## Diet\n\nAdvise to drink less beer.", "## Surgery\n\nRefer to a rheumatologist before it."
)


@pytest.fixture(autouse=True)
def reviewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """old.md, whose three passages were approved, and new.md."""
    monkeypatch.chdir(tmp_path)
    Path("old.md").write_text(OLD)
    Path("new.md").write_text(NEW)
    session = Session.open("old.md", reviewer="Ada")
    for number, passage in enumerate(session.passages, start=1):
        session.begin(number, passage.version)
        session.edit(number, 1, "add_triple", {"node": 0, "parts": ["adults with gout", "therapeutic schedule", f"step {number}"]})
        session.approve(number, 2)
    session.save()
    session.close()
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["mdt", "carry", *words])


SAID = """3 passages, 3 trees of the older review:
  1 with the same text: 1 approved, 0 corrected, 0 to review
  1 changed, 1 new, 1 gone

changed: passage 1; the old tree is a draft to review
   Adults with gout@Flares: For an acute flare, give colchicine [-0.5 mg-]{+1 mg+} twice daily.

new: passage 3
   Adults with gout@Surgery: Refer to a rheumatologist before it.

gone: record 3 of the older review
   Adults with gout@Diet: Advise to drink less beer.
"""


def test_it_carries_over_and_shows_what_changed(reviewed: Path) -> None:
    result = run("old.md", "new.md", "--reviewer", "Ben")
    assert result.exit_code == 0, result.output
    assert result.stdout == SAID + "written: new.md.review.jsonl (1 tree)\n"
    (saved,) = read_trees("new.md.review.jsonl").records
    assert saved.text.startswith("Adults with gout@Kidneys: With renal failure")
    assert saved.more["review"] == "approved"
    assert saved.more["carried"]["from"] == "old.md.review.jsonl"


def test_a_dry_run_writes_nothing(reviewed: Path) -> None:
    before = sorted(reviewed.iterdir())
    result = run("old.md.review.jsonl", "new.md", "--dry-run")
    assert (result.exit_code, result.stdout) == (0, SAID)
    assert sorted(reviewed.iterdir()) == before


def test_a_dry_run_knows_what_was_done_in_the_newer_review() -> None:
    session = Session.open("new.md", reviewer="Ben")
    session.begin(2, session.passage(2).version)
    session.put(1, Version([node("D", triple("rest", "therapeutic schedule"))], "drafted"))
    session.remove(3)
    session.close()
    files = {file: file.read_bytes() for file in Path().iterdir()}
    dry = run("old.md", "new.md", "--dry-run", "--json").stdout
    assert {file: file.read_bytes() for file in Path().iterdir()} == files
    assert dry == run("old.md", "new.md", "--json").stdout
    assert [json.loads(dry)[name] for name in ("kept", "beside", "approved", "new")] == [[2], [1], [], []]


def test_an_older_tree_that_has_no_place_in_the_newer_review_is_named() -> None:
    session = Session.open("new.md", reviewer="Ben")
    session.begin(2, session.passage(2).version)
    session.close()
    result = run("old.md", "new.md")
    assert "kept: passage 2; the older review has another tree for it\n   record 2: Adults with gout@Kidneys" in result.stdout
    assert json.loads(run("old.md", "new.md", "--json").stdout)["unlike"] == [{"passage": 2, "record": 2}]


def test_an_old_tree_that_lies_beside_a_newer_draft_already_is_told_of() -> None:
    session = Session.open("new.md", reviewer="Ben")
    old = read_trees("old.md.review.jsonl").records[0].tree.to_preorder()
    session.put(1, Version([node("D", triple("rest", "therapeutic schedule"))], "drafted"))
    session.put(1, Version(old, "drafted"), 0)
    session.close()
    result = run("old.md", "new.md")
    assert result.exit_code == 0, result.output
    assert "changed: passage 1; the old tree lies beside the newer draft" in result.stdout


def test_the_trees_of_two_reviewers_stay_and_that_is_said() -> None:
    session = Session.open("new.md", reviewer="Cy")
    for number in (1, 2):
        session.put(number, Version([node("D", triple("rest", "therapeutic schedule"))], "drafted"))
        session.put(number, Version([node("D")], "drafted", of="Ben"), 0)
    session.close()
    result = run("old.md", "new.md")
    assert "  2 that have the trees of two reviewers to choose from, and stay\n" in result.stdout
    assert "reviewed here already" not in result.stdout
    assert "kept: passage 2; the older review has another tree for it" in result.stdout
    session = Session.open("new.md")
    assert [one.beside and one.beside.of for one in session.passages[:2]] == ["Ben", "Ben"]
    session.close()


def test_drafts_of_the_older_review_are_not_forgotten_without_a_word(reviewed: Path) -> None:
    run("old.md", "new.md")  # the first passage changed, and has a draft there
    Path("third.md").write_text(NEW)
    said = "new.md.review.jsonl lacks 1 draft of its review that nobody approved or corrected"
    assert said in run("new.md", "third.md").stderr
    assert "draft" not in run("old.md", "third.md").stderr


def test_a_text_that_is_the_same_is_not_called_changed() -> None:
    older = [json.loads(line) for line in Path("old.md.review.jsonl").read_text().splitlines()]
    older[0]["text"] = older[1]["text"]
    Path("old.md.review.jsonl").write_text("".join(json.dumps(one) + "\n" for one in older))
    said = run("old.md", "new.md").stdout
    assert "several trees, of which nothing says which is of passage 2; the old tree is a draft to review" in said
    assert "changed: passage" not in said
    assert "gone: record 2" in said


def test_json() -> None:
    made = json.loads(run("old.md", "new.md", "--json").stdout)
    assert (made["approved"], made["changed"], made["new"]) == ([2], [1], [3])
    assert ["gone", "0.5 mg"] in made["differences"]["1"]
    assert [one["number"] for one in made["gone"]] == [3]


def test_again_it_says_what_stays() -> None:
    run("old.md", "new.md")
    result = run("old.md", "new.md")
    assert result.exit_code == 0
    assert "1 that was reviewed here already, and stays" in result.stdout
    assert "1 changed, 1 new, 1 gone" in result.stdout


def test_it_says_that_the_older_review_has_more_than_its_file() -> None:
    session = Session.open("old.md", reviewer="Ada")
    session.edit(3, session.passage(3).version, "remove_triple", {"node": 0, "triple": 0})
    session.close()
    assert "lacks 1 of the changes of its review" in run("old.md", "new.md").stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.pdf", "new.md"], "none.pdf.review.jsonl: there is no such file"),
        (["none.jsonl", "new.md"], "none.jsonl: there is no such file"),
        (["old.md", "none.md"], "none.md: there is no such file"),
        (["old.md", "old.md.review.jsonl"], "name the newer guideline after it"),
        (["old.md", "old.md"], "would be changed"),
        (["old.md", "new.md", "--out", "old.md.review.jsonl"], "would be changed"),
        (["old.md", "new.md", "--out", "x.txt"], "expected .jsonl"),
        (["old.md", "new.md", "--out", "x.txt", "--dry-run"], "expected .jsonl"),
    ],
)
def test_refused_in_a_sentence(reviewed: Path, words: list[str], said: str) -> None:
    before = {file: file.read_bytes() for file in reviewed.iterdir()}
    assert_refused(run(*words), said)
    assert {file: file.read_bytes() for file in reviewed.iterdir()} == before


def test_a_broken_record_of_the_older_review_is_named(reviewed: Path) -> None:
    with Path("old.md.review.jsonl").open("a") as file:
        file.write("{}\n")
    assert_refused(run("old.md", "new.md"), 'record 4: the key "text" is missing')
    assert not Path("new.md.review.jsonl").exists()
