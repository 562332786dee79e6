"""``gatewise mdt evaluate``: how good trees are, those of a file or those that an adapter extracts."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from gatewise.errors import GatewiseError
from gatewise.flags import BaseOption, DeviceOption, JsonOption
from gatewise_mdt.commands.model import (
    BatchOption,
    TokensOption,
    VerbatimOption,
    loaded,
)
from gatewise_mdt.commands.trees import StrictOption, read_file, say


def evaluate(
    gold: Annotated[str, typer.Option(help="The right trees: a .json or .jsonl file, or sample:guidelines.", show_default=False)],
    pred: Annotated[Path | None, typer.Option(help="The predicted trees, in the same order.", show_default=False)] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Extract the trees with this adapter, in place of --pred.", show_default=False)
    ] = None,
    base: BaseOption = None,
    verbatim: VerbatimOption = False,
    max_new_tokens: TokensOption = 512,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    limit: Annotated[int | None, typer.Option(help="With --adapter: only the first records.", min=1)] = None,
    mistakes: Annotated[
        bool, typer.Option("--mistakes", "--errors", help="Also count what is wrong with the trees, by kind.")
    ] = False,
    as_json: JsonOption = False,
    strict: StrictOption = False,
) -> None:
    """Measure predicted trees against the right ones.

    Measures are F1 of triples, nodes and decision paths, tree accuracy and tree edit ratio, with 95% bootstrap intervals. The trees
    are those of a file, or are extracted with an adapter. Predictions that are no trees count as wrong.
    With --strict trees of a file are compared as they are written.

    \b
    Examples:
      gatewise mdt evaluate --gold dev.json --pred predicted.json --mistakes
      gatewise mdt evaluate --gold dev.json --adapter runs/mdt-pointing/adapter
    """
    if (pred is None) == (adapter is None):
        raise GatewiseError("expected --pred FILE, the predicted trees, or --adapter DIR, to extract them now: give one of the two")
    if limit is not None and pred is not None:
        raise GatewiseError("--limit is for trees that are extracted now, with --adapter: leave it out, or give shorter files")
    if adapter is not None:
        from gatewise_mdt.extraction.extractor import measure

        read = read_file(gold, not strict, counted=True)
        if read.faults:
            raise GatewiseError(next(iter(read.faults.values())))
        settings = {"verbatim": verbatim, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        with loaded(adapter, base, device, **settings) as (extractor, count):
            faults: list[str] = []
            values = measure(extractor, read.records[:limit], count, mistakes=mistakes, faults=faults)
        for fault, times in Counter(faults).most_common(3):
            say(f"note: no tree of {times} passages: {fault}", err=True)
    else:
        assert pred is not None
        values = _measure_file(gold, pred, not strict, mistakes)
    if as_json:
        typer.echo(json.dumps(values))
        return
    from gatewise_mdt.evaluation.intervals import DRAWS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("metric", "precision", "recall", "F1"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name in ("triplet", "node", "path"):
        table.add_row(name, *(_with_interval(values, f"{name}_{kind}") for kind in ("precision", "recall", "f1")))
    console = Console()
    console.print(table)
    console.print(f"tree accuracy: {_with_interval(values, 'tree_acc')}")
    console.print(f"tree accuracy of the predictions that are not empty: {_with_interval(values, 'tree_acc_nonempty')}")
    console.print(f"tree edit ratio: {_with_interval(values, 'ter')}, lower is better; 1 - TER is {1 - values['ter']:.4f}")
    console.print(f"trees: {values['n']}; predictions that are no trees: {values['malformed']} ({values['empty']} of them empty)")
    if values["intervals"]:
        console.print(f"in brackets: 95% intervals, from {DRAWS:,} bootstrap draws of the {values['n']} passages")
    if mistakes:
        _show_mistakes(console, values["mistakes"])


def _with_interval(values: dict[str, Any], name: str) -> str:
    """A metric, and its interval in brackets if it has one."""
    ends = values["intervals"].get(name)
    return f"{values[name]:.4f}" + (f" ({ends['low']:.3f}-{ends['high']:.3f})" if ends else "")


def _measure_file(gold: str, pred: Path, repair: bool, mistakes: bool) -> dict[str, Any]:
    from gatewise_mdt.evaluation.intervals import intervals
    from gatewise_mdt.evaluation.metrics import count_trees, metrics_of
    from gatewise_mdt.evaluation.mistakes import count_mistakes
    from gatewise_mdt.records import read_items, repairs_in_words, repairs_of

    wanted: list[Any] = list(read_file(gold, repair).records) if gold.startswith("sample:") else read_items(gold)
    found = read_items(pred)
    for number, item in enumerate(wanted, start=1):
        if isinstance(item, GatewiseError):
            raise item
        if number <= len(found):
            _check_same_text(item, found[number - 1], number, gold, pred)
    if len(wanted) != len(found):
        raise GatewiseError(
            f"{gold} has {len(wanted)} trees and {pred} has {len(found)}: expected one prediction for each, in the same order"
        )
    counts = count_trees(wanted, found, repair=repair, source=gold)
    repairs = {name: repairs_of(items) if repair else {} for name, items in ((gold, wanted), (str(pred), found))}
    for name, made in repairs.items():
        if made:
            say(f"note: {repairs_in_words(name, made)}", err=True)
    metrics = {**metrics_of(counts).to_json(), "intervals": intervals(counts), "read_as": repairs}
    return {**metrics, "mistakes": count_mistakes(wanted, found, repair=repair)} if mistakes else metrics


def _check_same_text(gold: Any, pred: Any, number: int, gold_file: str, pred_file: Path) -> None:
    """Predictions in another order would all count as wrong, which says nothing about them."""
    given = [item.get("text") if isinstance(item, dict) else getattr(item, "text", None) for item in (gold, pred)]
    texts = [text.strip() for text in given if isinstance(text, str) and text.strip()]
    if len(texts) == 2 and texts[0] != texts[1]:
        raise GatewiseError(
            f"record {number} of {pred_file} has another text than record {number} of {gold_file}: give them in the same order"
        )


def _show_mistakes(console: Console, counts: dict[str, dict[str, int]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="alone: trees that would be right without this kind")
    for column in ("what is wrong", "times", "trees", "alone"):
        table.add_column(column, justify="left" if column == "what is wrong" else "right")
    for kind, one in sorted(counts.items(), key=lambda item: -item[1]["count"]):
        if one["count"]:
            table.add_row(kind, *(str(one[name]) for name in ("count", "trees", "alone")))
    console.print(table if table.row_count else "no mistakes")
