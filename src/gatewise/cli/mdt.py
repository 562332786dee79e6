"""The ``mdt`` commands: extracting, showing and measuring medical decision trees, and preparing rows to train on."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from gatewise.cli.mdt_review import review
from gatewise.cli.mdt_trees import Format, check_place, check_target, give, with_plans
from gatewise.cli.options import (
    BaseOption,
    CandidatesOption,
    DeviceOption,
    JsonOption,
    PipelineOption,
    RepairOption,
    TokensOption,
    VerbatimOption,
)
from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    from gatewise.mdt import TreeFile, TreeRecord
    from gatewise.mdt.extraction import Extractor

mdt_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", "--output", "-o", help="The file to write, not stdout; for SVG or Mermaid of several records a new folder."
    ),
]

LevelOption = Annotated[
    int | None, typer.Option(help="Chain of thought: 0 tree, 1 triples first, 2 triples and nodes first.", min=0, max=2)
]

FreeOption = Annotated[bool, typer.Option("--free", help="Let the model write what it likes, and read it as well as it goes.")]
BatchOption = Annotated[int, typer.Option(help="Passages in one forward pass.", min=1)]


class LanguageName(StrEnum):
    """The languages that are known."""

    en = "en"
    zh = "zh"


class StageName(StrEnum):
    """A step of the pipeline."""

    triples = "triples"
    nodes = "nodes"
    tree = "tree"


class StageOrAll(StrEnum):
    """A step of the pipeline, or all of them."""

    triples = "triples"
    nodes = "nodes"
    tree = "tree"
    all = "all"


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
    out: OutOption = None,
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
    check_target(out, [file])
    read = _read(file, repair)
    faults = dict(read.faults)
    chosen = _chosen(read, record)
    if record is not None:
        faults = {}
    if format == Format.fhir:
        chosen = with_plans(chosen, faults)
        if not chosen:
            raise GatewiseError(next(iter(faults.values())))
    written = give(chosen, format, out, several=len(chosen) > 1)
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
def extract(
    files: Annotated[list[str], typer.Argument(help="Texts: .txt, .md, .pdf or .docx files; - is stdin.", show_default=False)],
    adapter: Annotated[Path, typer.Option(help="The adapter's folder.", show_default=False)],
    format: Annotated[Format, typer.Option("--format", "-f", help="What to make of the trees.")] = Format.text,
    out: OutOption = None,
    base: BaseOption = None,
    language: Annotated[LanguageName | None, typer.Option(help="The texts' language. [default: found out]")] = None,
    population: Annotated[str | None, typer.Option(help="Whom all passages are about, if headings do not say.")] = None,
    passage_characters: Annotated[
        int | None, typer.Option(help="Most characters of a passage. [default: 800 in English, 300 in Chinese]", min=50)
    ] = None,
    level: LevelOption = None,
    pipeline: PipelineOption = False,
    verbatim: VerbatimOption = False,
    free: FreeOption = False,
    candidates: CandidatesOption = 1,
    max_new_tokens: TokensOption = 512,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
) -> None:
    """Extract decision trees from text with a trained adapter. Every tree needs review by a clinician.

    Long documents are cut into passages under their headings, which say whom they are about. What cannot be read or gives no tree
    does not stop the rest; what failed is said at the end, and the exit code is then 2. Ctrl-C gives what was found by then.

    \b
    Examples:
      gatewise mdt extract guideline.pdf --adapter runs/mdt-pi-lora/adapter --format html --out trees.html
      echo "adults with gout@For a flare, give colchicine." | gatewise mdt extract - --adapter runs/mdt-pi-lora/adapter
    """
    from gatewise.mdt.batch import Batch, extract_pieces, read_pieces
    from gatewise.mdt.views import fhir

    _check_ways(free, verbatim, level, pipeline)
    if format == Format.fhir:
        fhir.check_available()
    check_target(out, files)
    batch = Batch()
    named: Any = language.value if language else None
    pieces = read_pieces(files, batch, language=named, population=population, most_characters=passage_characters)
    several = len(pieces) > 1
    stopped: BaseException | None = None
    if pieces:
        check_place(format, out, several)
        settings = {"level": level, "pipeline": pipeline, "constrained": not free, "verbatim": verbatim, "candidates": candidates}
        try:
            with _loaded(adapter, base, device, max_new_tokens=max_new_tokens, batch_size=batch_size, **settings) as (
                extractor,
                count,
            ):
                extract_pieces(pieces, extractor, batch, count)
        except (KeyboardInterrupt, GatewiseError) as error:
            stopped = error
            if batch.read:
                typer.echo(f"stopped after {batch.read} of {len(pieces)} passages", err=True)
    faults = list(batch.faults)
    written = None
    try:
        written = _give_found(batch.records, format, out, several, faults)
    except GatewiseError as error:
        stopped = stopped or error
    for note in batch.notes:
        typer.echo(f"note: {note}", err=True)
    if written:
        typer.echo(f"written: {written}")
    for sentence in faults:
        typer.echo(f"failed: {sentence}", err=True)
    if stopped:
        raise stopped
    if batch.failed:
        which = "the text" if len(files) == 1 else f"{len(batch.failed)} of the {len(files)} texts"
        raise GatewiseError(f"{which} gave no tree: {', '.join(batch.failed)}")
    if faults:
        raise GatewiseError(f"{len(faults)} {'passage' if len(faults) == 1 else 'passages'} failed, named above")


@mdt_app.command()
def prepare(
    data: Annotated[str, typer.Argument(help="A .json, .jsonl or .txt file of trees, or sample:guidelines.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "--output", "-o", help="The .jsonl file of rows to write.", show_default=False)],
    level: LevelOption = None,
    stage: Annotated[StageOrAll | None, typer.Option(help="Rows for a step of the pipeline, or for all three.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Write the rows of every fifth record here instead.", show_default=False)] = None,
    swapped: Annotated[
        int,
        typer.Option(help="So many copies of each record to train on, with phrases of other records in place of its own.", min=0),
    ] = 0,
    repair: RepairOption = False,
) -> None:
    """Write the rows that `gatewise train` takes: prompts and what is to be written, end to end or for a step of the pipeline.

    The recipe's template is "{source}", see recipes/mdt-pi-lora.yaml.

    \b
    Examples:
      gatewise mdt prepare sample:guidelines --out runs/mdt-data/train.jsonl --dev runs/mdt-data/dev.jsonl
      gatewise mdt prepare trees.json --swapped 3 --out train.jsonl
      gatewise mdt prepare trees.json --stage all --out steps.jsonl
    """
    from gatewise.files import write_json_lines
    from gatewise.mdt.swapping import swapped_copies

    if level is not None and stage is not None:
        raise GatewiseError("--level and --stage were both given: the steps of the pipeline have no levels, leave one out")
    for path in filter(None, (out, dev)):
        if path.suffix.lower() != ".jsonl":
            raise GatewiseError(f"{path}: the name ends in {path.suffix!r}, expected .jsonl")
        check_target(path, [data])
    if out == dev:
        raise GatewiseError(f"--out and --dev are both {out}: expected two files")
    read = _read(data, repair)
    faults = dict(read.faults)
    chosen = _chosen(read, None)
    train = [one for one in chosen if dev is None or one.number % 5]
    sides: dict[Path | None, list[Any]] = {
        dev: [one for one in chosen if one.number % 5 == 0],
        out: [*train, *swapped_copies(train, swapped)],
    }
    for target, records in sides.items():
        if target is None:
            continue
        rows = _rows(records, faults, level=level or 0, stage=stage.value if stage else None)
        if not rows:
            raise GatewiseError(
                f"{data} gives no rows for {target}: expected {'five or more records' if dev else 'trees with triples'}"
            )
        write_json_lines(target, rows)
        typer.echo(f"written: {target}, {len(rows)} rows")
    if faults:
        for number in sorted(faults):
            typer.echo(f"failed: {faults[number]}", err=True)
        raise GatewiseError(f"{len(faults)} of the {read.count} records of {data} give no rows and were left out")


@mdt_app.command()
def evaluate(
    gold: Annotated[str, typer.Option(help="The right trees: a .json or .jsonl file, or sample:guidelines.", show_default=False)],
    pred: Annotated[Path | None, typer.Option(help="The predicted trees, in the same order.", show_default=False)] = None,
    adapter: Annotated[Path | None, typer.Option(help="Extract with this adapter instead.", show_default=False)] = None,
    base: BaseOption = None,
    stage: Annotated[StageName | None, typer.Option(help="With --adapter: this step alone, from gold input.")] = None,
    level: LevelOption = None,
    pipeline: PipelineOption = False,
    verbatim: VerbatimOption = False,
    free: FreeOption = False,
    candidates: CandidatesOption = 1,
    max_new_tokens: TokensOption = 512,
    batch_size: BatchOption = 8,
    device: DeviceOption = "auto",
    limit: Annotated[int | None, typer.Option(help="With --adapter: only the first records.", min=1)] = None,
    errors: Annotated[bool, typer.Option("--errors", help="Show what is wrong with the trees, too, by kind.")] = False,
    as_json: JsonOption = False,
    repair: RepairOption = False,
) -> None:
    """Measure trees: F1 of triples, nodes and decision paths, tree accuracy, tree edit ratio.

    The trees are those of a file, or are extracted with an adapter; then a step of the pipeline can be measured alone. Predictions
    that are no trees count as wrong.

    \b
    Examples:
      gatewise mdt evaluate --gold dev.json --pred predicted.json --errors
      gatewise mdt evaluate --gold dev.json --adapter runs/mdt-steps/adapter --stage nodes
    """
    if (pred is None) == (adapter is None):
        raise GatewiseError("give --pred, a file of predicted trees, or --adapter, to extract them now, and not both")
    if adapter is not None:
        from gatewise.mdt.steps import measure as measure_adapter

        _check_ways(free, verbatim, level, pipeline)
        read = _read(gold, repair)
        if read.faults:
            raise GatewiseError(next(iter(read.faults.values())))
        settings = {"level": level, "pipeline": pipeline, "constrained": not free, "verbatim": verbatim, "candidates": candidates}
        with _loaded(adapter, base, device, max_new_tokens=max_new_tokens, batch_size=batch_size, **settings) as (extractor, count):
            records = read.records[:limit]
            values = measure_adapter(extractor, records, stage.value if stage else None, count, errors=errors)
    else:
        assert pred is not None
        values = _measure_file(gold, pred, repair, errors)
    if as_json:
        typer.echo(json.dumps(values))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("metric", "precision", "recall", "F1"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name in ("triplet", "node", "path"):
        if f"{name}_f1" in values:
            table.add_row(name, *(f"{values[f'{name}_{kind}']:.4f}" for kind in ("precision", "recall", "f1")))
    console = Console()
    console.print(table)
    if "ter" in values:
        nonempty = f"{values['tree_acc_nonempty']:.4f} of the predictions that are not empty"
        console.print(f"tree accuracy: {values['tree_acc']:.4f} ({nonempty})")
        console.print(f"tree edit ratio: {values['ter']:.4f} (lower is better; 1 - TER is {1 - values['ter']:.4f})")
        console.print(f"trees: {values['n']}, of whose predictions {values['malformed']} are no trees ({values['empty']} empty)")
    else:
        console.print(f"records: {values['n']}, of which nothing could be read for {values['failed']}")
    if errors:
        _show_errors(console, values["errors"])


mdt_app.command()(review)


def _check_ways(free: bool, verbatim: bool, level: Any, pipeline: bool) -> None:
    """Before a model is loaded for what the extractor refuses."""
    if free and verbatim:
        raise GatewiseError("--free and --verbatim exclude each other: verbatim phrases take constrained writing")
    if level is not None and pipeline:
        raise GatewiseError("--level and --pipeline exclude each other: the pipeline has no levels")


def _show_errors(console: Console, counts: dict[str, dict[str, int]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="alone: trees that would be right without this kind")
    for column in ("what is wrong", "times", "trees", "alone"):
        table.add_column(column, justify="left" if column == "what is wrong" else "right")
    for kind, one in sorted(counts.items(), key=lambda item: -item[1]["count"]):
        if one["count"]:
            table.add_row(kind, *(str(one[name]) for name in ("count", "trees", "alone")))
    console.print(table if table.row_count else "nothing is wrong")


def _measure_file(gold: str, pred: Path, repair: bool, errors: bool) -> dict[str, Any]:
    from gatewise.mdt.metrics import evaluate as measure
    from gatewise.mdt.mistakes import count_mistakes
    from gatewise.mdt.records import Broken, read_items

    wanted = list(_read(gold, repair).records) if gold.startswith("sample:") else read_items(gold)
    found = read_items(pred)
    for number, item in enumerate(wanted, start=1):
        if isinstance(item, Broken):
            raise GatewiseError(item.message)
        if number <= len(found):
            _check_same_text(item, found[number - 1], number, gold, pred)
    if len(wanted) != len(found):
        raise GatewiseError(
            f"{gold} has {len(wanted)} trees and {pred} has {len(found)}: expected one prediction for each, in the same order"
        )
    metrics: dict[str, Any] = measure(wanted, found, repair=repair, source=gold).to_json()
    return {**metrics, "errors": count_mistakes(wanted, found, repair=repair)} if errors else metrics


@contextmanager
def _loaded(
    adapter: Path, base: str | None, device: str, **settings: Any
) -> "Iterator[tuple[Extractor, Callable[[str, int, int], None]]]":
    """The extractor, and what shows its progress on stderr."""
    from gatewise.mdt.extraction import Extractor
    from gatewise.progress import ConsoleProgress, quiet

    progress = ConsoleProgress(Console(stderr=True))
    with quiet(bars=True):
        extractor = Extractor.load(adapter, base=base, device=device, say=progress.say, **settings)
        said: set[str] = set()

        with progress.counting("writing") as count:

            def show(what: str, done: int, total: int) -> None:
                if what not in said and not progress.console.is_terminal:
                    progress.say(f"writing {what} for {total} {'passage' if total == 1 else 'passages'}")
                said.add(what)
                count(done, total)

            yield extractor, show


def _read(file: str, repair: bool) -> "TreeFile":
    from gatewise.mdt.records import TreeFile, read_trees
    from gatewise.mdt.samples import NAME, sample

    if file == NAME:
        records = sample()
        return TreeFile(NAME, tuple(records), {}, (), len(records))
    if file.startswith("sample:"):
        raise GatewiseError(f"there is no sample {file!r} of trees: expected {NAME}")
    return read_trees(file, repair=repair)


def _rows(records: "Sequence[TreeRecord]", faults: dict[int, str], **how: Any) -> list[dict[str, Any]]:
    """Training rows of the records that give some; what is wrong with the others goes to the faults, by their numbers."""
    from gatewise.mdt.prompts import training_rows

    rows: list[dict[str, Any]] = []
    for record in records:
        try:
            rows += training_rows([record], **how)
        except GatewiseError as error:
            faults[record.number] = str(error)
    return rows


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


def _give_found(records: "Sequence[TreeRecord]", format: Format, out: Path | None, several: bool, faults: list[str]) -> Path | None:
    """Gives what an extraction found; what cannot be given so is printed, so that the work is not lost."""
    from gatewise.mdt.views import render

    without_plan: dict[int, str] = {}
    given = with_plans(records, without_plan) if format == Format.fhir else records
    faults += without_plan.values()
    for one in records:
        if one.number in without_plan:
            typer.echo(render([one], "text"), err=True, nl=False)
    try:
        return give(given, format, out, several) if given else None
    except GatewiseError as error:
        typer.echo(render(given, "json"), nl=False)
        raise GatewiseError(f"{error} (the trees are on stdout, as JSON)") from None


def _check_same_text(gold: Any, pred: Any, number: int, gold_file: str, pred_file: Path) -> None:
    """Predictions in another order would all count as wrong, which says nothing about them."""
    given = [item.get("text") if isinstance(item, dict) else getattr(item, "text", None) for item in (gold, pred)]
    texts = [text.strip() for text in given if isinstance(text, str) and text.strip()]
    if len(texts) == 2 and texts[0] != texts[1]:
        raise GatewiseError(f"record {number} of {pred_file} has another text than record {number} of {gold_file}: keep the order")
