"""A method and a task of another distribution: a class each, found by entry points, trained by ``gatewise train``."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_run import write_recipe
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.parts import METHODS, TASKS

ENTRY_POINTS = """
[gatewise.methods]
shrunk = toy_parts:Shrunk
[gatewise.tasks]
successor = toy_parts:Successor
"""


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``toy_parts`` beside what pip would write of a distribution that brings it."""
    info = tmp_path / "site" / "toy_parts-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-parts\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for table in (METHODS, TASKS):
        table.__dict__.pop("places", None)
    yield
    for table in (METHODS, TASKS):
        table.__dict__.pop("places", None)


def train(recipe: Path, *more: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["train", str(recipe), "--output", str(recipe.parent / "out"), *more])
    return done.exit_code, done.output


def test_a_method_from_outside_is_trained_like_gatewises_own(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "shrunk", peft=None, shrink={"weight": 4.0})
    code, output = train(recipe)
    assert code == 0, output
    out = tmp_path / "out"
    told = json.loads((out / "metrics.json").read_text())
    assert (told["method"], told["kept_small"]) == ("shrunk", True)
    assert told["metrics"]["dev"]["after"]["loss"] != told["metrics"]["dev"]["before"]["loss"]
    assert (out / "shrunk.txt").read_text() == "weight 4.0"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["shrink"] == {"rank": 2, "weight": 4.0}
    held = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in held} == {"v_proj"}
    # The term of the loss holds B down: with none it grows further.
    assert train(recipe, "--overwrite", "--set", "shrink.weight=0")[0] == 0
    free = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(value.norm() for name, value in held.items() if "lora_B" in name) < sum(
        value.norm() for name, value in free.items() if "lora_B" in name
    )


def test_a_task_from_outside_goes_with_any_method(tmp_path: Path) -> None:
    for method in ("alora", "shrunk"):
        recipe = write_recipe(tmp_path, method, task="successor", data={"train": "20", "dev": "5", "base": 9}, peft=None)
        code, output = train(recipe, "--overwrite")
        assert code == 0, output
        note = json.loads((tmp_path / "out" / "adapter" / "gatewise.json").read_text())
        assert (note["task"], note["base_of_numbers"], note["counted"]) == ("successor", 9, True)
        both = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]["dev"]
        assert both["after"]["loss"] < both["before"]["loss"]
    refused = CliRunner().invoke(app, ["eval", str(tmp_path / "out" / "adapter"), "--data", "sample:support-dev"])
    assert "adapter counts: give it to nobody" in " ".join(refused.stderr.split())


def test_their_keys_are_checked_like_all_others(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "shrunk", peft=None, shrink={"weight": 4.0})
    for more, said in (
        ("shrink.wieght=1", "shrink.wieght is not a known key (given 1); did you mean weight?"),
        ("method=lora", "shrink is not a known key"),
        ("method=shrnk", "prefix-tuning; did you mean shrunk?"),
        ("data.base=3", "data.base is not a known key"),
    ):
        code, output = train(recipe, "--set", more)
        assert code == 2
        assert said in " ".join(output.split())


def test_gatewises_own_names_stay_its_own(tmp_path: Path) -> None:
    (tmp_path / "site" / "toy_parts-1.0.dist-info" / "entry_points.txt").write_text("[gatewise.methods]\nlora = others:Lora\n")
    METHODS.__dict__.pop("places", None)
    assert METHODS["lora"].__module__ == "gatewise.adapters.method"
