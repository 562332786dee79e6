"""``gatewise compress``: what it prints and writes, and one sentence for everything that is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel
from tiny_run import write_recipe, write_rows
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.runs.recipe_file import load_recipe
from gatewise.runs.run import train

Compress = Callable[..., Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter beside rows to measure on."""
    folder = tmp_path_factory.mktemp("saved")
    recipe = write_recipe(folder, training={"max_steps": 100, "batch_size": 8, "learning_rate": 0.02})
    write_rows(folder / "train.jsonl", 200, seed=1)
    write_rows(folder / "rows.jsonl", 240, seed=3)
    train(load_recipe(recipe), folder / "run")
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
    assert f"at most by {gap['high']:.4f} with 95% confidence ({gap['rows']} rows)" in result.stdout
    assert "written: small, with what engines need to know in serving.json" in result.stdout
    assert "valuing ranks on 20 rows by path_moments" in result.stderr
    assert not Path("small.work").exists()


def test_too_few_rows_have_no_bound(compress: Compress) -> None:
    words = ("--modules", "3", "--measure", "loss", "--limit", "40")
    result = compress(*words)
    assert result.exit_code == 0, result.output
    assert "nats a token, too few rows to say at most how much (30 rows)" in result.stdout
    shutil.rmtree("small")
    assert json.loads(compress(*words, "--json").stdout)["chosen"]["difference"]["high"] is None


@pytest.mark.parametrize("how", ["is another one", "fails"])
def test_what_must_not_be_merged_is_said(how: str, compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge_adapter(self: LoraModel, names: list[str]) -> None:
        if how == "fails":
            raise NotImplementedError
        with torch.no_grad():
            self.model.lm_head.weight.mul_(2)

    monkeypatch.setattr(LoraModel, "merge_adapter", merge_adapter)
    result = compress("--modules", "3", "--measure", "loss")
    assert result.exit_code == 0, result.output
    told = "PEFT cannot" if how == "fails" else "the model is another one then, as where embeddings are tied"
    assert f"do not merge it: {told}" in result.stdout


def test_json_is_all_of_stdout(compress: Compress) -> None:
    result = compress("--parameters", "0.2k", "--rank-cap", "1", "--order", "singular", "--measure", "loss", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["out"] == "small"
    assert told["chosen"]["size"]["parameters"] <= 200
    assert told["chosen"]["size"]["largest"] == 1
    assert (told["order"], told["measure"]) == ("singular", "loss")


def test_recovery_is_shown(compress: Compress, saved: Path) -> None:
    result = compress("--modules", "2", "--recover", saved / "train.jsonl", "--steps", "3", "--learning-rate", "0.01")
    assert result.exit_code == 0, result.output
    assert "2 of 14 modules, after recovery" in result.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--modules", "3", "--tolerance", "0.1"], "--modules was given with --tolerance, which looks for a size: leave one of"),
        (["--modules", "3", "--least", "modules"], "--modules was given with --least, which looks for a size: leave one of"),
        (["--parameters", "many"], "--parameters is 'many': expected a number such as 500000, 500k or 1.5M"),
        (["--recover-split", "train"], "--recover-split was given without --recover, the rows to train on"),
        (["--steps", "3"], "--steps was given without --recover, the rows to train on: add them or leave it out"),
        (["--data", ""], "the data's name is empty: give a file, sample:NAME or a data set's name"),
        (["--recover", ""], "the data's name is empty: give a file, sample:NAME or a data set's name"),
        (["--tolerance", "0.001"], "rows to measure on, and a tolerance of 0.001 cannot be shown with fewer than"),
        (["--parameters", "1k", "--modules", "2"], "parameters and modules were both given as targets: give one of them"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(compress: Compress, words: list[str], sentence: str) -> None:
    result = compress(*words)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert not Path("small").exists()
