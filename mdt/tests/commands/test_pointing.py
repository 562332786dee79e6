"""`gatewise mdt` with the adapter of a model that points, and what all other commands say to one."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import load_extractor, read_trees
from gatewise_mdt.pointing.calibration import Calibration
from gatewise_mdt.pointing.extractor import PointingExtractor
from mdt_trees import TEXT
from pointing_models import RECORDS, write_pointing, write_trees
from refusals import assert_refused
from rich.console import Console
from tiny_run import weights, write_rows
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.runs import run
from gatewise.runs.recipe import load_recipe

Gatewise = Callable[..., Any]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    made = run.train(load_recipe(write_pointing(folder)), folder / "out", console=Console(quiet=True)).adapter
    note = json.loads((made / "gatewise.json").read_text())
    assert note["calibration"] is None  # of so few nodes
    (made / "gatewise.json").write_text(json.dumps({**note, "calibration": asdict(Calibration())}))
    return made


@pytest.fixture
def gatewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gatewise:
    """gatewise("mdt", "extract", ...) -> the result of the command in a folder with some files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Path("good.txt").write_text(TEXT)
    Path("long.md").write_text("# Adults with gout\n\nGive colchicine at once.\n\n# Children with gout\n\nGive naproxen to them.\n")
    write_trees(Path("gold.json"), RECORDS)
    write_rows(Path("rows.jsonl"), 6)
    return lambda *words, **more: CliRunner().invoke(app, [*map(str, words)], **more)


def test_extract_writes_trees_with_confidence(gatewise: Gatewise, adapter: Path) -> None:
    result = gatewise("mdt", "extract", "good.txt", "long.md", "--adapter", adapter, "-f", "json", "-o", "out.json")
    assert result.exit_code == 0, result.output
    read = read_trees("out.json")
    assert not read.faults
    direct = PointingExtractor.load(adapter)([one.text for one in read.records])
    for record, one in zip(read.records, direct, strict=True):
        assert record.tree == one.tree  # type: ignore[union-attr]
        confidence = record.more["confidence"]
        assert [value is None for value in confidence] == [node.is_empty for node in record.tree.nodes]
        assert all(value is None or 0 <= value <= 1 for value in confidence)
        assert record.extraction is not None
        assert record.extraction["settings"]["pointing"] is True
        assert record.extraction["adapter"]["name"] == "adapter"


def test_evaluate_measures_its_trees(gatewise: Gatewise, adapter: Path) -> None:
    result = gatewise("mdt", "evaluate", "--gold", "gold.json", "--adapter", adapter, "--json", "--mistakes")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["n"], values["failed"]) == (len(RECORDS), 0)
    held = json.loads(Path("gold.json").read_text())
    Path("long.json").write_text(json.dumps([{**held[0], "text": held[0]["text"] + " and so on" * 700}, *held[1:]]))
    result = gatewise("mdt", "evaluate", "--gold", "long.json", "--adapter", adapter, "--json")
    assert json.loads(result.stdout)["failed"] == 1
    assert "note: no tree of 1 passages: " in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "ADAPTER", "--data", "rows.jsonl"),
        ("compress", "ADAPTER", "--data", "rows.jsonl", "--out", "made"),
        ("inspect", "ADAPTER", "--scores", "--data", "gold.json"),
        ("inspect", "ADAPTER", "--routing", "--data", "rows.jsonl"),
        ("serving-check", "ADAPTER", "--data", "rows.jsonl"),
    ],
)
def test_other_commands_say_where_it_belongs(words: tuple[str, ...], gatewise: Gatewise, adapter: Path) -> None:
    result = gatewise(*(adapter if word == "ADAPTER" else word for word in words))
    assert_refused(result, "points at the phrases of decision trees: give it to `gatewise mdt extract`")
    assert not Path("made").exists()


def test_what_is_exported_still_points(gatewise: Gatewise, adapter: Path) -> None:
    result = gatewise("export", adapter, "plain")
    assert result.exit_code == 0, result.output
    assert weights(Path("plain")).keys() == weights(adapter).keys()
    one, other = (load_extractor(folder)([TEXT])[0] for folder in (adapter, Path("plain")))
    assert (one.tree, one.confidence) == (other.tree, other.confidence)  # type: ignore[union-attr]
