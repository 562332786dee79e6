"""The ``compress`` command: a finished adapter -> the smallest one that is as good on some data."""

import json
import math
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from gatewise.adapters.data_options import DataOptions
from gatewise.checks import number_of
from gatewise.cli.options import takes_data_options
from gatewise.errors import GatewiseError
from gatewise.files import finite
from gatewise.flags import JsonOption

if TYPE_CHECKING:
    from gatewise.compress import Compressed, Shared, Size


class Least(StrEnum):
    """What the smaller adapter has least of."""

    parameters = "parameters"
    modules = "modules"
    time = "time"


@takes_data_options()
def compress(
    adapters: Annotated[
        list[Path], typer.Argument(help="The folder of any LoRA adapter; several with --shared.", show_default=False)
    ],
    data: Annotated[
        list[str],
        typer.Option(help="Rows that measure: a file, sample:NAME or a data set. With --shared one for each.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, new or empty.", show_default=False)],
    options: DataOptions,
    tolerance: Annotated[
        float | None,
        typer.Option(help="How much worse it may be: share of right answers, or nats. [default: 0.01]"),
    ] = None,
    least: Annotated[Least | None, typer.Option(help="What to have least of. [default: parameters]")] = None,
    parameters: Annotated[str | None, typer.Option(help="Instead of a tolerance: so many parameters, such as 500k.")] = None,
    modules: Annotated[int | None, typer.Option(help="Instead of a tolerance: so many modules.", min=1)] = None,
    speed: Annotated[float | None, typer.Option(help="Instead of a tolerance: steps so many times as fast, such as 1.3.")] = None,
    rank_cap: Annotated[int | None, typer.Option(help="No module keeps more ranks than this, such as 8.", min=1)] = None,
    recover: Annotated[
        str | None, typer.Option(help="Rows to train on where ranks that went are missed.", show_default=False)
    ] = None,
    recover_split: Annotated[str | None, typer.Option(help="The split of --recover, if that is a Hugging Face dataset.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of that training. [default: 60]", min=1)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of that training. [default: a quarter of the run's, or 1e-4]")
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(help="How ranks are valued: a score, singular, activation, random, last. [default: path_moments]"),
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="right or loss. [default: right answers where there are some, else the loss]")
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Make several adapters of one base smaller together: the same few modules for all.")
    ] = False,
    score_rows: Annotated[int, typer.Option(help="Rows that value the ranks; they do not measure.", min=1)] = 128,
    as_json: JsonOption = False,
) -> None:
    """Give back the smallest adapter that is as good on the data, as a plain LoRA adapter.

    Ranks and modules go in the order of what they are worth by what they cost. Each candidate is measured on rows that valued no
    rank and trained nothing. It counts as good as the whole adapter when it is worse by at most the tolerance, with 95% confidence.
    An interrupted compression goes on when the same command is given again.

    \b
    Examples:
      gatewise compress runs/quickstart/adapter --data sample:support-dev --out small --tolerance 0.1
      gatewise compress hub-adapter --data dev.jsonl --recover train.jsonl --steps 60 --out small
      gatewise compress hub-adapter --data dev.jsonl --modules 60 --rank-cap 8 --out fast
      gatewise compress one two three --shared --data one.jsonl --data two.jsonl --data three.jsonl --out together
    """
    from gatewise.compress import Goal, Recovery, compress_shared
    from gatewise.compress import compress as run

    targets = {"--parameters": parameters, "--modules": modules, "--speed": speed}
    for name, given in targets.items():
        if given is not None:
            for other, value in {"--tolerance": tolerance, "--least": least}.items():
                if value is not None:
                    raise GatewiseError(f"{name} was given with {other}, which looks for a size: leave one of the two out")
    if recover is None:
        of_recovery = {"--recover-split": recover_split, "--steps": steps, "--learning-rate": learning_rate}
        for name, setting in of_recovery.items():
            if setting is not None:
                raise GatewiseError(f"{name} was given without --recover, the rows to train on: add them or leave it out")
    if not shared and (len(adapters) > 1 or len(data) > 1):
        raise GatewiseError(f"{len(adapters)} adapters and {len(data)} data were given: give one of each, or add --shared")
    goal = Goal(
        least=least.value if least else "modules" if shared else "parameters",
        tolerance=0.01 if tolerance is None else tolerance,
        parameters=None if parameters is None else number_of(parameters, "--parameters"),
        modules=modules,
        speed=speed,
        rank_cap=rank_cap,
    )
    recovery = None if recover is None else Recovery(recover, 60 if steps is None else steps, learning_rate, split=recover_split)
    chosen = {} if order is None else {"order": order}
    if shared:
        if recover is not None:
            raise GatewiseError("--recover was given with --shared, which does not train: recover each adapter by itself")
        _show_shared(
            compress_shared(adapters, data, out, goal, options=options, measure=measure, score_rows=score_rows, **chosen),  # type: ignore[arg-type]
            as_json,
        )  # fmt: skip
        return
    result = run(
        adapters[0], data[0], out, goal, options=options, recovery=recovery, measure=measure, score_rows=score_rows, **chosen  # type: ignore[arg-type]
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(finite({**asdict(result), "out": str(result.out)})))
        return
    Console().print(_table(result))
    for line in _lines(result):
        typer.echo(line)


def _show_shared(result: "Shared", as_json: bool) -> None:
    if as_json:
        told = {name: {**asdict(one), "out": str(one.out)} for name, one in result.adapters.items()}
        ends = {"before": asdict(result.before), "after": asdict(result.after)}
        typer.echo(json.dumps(finite({"out": str(result.out), "adapters": told, **ends})))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("adapter", "parameters", "modules", "largest rank", "whole", "smaller", "worse by", "at most by"):
        table.add_column(name, justify="left" if name == "adapter" else "right")
    for name, one in result.adapters.items():
        gap, size = one.chosen.difference, one.chosen.size
        table.add_row(
            name, f"{size.parameters:,}", f"{size.modules:,}", f"{size.largest:,}", f"{abs(one.whole_quality):.4f}",
            f"{abs(one.chosen.quality):.4f}", f"{gap.mean:.4f}", "" if math.isnan(gap.high) else f"{gap.high:.4f}",
        )  # fmt: skip
    Console().print(table)
    if few := [name for name, one in result.adapters.items() if math.isnan(one.chosen.difference.high)]:
        typer.echo(f"too few rows to say at most how much worse: {', '.join(few)}")
    for name, one in result.adapters.items():
        if one.merges is False:
            typer.echo(f"{name}: {_unmerged(one)}")
    before, after = result.before, result.after
    typer.echo(f"modules of any: {after.modules} of {before.modules}, largest rank {after.rank} of {before.rank}")
    typer.echo(f"numbers that an engine reserves: {after.numbers:,} of {before.numbers:,} ({after.numbers / before.numbers:.0%})")
    typer.echo(f"written: {result.out}, with what engines need to know in serving.json")


def _table(result: "Compressed") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("adapter", "parameters", "modules", "ranks", "largest rank", "right" if result.measure == "right" else "loss"):
        table.add_column(name, justify="left" if name == "adapter" else "right")

    def add(name: str, size: "Size | None", quality: float) -> None:
        shown = ("",) * 4 if size is None else (f"{size.parameters:,}", f"{size.modules:,}", f"{size.ranks:,}", f"{size.largest:,}")
        table.add_row(name, *shown, f"{abs(quality):.4f}")

    add("none", None, result.base_quality)
    add("whole", result.whole_size, result.whole_quality)
    add("smaller", result.chosen.size, result.chosen.quality)
    return table


def _unmerged(result: "Compressed") -> str:
    why = "the model is another one then, as where embeddings are tied" if "merged" in result.deviation else "PEFT cannot"
    return f"do not merge it: {why}"


def _lines(result: "Compressed") -> list[str]:
    gap, size = result.chosen.difference, result.chosen.size
    unit = "of the answers" if result.measure == "right" else "nats a token"
    how = ", after recovery" if result.chosen.recovered else ""
    share = size.parameters / result.whole_size.parameters
    lines = [
        f"{share:.0%} of the parameters, {size.modules} of {result.whole_size.modules} modules{how}",
        f"worse by {gap.mean:.4f} {unit}, {gap.at_most}{'' if math.isnan(gap.high) else ' with 95% confidence'} ({gap.rows} rows)",
    ]
    if result.seconds is not None:
        whole, smaller, none = (1000 * one for one in result.seconds)
        lines.append(f"a step takes {smaller:.1f} ms, with the whole adapter {whole:.1f} ms, without one {none:.1f} ms")
        if result.goal.speed is not None and whole / smaller < result.goal.speed:
            lines.append(
                f"that is {whole / smaller:.2f} times as fast, not {result.goal.speed:g} times: timings vary, and modules were "
                "timed one by one; ask for a little more, or for --modules"
            )
    checks = [f"{name} {value:.1g}" for name, value in result.deviation.items()]
    lines.append(f"as measured: logits differ by {', '.join(checks)}")
    if result.merges is False:
        lines.append(_unmerged(result))
    lines.append(f"written: {result.out}, with what engines need to know in serving.json")
    return lines
