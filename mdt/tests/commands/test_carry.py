"""``gatewise mdt carry``: what it does, shows and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import read_trees
from gatewise_mdt.review.session import Session
from refusals import assert_refused
from review_serving import tick_all
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
        session.approve(number, tick_all(session, number))
    session.save()
    session.close()
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["mdt", "carry", *words])


SAID = """3 passages, 3 trees of the older review:
  1 with the same text, 1 of them approved
  1 changed, 1 new, 1 gone

changed: passage 1; the old tree is a draft to review, or lies beside a newer draft
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


def test_an_older_tree_that_has_no_place_in_the_newer_review_is_named() -> None:
    session = Session.open("new.md", reviewer="Ben")
    session.begin(2, session.passage(2).version)
    session.close()
    result = run("old.md", "new.md")
    assert "kept: passage 2; the older review has another tree for it\n   record 2: Adults with gout@Kidneys" in result.stdout
    assert json.loads(run("old.md", "new.md", "--json").stdout)["unlike"] == [{"passage": 2, "record": 2}]


def test_drafts_of_the_older_review_are_not_forgotten_without_a_word(reviewed: Path) -> None:
    run("old.md", "new.md")  # the first passage changed, and has a draft there
    Path("third.md").write_text(NEW)
    assert "the older review has trees for 1 passages that are not in new.md.review.jsonl" in run("new.md", "third.md").stderr
    assert "lacks" not in run("old.md", "third.md").stderr


def test_a_text_that_is_the_same_is_not_called_changed() -> None:
    older = [json.loads(line) for line in Path("old.md.review.jsonl").read_text().splitlines()]
    older[0]["text"] = older[1]["text"]
    Path("old.md.review.jsonl").write_text("".join(json.dumps(one) + "\n" for one in older))
    said = run("old.md", "new.md").stdout
    assert "several old trees have the text of passage 2;" in said
    assert "changed: passage" not in said
    assert "gone: record 2" in said


def test_json() -> None:
    made = json.loads(run("old.md", "new.md", "--json").stdout)
    assert (made["same"], made["changed"], made["new"]) == ([2], [1], [3])
    assert ["gone", "0.5 mg"] in made["differences"]["1"]
    assert [one["number"] for one in made["gone"]] == [3]


def test_again_it_says_what_stays() -> None:
    run("old.md", "new.md")
    result = run("old.md", "new.md")
    assert result.exit_code == 0
    assert "1 where the newer review stays as it is" in result.stdout
    assert "1 changed, 1 new, 1 gone" in result.stdout


def test_it_says_that_the_older_review_has_more_than_its_file() -> None:
    session = Session.open("old.md", reviewer="Ada")
    session.edit(3, session.passage(3).version, "remove_triple", {"node": 0, "triple": 0})
    session.close()
    assert "has trees for 1 passages that are not in old.md.review.jsonl" in run("old.md", "new.md").stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.pdf", "new.md"], "none.pdf.review.jsonl: there is no such file"),
        (["none.jsonl", "new.md"], "none.jsonl: there is no such file"),
        (["old.md", "none.md"], "none.md: there is no such file"),
        (["old.md", "old.md.review.jsonl"], "old.md.review.jsonl is the older review: name the newer guideline after"),
        (["old.md", "old.md"], "would be changed"),
        (["old.md", "new.md", "--out", "old.md.review.jsonl"], "would be changed"),
        (["old.md", "new.md", "--out", "x.txt"], "expected .jsonl"),
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
