"""The JSON schema of recipes: it is shipped as the code has it, and takes and refuses what reading a recipe does."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.runs.recipe import checked, load_recipe, read_tree
from gatewise.runs.schema import recipe_schema

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "recipes" / "recipe.schema.json"
RECIPES = [path for folder in ("recipes", "benchmarks/recipes", "mdt/recipes") for path in sorted(ROOT.glob(f"{folder}/*.yaml"))]


def faults(tree: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(json.loads(SHIPPED.read_text(encoding="utf-8")))
    return [error.message for error in validator.iter_errors(tree)]


def test_what_is_shipped_is_what_is_printed() -> None:
    printed = CliRunner().invoke(app, ["schema"]).stdout
    same = json.loads(printed) == json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert same, "recipes have other keys than recipes/recipe.schema.json: gatewise schema > recipes/recipe.schema.json"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_it_and_fits(path: Path) -> None:
    first, _, _ = path.read_text(encoding="utf-8").partition("\n")
    assert (path.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve() == SHIPPED
    assert not faults(load_recipe(path).model_dump(mode="json", exclude_unset=True))


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/recipes/arms/*.yaml")), ids=lambda path: path.stem)
def test_every_arm_of_a_benchmark_is_a_recipe_with_what_is_shared(path: Path) -> None:
    base = read_tree(ROOT / "benchmarks" / "recipes" / "trec-written.yaml")
    tree = {**{key: base[key] for key in ("model", "data", "template", "training")}, **read_tree(path)}
    assert checked(tree, str(path)).method == tree["method"]
    assert not faults(tree)


@pytest.mark.parametrize(
    ("more", "fits"),
    [
        (
            {"training": {"learning_rate": 1, "report_to": ["wandb"]}, "allocation": None, "launch": {"fsdp_offload_params": True}},
            True,
        ),
        ({"data": {"train": "a.csv", "dev": "b.csv", "labels": [0, 1]}, "template": {"labels": {"0": "no", "1": "yes"}}}, True),
        ({"training": {"learning_rat": 1e-3}}, False),
        ({"training": {"batch_size": "eight"}}, False),
        ({"adalora": {}}, False),
        ({"pointing": {}}, False),
        ({"task": "text2mdt", "pointing": {"longest": 3}}, True),
        ({"task": "text2mdt", "template": {}}, False),
        ({"method": "alor"}, False),
        ({"seed": None, "task": None, "device": None, "template": {"prompt": "{text}"}}, True),
        ({"data": None}, False),
        ({"allocation": {"first_round": 3, "recover": 0.5, "score": "my:score"}, "peft": {"target_modules": ["q_proj"]}}, True),
        ({"allocation": {"first_round": "3"}}, False),
        ({"allocation": {"score": "path_momens"}}, False),
        ({"peft": {"target_modules": []}}, False),
        ({"method": "spt", "prompts": {"prompt_layers": [0, 3]}}, True),
        ({"method": "spt", "prompts": {"prompt_layers": [0, 0]}}, False),
        ({"task": ""}, False),
    ],
)
def test_it_knows_what_goes_with_a_method_and_a_task(more: dict[str, Any], fits: bool) -> None:
    tree = {"method": "alora", "model": "m", "data": {"train": "a.csv", "dev": "b.csv"}, **more}
    assert bool(faults(tree)) != fits
    with nullcontext() if fits else pytest.raises(GatewiseError):
        checked(tree)


def test_it_may_be_of_one_method() -> None:
    made = recipe_schema("lora", "causal")
    assert made["properties"]["method"]["enum"] == ["lora"]
    assert "allocation" not in made["properties"]
    with pytest.raises(GatewiseError, match="did you mean alora"):
        recipe_schema("alor")
