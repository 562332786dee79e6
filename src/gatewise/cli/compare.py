"""The ``compare`` command: methods side by side, each at the learning rate that suits it."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gatewise.cli.options import INTERRUPTED, print_whole
from gatewise.files import finite
from gatewise.flags import OUT, JsonOption


def compare(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="The recipe whose model, rows and training all methods share. Stands before --methods.", show_default=False
        ),
    ],
    methods: Annotated[
        list[str],
        typer.Option(
            "--methods",
            metavar="A B ...",
            help="Methods, controls (random, lora+, rslora, eva, lora-ga, pissa, olora, corda) or recipe files, whose "
            "model, rows and steps are left aside. The others are compared with the first, and made to store as much.",
        ),
    ],
    out: Annotated[Path, typer.Option(*OUT, help="Folder to write, and to go on in.", show_default=False)],
    seeds: Annotated[int, typer.Option(help="Final runs of each method, with seeds that tuned nothing.", min=1)] = 5,
    rates: Annotated[
        int, typer.Option(help="Learning rates to begin with, a factor of 1.8 apart; 1 takes the recipe's own.", min=1)
    ] = 5,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE ...", help="Change keys of the recipe, for all methods.")
    ] = None,
    budget_minutes: Annotated[
        float | None,
        typer.Option(
            help="Begin no run that would not end within so many minutes; 0 shows the plan and what has come out so far.", min=0
        ),
    ] = None,
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="Keep the adapters of the final runs, in OUT/adapters.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare methods on your rows, each at the learning rate that suits it.

    For each method, learning rates are tried on rows taken out of training (data.tuning, else a tenth, 32 at least); the better
    half with a second seed, the best two with a third, and rates beyond the edge where the best is there. At the best one it is
    trained with seeds that tuned nothing, and measured on dev and test. Other rates (SPT's search, MiLoRA's routers) are not tuned.
    The same command goes on after an interruption, in several processes at once too, and takes more methods, seeds and rates.

    \b
    Examples:
      gatewise compare my.yaml --methods lora dora alora --out compared
      gatewise compare my.yaml --methods lora alora --seeds 3 --rates 3 --set training.max_steps=100 --out compared
    """
    from gatewise.comparing import compare as run
    from gatewise.comparing.report import table

    try:
        content = run(
            recipe,
            methods,
            out,
            seeds=seeds,
            rates=rates,
            overrides=set_ or (),
            budget_minutes=budget_minutes,
            keep_adapters=keep_adapters,
            console=Console(stderr=True),
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted: what is finished is in {out}; give the same command to go on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(finite(content)))
        return
    print_whole(table(content))
    for line in (content["sentence"], *content["notes"]):
        typer.echo(line)
    typer.echo(f"written: {out}/compare.json{', compare.png' if (out / 'compare.png').exists() else ''}")
    if content["missing"]:
        typer.echo(
            "the plan alone: leave out --budget-minutes 0 to train" if budget_minutes == 0 else "give the same command to go on"
        )
