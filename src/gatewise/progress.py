"""Shows the progress of long work as lines and bars on a console, and keeps Transformers quiet meanwhile."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class ConsoleProgress:
    """Shows what a long command does now.

    Args:
        console: bars appear only if it is a terminal, so that logs stay readable.
    """

    def __init__(self, console: "Console") -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Yields a function that shows (done, total) on a bar."""
        with self.new_bar() as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def new_bar(self) -> "Progress":
        """A bar that disappears when it is closed."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keeps Transformers from printing notes and warnings and, unless ``bars``, progress bars."""
    import transformers

    log = transformers.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if not bars:
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars and not bars:
            log.enable_progress_bar()
