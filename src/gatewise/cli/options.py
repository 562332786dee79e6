"""The options of commands that read rows with a saved adapter: a flag for each field of ``DataOptions``."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from gatewise.adapters.data_options import DataOptions
from gatewise.flags import BaseOption, DeviceOption

# The command-line side of ``DataOptions``: a flag for each of its fields.
_DATA_FLAGS: dict[str, Any] = {
    "base": BaseOption,
    "split": Annotated[str | None, typer.Option(help="Split of a Hugging Face data set.")],
    "prompt": Annotated[
        str | None,
        typer.Option("--template-prompt", help="Prompt with the row's fields in braces, if not the run's. Not for classifiers."),
    ],
    "labels": Annotated[str | None, typer.Option(help="Labels in order, 'no,yes', or with their words, 'no=bad,yes=good'.")],
    "limit": Annotated[int | None, typer.Option(help="Measure on the first rows only.", min=1)],
    "device": DeviceOption,
}


def takes_data_options(leave_out: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the flags of ``DataOptions`` in place of its argument ``options``, and hands their values to it as one.

    Args:
        leave_out: a flag that the command has in its own way.
    """
    flags = {name: flag for name, flag in _DATA_FLAGS.items() if name != leave_out}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            options = DataOptions(**{name: given.pop(name) for name in flags})
            command(**given, options=options)

        # Typer builds the command line from the signature.
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for one in inspect.signature(command).parameters.values():
            keyword = one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name])
            parameters += (
                [keyword]
                if one.name != "options"
                else [keyword.replace(name=name, default=getattr(DataOptions(), name), annotation=flags[name]) for name in flags]
            )
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate
