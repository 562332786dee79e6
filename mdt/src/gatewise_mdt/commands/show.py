"""``gatewise mdt show``: trees of a file in a form for people or systems."""

from pathlib import Path
from typing import Annotated

import typer

from gatewise.errors import GatewiseError
from gatewise_mdt.commands.trees import (
    DraftsOption,
    Format,
    OutOption,
    RepairOption,
    check_target,
    check_whole,
    give,
    read_file,
    say,
)


def show(
    file: Annotated[str, typer.Argument(help="A .json or .jsonl file of trees, or sample:guidelines.", show_default=False)],
    record: Annotated[int | None, typer.Option(help="Only this record, counted from 1.", min=1)] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="The form to show it in.")] = "text",
    out: OutOption = None,
    drafts: DraftsOption = False,
    pathway: Annotated[Path | None, typer.Option(help="Join the trees by the links of this file of gatewise mdt pathway.")] = None,
    repair: RepairOption = False,
) -> None:
    """Show trees to people, or export them for systems that run them.

    People read text, JSON, Mermaid, SVG, an HTML page or a few patients (vignettes).

    Systems run fhir-r4 and fhir-r5 (PlanDefinition with CQL), dmn (decision tables, DMN 1.3) and dak (WHO's workbooks, with --out).
    They take approved trees alone, whose items of `gatewise mdt check` are all ticked in `gatewise mdt review`. With --drafts they
    take others, too, and everything in them says DRAFT. What one of them cannot say is said in a note.

    A record with a fault does not stop the others; what failed is said at the end, and the exit code is then 2.

    \b
    Examples:
      gatewise mdt show sample:guidelines --record 3
      gatewise mdt show trees.json --record 3 --format html --out tree.html
      gatewise mdt show trees.json --format svg --out drawings
      gatewise mdt show guideline.pdf.review.jsonl --format fhir-r4 --out bundle.json
      gatewise mdt show trees.json --format dmn --drafts --out drafts.dmn
      gatewise mdt show trees.json --pathway pathway.json --format svg --out pathway.svg
    """
    from gatewise_mdt.formats.gate import RUN, check_documents
    from gatewise_mdt.pathway import read_links

    if record is not None and pathway is not None:
        raise GatewiseError("--record shows one tree, and --pathway all that its links join: leave one of the two out")
    check_target(out, [file, *([pathway] if pathway else [])])
    read = read_file(file, repair)
    records, faults = list(read.records), read.faults
    if record is not None:
        records, faults = [one for one in records if one.number == record], {}
        if not records:
            raise GatewiseError(read.faults.get(record, f"{file} has {read.count} records, so none with the number {record}"))
    if not drafts and format in RUN:
        check_documents(Path(file), records)
    links = None if pathway is None else read_links(pathway, read.records)
    if written := give(records, format, out, several=len(records) > 1, drafts=drafts, links=links):
        say(f"written: {written}")
    check_whole(read, faults)
