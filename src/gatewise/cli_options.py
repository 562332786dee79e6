"""Options that several commands have, with one meaning."""

from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
BaseOption = Annotated[str | None, typer.Option(help="The base model, if not the one the adapter names.")]
SplitOption = Annotated[str | None, typer.Option(help="Split of a Hugging Face data set.")]
TemplateOption = Annotated[str | None, typer.Option(help="Prompt with the row's fields in braces, if not the run's.")]
LabelsOption = Annotated[str | None, typer.Option(help="Labels in order, 'no,yes', or with their words, 'no=bad,yes=good'.")]
