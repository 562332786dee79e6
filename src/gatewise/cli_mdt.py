"""The ``mdt`` commands: showing and measuring medical decision trees."""

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from gatewise.cli_options import JsonOption
from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    from gatewise.mdt import TreeFile, TreeRecord

mdt_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

RepairOption = Annotated[
    bool,
    typer.Option("--repair", help="Put right what has one plain meaning, such as 'and' over a single triple."),
]


class Format(StrEnum):
    """What `show` makes of a tree."""

    text = "text"
    json = "json"
    mermaid = "mermaid"
    svg = "svg"
    html = "html"
    fhir = "fhir"


@mdt_app.callback()
def mdt() -> None:
    """Medical decision trees from guideline text. Every tree needs review by a clinician.

    \b
    Example:
      gatewise mdt show sample:guidelines --record 1
    """


@mdt_app.command()
def show(
    file: Annotated[str, typer.Argument(help="A .json, .jsonl or .txt file of trees, or sample:guidelines.", show_default=False)],
    record: Annotated[int | None, typer.Option(help="Only this record, counted from 1.", min=1)] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to make of it.")] = Format.text,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write, not stdout; for the SVG of several records a new folder.")
    ] = None,
    repair: RepairOption = False,
) -> None:
    """Show trees as text, JSON, Mermaid, SVG, one HTML page, or FHIR R5.

    A record with a fault does not stop the others; what failed is said at the end, and the exit code is then 2.

    \b
    Examples:
      gatewise mdt show sample:guidelines --record 3
      gatewise mdt show trees.json --record 3 --format html --out tree.html
      gatewise mdt show trees.json --format svg --out drawings
    """
    from gatewise.mdt.views import fhir

    if format == Format.fhir:
        fhir.check_available()
    read = _read(file, repair)
    faults = dict(read.faults)
    chosen = _chosen(read, record)
    if record is not None:
        faults = {}
    if format == Format.fhir:
        chosen = _with_plans(chosen, faults)
    written = _give(chosen, format, out)
    for note in read.notes if record is None else [note for note in read.notes if f", record {record}: " in note]:
        typer.echo(f"repaired: {note}", err=True)
    if written:
        typer.echo(f"written: {written}")
    if faults:
        for number in sorted(faults):
            typer.echo(f"failed: {faults[number]}", err=True)
        numbers = ", ".join(map(str, sorted(faults)))
        hint = "" if repair else "; --repair may put them right"
        raise GatewiseError(f"{len(faults)} of the {read.count} records of {file} could not be shown: {numbers}{hint}")


@mdt_app.command()
def evaluate(
    gold: Annotated[Path, typer.Option(help="The right trees: a .json or .jsonl file.", show_default=False)],
    pred: Annotated[Path, typer.Option(help="The predicted trees, in the same order.", show_default=False)],
    as_json: JsonOption = False,
    repair: RepairOption = False,
) -> None:
    """Measure predicted trees: F1 of triples, nodes and decision paths, tree accuracy, tree edit ratio.

    Predictions that are no trees count as wrong.

    \b
    Example:
      gatewise mdt evaluate --gold dev.json --pred predicted.json
    """
    from gatewise.mdt.metrics import evaluate as measure
    from gatewise.mdt.records import Broken, read_items

    wanted, found = read_items(gold), read_items(pred)
    for number, item in enumerate(wanted, start=1):
        if isinstance(item, Broken):
            raise GatewiseError(item.message)
        if number <= len(found):
            _check_same_text(item, found[number - 1], number, gold, pred)
    if len(wanted) != len(found):
        raise GatewiseError(
            f"{gold} has {len(wanted)} trees and {pred} has {len(found)}: expected one prediction for each, in the same order"
        )
    metrics = measure(wanted, found, repair=repair, source=str(gold))
    if as_json:
        typer.echo(json.dumps(metrics.to_json()))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("metric", "precision", "recall", "F1"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    values = metrics.to_json()
    for name in ("triplet", "node", "path"):
        table.add_row(name, *(f"{values[f'{name}_{kind}']:.4f}" for kind in ("precision", "recall", "f1")))
    console = Console()
    console.print(table)
    console.print(f"tree accuracy: {metrics.tree_acc:.4f} ({metrics.tree_acc_nonempty:.4f} of the predictions that are not empty)")
    console.print(f"tree edit ratio: {metrics.ter:.4f} (lower is better; 1 - TER is {1 - metrics.ter:.4f})")
    console.print(f"trees: {metrics.n}, of whose predictions {metrics.malformed} are no trees ({metrics.empty} empty)")


def _read(file: str, repair: bool) -> "TreeFile":
    from gatewise.mdt.records import TreeFile, read_trees
    from gatewise.mdt.samples import NAME, sample

    if file == NAME:
        records = sample()
        return TreeFile(NAME, tuple(records), {}, (), len(records))
    if file.startswith("sample:"):
        raise GatewiseError(f"there is no sample {file!r} of trees: expected {NAME}")
    return read_trees(file, repair=repair)


def _chosen(read: "TreeFile", record: int | None) -> "list[TreeRecord]":
    if record is None:
        if not read.records:
            raise GatewiseError(next(iter(read.faults.values())))
        return list(read.records)
    if record > read.count:
        raise GatewiseError(f"{read.source} has {read.count} records, so none with the number {record}")
    if record in read.faults:
        raise GatewiseError(read.faults[record])
    return [one for one in read.records if one.number == record]


def _with_plans(records: "list[TreeRecord]", faults: dict[int, str]) -> "list[TreeRecord]":
    """The records that FHIR can hold; the others go to the faults, unless there is none left."""
    from gatewise.mdt.views import plan_of

    kept = []
    for one in records:
        try:
            plan_of(one)
            kept.append(one)
        except GatewiseError as error:
            if len(records) == 1:
                raise
            faults[one.number] = f"record {one.number}: {error}"
    if not kept:
        raise GatewiseError(next(iter(faults.values())))
    return kept


def _give(records: "Sequence[TreeRecord]", format: Format, out: Path | None) -> Path | None:
    """Prints, or writes and says where."""
    from gatewise.files import whole_folder
    from gatewise.mdt.views import FORMATS, render, write_view

    if format == Format.svg and len(records) > 1:
        if out is None:
            raise GatewiseError(f"an SVG shows one tree of these {len(records)}: name one with --record, or a folder with --out")
        with whole_folder(out) as folder:
            for one in records:
                (folder / f"record-{one.number:04}{FORMATS[format]}").write_text(render([one], format), encoding="utf-8")
        return out
    if out is not None:
        return write_view(records, format, out)
    typer.echo(render(records, format), nl=False)
    return None


def _check_same_text(gold: Any, pred: Any, number: int, gold_file: Path, pred_file: Path) -> None:
    """Predictions in another order would all count as wrong, which says nothing about them."""
    texts = [item["text"].strip() for item in (gold, pred) if isinstance(item, dict) and isinstance(item.get("text"), str)]
    if len(texts) == 2 and texts[0] != texts[1]:
        raise GatewiseError(f"record {number} of {pred_file} has another text than record {number} of {gold_file}: keep the order")
