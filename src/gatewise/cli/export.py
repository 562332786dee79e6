"""The ``export`` command: an adapter as plain LoRA, at its true ranks or, of a routed one, with the same gates for all prompts."""

import json
import math
from dataclasses import asdict, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from gatewise.adapters.data_options import DataOptions
from gatewise.cli.options import takes_data_options
from gatewise.errors import GatewiseError
from gatewise.files import finite
from gatewise.flags import JsonOption

if TYPE_CHECKING:
    from gatewise.compress.quality import Difference
    from gatewise.compress.static import Static


class MeasureBy(StrEnum):
    """What a tolerance is about."""

    right = "right"
    loss = "loss"


@takes_data_options()
def export(
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter or checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write, new or empty.", show_default=False)],
    padded: Annotated[
        bool, typer.Option("--padded", help="One rank for all modules, for engines that ignore rank patterns.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            help="With --padded: this rank, and modules without ranks as zeros, so that adapters can be swapped and merged.", min=1
        ),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Of a routed adapter (method milora): the same modules and gates for all prompts.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="With --static: rows that choose and measure, a file, sample:NAME or a data set.")
    ] = None,
    modules: Annotated[
        int | None, typer.Option(help="With --static: keep so many. [default: as many as the loss asks for]", min=1)
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="With --static: keep those that at least this share of prompts keeps.", min=0, max=1)
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="With --static: write nothing if it is worse by more: share of right answers, or nats.")
    ] = None,
    measure: Annotated[
        MeasureBy | None,
        typer.Option(help="What the tolerance is about. [default: right answers where there are some, else the loss]"),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="With --static: rows that choose; they do not measure. [default: 128, at most half]", min=1)
    ] = None,
    *,
    options: DataOptions,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as plain LoRA at its true ranks.

    With --static, a routed adapter whose choice hardly moves: modules that few prompts keep go, the others get the mean gate, and
    what that loses is measured on rows that chose nothing.

    \b
    Examples:
      gatewise export runs/quickstart/adapter for-serving --padded
      gatewise export runs/milora-support/adapter plain --static --data sample:support-dev
    """
    if static:
        for name, given in {"padded": padded or None, "rank": rank}.items():
            if given is not None:
                raise GatewiseError(f"--{name} was given with --static: export what --static has written once more, with --{name}")
        if data is None:
            raise GatewiseError("--static was given without --data: name rows like those of its use, such as --data dev.jsonl")
        if measure is not None and tolerance is None:
            raise GatewiseError("--measure was given without --tolerance, which alone it is about: add it, or leave --measure out")
        from gatewise.compress.static import ROWS, to_static

        result = to_static(
            adapter, data, out, options=options, modules=modules, share=share, tolerance=tolerance,
            measure=None if measure is None else measure.value, rows=ROWS if rows is None else rows,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(finite({**asdict(result), "out": str(result.out)})))
            return
        Console().print(_table(result))
        for line in _lines(result):
            typer.echo(line)
        return
    flags = {"prompt": "template-prompt"}
    needs_static: dict[str, object] = {
        "data": data, "modules": modules, "share": share, "tolerance": tolerance, "measure": measure, "rows": rows,
        **{flags.get(one.name, one.name): getattr(options, one.name) for one in fields(DataOptions)},
        "device": None if options.device == DataOptions().device else options.device, "json": as_json or None,
    }  # fmt: skip
    for name, value in needs_static.items():
        if value is not None:
            raise GatewiseError(f"--{name} was given without --static, where it means nothing: add --static or leave it out")
    from gatewise.adapters.export import to_lora

    typer.echo(f"written: {to_lora(adapter, out, padded=padded, rank=rank)}")


def _table(result: "Static") -> Table:
    """What was tried, on the rows that choose."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("kept by at least", "gates", "modules", "parameters", "loss", ""):
        table.add_column(name, justify="left" if name in ("gates", "") else "right")
    for one in result.candidates:
        gates = "scaled up" if one.scaled else "mean"
        mark = "taken" if one == result.chosen else ""
        table.add_row(f"{one.least_share:.0%}", gates, f"{one.modules:,}", f"{one.parameters:,}", f"{one.loss:.4f}", mark)
    return table


def _lines(result: "Static") -> list[str]:
    choice, chosen = result.choice, result.chosen
    low, high = min(choice.modal.values()), max(choice.modal.values())
    lines = [
        f"routing: {choice.mean_modal:.0%} of {choice.prompts} prompts make the choice that most of them make in a layer "
        f"({low:.0%} to {high:.0%} by layer)",
        f"left: {chosen.modules:,} of {result.routed_modules:,} modules, of which a prompt kept {result.kept_modules:,}; "
        f"{chosen.parameters:,} of {result.routed_parameters:,} parameters",
        f"loss: {_told(result, 'loss')}; {_worse(result.loss, 'nats a token')}",
    ]
    if result.right is not None:
        lines.append(f"right answers: {_told(result, 'right')}; {_worse(result.right, 'of the answers')}")
    lines.append(f"written: {result.out}, with what engines need to know in serving.json")
    return lines


def _told(result: "Static", name: str) -> str:
    return ", ".join(f"{who} {result.quality[who][name]:.4f}" for who in ("routed", "static", "base"))


def _worse(gap: "Difference", unit: str) -> str:
    bounds = "too few rows to say between what" if math.isnan(gap.high) else f"{gap.low:.4f} to {gap.high:.4f} with 90% confidence"
    return f"static is worse by {gap.mean:.4f} {unit}, {bounds} ({gap.rows} rows)"
