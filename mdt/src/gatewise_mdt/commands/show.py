"""``gatewise mdt show``: trees of a file in a form for people or systems."""

from typing import Annotated

import typer

from gatewise.errors import GatewiseError
from gatewise_mdt.commands.trees import (
    Format,
    OutOption,
    RepairOption,
    check_format,
    check_target,
    chosen,
    give,
    read_file,
    say,
)


def show(
    file: Annotated[str, typer.Argument(help="A .json or .jsonl file of trees, or sample:guidelines.", show_default=False)],
    record: Annotated[int | None, typer.Option(help="Only this record, counted from 1.", min=1)] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to make of it.")] = Format.text,
    out: OutOption = None,
    repair: RepairOption = False,
) -> None:
    """Show trees as text, JSON, Mermaid, SVG or one HTML page; or export them for systems that run them.

    Systems run fhir-r4 and fhir-r5 (PlanDefinition with CQL), dmn (decision tables, DMN 1.3) and dak (WHO's workbooks, with --out).
    What one of them cannot say is said in a note.

    A record with a fault does not stop the others; what failed is said at the end, and the exit code is then 2.

    \b
    Examples:
      gatewise mdt show sample:guidelines --record 3
      gatewise mdt show trees.json --record 3 --format html --out tree.html
      gatewise mdt show trees.json --format svg --out drawings
      gatewise mdt show trees.json --format fhir-r4 --out bundle.json
    """
    check_format(format, out)
    check_target(out, [file])
    read = read_file(file, repair)
    faults = dict(read.faults)
    records = chosen(read, record)
    if record is not None:
        faults = {}
    written = give(records, format, out, several=len(records) > 1)
    for note in read.notes:
        if record is None or f", record {record}: " in note:
            say(f"repaired: {note}", err=True)
    if written:
        say(f"written: {written}")
    if faults:
        for number in sorted(faults):
            say(f"failed: {faults[number]}", err=True)
        numbers = ", ".join(map(str, sorted(faults)))
        hint = "" if repair else "; --repair may put them right"
        raise GatewiseError(f"{len(faults)} of the {read.count} records of {file} could not be shown: {numbers}{hint}")
