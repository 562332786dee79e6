"""What several commands share: the options by which rows are read with a saved adapter (see ``DataOptions``), and tables."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table
from typer.core import TyperCommand

INTERRUPTED = 130
"""The exit code after an interrupt."""

SplitOption = Annotated[str | None, typer.Option(help="Split of a data set, or of a file what its run took out: dev, test.")]
PromptOption = Annotated[
    str | None,
    typer.Option("--template-prompt", help="Prompt with the row's fields in braces, if not the run's. Not for classifiers."),
]
LabelsOption = Annotated[str | None, typer.Option(help="Labels in order, 'no,yes', or with their words, 'no=bad,yes=good'.")]
ColumnsOption = Annotated[
    str | None,
    typer.Option(help="Columns that fields are read from, if not the run's: 'text=message,label=category'.", show_default=False),
]
LimitOption = Annotated[int | None, typer.Option(help="Measure on the first rows only.", min=1)]


class SeveralValues(TyperCommand):
    """Lets one ``--methods`` or ``--set`` have several values: ``--methods a b`` is ``--methods a --methods b``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the option before each of its values. Only KEY=VALUE is a value of ``--set``: a recipe may follow."""
        words: list[str] = []
        option = None
        for word in args:
            if word.startswith("-"):
                option = name if (name := word.partition("=")[0]) in ("--methods", "--set") else None
            elif option and words[-1] != option and (option != "--set" or re.match(r"[\w.]+=", word)):
                words.append(option)
            words.append(word)
        return super().parse_args(ctx, words)


def at_hand(adapter: Path) -> Path:
    """The folder of an adapter that is named by its folder or its id on the hub."""
    from gatewise.adapters.files import local_folder  # brings torch

    return local_folder(adapter)


def print_whole(table: Table | Group) -> None:
    """Prints a table, or several, as wide as needed: a narrow terminal goes on in its next line, and loses no number."""
    console = Console(markup=False)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)


def print_table(left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table whose first columns, called ``left``, are words, and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=name == left[0])
    for name in right:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    print_whole(table)
