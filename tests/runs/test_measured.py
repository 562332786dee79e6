"""What a run gives to be compared by: rows to tune on, a number a row, memory, and one adapter whatever is measured."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_run import assert_same_adapter, write_recipe

from gatewise.errors import GatewiseError
from gatewise.parts import METHODS, TASKS, Run
from gatewise.progress import ConsoleProgress
from gatewise.runs import run
from gatewise.runs.measure import measure_adapter
from gatewise.runs.recipe import load_recipe
from gatewise.tasks.encoding import encode

SILENT = Console(quiet=True)


def train(recipe: Path, output: Path, *overrides: str, **options: Any) -> run.RunResult:
    return run.train(load_recipe(recipe, overrides), output, console=SILENT, **options)


def prepared(path: Path, *overrides: str) -> Run:
    recipe = load_recipe(path, overrides)
    task, method = TASKS[recipe.task](recipe), METHODS[recipe.method](recipe)
    where = torch.device("cpu"), torch.float32
    return run.prepared(recipe, task, method, path.parent / "out", *where, None, ConsoleProgress(SILENT))


def test_rows_to_tune_on_are_the_same_for_every_seed_and_method_and_trained_on_by_none(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    again = [line.replace('"text": "', '"text": " ') for line in lines[:6]]  # which ask the same
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, *again]))
    made = [
        prepared(path, "data.tuning=5", *more)
        for more in ((), ("seed=7",), ("method=prompt-tuning", "peft=null"), ("method=alora", "data.held_out=3"))
    ]
    tuning, *others = [one.task.measured["tuning"].rows for one in made]
    assert all(rows == tuning for rows in others)
    asked = {row["text"].strip() for row in tuning}
    for one in made:
        assert [*one.task.measured] == ["tuning", "dev"]
        assert len(one.task.train) + len(tuning) == 32
        assert not asked & {row["text"].strip() for row in one.task.train.rows}
        trained = [one.tokenizer.decode(row["input_ids"]) for row in (*one.train, *one.held_out)]
        held = [one.tokenizer.decode(row["input_ids"]).split() for row in one.held_out]
        twins = sum(one.tokenizer.decode(row["input_ids"]).split() in held for row in encode(one.task.train, one.tokenizer, None))
        assert len(trained) == 32 - len(tuning) - (twins - len(held))
        assert not [text for text in trained for question in asked if f": {question}\n" in text]
    assert 4 <= len(tuning) <= 5
    assert len(prepared(path, "data.tuning=20").task.measured["tuning"]) <= 8  # a quarter
    # After data.limit_train.
    assert {row["text"] for row in prepared(path, "data.tuning=5", "data.limit_train=20").task.measured["tuning"].rows} <= {
        json.loads(line)["text"] for line in lines[:20]
    }
    with pytest.raises(GatewiseError, match=r"data\.tuning is 5, but none of the 3 rows of data\.train can be taken out"):
        prepared(path, "data.tuning=5", "data.limit_train=3")


def test_rows_in_the_order_of_their_labels(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    in_order = sorted((tmp_path / "train.jsonl").read_text().splitlines(), key=lambda line: json.loads(line)["label"])
    (tmp_path / "train.jsonl").write_text("\n".join(in_order))
    with pytest.raises(GatewiseError, match=r"the 5 rows to train on all have the label 'bad': give .* in another order, or more"):
        prepared(path, "data.limit_train=5")
    (tmp_path / "dev.jsonl").write_text("\n".join(in_order[:4]))
    told = prepared(path, "data.limit_dev=3").task.told  # type: ignore[attr-defined]
    assert told[0] == "data.limit_dev: the first 3 of 4 rows are taken"
    assert "data.dev has no row with label good" in told


def test_a_held_out_row_is_trained_on_nowhere(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, *lines]))
    made = prepared(path)
    held, trained = ({tuple(row["input_ids"]) for row in rows} for rows in (made.held_out, made.train))
    assert len(made.held_out) == len(held) == 6
    assert not held & trained
    assert len(made.train) == 2 * (26 - 6)


def test_rows_that_share_an_instruction_are_no_copies(tmp_path: Path) -> None:
    """Those of them that are held out take no others along."""
    rows = [{"source": ("Shorten.", "Name it.")[n % 2], "document": f"{n} nice", "target": "good"} for n in range(40)]
    path = write_recipe(tmp_path, template={"prompt": "{source}\n{document}\n"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:30])))
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows[30:])))
    made = prepared(path, "data.tuning=5")
    assert (len(made.held_out), len(made.train)) == (6, 30 - 5 - 6)
    assert not any("word for word" in line for line in made.task.told)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("data.max_new_tokens=4", "label"),
        ("data.assistant=last", "label"),
        ("data.labels=[a,b]", "generation"),
        ("template.labels={a: b, c: d}", "generation"),
    ],
)
def test_keys_that_mean_nothing_for_the_rows_are_refused(setting: str, kind: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    if kind == "generation":
        for name in ("train", "dev"):
            rows = [{"source": f"{n} nice", "target": "good"} for n in range(12)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(GatewiseError, match=f"{setting.partition('=')[0]} means nothing for {kind} rows"):
        prepared(path, setting)


@pytest.mark.parametrize("method", ["milora", "spt"])
def test_what_is_measured_changes_nothing_that_is_trained(method: str, tmp_path: Path) -> None:
    data = {"train": "train.jsonl", "dev": "dev.jsonl", "held_out": 6, "tuning": 4}
    training = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01}
    recipe = write_recipe(tmp_path, method, data=data, training=training)
    whole = train(recipe, tmp_path / "whole")
    bare = train(recipe, tmp_path / "bare", measured=("tuning",), before=False)
    assert_same_adapter(whole.adapter, bare.adapter)
    assert {name: [*one] for name, one in whole.metrics.items()} == {"dev": ["before", "after"]}
    assert {name: [*one] for name, one in bare.metrics.items()} == {"tuning": ["after"]}
    assert json.loads(bare.metrics_file.read_text())["metrics"] == bare.metrics
    assert "tuning accuracy" in (bare.adapter / "README.md").read_text()


@pytest.mark.parametrize("measured", [("tuning",), ("dev",)])
def test_a_run_with_rows_to_tune_on_chooses_by_them_and_not_by_dev(measured: tuple[str, ...], tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    logs = []
    for dev in ("dev", "train"):
        settings = (
            f"data.dev={tmp_path / dev}.jsonl",
            "data.tuning=5",
            "training.max_steps=2",
            "training.eval_every=1",
            "training.save_every=1",
        )
        result = train(path, tmp_path / dev, *settings, "training.load_best=true", measured=measured, before=False)
        logs.append([one for one in json.loads(result.metrics_file.read_text())["log"] if "eval_loss" in one])
    assert len(logs[0]) == 2
    assert logs[0] == logs[1]
    assert logs[0][-1]["eval_accuracy"] in {one / 5 for one in range(6)}


def test_rows_that_are_reported_on_last_are_checked_before_the_training(tmp_path: Path) -> None:
    """What `gatewise compare` tunes on is none of them, and may take hours."""
    path = write_recipe(tmp_path)
    rows = [{"question": f"which of {n}?", "choices": ["yes", "no"], "answer": n % 2} for n in range(20)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        rows[3]["choices"] = ["yes", "n" + 120 * "o"]
    with pytest.raises(GatewiseError, match="no room in"):
        train(path, tmp_path / "out", "data.tuning=4", measured=("tuning",), before=False)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_each_row_has_its_number_in_the_order_of_the_file(tmp_path: Path) -> None:
    result = train(
        write_recipe(tmp_path, data={"train": "train.jsonl", "dev": "dev.jsonl", "test": "train.jsonl"}), tmp_path / "out"
    )
    assert statistics.mean(result.rows["dev"]) == result.metrics["dev"]["after"]["accuracy"]
    assert (len(result.rows["dev"]), len(result.rows["test"])) == (10, 26)
    answers = tmp_path / "answers.jsonl"
    measure_adapter(result.adapter, str(tmp_path / "train.jsonl"), out=answers, console=SILENT)
    assert result.rows["test"] == [json.loads(line)["right"] for line in answers.read_text().splitlines()]
    assert "rows" not in json.loads(result.metrics_file.read_text())
    with pytest.raises(GatewiseError, match="measured names train: expected any of tuning, dev, test"):
        train(tmp_path / "lora.yaml", tmp_path / "other", measured=("dev", "train"))
