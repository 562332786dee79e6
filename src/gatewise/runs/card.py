"""The model card of a run's adapter: which data, which method and settings, and the metrics before and after."""

import math
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from gatewise.adapters.files import read_config
from gatewise.inspection.card import PICTURES, fenced, table_of, write_card
from gatewise.parts import METHODS, Run
from gatewise.runs.recipe import Recipe, recipe_as_yaml
from gatewise.tasks.metrics import format_metric
from gatewise.tasks.records import is_data_set


def write_card_of(run: Run, adapter: Path, result: Any) -> Path:
    """Writes the card into the adapter's folder, with the pictures of the run beside it. No path of this machine is in it.

    Args:
        result: the run's ``RunResult``.
    """
    for name in filter(lambda one: one in result.pictures, PICTURES):
        shutil.copyfile(result.pictures[name], adapter / name)
    recipe: Recipe = without_paths(run.recipe)
    data, parameters = recipe.data.model_dump(), result.parameters
    hub = [
        str(data[key])
        for key in ("train", "dev", "test")
        if isinstance(data.get(key), str) and is_data_set(getattr(run.recipe.data, key))
    ]
    rows = [
        [f"{key} {name}", format_metric(name, both["before"][name]) if "before" in both else "", format_metric(name, value)]
        for key, both in result.metrics.items()
        for name, value in both["after"].items()
    ]
    paper = (METHODS[recipe.method].__doc__ or "").strip().partition("\n")[0]
    settings = recipe.training
    trained = (
        f"`{recipe.method}`: {paper} {result.steps} steps of {settings.batch_size * settings.gradient_accumulation} rows, learning "
        f"rate {settings.learning_rate:g}, seed {recipe.seed}, in {result.dtype} on {result.device}. The adapter has "
        f"{parameters['adapter']:,} parameters, {parameters['adapter'] / parameters['base']:.2%} of the base model."
    )
    text = fenced(recipe_as_yaml(recipe).rstrip(), "yaml")  # which may hold a prompt with a fence
    whole = f"<details><summary>The recipe, with every default</summary>\n\n{text}\n\n</details>"
    sections = {
        "Results": table_of(rows, ["metric", "base model", "with the adapter"]),
        "Data": f"Trained on `{data['train']}` ({len(run.train):,} rows), "
        + " and ".join(
            f"measured on {f'`{source}`' if isinstance(source, str) else f'rows taken out of it ({key}: {source})'}"
            for key in result.metrics
            if (source := data.get(key))
        )
        + ".",
        "Training": f"{trained}\n\n{whole}",
    }
    task = {"SEQ_CLS": "text-classification"}.get(str(read_config(adapter).get("task_type")), "text-generation")
    results = [
        EvalResult(
            task_type=task, dataset_type=(name := source if isinstance(source := data.get(key), str) else data["train"]),
            dataset_name=name, dataset_split=key,
            metric_type=metric, metric_name=metric, metric_value=round(float(value), 4),
        )
        for key, both in result.metrics.items()
        for metric, value in both["after"].items()
        if metric != "n" and math.isfinite(value)
    ]  # fmt: skip
    return write_card(adapter, run.output.resolve().name, sections=sections, results=results, datasets=hub, tags=[recipe.method])


def without_paths(recipe: Recipe) -> Recipe:
    """A recipe in which files and folders have their names alone."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one if key == "template" else named(one) for key, one in value.items()}  # a prompt may begin with "/"
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return type(recipe).model_validate(named(recipe.model_dump()))
