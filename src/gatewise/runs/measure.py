"""Measures a saved adapter on data, with the prompt, labels and lengths of its run or with others."""

from pathlib import Path
from typing import Any

from rich.console import Console

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import files_of, read_note
from gatewise.adapters.loading import load_with_data
from gatewise.errors import GatewiseError
from gatewise.files import check_new_file, check_not_read, finite, write_json_lines
from gatewise.progress import ConsoleProgress, quiet
from gatewise.tasks import evaluate
from gatewise.tasks.metrics import Metrics, cut_line, metrics_line


def measure_adapter(
    adapter: str | Path,
    data: str,
    options: DataOptions = DataOptions(),
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Metrics:
    """Metrics of an adapter on data, as ``gatewise.tasks.evaluate`` gives them.

    Args:
        adapter: its folder. ``gatewise.json`` in it says how its run wrote prompts and labels; an adapter from elsewhere has
            none and gets the plain template for the data.
        data, options: as for ``gatewise.adapters.loading.load_with_data``.
        max_new_tokens: of a written answer, see ``gatewise.tasks.evaluate``; None for that of the adapter's run.
        out: a JSON-lines file for the rows with what was answered to each, see ``gatewise.tasks.evaluate``.

    Raises:
        GatewiseError: adapter, base model and data cannot be read or do not fit each other; ``out`` cannot be written.
    """
    if out is not None:
        check_new_file(out)
        check_not_read(out, data, *files_of(adapter))
    progress = ConsoleProgress(console or Console(stderr=True))
    answers: list[dict[str, Any]] = []
    with quiet(bars=True):
        loaded = load_with_data(adapter, data, options, say=progress.say)
        if max_new_tokens is not None and loaded.records.kind in ("label", "choice"):
            raise GatewiseError(f"{data} holds {loaded.records.kind} rows, to which nothing is written: leave --max-new-tokens out")
        if max_new_tokens is None:
            max_new_tokens = read_note(adapter).get("max_new_tokens")
        with progress.counting("measuring") as count:
            metrics = evaluate(
                loaded.model,
                loaded.tokenizer,
                loaded.records,
                loaded.template,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                max_length=loaded.max_length,
                progress=count,
                answers=answers,
            )
        if line := cut_line(answers, "--max-new-tokens"):
            progress.say(line)
    if out is not None:
        try:
            write_json_lines(out, (finite({**row, **answer}) for row, answer in zip(loaded.records.rows, answers, strict=True)))
        except GatewiseError:
            progress.say(metrics_line(metrics))
            raise
    return metrics
