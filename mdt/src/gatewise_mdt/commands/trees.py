"""The files of trees that a command reads, and where the trees go that it made: to stdout, or to ``--out``."""

import os
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gatewise.checks import printable
from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    from gatewise_mdt.records import TreeFile, TreeRecord

OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", "--output", "-o", help="The file to write, not stdout; for SVG or Mermaid of several records a new folder."
    ),
]

RepairOption = Annotated[
    bool,
    typer.Option("--repair", help="Put right what has one plain meaning, such as 'and' over a single triple."),
]


class Format(StrEnum):
    """What is made of a tree."""

    text = "text"
    json = "json"
    mermaid = "mermaid"
    svg = "svg"
    html = "html"
    fhir_r4 = "fhir-r4"
    fhir_r5 = "fhir-r5"
    dmn = "dmn"
    dak = "dak"


def read_file(file: str, repair: bool) -> "TreeFile":
    from gatewise_mdt.records import TreeFile, read_trees
    from gatewise_mdt.samples import NAME, sample

    if file == NAME:
        records = sample()
        return TreeFile(NAME, tuple(records), {}, (), len(records))
    if file.startswith("sample:"):
        raise GatewiseError(f"there is no sample {file!r} of trees: expected {NAME}")
    return read_trees(file, repair=repair)


def chosen(read: "TreeFile", record: int | None) -> "list[TreeRecord]":
    if record is None:
        if not read.records:
            raise GatewiseError(next(iter(read.faults.values())))
        return list(read.records)
    if record > read.count:
        raise GatewiseError(f"{read.source} has {read.count} records, so none with the number {record}")
    if record in read.faults:
        raise GatewiseError(read.faults[record])
    return [one for one in read.records if one.number == record]


def check_target(out: Path | None, inputs: Iterable[str | Path]) -> None:
    """Refuses to write over what is read.

    Raises:
        GatewiseError: the target is one of the inputs.
    """
    for one in inputs if out is not None and os.path.isfile(out) else ():
        if is_one_file(one, out):  # type: ignore[arg-type]
            raise GatewiseError(f"--out {out} is what is read, and would be lost: give another path")


def is_one_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file, which need not be there yet."""
    try:
        return os.path.realpath(one) == os.path.realpath(other) or os.path.samefile(one, other)
    except (OSError, ValueError):  # one is not there, or has a NUL in its name, which is told when it is opened
        return False


def check_format(format: Format, out: Path | None) -> None:
    """Refuses before any work a format that cannot be printed.

    Raises:
        GatewiseError: a workbook has no file to go to.
    """
    if format == Format.dak and out is None:
        raise GatewiseError("the format dak is a workbook, which cannot be printed: name a file with --out, such as trees.xlsx")


def check_place(format: Format, out: Path | None, several: bool) -> None:
    """Refuses before long work what could not be printed or written after it.

    Args:
        several: whether there may be more than one tree.

    Raises:
        GatewiseError: the place cannot be written, or the format shows one tree and there is no folder for several.
    """
    from gatewise.files import check_new_file, check_new_folder
    from gatewise_mdt.formats.views import ONE_TREE

    folder = several and format in ONE_TREE
    if out is None:
        if folder:
            raise GatewiseError(f"{ONE_TREE[format]} shows one tree, and here may be several: name a new folder with --out")
        return
    if folder:
        check_new_folder(out)
    else:
        check_new_file(out)


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Prints a text of documents and trees, which may hold what a terminal would obey."""
    typer.echo(printable(text), err=err, nl=nl)


def give(records: "Sequence[TreeRecord]", format: Format, out: Path | None, several: bool) -> Path | None:
    """Prints, or writes and says where.

    Args:
        several: whether there might have been more than one tree: formats that show one tree then fill a folder.

    Raises:
        GatewiseError: the place cannot be written, or the format cannot show the trees.
    """
    from gatewise.files import whole_folder
    from gatewise_mdt.formats.views import FORMATS, ONE_TREE, notes_of, render, write_view

    for note in notes_of(records, format):
        say(f"note: {note}", err=True)
    if several and format in ONE_TREE:
        if out is None:
            which = f"name one of these {len(records)} with --record, or a new folder with --out"
            raise GatewiseError(f"{ONE_TREE[format]} shows one tree: {which}")
        with whole_folder(out) as folder:
            for one in records:
                file = folder / f"record-{one.number:04}{FORMATS[format]}"
                file.write_text(render([one], format), encoding="utf-8", newline="\n")
        return out
    if out is not None:
        return write_view(records, format, out)
    say(render(records, format), nl=False)
    return None
