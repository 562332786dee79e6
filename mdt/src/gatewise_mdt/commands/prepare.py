"""``gatewise mdt prepare``: trees to rows that ``gatewise train`` takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gatewise.errors import GatewiseError
from gatewise.files import is_one_file
from gatewise.flags import OUT
from gatewise_mdt.commands.trees import StrictOption, check_target, check_whole, count_of, read_file, say

if TYPE_CHECKING:
    from gatewise_mdt.records import TreeRecord


def prepare(
    data: Annotated[str, typer.Argument(help="A .json or .jsonl file of trees, or sample:guidelines.", show_default=False)],
    out: Annotated[Path, typer.Option(*OUT, help="The .jsonl file of rows to write.", show_default=False)],
    only: Annotated[Literal["approved"] | None, typer.Option(help="Only the records that a reviewer approved.")] = None,
    dev: Annotated[
        Path | None, typer.Option(help="Hold whole documents back for dev, and write their rows to this file.", show_default=False)
    ] = None,
    dev_share: Annotated[
        float | None, typer.Option(help="With --dev: about this share of the records, 0.2 if not given.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw of documents (--dev) and phrases (--swapped).")] = 0,
    swapped: Annotated[
        int,
        typer.Option(help="Copies to add of each training record, with phrases of other records in place of its own.", min=0),
    ] = 0,
    strict: StrictOption = False,
) -> None:
    """Write training rows for a model that writes trees.

    A row is a prompt and the tree that is to be written after it, as `gatewise train` takes them. The recipe's template is
    "{source}", see mdt/recipes/mdt-pi-lora.yaml.

    \b
    Examples:
      gatewise mdt prepare sample:guidelines --out runs/mdt-data/train.jsonl --dev runs/mdt-data/dev.jsonl
      gatewise mdt prepare trees.json --swapped 3 --out train.jsonl
      gatewise mdt prepare guideline.pdf.review.jsonl --only approved --out train.jsonl
    """
    from gatewise.files import write_json_lines
    from gatewise_mdt.training.splitting import by_document, split
    from gatewise_mdt.training.swapping import swapped_copies

    for path in filter(None, (out, dev)):
        if path.suffix.lower() != ".jsonl":
            raise GatewiseError(f"{path}: the name ends in {path.suffix!r}, expected .jsonl")
        check_target(path, [data])
    if dev is None and dev_share is not None:
        raise GatewiseError("--dev-share needs --dev FILE, the file that the records held back are written to")
    if dev is not None and is_one_file(out, dev):
        raise GatewiseError(f"--out {out} and --dev {dev} are one file: expected two files")
    read = read_file(data, not strict, counted=True)
    faults, records = dict(read.faults), list(read.records)
    if only is not None:
        records = _only_approved(records, data)
    train, held = (records, []) if dev is None else split(records, 0.2 if dev_share is None else dev_share, seed=seed)
    sides: dict[Path, list[TreeRecord]] = {out: [*train, *swapped_copies(train, swapped, seed=seed)]}
    if dev is not None:
        sides = {dev: held, **sides}
    made = {target: _rows(side, faults) for target, side in sides.items()}
    for target, rows in made.items():
        if not rows:
            where = " on both sides" if dev else ""
            raise GatewiseError(f"{data} gives no rows for {target}: expected trees with triples{where}")
    for target, rows in made.items():
        write_json_lines(target, [row for _, row in rows])
        used = {record.number for record, _ in rows}
        passages = [record for record in records if record.number in used]
        say(
            f"written: {target}, {len(rows)} rows of {count_of(len(passages), 'passage')}"
            f" of {count_of(len(by_document(passages)), 'document')}"
        )
    check_whole(read, faults)


def _only_approved(records: "list[TreeRecord]", data: str) -> "list[TreeRecord]":
    """Those that a reviewer approved; says how many others there are."""
    kept = [one for one in records if one.is_approved]
    if not kept:
        raise GatewiseError(
            f"none of the {len(records)} records of {data} was approved: approve some in `gatewise mdt review`, or leave --only out"
        )
    say(f"left out: {len(records) - len(kept)} of {count_of(len(records), 'record')}, which no reviewer approved")
    return kept


def _rows(records: "Sequence[TreeRecord]", faults: dict[int, str]) -> "list[tuple[TreeRecord, dict[str, Any]]]":
    """Each training row with its record; what is wrong with records that give none goes to the faults, by their numbers."""
    from gatewise_mdt.training.rows import training_rows

    rows: list[tuple[TreeRecord, dict[str, Any]]] = []
    for record in records:
        try:
            rows += [(record, row) for row in training_rows([record])]
        except GatewiseError as error:
            faults[record.number] = str(error)
    return rows
