"""The search stage of a run with method spt: which layers take a prompt, by SPT-DARTS (``gatewise.prompts.stages``)."""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments, set_seed

from gatewise import inspection
from gatewise.adapters.files import SEARCH_FILE, Selection
from gatewise.files import finite
from gatewise.prompts.stages import search
from gatewise.runs.build import recompute_activations, training_arguments
from gatewise.runs.folder import CHECKPOINTS, GATES, SEARCH_CHECKPOINTS, before_the_end
from gatewise.runs.progress import RunProgress
from gatewise.runs.recipe import PromptsSection, Recipe, SearchSection
from gatewise.runs.trainer import SearchRecipeTrainer, checkpoint_step
from gatewise.tasks import PadCollator


def search_layers(
    recipe: Recipe,
    model: PeftModel,
    rows: Sequence[Mapping[str, Any]],
    collator: PadCollator,
    note: Mapping[str, Any],
    output: Path,
    progress: RunProgress,
    device: torch.device,
) -> Selection:
    """Searches, draws ``gates.png`` and writes ``search.json``, whose presence says that the search is done.

    It goes on from the latest complete checkpoint of a search in the folder, if there is one; on the CPU the result is that of a
    search never stopped.

    Args:
        model: with the hyper-network; it is left as the search trained it.
        rows: all training rows. A random half trains the weights, the other half the gates.

    Raises:
        GatewiseError: fewer than two rows, or a loss that is not finite.
    """
    section, training = recipe.search or SearchSection(), recipe.training
    steps = search_steps(recipe, len(rows))
    checkpoint = before_the_end(output / SEARCH_CHECKPOINTS, steps)
    if training.gradient_checkpointing:
        recompute_activations(model)
    # Nothing is measured while searching: dev is for the model that comes of it.
    alone = training.model_copy(update={"eval_every": None, "early_stopping_patience": None, "load_best": False})
    set_seed(recipe.seed)
    begun = time.monotonic()
    with progress.training("searching"):
        found = search(
            model,
            rows,
            training_arguments(alone, recipe.seed, steps, output / CHECKPOINTS, device),
            keep=section.keep,
            choose=section.choose,
            trainer_class=partial(_trainer, collator=collator, note=note, progress=progress, group=training.group_by_length),
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
            upper_learning_rate=section.gate_learning_rate,
            reparameterise=section.reparameterise,
            consistency=section.consistency,
            drop=section.drop,
        )
    selection = Selection(
        layers=found.layers,
        gates=found.gates[-1].tolist(),
        losses=None if found.losses is None else found.losses.tolist(),
        steps=steps,
        seconds=round(time.monotonic() - begun, 2),
        resumed_from=None if checkpoint is None else checkpoint_step(checkpoint),
        settings={
            "search": section.model_dump(mode="json"),
            "prompts": (recipe.prompts or PromptsSection()).model_dump(mode="json", include=PromptsSection().keys_of("spt")),
        },
        log=[finite(entry) for entry in found.log if "loss" in entry],
    )
    inspection.plot_gates(found.gates.tolist(), found.layers, output / GATES, recipe.model)
    selection.write(output / SEARCH_FILE)
    progress.say(_told(selection))
    return selection


def search_steps(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of the search over ``rows`` training rows, of which one half is the weights'."""
    section = recipe.search or SearchSection()
    if section.epochs is not None:
        return math.ceil(section.epochs * recipe.training.steps_per_epoch((rows + 1) // 2))
    return section.max_steps or recipe.training.total_steps(rows)


def _trainer(
    model: PeftModel,
    args: TrainingArguments,
    train_dataset: Sequence[Mapping[str, Any]],
    collator: PadCollator,
    note: Mapping[str, Any],
    progress: RunProgress,
    group: bool,
    **settings: Any,
) -> SearchRecipeTrainer:
    return SearchRecipeTrainer(
        model=model,
        args=args,
        train=train_dataset,
        dev=[],
        collator=collator,
        note=note,
        callbacks=[progress],
        group_by_length=group,
        **settings,
    )


def _told(selection: Selection) -> str:
    numbers = selection.gates if selection.losses is None else selection.losses
    chosen = ", ".join(f"{layer} ({numbers[layer]:.3f})" for layer in selection.layers)
    others = [number for layer, number in enumerate(numbers) if layer not in selection.layers]
    if not others:
        return f"the search chose all layers: {chosen}"
    rest = f"gates are at most {max(others):.3f}" if selection.losses is None else f"mean losses are at least {min(others):.3f}"
    return f"the search chose layers {chosen}; the other {rest}"
