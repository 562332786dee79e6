"""Text2MDT as a task of ``gatewise train``: texts with their trees, read by a base model with pointing heads."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatewise.models import load_model
from gatewise.parts import Count, Counting, DataSection, Features, Run, Section, Share, Task
from gatewise_mdt.pointing.model import PointingCollator
from gatewise_mdt.pointing.training import calibration, measured, pointing_model, read_records, training_rows
from gatewise_mdt.records import TreeRecord


class PointingSection(Section):
    """The heads of a pointing model, see ``gatewise_mdt.pointing.heads``.

    ``swapped``: copies of each training passage whose phrases have changed places with those of others. ``width`` is that of the
    heads, ``dropout`` theirs in training. ``longest``: units (words, doses, Chinese characters) of the longest phrase that can be
    pointed at.
    """

    swapped: Annotated[int, Field(ge=0)] = 3
    width: Annotated[int, Field(gt=0, multiple_of=4)] = 128
    dropout: Share = 0.2
    longest: Count = 24


class Text2Mdt(Task):
    """Trees of clinical decisions, whose phrases the model points at in the text."""

    task_type = "FEATURE_EXTRACTION"
    elsewhere = "points at the phrases of decision trees: give it to `gatewise mdt extract`, `evaluate` or `review`"
    data: DataSection
    pointing: PointingSection

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Methods and settings of methods that do not go with heads."""
        _, method = self.recipe.parts()
        if method.prompt_tokens:
            yield (
                "method",
                f"is {self.recipe.method}, whose prompts stand before the text, where a pointing model would point at them: take "
                "lora, alora, pi-lora, milora, dora, adalora or spt",
            )
        search = method.sections().get("search")
        if search is not None and method.searches and method.search.consistency:
            yield (
                "search.consistency",
                "compares the classes or words that two passes predict, of which a pointing model has none: set it to 0, or name "
                "the layers in prompts.prompt_layers",
            )

    def read(self, noted: Any) -> None:
        """Texts with their trees."""
        self.train = read_records(self.data.train, self.data.limit_train)
        self.measured = {"dev": read_records(self.data.dev, self.data.limit_dev)}
        if self.data.test is not None:
            self.measured["test"] = read_records(self.data.test)

    def base(self, dtype: Any, tokenizer: PreTrainedTokenizerBase, brought: Any) -> PreTrainedModel:
        """The base model without a head of its own, and fresh pointing heads."""
        encoder = load_model(self.recipe.model, task="encoder", dtype=dtype)
        return pointing_model(encoder, **self.pointing.model_dump(include={"width", "longest", "dropout"}))

    def encode(
        self,
        rows: list[TreeRecord],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        key: str,
        say: Callable[[str], None],
    ) -> Features:
        """Texts with the places of their trees' phrases; those to train on with copies."""
        return training_rows(
            rows,
            tokenizer,
            longest=self.pointing.longest,
            max_length=max_length,
            swapped=self.pointing.swapped if key == "data.train" else 0,
            seed=self.recipe.seed,
            what=key,
            say=say,
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> PointingCollator:
        """Pads texts and trees."""
        return PointingCollator(tokenizer)

    def note(self, base: Any) -> dict[str, Any]:
        """The heads' sizes."""
        return {"heads": base.heads.settings.to_json()}

    def measure(
        self, run: Run, model: nn.Module, rows: list[TreeRecord], counting: Counting
    ) -> tuple[dict[str, float | int], str | None]:
        """How good the trees are that the model finds."""
        return measured(model, run.tokenizer, rows, self.recipe.training.eval_batch_size, counting), None

    def note_after(self, run: Run, model: nn.Module) -> dict[str, Any]:
        """How probabilities become confidence, fitted on dev."""
        found = calibration(model, run.tokenizer, self.measured["dev"])
        if found is None:
            run.progress.say("trees will have no confidence: too few nodes were found in dev, or all are right or all wrong")
        return {"calibration": found}
