"""examples/extend: a score, a rule, a schedule, a method and a task that a reader of docs/guides/extend.md begins with."""

import ast
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import adapted, batch
from tiny_run import write_base
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

import gatewise
from gatewise.cli.main import app
from gatewise.parts import METHODS, TASKS

ROOT = Path(__file__).parents[1]
EXTEND = ROOT / "examples" / "extend"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``my_parts`` beside what pip writes of its pyproject.toml."""
    project = tomllib.loads((EXTEND / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / "site" / "my_parts-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 0.1.0\n", encoding="utf-8")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in own.items()) for group, own in project["entry-points"].items()]
    (info / "entry_points.txt").write_text("".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.syspath_prepend(EXTEND)
    for table in (METHODS, TASKS):
        table.__dict__.pop("places", None)
    yield __import__("my_parts")
    for table in (METHODS, TASKS):
        table.__dict__.pop("places", None)


def test_the_score_the_rule_and_the_schedule_move_ranks(installed: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, scored = adapted(trained=False), batch(rows=8)
    rows = [{name: values[at] for name, values in scored.items()} for at in range(8)]
    schedule = installed.Fading(rounds=2, first_round=2, recover=2, prune_fraction=1 / 4)
    given: Any = {"score": installed.size, "rule": "my_parts:to_the_best", "schedule": schedule}
    allocation = gatewise.RankAllocation(validation_batch=scored, **given)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, learning_rate=0.05, report_to="none", save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[allocation])  # type: ignore[arg-type]
    costs = {
        path: sum(module.weight.shape) for path, module in model.get_base_model().named_modules() if path in allocation._capacity
    }
    trainer.train()
    first, second = allocation.history
    lost = [sum(costs[path] * len(own) for path, own in one.pruned.items()) for one in (first, second)]
    assert lost[0] > 1.5 * lost[1] > 0
    worth = {path: sum(own) / costs[path] for path, own in first.scores.items() if path not in first.pruned}
    best = max(worth, key=lambda path: worth[path])
    assert first.ranks[best] == allocation._capacity[best]
    assert all(sum(costs[path] * rank for path, rank in one.ranks.items()) <= allocation.budget for one in allocation.history)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "allocation.json").read_text())["score"] == "size"


@pytest.mark.usefixtures("installed")
def test_the_method_and_the_task_are_trained_from_their_recipe(tmp_path: Path) -> None:
    for name in ("plurals.yaml", "plurals.csv", "plurals_dev.csv"):
        shutil.copy(EXTEND / name, tmp_path)
    output, base = tmp_path / "out", write_base(tmp_path / "base")
    words = ["train", str(tmp_path / "plurals.yaml"), "--set", f"model={base}", "--output", str(output)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    told = json.loads((output / "metrics.json").read_text())["metrics"]["dev"]
    assert told["after"]["loss"] < told["before"]["loss"]
    held = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {(name.split(".")[-3], *value.shape[:1]) for name, value in held.items() if "lora_A" in name} == {("v_proj", 4)}
    refused = CliRunner().invoke(app, ["eval", str(output / "adapter"), "--data", "sample:support-dev"])
    assert "writes plurals: load it in Python" in " ".join(refused.stderr.split())


def test_the_guide_shows_what_the_example_has() -> None:
    def parts(code: str) -> dict[str, str]:
        """Its functions and classes, without their docstrings."""
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        return {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}

    guide = (ROOT / "docs" / "guides" / "extend.md").read_text(encoding="utf-8")
    shown = parts("\n".join(re.findall(r"```python\n(.*?)```", guide, re.DOTALL)))
    there = parts((EXTEND / "my_parts.py").read_text(encoding="utf-8"))
    assert set(shown) == {"size", "to_the_best", "ValuesSection", "ValuesOnly"}
    assert shown == {name: there.get(name) for name in shown}
