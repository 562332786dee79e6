"""``gatewise export --static``: what it prints and writes, and one sentence for everything that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_adapter, write_recipe, write_rows
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.runs.recipe_file import load_recipe
from gatewise.runs.run import train

Export = Callable[..., Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed adapter that was trained, a plain one, and rows."""
    folder = tmp_path_factory.mktemp("saved")
    train(load_recipe(write_recipe(folder, "milora")), folder / "run")
    write_adapter(folder / "plain", folder / "llama")
    write_rows(folder / "rows.jsonl", 50, seed=3)
    return folder


@pytest.fixture
def export(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """export(...) -> the result of ``gatewise export ADAPTER out ...``, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *words: CliRunner().invoke(app, ["export", str(saved / "run" / "adapter"), "out", *map(str, words)])


def test_it_says_what_moved_what_is_left_and_what_is_lost(export: Export, saved: Path) -> None:
    result = export("--static", "--data", saved / "rows.jsonl")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("out/static.json").read_text())
    words = [line.split() for line in result.stdout.splitlines() if line.split()]
    assert sum(line[-1] == "taken" for line in words) == 1
    modal, gap = report["choice"]["modal"].values(), report["loss"]
    assert f"routing: {sum(modal) / 2:.0%} of 25 prompts make the choice that most of them make" in result.stdout
    assert f"left: {report['chosen']['modules']} of 14 modules, of which a prompt kept 4; " in result.stdout
    assert f"static is worse by {gap['mean']:.4f} nats a token, too few rows to say between what (25 rows)" in result.stdout
    assert (gap["low"], gap["high"]) == (None, None)
    gap = report["right"]
    interval = f"{gap['mean']:.4f} of the answers, {gap['low']:.4f} to {gap['high']:.4f} with 90% confidence (25 rows)"
    assert f"static is worse by {interval}" in result.stdout
    assert "right answers: routed " in result.stdout
    assert "written: out, with what engines need to know in serving.json" in result.stdout
    again = CliRunner().invoke(app, ["eval", "out", "--data", str(saved / "rows.jsonl"), "--json"])
    assert json.loads(again.stdout)["n"] == 50


def test_json_is_all_of_stdout(export: Export, saved: Path) -> None:
    result = export("--static", "--data", saved / "rows.jsonl", "--modules", 3, "--limit", 44, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["out"], told["chosen"]["modules"], told["choice"]["prompts"]) == ("out", 3, 22)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--static", "--static was given without --data: name rows like those of its use"),
        ("--static --data DATA --padded", "--padded was given with --static: export what --static has written once more"),
        ("--static --data DATA --rank 4", "--rank was given with --static"),
        ("--data DATA", "--data was given without --static, where it means nothing"),
        ("--modules 3", "--modules was given without --static"),
        ("--template-prompt {text}", "--template-prompt was given without --static"),
        ("--device cpu", "--device was given without --static"),
        ("--json", "--json was given without --static"),
        ("--static --data DATA --modules 3 --share 0.5", "modules and share were both given"),
        ("--static --data DATA --measure loss", "--measure was given without --tolerance"),
        ("--static --data DATA --limit 30", "rows.jsonl has 30 rows, and of those that choose modules none may measure"),
        ("--static --data DATA --tolerance 0.1", "and a tolerance of 0.1 cannot be shown with fewer than 30: give more rows"),
        ("--static --data none.jsonl", "none.jsonl: there is no such file"),
        ("", "which chooses modules by the prompt"),
    ],
)
def test_what_is_wrong_is_one_sentence(words: str, sentence: str, export: Export, saved: Path) -> None:
    result = export(*words.replace("DATA", str(saved / "rows.jsonl")).split())
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert result.stdout == ""
    assert not Path("out").exists()


def test_other_adapters_and_folders_that_are_taken(export: Export, saved: Path, tmp_path: Path) -> None:
    words = ["export", str(saved / "plain"), "out", "--static", "--data", str(saved / "rows.jsonl")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "expected a routed adapter (ROUTED_LORA, method milora)" in result.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = export("--static", "--data", saved / "rows.jsonl")
    assert result.exit_code == 2
    assert "out is not empty" in result.stderr
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["mine.txt"]
