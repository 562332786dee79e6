"""``gatewise train --dry-run``: what it tells is true, and it writes nothing."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import write_recipe
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.runs.dry_run import dry_run
from gatewise.runs.recipe import load_recipe
from gatewise.runs.run import train

SILENT = Console(quiet=True)


def test_it_tells_what_the_run_would_be_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, "alora", data={"train": "train.jsonl", "dev": "dev.jsonl", "max_length": 21, "held_out": 5})
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    result = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "--set", "template.prompt={text}:"])
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.rglob("*")) == before
    lines = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines() if line}
    # One token a byte: the text, a colon, " good" or " bad", and the end.
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lengths = sorted(len(row["text"]) + 1 + 1 + len(row["label"]) + 1 for row in rows)
    longer = sum(length > 21 for length in lengths)
    at = [lengths[round(share * 25)] for share in (0, 0.5, 0.9, 1)]
    assert 0 < longer < 26
    assert lines["train"] == ["train", "21", *map(str, at), str(longer)]
    assert lines["held out"][-1] == "5"
    shown = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(shown) == 2
    assert all(line.endswith((":[[ good</s>]]", ":[[ bad</s>]]")) for line in shown)
    done = train(load_recipe(recipe), tmp_path / "out", console=SILENT)
    assert lines["adapter"][1] == f"{done.parameters['adapter']:,}"
    assert lines["steps"][1] == f"{done.steps},"
    assert "about" in lines["time"]
    assert "about" in lines["memory"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_is_trained_is_green(family: str, tmp_path: Path) -> None:
    shown = io.StringIO()
    recipe = load_recipe(write_recipe(tmp_path, family=family))
    dry_run(recipe, tmp_path / "out", Console(file=shown, force_terminal=True, color_system="standard", width=200), SILENT)
    end = "</s>" if family == "llama" else ""
    assert sum(shown.getvalue().count(f"\x1b[1;32m {label}{end}\x1b[0m") for label in ("good", "bad")) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["launch.processes=3"], "training.batch_size is 4, which 3 processes cannot share: give a multiple of 3"),
        (["launch.strategy=fsdp2", "training.lora_plus_ratio=2"], "training.lora_plus_ratio does not go with FSDP"),
        (["launch.strategy=zero2", "training.lora_plus_ratio=2"], "training.lora_plus_ratio does not go with DeepSpeed"),
        (["launch.proceses=3"], "launch.proceses is not a known key"),
    ],
)
def test_what_several_processes_would_refuse_is_refused_before_the_model_is_loaded(
    settings: list[str], said: str, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, model="not-there"), ["training.batch_size=4", *settings])
    with pytest.raises(GatewiseError, match=said):
        dry_run(recipe, tmp_path / "out", SILENT, SILENT)
