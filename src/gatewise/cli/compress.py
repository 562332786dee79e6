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
    from gatewise.compress import Compressed


class Least(StrEnum):
    """What the smaller adapter has least of."""

    parameters = "parameters"
    modules = "modules"


class MeasureBy(StrEnum):
    """What says how good an adapter is."""

    right = "right"
    loss = "loss"


class Order(StrEnum):
    """How ranks are valued."""

    path_moments = "path_moments"
    singular = "singular"


@takes_data_options()
def compress(
    adapter: Annotated[Path, typer.Argument(help="The folder of any LoRA adapter.", show_default=False)],
    data: Annotated[str, typer.Option(help="Rows that measure: a file, sample:NAME or a data set.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write, new or empty.", show_default=False)],
    options: DataOptions,
    tolerance: Annotated[
        float | None,
        typer.Option(help="How much worse it may be: share of right answers, or nats. [default: 0.01]"),
    ] = None,
    least: Annotated[Least | None, typer.Option(help="What to have least of. [default: parameters]")] = None,
    parameters: Annotated[str | None, typer.Option(help="Instead of a tolerance: so many parameters, such as 500k.")] = None,
    modules: Annotated[int | None, typer.Option(help="Instead of a tolerance: so many modules.", min=1)] = None,
    rank_cap: Annotated[int | None, typer.Option(help="No module keeps more ranks than this, such as 8.", min=1)] = None,
    recover: Annotated[
        str | None, typer.Option(help="Rows to train on where ranks that went are missed.", show_default=False)
    ] = None,
    recover_split: Annotated[str | None, typer.Option(help="The split of --recover, if that is a Hugging Face dataset.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of that training. [default: 60]", min=1)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of that training. [default: a quarter of the run's, or 1e-4]")
    ] = None,
    order: Annotated[Order, typer.Option(help="How ranks are valued.")] = Order.path_moments,
    measure: Annotated[
        MeasureBy | None,
        typer.Option(help="What says how good it is. [default: right answers where there are some, else the loss]"),
    ] = None,
    score_rows: Annotated[int, typer.Option(help="Rows that value the ranks; they do not measure.", min=1)] = 128,
    as_json: JsonOption = False,
) -> None:
    """Give back the smallest adapter that is as good on the data, as a plain LoRA adapter.

    Ranks and modules go in the order of what they are worth by what they cost. Each candidate is measured on rows that valued no
    rank and trained nothing. It counts as good as the whole adapter when it is worse by at most the tolerance, with 95% confidence.
    The same command goes on after an interruption, also with another tolerance.

    \b
    Examples:
      gatewise compress runs/quickstart/adapter --data sample:support-dev --out small --tolerance 0.1
      gatewise compress hub-adapter --data dev.jsonl --recover train.jsonl --steps 60 --out small
      gatewise compress hub-adapter --data dev.jsonl --modules 60 --rank-cap 8 --out fast
    """
    from gatewise.compress import Goal, Recovery
    from gatewise.compress import compress as run

    for name, given in {"--parameters": parameters, "--modules": modules}.items():
        for other, value in {"--tolerance": tolerance, "--least": least}.items():
            if given is not None and value is not None:
                raise GatewiseError(f"{name} was given with {other}, which looks for a size: leave one of the two out")
    for name, setting in {"--recover-split": recover_split, "--steps": steps, "--learning-rate": learning_rate}.items():
        if recover is None and setting is not None:
            raise GatewiseError(f"{name} was given without --recover, the rows to train on: add them or leave it out")
    goal = Goal(
        least=least.value if least else "parameters",
        tolerance=0.01 if tolerance is None else tolerance,
        parameters=None if parameters is None else number_of(parameters, "--parameters"),
        modules=modules,
        rank_cap=rank_cap,
    )
    recovery = None if recover is None else Recovery(recover, 60 if steps is None else steps, learning_rate, split=recover_split)
    result = run(
        adapter, data, out, goal, options=options, recovery=recovery, order=order.value,
        measure=measure.value if measure else None, score_rows=score_rows,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(finite({**asdict(result), "out": str(result.out)})))
        return
    Console().print(_table(result))
    for line in _lines(result):
        typer.echo(line)


def _table(result: "Compressed") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("adapter", "parameters", "modules", "ranks", "largest rank", "right" if result.measure == "right" else "loss"):
        table.add_column(name, justify="left" if name == "adapter" else "right")
    table.add_row("none", "", "", "", "", f"{abs(result.base_quality):.4f}")
    whole, smaller = (result.whole_size, result.whole_quality), (result.chosen.size, result.chosen.quality)
    for name, (size, quality) in {"whole": whole, "smaller": smaller}.items():
        counts = (size.parameters, size.modules, size.ranks, size.largest)
        table.add_row(name, *(f"{count:,}" for count in counts), f"{abs(quality):.4f}")
    return table


def _lines(result: "Compressed") -> list[str]:
    gap, size = result.chosen.difference, result.chosen.size
    unit = "of the answers" if result.measure == "right" else "nats a token"
    how = ", after recovery" if result.chosen.recovered else ""
    share = size.parameters / result.whole_size.parameters
    checks = [f"{name} {value:.1g}" for name, value in result.deviation.items()]
    lines = [
        f"{share:.0%} of the parameters, {size.modules} of {result.whole_size.modules} modules{how}",
        f"worse by {gap.mean:.4f} {unit}, {gap.at_most}{'' if math.isnan(gap.high) else ' with 95% confidence'} ({gap.rows} rows)",
        f"as measured: logits differ by {', '.join(checks)}",
    ]
    if result.merges is False:
        another = "merged" in result.deviation
        why = "the model is another one then, as where embeddings are tied" if another else "PEFT cannot"
        lines.append(f"do not merge it: {why}")
    lines.append(f"written: {result.out}, with what engines need to know in serving.json")
    return lines
