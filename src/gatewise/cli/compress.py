"""The ``compress`` command: a finished adapter -> the smallest one that is as good on some data."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gatewise.adapters.data_options import DataOptions
from gatewise.checks import number_of
from gatewise.cli.options import ColumnsOption, LabelsOption, LimitOption, PromptOption, SplitOption, at_hand, print_table
from gatewise.errors import GatewiseError
from gatewise.flags import OUT, BaseOption, DeviceOption, JsonOption


def compress(
    adapter: Annotated[Path, typer.Argument(help="Any LoRA adapter: its folder, or its id on the hub.", show_default=False)],
    data: Annotated[str, typer.Option(help="Rows that measure: a file, sample:NAME or a data set.", show_default=False)],
    out: Annotated[Path, typer.Option(*OUT, help="The folder to write, new or empty.", show_default=False)],
    base: BaseOption = None,
    split: SplitOption = None,
    prompt: PromptOption = None,
    labels: LabelsOption = None,
    columns: ColumnsOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    tolerance: Annotated[
        float | None,
        typer.Option(help="How much worse it may be: share of right answers, or nats. [default: 0.01]"),
    ] = None,
    least: Annotated[
        Literal["parameters", "modules"] | None, typer.Option(help="What to have least of. [default: parameters]")
    ] = None,
    parameters: Annotated[str | None, typer.Option(help="Instead of a tolerance: so many parameters, such as 500k.")] = None,
    modules: Annotated[int | None, typer.Option(help="Instead of a tolerance: so many modules.", min=1)] = None,
    recover: Annotated[
        str | None, typer.Option(help="Rows to train on where ranks that went are missed.", show_default=False)
    ] = None,
    recover_split: Annotated[str | None, typer.Option(help="The split of --recover, if that is a Hugging Face dataset.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of that training. [default: 60]", min=1)] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of that training. [default: a quarter of the run's, or 1e-4]")
    ] = None,
    order: Annotated[Literal["path_moments", "singular"], typer.Option(help="How ranks are valued.")] = "path_moments",
    measure: Annotated[
        Literal["right", "loss"] | None,
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
      gatewise compress hub-adapter --data dev.jsonl --modules 60 --out fast
    """
    from gatewise.compress import Goal, Recovery
    from gatewise.compress import compress as run

    asked = {"--parameters": parameters, "--modules": modules, "--tolerance": tolerance, "--least": least}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1 and given != ["--tolerance", "--least"]:
        raise GatewiseError(f"{given[0]} asks for a size: leave {given[1]} out")
    for name, setting in {"--recover-split": recover_split, "--steps": steps, "--learning-rate": learning_rate}.items():
        if recover is None and setting is not None:
            raise GatewiseError(f"{name} was given without --recover, the rows to train on: add them or leave it out")
    goal = Goal(least or "parameters", tolerance=0.01 if tolerance is None else tolerance)
    if parameters is not None:
        goal = Goal("parameters", number_of(parameters, "--parameters"))
    elif modules is not None:
        goal = Goal("modules", modules)
    recovery = None if recover is None else Recovery(recover, 60 if steps is None else steps, learning_rate, split=recover_split)
    options = DataOptions(base, split, prompt, labels, limit, device, columns)
    result = run(
        at_hand(adapter), data, out, goal, options=options, recovery=recovery, order=order, measure=measure, score_rows=score_rows
    )
    if as_json:
        typer.echo((out / "compress.json").read_text(encoding="utf-8"), nl=False)
        return
    size, whole, gap = result.chosen.size, result.whole_size, result.chosen.difference
    rows = [("none", "", "", "", f"{abs(result.base_quality):.4f}")]
    for name, one, quality in (("whole", whole, result.whole_quality), ("smaller", size, result.chosen.quality)):
        rows.append((name, f"{one.parameters:,}", f"{one.modules:,}", f"{one.ranks:,}", f"{abs(quality):.4f}"))
    print_table(["adapter"], ["parameters", "modules", "ranks", "right" if result.measure == "right" else "loss"], rows)
    share, how = size.parameters / whole.parameters, ", after recovery" if result.chosen.recovered else ""
    unit = "share of right answers" if result.measure == "right" else "nats a token"
    typer.echo(f"{share:.0%} of the parameters, {size.modules} of {whole.modules} modules{how}")
    typer.echo(f"{gap} ({gap.rows} rows, {unit}); as written its logits differ by {result.deviation:.1g}")
    typer.echo(f"written: {out}, with what engines need to know in serving.json")
