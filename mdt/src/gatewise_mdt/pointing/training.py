"""What a run with ``task: text2mdt`` trains and measures: rows of trees, a model with fresh heads, and how good its trees are."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise_mdt.extraction.extractor import measure
from gatewise_mdt.pointing.calibration import fitted
from gatewise_mdt.pointing.extractor import PointingExtractor
from gatewise_mdt.pointing.heads import HeadSettings
from gatewise_mdt.pointing.model import PointingCollator, PointingModel, encode_records
from gatewise_mdt.records import TreeRecord, read_trees
from gatewise_mdt.samples import NAME, sample
from gatewise_mdt.training.swapping import swapped_copies

__all__ = ("PointingCollator", "calibration", "measured", "pointing_model", "read_records", "training_rows")

SIDES = {"sample:guideline-trees-train": False, "sample:guideline-trees-dev": True}
"""The two sides of the sample of guideline passages, for recipes that anybody can run: every fifth passage is dev's."""
METRICS = ("triplet_f1", "node_f1", "path_f1", "tree_acc", "ter", "n")


def read_records(source: str, limit: int | None = None) -> list[TreeRecord]:
    """Texts with their trees: a file of :mod:`gatewise_mdt.records`, ``sample:guidelines`` or one of its SIDES.

    Raises:
        GatewiseError: the file cannot be read, or has a record with a fault.
    """
    if source == NAME or source in SIDES:
        records = [one for one in sample() if SIDES.get(source) in (None, one.number % 5 == 0)]
    elif source.startswith("sample:"):
        raise GatewiseError(f"there is no sample {source!r} of trees: expected {', '.join((NAME, *SIDES))}")
    else:
        read = read_trees(source, repair=True)
        if read.faults:
            raise GatewiseError(next(iter(read.faults.values())))
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
        say(f"{what}: {trees} of {len(records)} trees lose a node by that, or have a node twice, and teach phrases alone")
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


def pointing_model(encoder: PreTrainedModel, *, width: int, longest: int, dropout: float) -> PointingModel:
    """A base model with fresh heads, drawn from torch's random state."""
    hidden = int(encoder.config.get_text_config().hidden_size)
    return PointingModel(encoder, HeadSettings(hidden=hidden, width=width, longest=longest, dropout=dropout))


def measured(
    model: Any, tokenizer: PreTrainedTokenizerBase, records: Sequence[TreeRecord], batch_size: int, progress: Any = None
) -> dict[str, float | int]:
    """How good the trees are that a pointing model finds in the records' texts: METRICS of ``gatewise_mdt.evaluation.metrics``."""
    values = measure(PointingExtractor(model, tokenizer, batch_size), records, progress)
    return {name: values[name] for name in METRICS}


def calibration(model: Any, tokenizer: PreTrainedTokenizerBase, records: Sequence[TreeRecord]) -> dict[str, Any] | None:
    """How a pointing model's probabilities become confidence, fitted on records that it was not trained on, for an adapter's note.

    None where there are too few nodes to tell.
    """
    found = fitted(*PointingExtractor(model, tokenizer).judged(records))
    return None if found is None else found.to_json()
