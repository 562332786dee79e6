"""SPT as a part of a recipe: soft prompts at a few layers, which a search of its own may choose before they are trained."""

import gc
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import PeftModel
from pydantic import AfterValidator, Field, WithJsonSchema
from transformers import PreTrainedModel, set_seed

from gatewise import processes
from gatewise.adapters.checkpoints import checkpoint_before, checkpoint_step
from gatewise.adapters.files import SEARCH_FILE, Selection, read_selection
from gatewise.checks import is_whole
from gatewise.errors import GatewiseError
from gatewise.files import finite
from gatewise.internals.soft_prompt_fixes import without_prompts
from gatewise.parts import Count, Fraction, Method, NotNegative, Positive, Report, Run, Section
from gatewise.prompts.config import SelectivePromptConfig
from gatewise.prompts.darts import SEARCH_FOLDER, SearchMixin, search

FIXED_CHOICES = ("first", "last", "spread", "random")
"""What ``prompts.prompt_layers`` may be beside a list of layers, see ``fixed_layers``."""


def _layers(value: Any) -> Any:
    if isinstance(value, list):
        known = bool(value) and all(is_whole(layer) and layer >= 0 for layer in value) and len(set(value)) == len(value)
    else:
        known = value is None or value in FIXED_CHOICES
    if not known:
        raise ValueError("expected a list of different layer numbers from 0, such as [3, 7], or first, last, spread or random")
    return value


_NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "uniqueItems": True}
Layers = Annotated[Any, AfterValidator(_layers), WithJsonSchema({"anyOf": [{"enum": [*FIXED_CHOICES, None]}, _NUMBERS]})]


class PromptsSection(Section):
    """The prompts of SPT, see ``gatewise.SelectivePromptConfig``."""

    num_prompt_tokens: Count = 10
    """Prompt tokens in front of the text, inside the model."""
    bottleneck: Count = 64
    """Width of the generators that write them."""
    prompt_layers: Layers = None
    """The layers with a new prompt: a list from 0, or with ``keep`` a fixed choice of so many. Left out: they are searched."""
    keep: Count | None = None
    """With such a choice: how many layers."""
    tau: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How much of the prompt from below a new one replaces."""
    balanced: bool | None = None
    """Mix prompts by direction and not by size, see docs/reports/spt.md. Left out: in decoders."""
    phm: Count | None = None
    """Generators as sums of so many Kronecker products, with so many times fewer parameters. Left out: plain ones."""
    activation: Literal["gelu", "relu", "tanh", "identity"] = "gelu"
    """The generators' activation."""
    normalize_states: bool = True
    """Scale hidden states to unit size before a generator reads them."""


class SearchSection(Section):
    """SPT-DARTS, the search for the layers that take a new prompt. Only without ``prompts.prompt_layers``."""

    keep: Count = 4
    """K, how many layers are kept: those with the largest gates."""
    max_steps: Count | None = None
    """Steps of the search, in place of ``epochs``. Left out, with those too: as many as the training that follows."""
    epochs: Positive | None = None
    """Passes over the half of the rows that the weights learn on; the gates learn on the other half."""
    gate_learning_rate: Positive = 1e-2
    """Learning rate of the gates."""
    reparameterise: bool = True
    """Gates compete for the gradient."""
    consistency: NotNegative = 1.0
    """Weight λ of the distance between two passes with different gates left out; 0: one pass, with all of them."""
    drop: Fraction = 0.5
    """The probability that such a pass leaves a gate out."""


class SelectivePrompts(Method):
    """SPT (Zhu and Tan, EMNLP 2023, arXiv 2310.20127)."""

    files = (SEARCH_FILE, "layers.png")
    stage = SEARCH_FOLDER
    reads_prompt = True
    size_key = "prompts.bottleneck"
    untrained = staticmethod(without_prompts)  # prompts change the function from the start
    prompts: PromptsSection
    search: SearchSection

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe)
        self.selection: Selection | None = None

    @property
    def searches(self) -> bool:
        """Whether the layers with a prompt are searched before they are trained."""
        return self.prompts.prompt_layers is None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Two ways to say which layers, or none."""
        prompts, layers = self.prompts, self.prompts.prompt_layers
        if prompts.phm is not None and prompts.bottleneck % prompts.phm:
            yield "prompts.phm", f"is {prompts.phm}, expected a divisor of prompts.bottleneck ({prompts.bottleneck})"
        if isinstance(layers, str) and prompts.keep is None:
            yield "prompts.keep", f"is missing: with prompt_layers: {layers} say how many layers take a prompt, such as keep: 4"
        if prompts.keep is not None and not isinstance(layers, str):
            hint = (
                "search.keep says how many layers a search keeps" if self.searches else "the list says which layers take a prompt"
            )
            yield "prompts.keep", f"is for prompt_layers: {', '.join(FIXED_CHOICES)}; remove the key, {hint}"
        if not self.searches and self.search != SearchSection():
            yield (
                "search",
                "goes without prompts.prompt_layers, which says already which layers take a prompt: remove one of the two",
            )
        if self.search.max_steps is not None and self.search.epochs is not None:
            yield "search.epochs", "cannot be given together with search.max_steps: keep the one that ends the search"

    def resume(self, output: Path) -> None:
        """What the search chose, where it has ended."""
        path = output / SEARCH_FILE
        if self.searches:
            self.selection = processes.by_main(lambda: read_selection(path) if path.is_file() else None)

    def config(self, run: Run, base: PreTrainedModel) -> SelectivePromptConfig:
        """Prompts at the layers that were chosen or, before the search, the network to be searched."""
        count = int(base.config.get_text_config().num_hidden_layers)
        key, keep = ("search.keep", self.search.keep) if self.searches else ("prompts.keep", self.prompts.keep)
        if keep is not None and keep > count:
            raise GatewiseError(f"{key} is {keep}, expected at most {count}, the layers of {self.recipe.model}")
        layers = self.prompts.prompt_layers
        if self.searches:
            layers = self.selection and self.selection.layers
        elif isinstance(layers, str):
            assert keep is not None
            layers = fixed_layers(layers, keep, count, self.recipe.seed)
        return SelectivePromptConfig(
            prompt_layers=None if layers is None else sorted(layers),
            task_type=run.task.task_type,
            modules_to_save=list(getattr(base, "trained_whole", ())) or None,
            **self.prompts.model_dump(exclude={"prompt_layers", "keep"}),
        )

    def saved_config(self, run: Run, base: PreTrainedModel) -> SelectivePromptConfig:
        """With as many layers as the search will keep, which are all of one size."""
        config = self.config(run, base)
        config.prompt_layers = config.prompt_layers or list(range(self.search.keep))
        return config

    def resized(self, size: int) -> dict[str, Any]:
        """A width that ``phm`` divides."""
        each = self.prompts.phm or 1
        return {"prompts.bottleneck": max(1, round(size / each)) * each}

    def adapt(self, run: Run, base: PreTrainedModel) -> PeftModel:
        """Fresh prompts. The note says how many layers there were to choose from."""
        run.note["num_layers"] = int(base.config.get_text_config().num_hidden_layers)
        return super().adapt(run, base)

    def stage_steps(self, rows: int) -> int:
        """Optimiser steps of the search over ``rows`` training rows, of which one half is the weights'."""
        training = self.recipe.training
        if not self.searches:
            return 0
        if self.search.epochs is not None:
            return math.ceil(self.search.epochs * training.steps_per_epoch((rows + 1) // 2))
        return self.search.max_steps or int(training.total_steps(rows))

    def before_training(self, run: Run) -> None:
        """Searches the layers by SPT-DARTS, and puts a fresh model with prompts there in place of the searched one.

        Writes ``search.json``, which says that the search is done. It goes on from the latest complete checkpoint of a search in
        the folder; on the CPU the result is that of a search never stopped.
        """
        if not self.searches:
            return
        if self.selection is None:
            self.selection = self._found(run)
            # Nothing of the search but its choice: head and activations of the base are as they were too.
            set_seed(self.recipe.seed)
            # Else two base models are there at a time. A PEFT model is part of cycles, which are collected late.
            run.model = None
            gc.collect()
            run.model = self.adapt(run, run.fresh_base())
        run.seconds["search"] = self.selection.seconds

    def _found(self, run: Run) -> Selection:
        section, steps = self.search, self.stage_steps(len(run.train))
        checkpoint = checkpoint_before(run.output / "checkpoints" / SEARCH_FOLDER, steps)
        set_seed(self.recipe.seed)
        begun = time.monotonic()
        run.progress.say(f"searching for layers in {steps} steps")
        found = search(
            run.model,
            run.train,
            run.arguments(steps, evaluates=False),  # dev is for the model that comes of it
            keep=section.keep,
            trainer_class=run.trainer,
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
            mixin=SearchMixin,
            eval_dataset=[],
            callbacks=self.callbacks(run),
            upper_learning_rate=section.gate_learning_rate,
            reparameterise=section.reparameterise,
            consistency=section.consistency,
            drop=section.drop,
        )
        selection = Selection(
            layers=found.layers,
            gates=found.gates[-1].tolist(),
            steps=steps,
            seconds=round(time.monotonic() - begun, 2),
            resumed_from=None if checkpoint is None else checkpoint_step(checkpoint),
            settings={"search": section.model_dump(mode="json"), "prompts": self.prompts.model_dump(mode="json")},
            log=[finite(entry) for entry in found.log if "loss" in entry],
        )
        if processes.is_main():
            selection.write(run.output / SEARCH_FILE)
        chosen = ", ".join(f"{layer} ({selection.gates[layer]:.3f})" for layer in selection.layers)
        run.progress.say(f"the search chose layers {chosen}")
        return selection

    def report(self, adapter: Path) -> Report:
        """The search, which is written beside the adapter too."""
        if self.selection is None:
            return Report()
        self.selection.write(adapter / SEARCH_FILE)
        return Report(numbers={"search_steps": self.selection.steps})


def fixed_layers(choice: str, keep: int, layers: int, seed: int = 0) -> list[int]:
    """The baselines of a search: ``keep`` of ``layers`` layers, in order.

    "first", "last"; "spread": every layers/keep-th, that is ⌊i · layers / keep⌋; "random": a set drawn from ``seed`` alone.
    """
    if choice == "random":
        return sorted(random.Random(f"prompt layers/{seed}").sample(range(layers), keep))
    if choice == "spread":
        return [i * layers // keep for i in range(keep)]
    return list(range(keep)) if choice == "first" else list(range(layers - keep, layers))
