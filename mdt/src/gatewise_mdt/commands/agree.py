"""``gatewise mdt agree``: whether people, or a person and a model, agree on the trees of the same passages, and where not."""

import json
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gatewise.checks import printable, writable
from gatewise.errors import GatewiseError
from gatewise.files import finite
from gatewise.flags import JsonOption
from gatewise_mdt.commands.trees import RepairOption, check_target, is_one_file, read_file, say

if TYPE_CHECKING:
    from gatewise_mdt.evaluation.agreement import Agreement
    from gatewise_mdt.records import TreeFile

_COLOURS = {"a": "cyan", "b": "magenta"}


class View(StrEnum):
    """What is made of an agreement."""

    text = "text"
    html = "html"


def agree(
    files: Annotated[
        list[str],
        typer.Argument(help="Two or more files of trees, one of each person or model; or sample:guidelines.", show_default=False),
    ],
    adjudicate: Annotated[
        Path | None,
        typer.Option(
            help="Prepare a review of two files in a new FILE.review.jsonl: an adjudicator opens it with mdt review.",
            show_default=False,
        ),
    ] = None,
    reviewer: Annotated[
        str | None, typer.Option(help="With --adjudicate: who prepares it, for the history. [default: the login name]")
    ] = None,
    as_json: JsonOption = False,
    format: Annotated[View, typer.Option("--format", "-f", help="Text, or an HTML page with the trees side by side.")] = View.text,
    out: Annotated[
        Path | None, typer.Option("--out", "--output", "-o", help="With --format html: the file to write, not stdout.")
    ] = None,
    repair: RepairOption = False,
) -> None:
    """Compare the trees of two reviewers: measures of agreement with 95% intervals, and what differs in each passage.

    Passages are paired by their text. F1 of triples, nodes and paths and the tree edit ratio are those of mdt evaluate, and do not
    depend on the order of the files; Cohen's kappa is given where chance agreement is defined. More than two files are compared in
    pairs. Records with a fault are left out and named at the end, and the exit code is then 2.

    \b
    Examples:
      gatewise mdt agree ada.review.jsonl ben.review.jsonl
      gatewise mdt agree ada.review.jsonl ben.review.jsonl --format html --out agreement.html
      gatewise mdt agree ada.review.jsonl ben.review.jsonl --adjudicate third.review.jsonl
    """
    _check(files, adjudicate, reviewer, as_json, format, out)
    from gatewise_mdt.evaluation.agreement import agree as agreement_of
    from gatewise_mdt.evaluation.agreement import names_of

    read = [read_file(file, repair) for file in files]
    for one in read:
        if not one.records:
            raise GatewiseError(next(iter(one.faults.values())))
        for note in one.notes:
            say(f"repaired: {note}", err=True)
    names = names_of(*((one.source, one.records) for one in read))
    sources = [writable(file) for file in files]
    found = [
        agreement_of(read[i].records, read[j].records, names=(names[i], names[j]), files=(sources[i], sources[j]))
        for i, j in combinations(range(len(read)), 2)
    ]
    if as_json:
        typer.echo(json.dumps(finite({"pairs": [agreement.to_json() for agreement in found]})))
    elif format == View.html:
        _give_page(found[0], out)
    else:
        for agreement in found:
            _show(agreement)
    _check_whole(read, repair, adjudicate)
    if adjudicate is not None:
        from gatewise_mdt.review.adjudication import prepare

        prepared = prepare(found[0], adjudicate, reviewer)
        for line in prepared.said:
            say(line, err=as_json or (format == View.html and out is None))


def _check(files: list[str], adjudicate: Path | None, reviewer: str | None, as_json: bool, format: View, out: Path | None) -> None:
    if len(files) < 2:
        raise GatewiseError(f"{files[0]} is the only file, expected two or more to compare")
    for one, other in combinations(files, 2):
        if is_one_file(one, other):
            raise GatewiseError(f"{one} and {other} are the same file, expected the trees of two people: name another file")
    if as_json and format == View.html:
        raise GatewiseError("--json and --format html exclude each other: give one of them")
    if out is not None and format != View.html:
        raise GatewiseError("--out was given without --format html: text and JSON are printed, and can be redirected")
    if len(files) > 2 and (adjudicate is not None or format == View.html):
        what = "--adjudicate" if adjudicate is not None else "--format html"
        raise GatewiseError(f"{what} takes two files, and {len(files)} were given: name two of them")
    if reviewer is not None and adjudicate is None:
        raise GatewiseError("--reviewer was given without --adjudicate: trees have the names of those who reviewed them")
    check_target(out, files)
    if adjudicate is not None:
        from gatewise_mdt.review.adjudication import check_new

        check_new(adjudicate)


def _give_page(agreement: "Agreement", out: Path | None) -> None:
    from gatewise.files import whole_file
    from gatewise_mdt.evaluation.comparison import page_of

    page = page_of(agreement)
    if out is None:
        say(page, nl=False)
        return
    with whole_file(out) as part:
        part.write_bytes(page.encode())
    say(f"written: {out}")


def _show(agreement: "Agreement") -> None:
    from gatewise_mdt.evaluation.comparison import NOTICE, figures_of, heading_of, lines_of, remarks_of, rows_of

    console = Console(highlight=False)
    a, b = agreement.names
    console.print(_text(a, "a") + Text(" and ") + _text(b, "b") + Text(f": {_passages(len(agreement.passages))} in both"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "value", "95% interval", "of"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in rows_of(agreement):
        table.add_row(*map(_text, row))
    console.print(table)
    for remark in remarks_of(agreement):
        console.print(_text(remark), soft_wrap=True)
    differing = [passage for passage in agreement.passages if not passage.same]
    for passage in differing:
        console.print()
        console.print(_text(heading_of(passage), bold=True), soft_wrap=True)
        console.print(_text(f"  {figures_of(passage)}", dim=True), soft_wrap=True)
        for line in lines_of(passage, agreement.names):
            words = Text("").join(_text(text, side) for text, side in line.words)
            console.print(Text("  ") + _text(line.label, bold=True) + Text(" | ") + words, soft_wrap=True)
    console.print()
    console.print(_text(NOTICE), soft_wrap=True)


def _passages(count: int) -> str:
    return "1 passage" if count == 1 else f"{count} passages"


def _text(text: str, side: str = "", *, bold: bool = False, dim: bool = False) -> Text:
    style = " ".join(filter(None, (_COLOURS.get(side, ""), "bold" if bold else "", "dim" if dim else "")))
    return Text(printable(text), style=style)


def _check_whole(read: "list[TreeFile]", repair: bool, adjudicate: Path | None) -> None:
    """Says what was left out, which no adjudicator would ever see.

    Raises:
        GatewiseError: something was.
    """
    faults = [fault for one in read for _, fault in sorted(one.faults.items())]
    if not faults:
        return
    for fault in faults:
        say(f"failed: {fault}", err=True)
    hint = "" if repair else "; --repair may put them right"
    left = f", so {adjudicate} was not prepared" if adjudicate is not None else ""
    raise GatewiseError(
        f"{len(faults)} of the {sum(one.count for one in read)} records could not be read and were left out{left}{hint}"
    )
