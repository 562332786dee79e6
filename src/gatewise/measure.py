"""Measuring a saved adapter: with the prompt, labels and lengths of its run, or with those given."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.files import check_new_file, finite, write_json_lines
from gatewise.models import load_adapter
from gatewise.models.convert import quiet
from gatewise.progress import RunProgress
from gatewise.tasks import Records, Template, default_template, evaluate, load_records
from gatewise.training import NOTE_FILE

Metrics = dict[str, float | int]


def measure_adapter(
    adapter: str | Path,
    data: str,
    *,
    base: str | None = None,
    split: str | None = None,
    prompt: str | None = None,
    labels: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Metrics:
    """Metrics of an adapter on data, as ``gatewise.tasks.evaluate`` gives them.

    Args:
        adapter: its folder. ``gatewise.json`` in it says how its run wrote prompts and labels; an adapter from elsewhere has
            none and gets the plain template for the data.
        prompt: a prompt template instead of the run's.
        labels: ``"no,yes"``, the labels in the order of the classes, or ``"no=bad,yes=good"``, with the words written for them.
        limit: only the first rows.
        out: a JSON-lines file for the rows with what was answered to each, see ``gatewise.tasks.evaluate``.

    Raises:
        GatewiseError: adapter, base model and data cannot be read or do not fit each other; ``out`` cannot be written.
    """
    if out is not None:
        check_new_file(out)
    progress = RunProgress(console or Console(stderr=True))
    answers: list[dict[str, Any]] = []
    with quiet(bars=True):
        loaded = load_with_data(adapter, data, base=base, split=split, prompt=prompt, labels=labels, limit=limit, say=progress.say)
        with progress.counting("measuring") as count:
            metrics = evaluate(
                loaded.model,
                loaded.tokenizer,
                loaded.records,
                loaded.template,
                batch_size=batch_size,
                max_length=loaded.max_length,
                progress=count,
                answers=answers,
            )
    if out is not None:
        write_json_lines(out, (finite({**row, **answer}) for row, answer in zip(loaded.records.rows, answers, strict=True)))
    return metrics


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base model, and data read as the adapter's own run read its data.

    Attributes:
        base: the base model's name.
        template: None for a classifier, which reads the text itself.
        max_length: most tokens of a sequence in that run.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    records: Records
    template: Template | None
    max_length: int


def load_with_data(
    adapter: str | Path,
    data: str,
    *,
    base: str | None = None,
    split: str | None = None,
    prompt: str | None = None,
    labels: str | None = None,
    limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Loaded:
    """Loads an adapter and the data it is to be run on. Arguments and errors are those of ``measure_adapter``.

    Args:
        say: told in a line what happens now.
    """
    adapter = Path(adapter)
    note = read_note(adapter)
    names, words = _labels(labels) if labels else (note.get("labels"), note.get("label_words"))
    records = load_like(data, names, split=split, limit=limit)
    check_labels(records, "give --labels with all of them")
    if say:
        say(f"loading {adapter}")
    dtype = torch.bfloat16 if note.get("dtype") == "bfloat16" else torch.float32
    model, tokenizer, base_name = load_adapter(adapter, base=base, dtype=dtype)
    template = None
    if note.get("task", "causal") == "causal":
        plain = default_template(records)
        template = Template(prompt or note.get("template") or plain.prompt, words if records.labels is not None else None)
    return Loaded(model, tokenizer, base_name, records, template, int(note.get("max_length", 512)))


def load_like(data: str, labels: list[str] | None, *, split: str | None = None, limit: int | None = None) -> Records:
    """Records with the labels of other records, in the same order, if they have labels at all."""
    records = load_records(data, split=split, limit=limit)
    if records.labels is None or labels is None:
        return records
    return load_records(data, split=split, limit=limit, labels=labels)


def check_labels(records: Records, advice: str) -> None:
    """Refuses rows that leave nothing to choose between.

    Raises:
        GatewiseError: there is one label only.
    """
    if records.labels is not None and len(records.labels) == 1:
        raise GatewiseError(
            f"all rows of {records.source} have the label {records.labels[0]!r}, so that any answer would be right: {advice}"
        )


def read_note(adapter: Path) -> dict[str, Any]:
    """What the run left in ``gatewise.json``; empty for an adapter from elsewhere.

    Raises:
        GatewiseError: the file is damaged.
    """
    path = adapter / NOTE_FILE
    if not path.is_file():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GatewiseError(f"{path} cannot be read ({error}): remove it and give --template-prompt and --labels") from None
    if not isinstance(note, dict):
        raise GatewiseError(f"{path} is not a JSON object: remove it and give --template-prompt and --labels")
    return note


def metrics_line(metrics: Mapping[str, float | int]) -> str:
    """Metrics as ``accuracy 0.912, loss 0.2871, n 200``."""
    return ", ".join(f"{name} {format_metric(name, value)}" for name, value in metrics.items())


def format_metric(name: str, value: float | int) -> str:
    """A metric with as many digits as mean something."""
    if name == "n":
        return str(value)
    return f"{value:.1f}" if name == "bleu" else f"{value:.4f}" if name == "loss" else f"{value:.3f}"


def _labels(text: str) -> tuple[list[str], dict[str, str] | None]:
    parts = [part.strip() for part in text.split(",")]
    pairs = [part.partition("=") for part in parts]
    names = [name.strip() for name, _, _ in pairs]
    with_words = [bool(equals and word.strip()) for _, equals, word in pairs]
    if not all(names) or len(names) < 2 or any(with_words) != all(with_words):
        raise GatewiseError(f"--labels {text!r}: expected 'no,yes', or with a word for each label 'no=bad,yes=good'")
    return names, {name.strip(): word.strip() for name, _, word in pairs} if all(with_words) else None
