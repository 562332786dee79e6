"""The files of trees that a command reads, and where the trees go that it made: to stdout, or to ``--out``."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gatewise.checks import printable
from gatewise.errors import GatewiseError
from gatewise.files import is_one_file
from gatewise.flags import OUT

if TYPE_CHECKING:
    from gatewise_mdt.pathway import Link
    from gatewise_mdt.records import TreeFile, TreeRecord

OutOption = Annotated[
    Path | None,
    typer.Option(*OUT, help="Write to this file, not to stdout; SVG or Mermaid of several records to a new folder."),
]
RepairOption = Annotated[
    bool,
    typer.Option("--repair", help="Correct slips that have one plain meaning, such as 'and' over a single triple."),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict/--repair",
        help="Refuse trees with slips such as 'null' over two triples, or correct and count them.",
    ),
]
DraftsOption = Annotated[
    bool,
    typer.Option(
        "--drafts",
        help="Take trees that are not approved for systems that run them, and links that are only proposed; mark all as DRAFT.",
    ),
]
Format = Literal["text", "json", "mermaid", "svg", "html", "vignettes", "vignettes-json", "fhir-r4", "fhir-r5", "dmn", "dak"]


def read_file(file: str, repair: bool, *, counted: bool = False) -> "TreeFile":
    """The trees of a file, or the sample; says what was repaired.

    Args:
        counted: says how often each kind of thing was, and not in which nodes.

    Raises:
        GatewiseError: the file cannot be read, or has no record without a fault.
    """
    from gatewise_mdt.records import TreeFile, read_trees, repairs_in_words
    from gatewise_mdt.samples import sample_of

    if file.startswith("sample:"):
        records = sample_of(file)
        return TreeFile(file, tuple(records), {}, (), len(records))
    read = read_trees(file, repair=repair)
    if counted and read.repairs:
        say(f"note: {repairs_in_words(file, read.repairs)}", err=True)
    for note in read.changed if counted else read.notes:
        say(f"repaired: {note}", err=True)
    if not read.records:
        raise GatewiseError(next(iter(read.faults.values())))
    return read


def check_whole(read: "TreeFile", faults: Mapping[int, str], more: str = "") -> None:
    """Says which records of a file were left out, at the end of a command.

    Raises:
        GatewiseError: some were.
    """
    for _, fault in sorted(faults.items()):
        say(f"failed: {fault}", err=True)
    if faults:
        numbers = ", ".join(map(str, sorted(faults)))
        helps = "" if read.repairs else "; --repair may help"
        raise GatewiseError(f"{len(faults)} of the {read.count} records of {read.source} were left out: {numbers}{helps}{more}")


def check_target(out: Path | None, inputs: Iterable[str | Path]) -> None:
    """Refuses to write over what is read, and over what a review wrote.

    Raises:
        GatewiseError: the target is one of the inputs, or a review's file of corrections.
    """
    if out is not None and any(is_one_file(one, out) for one in inputs):
        raise GatewiseError(f"--out {out} is a file that is read, and would be lost: give another path")
    if out is not None and out.suffix == ".jsonl":
        names = (".review.jsonl", ".history.jsonl")
        if (out.is_file() and out.name.endswith(names)) or out.with_suffix(".history.jsonl").exists():
            raise GatewiseError(f"--out {out} has the trees of a review, which would be lost: give another path")


def count_of(number: int, thing: str) -> str:
    """ "1 passage", "2 passages"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Prints a text of documents and trees, which may hold what a terminal would obey."""
    typer.echo(printable(text), err=err, nl=nl)


def give(
    records: "Sequence[TreeRecord]",
    format: str,
    out: Path | None,
    several: bool,
    drafts: bool = False,
    links: "Sequence[Link] | None" = None,
) -> Path | None:
    """Prints, or writes and says where.

    Args:
        several: whether there might have been more than one tree: formats that show one tree then fill a folder.
        drafts: formats that systems run take trees that are not approved, too.
        links: between the trees, which are then one pathway.

    Raises:
        GatewiseError: the place cannot be written, or the format cannot show the trees, or may not.
    """
    from gatewise.files import whole_folder
    from gatewise_mdt.formats.gate import approved_alone, cleared
    from gatewise_mdt.formats.views import FORMATS, ONE_TREE, notes_of, render, write_view

    records, left_out = approved_alone(records, format, drafts)
    cleared(records, format, drafts)
    if left_out:
        say(f"note: {left_out}", err=True)
    for note in notes_of(records, format):
        say(f"note: {note}", err=True)
    if out is None:
        say(render(records, format, drafts=drafts, links=links), nl=False)
        return None
    if links is not None or not (several and format in ONE_TREE):
        return write_view(records, format, out, drafts=drafts, links=links)
    with whole_folder(out) as folder:
        for one in records:
            file = folder / f"record-{one.number:04}{FORMATS[format]}"
            file.write_text(render([one], format), encoding="utf-8", newline="\n")
    return out
