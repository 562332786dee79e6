"""Prompts and completions, and the command that writes them."""

from pathlib import Path

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, linearise, sample, training_rows
from gatewise_mdt.extraction.prompts import prompt
from mdt_trees import TEXT, gout, node
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.runs.recipe import load_recipe
from gatewise.tasks import Template, load_records

RECORD = TreeRecord(TEXT, DecisionTree.from_preorder(gout()))


def test_a_prompt_has_population_and_passage_apart() -> None:
    assert prompt("adults with gout@For a\n flare,  give it.", "en") == (
        "Population: adults with gout\nPassage: For a flare, give it.\nDecision tree:"
    )
    assert prompt("成人患者@给药。", "zh") == "人群：成人患者\n原文：给药。\n诊疗决策树："
    assert prompt("Give it.", "en").startswith("Passage: ")


def test_a_row_has_the_prompt_and_the_tree() -> None:
    (row,) = training_rows([RECORD])
    assert row == {"source": prompt(TEXT, "en"), "target": linearise(RECORD.tree, text=TEXT), "language": "en"}
    empty = TreeRecord("adults@Give nothing at all to them.", DecisionTree.from_preorder([node("D")]))
    assert training_rows([empty])[0]["target"] == "D"


def test_prepare_writes_rows_that_train_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["mdt", "prepare", "sample:guidelines", "--out", "made/train.jsonl", "--dev", "made/dev.jsonl"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    train, dev = load_records("made/train.jsonl"), load_records("made/dev.jsonl")
    assert train.kind == "generation"
    assert len(train) + len(dev) == len(sample())
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "mdt-pi-lora.yaml", [])
    assert recipe.template is not None
    assert Template(recipe.template.prompt).render(train.rows[0]) == train.rows[0]["source"]


def test_the_sample_rows_are_those_of_the_sample_trees() -> None:
    for side, records in {
        "train": [one for one in sample() if one.number % 5],
        "dev": [one for one in sample() if one.number % 5 == 0],
    }.items():
        assert load_records(f"sample:guideline-trees-{side}").rows == training_rows(records)


def test_prepare_swaps_phrases_in_what_is_trained_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, more in (("plain", []), ("swapped", ["--swapped", "2"])):
        words = ["mdt", "prepare", "sample:guidelines", "--out", f"{folder}/train.jsonl", "--dev", f"{folder}/dev.jsonl", *more]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    plain, swapped = load_records("plain/train.jsonl"), load_records("swapped/train.jsonl")
    assert swapped.rows[: len(plain)] == plain.rows
    assert len(swapped) == 3 * len(plain)
    assert load_records("swapped/dev.jsonl").rows == load_records("plain/dev.jsonl").rows
    sources = {row["source"] for row in plain.rows}
    assert sum(row["source"] not in sources for row in swapped.rows) > 1.8 * len(plain)


def test_prepare_refuses_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in [
        (["sample:guidelines", "--out", "x.json"], "expected .jsonl"),
        (["sample:guidelines", "--out", "x.jsonl", "--dev", "x.jsonl"], "expected two files"),
        (["none.json", "--out", "x.jsonl"], "there is no such file"),
    ]:
        result = CliRunner().invoke(app, ["mdt", "prepare", *words])
        assert result.exit_code == 2
        assert said in result.stderr
        assert not list(tmp_path.iterdir())
