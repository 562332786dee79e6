"""Options that several commands share."""

from typing import Annotated

import typer

OUT = ("--out", "--output", "-o")
"""What every command calls the file or folder that it writes."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda, cuda:1 or mps.")]
BaseOption = Annotated[str | None, typer.Option(help="The base model, if not the one the adapter names.")]
