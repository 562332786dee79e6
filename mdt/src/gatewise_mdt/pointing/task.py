"""Text2MDT as a task of ``gatewise train``: texts with their trees, read by a base model with pointing heads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.models import load_model
from gatewise.parts import Count, Counting, DataSection, Features, Measured, Run, Section, Share, Task
from gatewise_mdt.extraction.extractor import measure
from gatewise_mdt.pointing.calibration import fitted
from gatewise_mdt.pointing.extractor import PointingExtractor
from gatewise_mdt.pointing.heads import HeadSettings
from gatewise_mdt.pointing.model import PointingCollator, PointingModel, encode_records
from gatewise_mdt.records import TreeRecord, read_trees, repairs_in_words
from gatewise_mdt.samples import sample_of
from gatewise_mdt.training.swapping import swapped_copies

METRICS = ("triplet_f1", "node_f1", "path_f1", "tree_acc", "ter", "n")


def read_records(source: str, limit: int | None = None, told: list[str] | None = None) -> list[TreeRecord]:
    """Texts with their trees: a file of :mod:`gatewise_mdt.records`, ``sample:guidelines`` or one of its sides.

    Args:
        told: gets a sentence on what was put right in the trees.

    Raises:
        GatewiseError: the file cannot be read, or has a record with a fault.
    """
    if source.startswith("sample:"):
        records = sample_of(source)
    else:
        read = read_trees(source, repair=True)
        if read.faults:
            raise GatewiseError(next(iter(read.faults.values())))
        if read.repairs and told is not None:
            told.append(repairs_in_words(source, read.repairs).partition(";")[0])
        records = list(read.records)
    return records[:limit]


def training_rows(
    records: Sequence[TreeRecord],
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    max_length: int,
    swapped: int = 0,
    seed: int = 0,
    what: str = "data.train",
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows for a pointing model, those of ``swapped`` copies of each record after them; ``group`` says of which record a row is.

    Args:
        longest: units of the longest phrase; triples with a longer one, or with one that does not stand in the text, are left
            out.
        max_length: tokens of the longest text; longer ones are left out.
        what: the records' key in the recipe.
        say: told how much was left out.

    Raises:
        GatewiseError: nothing is left, or the tokenizer does not say where its tokens stand.
    """
    rows, pointed = encode_records([*records, *swapped_copies(records, swapped, seed=seed)], tokenizer, longest)
    own = pointed[: len(records)]
    lost, triples = sum(one.left_out for one in own), sum(len(node.triples) for record in records for node in record.tree.nodes)
    if lost:
        say(
            f"{what}: {lost} of {triples} triples cannot be pointed at (their phrases do not stand in the text, overlap, or are too"
            " long)"
        )
    if trees := sum(not one.has_tree for one in own):
        say(f"{what}: {trees} of {len(records)} trees lose a node by that, or have a node twice: only their phrases are trained on")
    for i, row in enumerate(rows):
        at = i if i < len(records) else (i - len(records)) // swapped
        row["group"] = at  # a record with its copies
    kept = [row for row in rows if len(row["input_ids"]) <= max_length]
    if len(kept) < len(rows):
        say(f"{what}: {len(rows) - len(kept)} of {len(rows)} texts have more than {max_length} tokens and are left out")
    if not kept or (what == "data.train" and not any(row["mentions"] for row in kept)):
        raise GatewiseError(
            f"of the {len(records)} trees of {what} none is left with a triple: give trees with triples whose phrases stand in"
            f" their texts, of at most {max_length} tokens (data.max_length)"
        )
    return kept


class PointingSection(Section):
    """The heads of a pointing model, see ``gatewise_mdt.pointing.heads``."""

    swapped: Annotated[int, Field(ge=0)] = 3
    """Copies of each training passage whose phrases have changed places with those of others."""
    width: Annotated[int, Field(gt=0, multiple_of=4)] = 128
    """Width of the heads."""
    dropout: Share = 0.2
    """Dropout of the heads in training."""
    longest: Count = 24
    """Units (words, doses, Chinese characters) of the longest phrase that can be pointed at."""


class Text2Mdt(Task):
    """Trees of clinical decisions, whose phrases the model points at in the text."""

    task_type = "FEATURE_EXTRACTION"
    elsewhere = "points at the phrases of decision trees: give it to `gatewise mdt extract`, `evaluate` or `review`"
    collator = PointingCollator
    metrics = METRICS[:-1]
    lower_is_better = ("ter",)
    data: DataSection
    pointing: PointingSection
    told: Mapping[str, list[str]] = MappingProxyType({})  # by the keys of the recipe, what was put right in the trees

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
        self.told = {"data.train": [], "data.dev": [], "data.test": []}
        self.train = read_records(self.data.train, self.data.limit_train, self.told["data.train"])
        self.measured = {"dev": read_records(self.data.dev, self.data.limit_dev, self.told["data.dev"])}
        if self.data.test is not None:
            self.measured["test"] = read_records(self.data.test, None, self.told["data.test"])

    def base(self, dtype: Any, tokenizer: PreTrainedTokenizerBase, brought: Any) -> PreTrainedModel:
        """The base model without a head of its own, and fresh pointing heads."""
        encoder = load_model(self.recipe.model, task="encoder", dtype=dtype)
        sizes = self.pointing.model_dump(include={"width", "longest", "dropout"})
        return PointingModel(encoder, HeadSettings(hidden=int(encoder.config.get_text_config().hidden_size), **sizes))

    def encode(
        self,
        rows: list[TreeRecord],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        key: str,
        say: Callable[[str], None],
    ) -> Features:
        """Texts with the places of their trees' phrases; those to train on with copies. Says what was put right in the trees."""
        for sentence in self.told.get(key, ()):
            say(sentence)
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

    def note(self, base: Any) -> dict[str, Any]:
        """The heads' sizes."""
        return {"heads": asdict(base.heads.settings)}

    def units(self, rows: list[TreeRecord]) -> list[str]:
        """The records' texts."""
        return [record.text for record in rows]

    def measure(self, run: Run, model: nn.Module, rows: list[TreeRecord], counting: Counting) -> Measured:
        """How good the trees are that the model finds; the F1 of the triples of each text, of which the whole is no mean."""
        each: list[float] = []
        values = measure(PointingExtractor(model, run.tokenizer, self.recipe.training.eval_batch_size), rows, counting, each=each)
        return Measured({name: values[name] for name in METRICS}, rows=each)

    def note_after(self, run: Run, model: nn.Module) -> dict[str, Any]:
        """How probabilities become confidence, fitted on dev."""
        found = fitted(*PointingExtractor(model, run.tokenizer).judged(self.measured["dev"]))
        if found is None:
            run.progress.say("trees will have no confidence: too few nodes were found in dev, or all are right or all wrong")
        return {"calibration": found and asdict(found)}
