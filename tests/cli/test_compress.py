"""``gatewise compress``: what it prints and writes, and one sentence for everything that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_recipe, write_rows
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.runs.recipe import load_recipe
from gatewise.runs.run import train

Compress = Callable[..., Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter beside rows to measure on."""
    folder = tmp_path_factory.mktemp("saved")
    recipe = write_recipe(folder, training={"max_steps": 100, "batch_size": 8, "learning_rate": 0.02})
    write_rows(folder / "train.jsonl", 200, seed=1)
    write_rows(folder / "rows.jsonl", 240, seed=3)
    train(load_recipe(recipe, ["data.held_out=0"]), folder / "run")
    return folder


@pytest.fixture
def compress(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compress:
    """compress(...) -> the result of ``gatewise compress ADAPTER --data ROWS --out small ...``, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    given = [
        "compress",
        str(saved / "run" / "adapter"),
        "--data",
        str(saved / "rows.jsonl"),
        "--out",
        "small",
        "--score-rows",
        "20",
    ]
    return lambda *words: CliRunner().invoke(app, [*given, *map(str, words)])


def test_it_says_what_is_left_and_how_sure_it_is(compress: Compress) -> None:
    result = compress("--tolerance", "0.05", "--measure", "loss")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("small/compress.json").read_text())
    chosen, gap = report["chosen"], report["chosen"]["difference"]
    lines = [line.split() for line in result.stdout.splitlines() if line.split()]
    assert ["smaller", str(chosen["size"]["parameters"]), str(chosen["size"]["modules"])] in [line[:3] for line in lines]
    assert f"at most by {gap['high']:.4f} with 95% confidence ({gap['rows']} rows, nats a token)" in result.stdout
    assert "written: small, with what engines need to know in serving.json" in result.stdout
    assert "valuing ranks on 20 rows by path_moments" in result.stderr
    assert not Path("small.work").exists()


def test_json_is_all_of_stdout(compress: Compress) -> None:
    result = compress("--parameters", "0.2k", "--order", "singular", "--measure", "loss", "--limit", "40", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["chosen"]["size"]["parameters"] <= 200
    assert told["chosen"]["difference"]["high"] is None  # of so few rows
    assert (told["order"], told["measure"]) == ("singular", "loss")


def test_recovery_is_shown(compress: Compress, saved: Path) -> None:
    result = compress("--modules", "2", "--recover", saved / "train.jsonl", "--steps", "3", "--learning-rate", "0.01")
    assert result.exit_code == 0, result.output
    assert "2 of 14 modules, after recovery" in result.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--modules", "3", "--tolerance", "0.1"], "--modules asks for a size: leave --tolerance out"),
        (["--parameters", "1k", "--modules", "2"], "--parameters asks for a size: leave --modules out"),
        (["--parameters", "many"], "--parameters is 'many': expected a number such as 500000, 500k or 1.5M"),
        (["--steps", "3"], "--steps was given without --recover, the rows to train on: add them or leave it out"),
        (["--tolerance", "0.001"], "a tolerance of 0.001 cannot be shown with fewer than"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(compress: Compress, words: list[str], sentence: str) -> None:
    result = compress(*words)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert not Path("small").exists()
