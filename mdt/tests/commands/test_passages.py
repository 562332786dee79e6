"""``gatewise mdt passages``: what will be read, as text and as JSON, and what is said of a file that cannot be."""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gatewise.cli.main import app

pytest.importorskip("markdown_it")

SOURCE = "<!-- dose? -->\n# Adults with asthma\n\n## Renal failure\n\nDo not give NSAIDs.\n\n"
SOURCE += "| Drug | Dose |\n|---|---|\n| a\x1b | 5 mg |\n"


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "guide.md").write_text(SOURCE)
    return str(tmp_path / "guide.md")


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["mdt", "passages", *words])
    return result.exit_code, result.stdout, result.stderr


def test_it_shows_what_a_model_will_read(file: str) -> None:
    code, said, noted = run(file)
    assert code == 0
    assert said.splitlines() == [
        f"{file}: 1 passage",
        "",
        "1. line 6, characters 33 to 74",
        "   headings: Adults with asthma › Renal failure",
        "   population: Adults with asthma",
        "   Renal failure: Do not give NSAIDs. Drug: a. Dose: 5 mg.",
    ]
    assert 'a comment was left out: "dose?"' in noted


def test_json_holds_all_of_it(file: str) -> None:
    code, said, _ = run(file, "--json", "--population", "inpatients")
    made = json.loads(said)
    (only,) = made["passages"]
    assert code == 0
    assert made["document"] == file
    assert made["sha256"] == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert made["characters"] == 74
    assert "dose?" in made["notes"][0]
    assert only == {
        "passage_id": only["passage_id"],
        "number": 1,
        "text": "inpatients@Adults with asthma: Renal failure: Do not give NSAIDs. Drug: a\x1b. Dose: 5 mg.",
        "population": "inpatients",
        "passage": "Adults with asthma: Renal failure: Do not give NSAIDs. Drug: a\x1b. Dose: 5 mg.",
        "headings": ["Adults with asthma", "Renal failure"],
        "place": "line 6",
        "offsets": [33, 74],
        "notes": [],
    }


def test_a_note_that_holds_again_is_said_once(tmp_path: Path) -> None:
    rows = "\n".join(f"| naproxen {number} | {'rest ' * 90}|" for number in range(3))
    (tmp_path / "a.md").write_text(f"# Gout\n\n| Drug | Do | Never |\n|---|---|---|\n{rows}\n")
    _, said, _ = run(str(tmp_path / "a.md"))
    notes = [line.strip() for line in said.splitlines() if "note: " in line]
    assert notes == [
        'note: headers of the table were left out, as nothing stands under: "Never"',
        "note: as under 1",
        "note: as under 1",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["none.pdf"], "there is no such file"), (["a.rtf"], "there is no such file"), (["."], "cannot be read")],
)
def test_what_cannot_be_read_is_said_in_a_sentence(words: list[str], expected: str) -> None:
    code, said, told = run(*words)
    assert (code, said) == (2, "")
    assert told.startswith("error: ")
    assert expected in told
    assert len(told.strip().splitlines()) == 1
