"""``gatewise mdt prepare``: trees to rows that ``gatewise train`` takes."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatewise.errors import GatewiseError
from gatewise.mdt.commands.model import LevelOption
from gatewise.mdt.commands.trees import RepairOption, check_target, chosen, read_file, say

if TYPE_CHECKING:
    from gatewise.mdt.records import TreeRecord


class StageOrAll(StrEnum):
    """A stage of the pipeline, or all of them."""

    triples = "triples"
    nodes = "nodes"
    tree = "tree"
    all = "all"


def prepare(
    data: Annotated[str, typer.Argument(help="A .json, .jsonl or .txt file of trees, or sample:guidelines.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "--output", "-o", help="The .jsonl file of rows to write.", show_default=False)],
    level: LevelOption = None,
    stage: Annotated[StageOrAll | None, typer.Option(help="Rows for a stage of the pipeline, or for all three.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Write the rows of every fifth record here instead.", show_default=False)] = None,
    swapped: Annotated[
        int,
        typer.Option(help="So many copies of each record to train on, with phrases of other records in place of its own.", min=0),
    ] = 0,
    repair: RepairOption = False,
) -> None:
    """Write the rows that `gatewise train` takes: prompts and what is to be written, end to end or for a stage of the pipeline.

    The recipe's template is "{source}", see recipes/mdt-pi-lora.yaml.

    \b
    Examples:
      gatewise mdt prepare sample:guidelines --out runs/mdt-data/train.jsonl --dev runs/mdt-data/dev.jsonl
      gatewise mdt prepare trees.json --swapped 3 --out train.jsonl
      gatewise mdt prepare trees.json --stage all --out stages.jsonl
    """
    from gatewise.files import write_json_lines
    from gatewise.mdt.training.swapping import swapped_copies

    if level is not None and stage is not None:
        raise GatewiseError("--level and --stage were both given: the stages of the pipeline have no levels, leave one out")
    for path in filter(None, (out, dev)):
        if path.suffix.lower() != ".jsonl":
            raise GatewiseError(f"{path}: the name ends in {path.suffix!r}, expected .jsonl")
        check_target(path, [data])
    if out == dev:
        raise GatewiseError(f"--out and --dev are both {out}: expected two files")
    read = read_file(data, repair)
    faults = dict(read.faults)
    records = chosen(read, None)
    train = [one for one in records if dev is None or one.number % 5]
    sides: dict[Path | None, list[Any]] = {
        dev: [one for one in records if one.number % 5 == 0],
        out: [*train, *swapped_copies(train, swapped)],
    }
    for target, side in sides.items():
        if target is None:
            continue
        rows = _rows(side, faults, level=level or 0, stage=stage.value if stage else None)
        if not rows:
            raise GatewiseError(
                f"{data} gives no rows for {target}: expected {'five or more records' if dev else 'trees with triples'}"
            )
        write_json_lines(target, rows)
        say(f"written: {target}, {len(rows)} rows")
    if faults:
        for number in sorted(faults):
            say(f"failed: {faults[number]}", err=True)
        raise GatewiseError(f"{len(faults)} of the {read.count} records of {data} give no rows and were left out")


def _rows(records: "Sequence[TreeRecord]", faults: dict[int, str], **how: Any) -> list[dict[str, Any]]:
    """Training rows of the records that give some; what is wrong with the others goes to the faults, by their numbers."""
    from gatewise.mdt.training.rows import training_rows

    rows: list[dict[str, Any]] = []
    for record in records:
        try:
            rows += training_rows([record], **how)
        except GatewiseError as error:
            faults[record.number] = str(error)
    return rows
