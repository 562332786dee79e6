"""The ``export`` command: an adapter as plain LoRA, at its true ranks."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter or checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write, new or empty.", show_default=False)],
    padded: Annotated[
        bool, typer.Option("--padded", help="One rank for all modules, for engines that ignore rank patterns.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Pad to this rank, and modules without ranks as zeros, so that adapters can be swapped and merged.", min=1
        ),
    ] = None,
) -> None:
    """Write an adapter as plain LoRA at its true ranks.

    \b
    Example:
      gatewise export runs/quickstart/adapter for-serving --padded
    """
    from gatewise.adapters.export import to_lora

    typer.echo(f"written: {to_lora(adapter, out, padded=padded, rank=rank)}")
