"""The ``inspect`` command: where an adapter's budget went and, with ``--scores``, what its modules are worth."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer
from rich.table import Table

from gatewise.adapters.data_options import DataOptions
from gatewise.allocation.scores import DEFAULT, NAMES
from gatewise.checks import number_of
from gatewise.cli.options import ColumnsOption, LabelsOption, PromptOption, SplitOption, at_hand, print_whole
from gatewise.errors import GatewiseError
from gatewise.files import check_new_file, check_not_read, finite, write_json
from gatewise.flags import OUT, BaseOption, DeviceOption, JsonOption

Value = Literal["rank", "norm", "parameters"]
EVIDENCE = "the suggestion is a guess, not shown to be better than even ranks (docs/reports/scores.md): ask `gatewise compare`"


def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(help="Any LoRA adapter, or one of method spt: its folder, or its id on the hub.", show_default=False),
    ],
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a .png or .svg file.")] = None,
    value: Annotated[Value | None, typer.Option(help="What to show of each module. [default: rank]")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Score the ranks on --data and show what each module is worth.")] = False,
    routing: Annotated[
        bool, typer.Option("--routing", help="Route the prompts of --data and show which modules they choose (method milora).")
    ] = False,
    data: Annotated[str | None, typer.Option(help="A .jsonl, .json, .csv or .parquet file, sample:NAME, or a data set.")] = None,
    score: Annotated[str | None, typer.Option(help=f"{', '.join(NAMES)}. [default: {DEFAULT}]")] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of the data: to score on, drawn at random [default: 32]; to route, the first [default: all].", min=1
        ),
    ] = None,
    base: BaseOption = None,
    split: SplitOption = None,
    prompt: PromptOption = None,
    labels: LabelsOption = None,
    columns: ColumnsOption = None,
    device: DeviceOption = "auto",
    suggest: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGET",
            help="Suggest a LoraConfig of this size, such as 500k or 1.5M, with ranks placed by the scores: a guess, to compare.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(*OUT, help="Write the suggestion to this JSON file, not to stdout.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where the budget of a LoRA adapter went, layer by module, or which layers of an SPT adapter take a prompt; the base
    model is not needed.

    With --scores, load it and score its ranks on rows of data: what each layer and module is worth, and which could go. With
    --routing, load a routed adapter and show which modules the prompts of the data choose.

    \b
    Examples:
      gatewise inspect runs/quickstart/adapter --plot ranks.png
      gatewise inspect somebody/an-adapter --value norm
      gatewise inspect runs/quickstart/adapter --scores --data sample:support-dev --suggest 2.4M --out pattern.json
      gatewise inspect runs/milora-support/adapter --routing --data sample:support-dev --plot routing.png
    """
    from gatewise import inspection

    options = DataOptions(base, split, prompt, labels, device=device, columns=columns)
    mode = "routing" if routing else "scores" if scores else ""
    belongs = {
        "scores": (scores or None, "scores"), "value": (value, ""), "score": (score, "scores"), "suggest": (suggest, "scores"),
        "out": (out, "scores"), "data": (data, "scores routing"), "rows": (rows, "scores routing"),
    }  # fmt: skip
    for name, (given, modes) in belongs.items():
        if given is not None and mode not in modes.split(" "):
            where = f"with --{mode}" if mode else "without --scores"
            advice = "leave one of the two out" if mode else "add --scores, or leave it out"
            raise GatewiseError(f"--{name} was given {where}, where it means nothing: {advice}")
    if not mode and options != DataOptions():
        raise GatewiseError("a base model, a device, or how to read data was given without --scores or --routing: add one")
    if out and suggest is None:
        raise GatewiseError("--out was given without --suggest: add --suggest BUDGET, the size of the next adapter")
    size = None if suggest is None else number_of(suggest, "--suggest")
    if plot:
        inspection.check_plot(plot)
    from gatewise.adapters.files import files_of

    for path in (plot, out):  # scoring takes a while: what can be refused is refused before it
        if path:
            check_new_file(path)
            check_not_read(path, *([] if data is None else [data]), *files_of(adapter))
    adapter = at_hand(adapter)
    if not mode:
        found = _budget(adapter, value)
    elif data is None:
        raise GatewiseError(f"--{mode} was given without --data: name the rows to read, such as --data sample:support-dev")
    elif routing:
        found = _routing(adapter, data, replace(options, limit=rows))
    else:
        found = _scores(adapter, data, options, score or DEFAULT, 32 if rows is None else rows)
    if not as_json:
        _print(found)
    try:
        if plot:
            found.draw(plot)
            if not as_json:
                typer.echo(f"drawn: {plot}")
        if size is not None:
            found.told["suggestion"] = inspection.suggest(found.source, size)
            typer.echo(EVIDENCE, err=True)
        if out:
            write_json(out, found.told["suggestion"])
    finally:  # whatever fails: the scores took a while
        if as_json:
            typer.echo(json.dumps(found.told, indent=2, ensure_ascii=False))
    if as_json:
        return
    if out:
        typer.echo(f"suggestion written: {out}")
    elif size is not None:
        typer.echo(json.dumps(found.told["suggestion"], indent=2, ensure_ascii=False))


class Found(NamedTuple):
    """What was read of an adapter, and how it is shown: as JSON, as a table with lines below it, and as a picture."""

    source: Any
    told: dict[str, Any]
    title: str
    table: Table
    lines: Sequence[str]
    draw: Callable[[Path], Path]


def _budget(adapter: Path, value: Value | None) -> Found:
    from gatewise import inspection as show
    from gatewise.adapters.files import peft_type

    if peft_type(adapter) == "SELECTIVE_PROMPT":
        if value is not None:
            raise GatewiseError(f"--value {value} is of LoRA's modules, and {adapter} has prompts: leave it out")
        prompts = show.read_prompts(adapter)
        table, draw = show.prompts_table(prompts), partial(show.plot_prompts, prompts)
        return Found(prompts, finite(asdict(prompts)), "", table, show.prompts_lines(prompts), draw)
    value = value or "rank"
    budget = show.read_budget(adapter)
    table, drawn = show.grid_table(budget.grid(value)), partial(show.plot, budget, value=value)
    return Found(budget, show.budget_json(budget), "", table, show.budget_lines(budget), drawn)


def _scores(adapter: Path, data: str, options: DataOptions, score: str, rows: int) -> Found:
    from gatewise import inspection as show
    from gatewise.adapters.files import peft_type

    kind = peft_type(adapter)
    if kind != "LORA":
        hint = "; --routing shows which of its modules prompts choose" if kind == "ROUTED_LORA" else ""
        raise GatewiseError(f"{adapter} is of peft_type {kind!r}, but only plain LoRA has ranks that can be scored{hint}")
    importance = show.score_adapter(adapter, data, options, score=score, rows=rows)
    grid, draw = importance.score_grid(), partial(show.plot_importance, importance)
    title = f"{grid.title}, the sum over the ranks of a module"
    return Found(
        importance, show.importance_json(importance), title, show.grid_table(grid), show.importance_lines(importance), draw
    )


def _routing(adapter: Path, data: str, options: DataOptions) -> Found:
    from gatewise import inspection as show
    from gatewise.adapters.files import peft_type
    from gatewise.adapters.loading import read_data

    if (kind := peft_type(adapter)) != "ROUTED_LORA":  # before a base model is loaded
        read_data(adapter, data, options)  # which says where one of another task belongs
        raise GatewiseError(
            f"{adapter} is of peft_type {kind!r}, and only routed LoRA (method milora) chooses modules: leave --routing out"
        )
    routing = show.route_data(adapter, data, options)
    grid, draw = routing.grid(), partial(show.plot_routing, routing)
    return Found(routing, show.routing_json(routing), grid.title, show.grid_table(grid), show.routing_lines(routing), draw)


def _print(found: Found) -> None:
    if found.title:
        typer.echo(found.title)
    print_whole(found.table)
    for line in found.lines:
        typer.echo(line)
