"""From one CSV file with column names of its own, and no split, to an adapter: what training and measuring see of it."""

import csv
import json
from pathlib import Path

import pytest
from tiny_run import assert_same_adapter, stop_at, write_base
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.tasks import load_records

RECIPE = """
method: lora
model: llama
data:
  train: tickets.csv
  columns: {text: message, label: category}
  dev: 0.2
  test: 0.2
  group: customer
template: {prompt: "{product}: ```{text}```\\nDepartment:"}
peft: {r: 2}
training: {max_steps: 4, batch_size: 4, learning_rate: 0.01, save_every: 2, eval_every: 2, load_best: true}
"""


def gatewise(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_base(tmp_path / "llama")
    with (tmp_path / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["customer", "product", "message", "category"])
        for n in range(80):
            writer.writerow([f"c{n % 16}", "lamp", f"{n} {'nice' if n % 3 else 'poor'}", "good" if n % 3 else "bad"])
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_file_is_split_trained_resumed_and_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = gatewise("train", "mine.yaml", "--output", "out")
    assert code == 0, said
    assert "tickets.csv: 55 rows for train, 10 rows for dev, 15 rows for test" in said
    told = json.loads((folder / "out" / "metrics.json").read_text())["metrics"]
    assert {name: one["after"]["n"] for name, one in told.items()} == {"dev": 10, "test": 15}
    # Interrupted and gone on with, it has the same rows; other rows are refused as ever.
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        assert gatewise("train", "mine.yaml", "--output", "stopped")[0] == 130
    text = (folder / "tickets.csv").read_text(encoding="utf-8")
    (folder / "tickets.csv").write_text(text.replace("poor", "mean"), encoding="utf-8")
    code, said = gatewise("train", "mine.yaml", "--output", "stopped", "--resume")
    assert (code, "the rows of data.train are not those that the run in" in said) == (2, True), said
    (folder / "tickets.csv").write_text(text, encoding="utf-8")
    assert gatewise("train", "mine.yaml", "--output", "stopped", "--resume")[0] == 0
    assert_same_adapter(folder / "out" / "adapter", folder / "stopped" / "adapter")
    # Commands read the run's columns, gatewise's own names, and others that they are given.
    (folder / "own.csv").write_text(text.replace("message,category", "text,label"), encoding="utf-8")
    (folder / "other.csv").write_text(text.replace("message,category", "body,team"), encoding="utf-8")
    given = [("tickets.csv",), ("own.csv",), ("other.csv", "--columns", "text=body,label=team")]
    found = [gatewise("eval", "out/adapter", "--data", *one, "--json") for one in given]
    assert [code for code, _ in found] == [0, 0, 0], found
    warned = (
        "to train, dev and test: if it is tickets.csv, most of these rows were trained on; of a file --split dev or --split test"
    )
    assert warned in " ".join(found[0][1].split())
    assert found[0][1].partition("{")[2] == found[1][1].partition("{")[2] == found[2][1].partition("{")[2]
    for part, both in told.items():
        code, said = gatewise("eval", "out/adapter", "--data", "own.csv", "--split", part, "--json")
        assert json.loads("{" + said.partition("{")[2]) == both["after"]
        assert "trained on" not in said
    code, said = gatewise("eval", "out/adapter", "--data", "own.csv", "--split", "valid")
    assert (code, "the split is valid, but the adapter's run dealt its rows out to train, dev, test" in said) == (2, True), said
    card = (folder / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "\n````yaml\n" in card  # around a prompt with a fence of its own
    assert "measured on rows taken out of it (dev: 0.2) and measured on rows taken out of it (test: 0.2)." in card
    code, said = gatewise("eval", "out/adapter", "--data", "other.csv")
    assert (code, "there is no column 'message' for 'text'; there are customer, product, body, team" in said) == (2, True), said
    code, said = gatewise("eval", "out/adapter", "--data", "other.csv", "--columns", "text")
    assert (code, "expected each field with its column, such as 'text=message,label=category'" in said) == (2, True), said
    given = ("--data", "own.csv", "--split", "dev", "--recover", "tickets.csv", "--recover-split", "train", "--steps", "1")
    code, said = gatewise("compress", "out/adapter", *given, "--modules", "9", "--score-rows", "2", "--out", "small")
    assert code == 0, said
    assert json.loads((folder / "small" / "gatewise.json").read_text())["columns"] == {"text": "message", "label": "category"}
    code, said = gatewise("inspect", "out/adapter", "--scores", "--data", "other.csv", "--columns", "text=body,label=team")
    assert code == 0, said


def test_training_and_choice_do_not_see_the_test_rows(folder: Path) -> None:
    """Steps, early stopping and the best checkpoint are the same whatever they say; only they are measured otherwise."""
    rows = load_records("tickets.csv", columns={"text": "message", "label": "category"}).rows
    wrong = [{**row, "label": {"good": "bad", "bad": "good"}[row["label"]]} for row in rows]
    for name, some in (("right", rows), ("wrong", wrong)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some), encoding="utf-8")
        more = ("--set", f"data.test={name}.jsonl", "--set", "training.early_stopping_patience=1")
        code, said = gatewise("train", "mine.yaml", "--output", name, *more)
        assert code == 0, said
    assert "70 of the 80 rows of data.test ask what rows of data.train ask, word for word" in said  # the other parts are dev's
    assert_same_adapter(folder / "right" / "adapter", folder / "wrong" / "adapter")
    one, other = (json.loads((folder / name / "metrics.json").read_text()) for name in ("right", "wrong"))
    assert one["metrics"]["dev"] == other["metrics"]["dev"]
    assert one["metrics"]["test"]["after"]["accuracy"] == pytest.approx(1 - other["metrics"]["test"]["after"]["accuracy"])
