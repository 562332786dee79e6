"""``gatewise mdt agree``: do two reviewers, or a reviewer and a model, make the same trees?"""

import json
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
from gatewise_mdt.commands.trees import StrictOption, check_whole, count_of, read_file, say

if TYPE_CHECKING:
    from gatewise_mdt.evaluation.agreement import Agreement

NOTICE = "Needs review by a clinician. Not medical advice. Agreement says nothing of whether both are right."
_MEASURES = {
    "triplet_f1": "F1 of triples",
    "node_f1": "F1 of nodes",
    "path_f1": "F1 of paths",
    "tree_agreement": "same trees",
    "ter": "tree edit ratio",
}


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
    strict: StrictOption = False,
) -> None:
    """Compare the trees of two reviewers: what differs, then figures.

    What differs comes by danger: contrary orders (given and prohibited), other doses, other conditions, what only one tree has, and
    other words. Figures are measures of agreement with 95% intervals. Passages are paired by their text, and more than two files
    are compared in pairs. Records with a fault are left out and named at the end, and the exit code is then 2.

    \b
    Examples:
      gatewise mdt agree ada.review.jsonl ben.review.jsonl
      gatewise mdt agree ada.review.jsonl ben.review.jsonl --adjudicate third.review.jsonl
    """
    _check(files, adjudicate, reviewer)
    from gatewise_mdt.evaluation.agreement import agree as agreement_of
    from gatewise_mdt.evaluation.agreement import names_of

    read = [read_file(file, not strict, counted=True) for file in files]
    names = names_of(*((one.source, one.records) for one in read))
    sources = [writable(file) for file in files]
    found = [
        agreement_of(read[i].records, read[j].records, names=(names[i], names[j]), files=(sources[i], sources[j]))
        for i, j in combinations(range(len(read)), 2)
    ]
    if as_json:
        typer.echo(json.dumps(finite({"pairs": [agreement.to_json() for agreement in found]})))
    else:
        for agreement in found:
            _show(agreement)
    for one in read:
        check_whole(one, one.faults, f"; {adjudicate} was not prepared" if adjudicate else "")
    if adjudicate is not None:
        from gatewise_mdt.review.adjudication import prepare

        for line in prepare(found[0], adjudicate, reviewer):
            say(line, err=as_json)


def _check(files: list[str], adjudicate: Path | None, reviewer: str | None) -> None:
    if reviewer is not None and adjudicate is None:
        raise GatewiseError("--reviewer says whose third review --adjudicate prepares: add that, or leave it out")
    if len(files) < 2:
        raise GatewiseError(f"{files[0]} is the only file, expected two or more: name another one to compare it with")
    if adjudicate is not None:
        from gatewise_mdt.review.adjudication import check_new

        if len(files) > 2:
            raise GatewiseError(f"--adjudicate takes two files, and {len(files)} were given: name two of them")
        check_new(adjudicate)


def _show(agreement: "Agreement") -> None:
    from gatewise_mdt.evaluation.intervals import DRAWS
    from gatewise_mdt.records import clipped

    console, count = Console(highlight=False), len(agreement.passages)
    a, b = agreement.names
    same = sum(passage.same for passage in agreement.passages)
    console.print(
        Text(printable(f"{a} and {b}: {count_of(count, 'passage')} in both, {same or 'none'} with the same tree")), soft_wrap=True
    )
    kind = ""
    for passage, one in agreement.differences:
        if one.kind != kind:
            kind = one.kind
            console.print(Text(f"\n{kind}: {sum(other.kind == kind for _, other in agreement.differences)}", style="bold"))
        numbers = "/".join(str(number) for number in dict.fromkeys((passage.a.number, passage.b.number)))
        console.print(Text(printable(f"  {numbers}{one.what and f' ({one.what})'}: {clipped(passage.a.text, 70)}")), soft_wrap=True)
        for name, said, node in zip(agreement.names, (one.a, one.b), one.nodes, strict=True):
            if node is not None:
                console.print(Text(printable(f"     {name}, node {node + 1}: {said}")), soft_wrap=True)
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "value", "95% interval"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, label in _MEASURES.items():
        table.add_row(label, f"{agreement.values[name]:.3f}", _interval(agreement, name))
    kappa = "not defined" if agreement.kappa is None else f"{agreement.kappa:.3f}"
    table.add_row("kappa of characters", kappa, _interval(agreement, "kappa"))
    console.print(table)
    remarks = [f"95% intervals from {DRAWS:,} bootstrap draws of the {count_of(count, 'passage')}."] if agreement.intervals else []
    for name, records in zip(agreement.names, (agreement.only_a, agreement.only_b), strict=True):
        if records:
            listed = "; ".join(f'record {record.number}, "{clipped(record.text, 40)}"' for record in records)
            remarks.append(f"Only {name} has {listed}.")
    for remark in [*remarks, *agreement.notes]:
        console.print(Text(printable(remark)), soft_wrap=True)
    console.print(Text(f"\n{NOTICE}"), soft_wrap=True)


def _interval(agreement: "Agreement", name: str) -> str:
    ends = agreement.intervals.get(name)
    return f"{ends['low']:.3f} to {ends['high']:.3f}" if ends else ""
