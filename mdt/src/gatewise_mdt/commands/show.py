"""``gatewise mdt show``: trees of a file in a form for people or systems."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gatewise.errors import GatewiseError
from gatewise.files import content_of
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

if TYPE_CHECKING:
    from gatewise_mdt.records import TreeRecord


def show(
    file: Annotated[str, typer.Argument(help="A .json or .jsonl file of trees, or sample:guidelines.", show_default=False)],
    record: Annotated[int | None, typer.Option(help="Only this record, counted from 1.", min=1)] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to make of it.")] = "text",
    out: OutOption = None,
    drafts: DraftsOption = False,
    pathway: Annotated[Path | None, typer.Option(help="Join the trees by the links of this file of gatewise mdt pathway.")] = None,
    repair: RepairOption = False,
) -> None:
    """Show trees as text, JSON, Mermaid, SVG, HTML page or as a few patients (vignettes); or export them for systems that run them.

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
    from gatewise_mdt.formats.gate import RUN
    from gatewise_mdt.pathway import read_links

    check_target(out, [file, *([pathway] if pathway else [])])
    read = read_file(file, repair)
    records, faults = list(read.records), read.faults
    if record is not None:
        records, faults = [one for one in records if one.number == record], {}
        if not records:
            raise GatewiseError(read.faults.get(record, f"{file} has {read.count} records, so none with the number {record}"))
    if not drafts and format in RUN:
        _check_document(file, records)
    links = None if pathway is None else read_links(pathway, read.records)
    if written := give(records, format, out, several=len(records) > 1, drafts=drafts, links=links):
        say(f"written: {written}")
    check_whole(read, faults)


def _check_document(file: str, records: "list[TreeRecord]") -> None:
    """Refuses what was approved in a document that is another one by now.

    Raises:
        GatewiseError: the document that lies beside its file of corrections is not the one that they were last saved for.
    """
    from gatewise_mdt.formats.gate import DRAFTS
    from gatewise_mdt.review.files import SUFFIX

    document = Path(file.removesuffix(SUFFIX))
    own = [one for one in records if Path(str(one.more.get("source"))).name == document.name and one.sha256]
    if file.endswith(SUFFIX) and own and document.is_file():
        digest = hashlib.sha256(content_of(document)).hexdigest()
        if any(one.sha256 != digest for one in own):
            raise GatewiseError(
                f"{document} has changed since its review was saved, so an approval may be of another text: open it again with"
                f" gatewise mdt review {document}, look at what changed, and save; {DRAFTS}"
            )
