"""The ``inspect`` command: where an adapter's budget went and, with ``--scores``, what its modules are worth."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from gatewise.adapters.data_options import DataOptions
from gatewise.allocation.scores import DEFAULT, NAMES
from gatewise.checks import number_of
from gatewise.cli.options import takes_data_options
from gatewise.errors import GatewiseError
from gatewise.flags import JsonOption

Value = Literal["rank", "norm", "parameters"]


@takes_data_options(leave_out="limit")
def inspect(
    adapter: Annotated[Path, typer.Argument(help="The folder of any LoRA adapter, or one of method spt.", show_default=False)],
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a .png or .svg file.")] = None,
    value: Annotated[Value | None, typer.Option(help="What to show of each module. [default: rank]")] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Score the ranks on --data and show what each module is worth.")] = False,
    routing: Annotated[
        bool, typer.Option("--routing", help="Route the prompts of --data and show which modules they choose (method milora).")
    ] = False,
    data: Annotated[str | None, typer.Option(help="A .jsonl, .json or .csv file, sample:NAME, or a data set's name.")] = None,
    score: Annotated[str | None, typer.Option(help=f"{', '.join(NAMES)}. [default: {DEFAULT}]")] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of the data: to score on, drawn at random [default: 32]; to route, the first [default: all]."),
    ] = None,
    *,
    options: DataOptions,
    suggest: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGET", help="Suggest a LoraConfig of this size, such as 500k or 1.5M, with ranks placed by the scores."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the suggestion to this JSON file, not to stdout.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where the budget of a LoRA adapter went, layer by module, or which layers of an SPT adapter take a prompt; the base
    model is not needed.

    With --scores, load it and score its ranks on rows of data: what each layer and module is worth, and which could go. With
    --routing, load a routed adapter and show which modules the prompts of the data choose.

    \b
    Examples:
      gatewise inspect runs/quickstart/adapter --plot ranks.png
      gatewise inspect runs/quickstart/adapter --scores --data sample:support-dev --suggest 2.4M --out pattern.json
      gatewise inspect runs/milora-support/adapter --routing --data sample:support-dev --plot routing.png
    """
    mode = "routing" if routing else "scores" if scores else ""
    belongs = {
        "scores": (scores or None, "scores"), "value": (value, ""), "score": (score, "scores"), "suggest": (suggest, "scores"),
        "out": (out, "scores"), "data": (data, "scores routing"), "rows": (rows, "scores routing"),
    }  # fmt: skip
    for name, (given, modes) in belongs.items():
        if given is not None and mode not in modes.split(" "):
            where = f"with --{mode}" if mode else "without --scores"
            raise GatewiseError(f"--{name} was given {where}, where it means nothing: leave one of the two out")
    if not mode:
        if options != DataOptions():
            raise GatewiseError("a base model, a device, or how to read data was given without --scores or --routing: add one")
        _show_budget(adapter, plot, value or "rank", as_json)
        return
    if data is None:
        raise GatewiseError(f"--{mode} was given without --data: name the rows to read, such as --data sample:support-dev")
    if out and suggest is None:
        raise GatewiseError("--out was given without --suggest: add --suggest BUDGET, the size of the next adapter")
    if routing:
        _show_routing(adapter, data, replace(options, limit=rows), plot, as_json)
    else:
        size = None if suggest is None else number_of(suggest, "--suggest")
        _show_scores(adapter, data, options, score or DEFAULT, 32 if rows is None else rows, plot, size, out, as_json)


def _show(title: str, tables: Sequence[Table], lines: Sequence[str], plot: Path | None) -> None:
    """Prints what was found. Tables are as wide as they need: a narrow terminal goes on in its next line, and loses no number."""
    console = Console()
    wide = console.options.update(width=10_000)
    console.width = max(console.width, *(console.measure(table, options=wide).maximum for table in tables))
    if title:
        console.print(title, markup=False, highlight=False)
    for table in tables:
        console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)
    if plot:
        typer.echo(f"drawn: {plot}")


def _show_budget(adapter: Path, plot: Path | None, value: Value, as_json: bool) -> None:
    from gatewise import inspection
    from gatewise.adapters.files import peft_type

    if peft_type(adapter) == "SELECTIVE_PROMPT":
        prompts = inspection.read_prompts(adapter)
        told, table, lines = inspection.prompts_json(prompts), inspection.prompts_table(prompts), inspection.prompts_lines(prompts)
        if plot:
            inspection.plot_prompts(prompts, plot)
    else:
        budget = inspection.read_budget(adapter)
        told, table, lines = (
            inspection.budget_json(budget),
            inspection.grid_table(budget.grid(value)),
            inspection.budget_lines(budget),
        )
        if plot:
            inspection.plot(budget, plot, value)
    if as_json:
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        _show("", [table], lines, plot)


def _show_scores(
    adapter: Path,
    data: str,
    options: DataOptions,
    score: str,
    rows: int,
    plot: Path | None,
    budget: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    from gatewise import inspection
    from gatewise.adapters.files import peft_type
    from gatewise.files import check_new_file, write_json
    from gatewise.inspection.importance import score_adapter
    from gatewise.inspection.suggestion import suggest, suggested_ranks

    # Scoring takes a while: what can be refused before it is.
    if plot:
        inspection.check_plot(plot)
        check_new_file(plot)
    if out:
        check_new_file(out)
    kind = peft_type(adapter)
    if kind != "LORA":
        hint = "; --routing shows which of its modules prompts choose" if kind == "ROUTED_LORA" else ""
        raise GatewiseError(f"{adapter} is of peft_type {kind!r}, but only plain LoRA has ranks that can be scored{hint}")
    importance = score_adapter(adapter, data, options, score=score, rows=rows)
    if plot:
        inspection.plot_importance(importance, plot)
    if not as_json:
        grid = importance.score_grid()
        tables = [inspection.grid_table(grid), inspection.top_table(importance)]
        _show(f"{grid.title}, the sum over the ranks of a module", tables, inspection.importance_lines(importance), plot)
    suggestion = None if budget is None else suggest(importance, budget)
    if out and suggestion:
        write_json(out, suggestion)
    if as_json:
        told = inspection.importance_json(importance) | ({"suggestion": suggestion} if suggestion else {})
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    elif budget is not None:
        ranks = suggested_ranks(importance, budget)
        kept = [rank for rank in ranks.values() if rank]
        parameters = sum(module.cost * ranks[module.path] for module in importance.modules)
        where = f"{len(kept):,} of {len(ranks):,} modules, ranks from {min(kept)} to {max(kept)}"
        typer.echo(f"suggestion: {parameters:,} parameters in {where}" + (f", written: {out}" if out else ""))
        if not out:
            typer.echo(json.dumps(suggestion, indent=2, ensure_ascii=False))


def _show_routing(adapter: Path, data: str, options: DataOptions, plot: Path | None, as_json: bool) -> None:
    from gatewise import inspection
    from gatewise.files import check_new_file
    from gatewise.inspection.routing import route_data

    if plot:
        inspection.check_plot(plot)
        check_new_file(plot)
    routing = route_data(adapter, data, options)
    if plot:
        inspection.plot_routing(routing, plot)
    if as_json:
        typer.echo(json.dumps(inspection.routing_json(routing), indent=2, ensure_ascii=False))
        return
    grid = routing.grid()
    _show(grid.title, [inspection.grid_table(grid)], inspection.routing_lines(routing), plot)
