"""Shows the progress of long work as lines and bars on a console, and keeps Transformers quiet meanwhile."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from rich.console import Console


class ConsoleProgress(TrainerCallback):
    """Shows what a long command does now, and as a Trainer's callback its steps and losses.

    Args:
        console: bars appear only if it is a terminal, so that logs stay readable. A notebook says that its commands have one, and
            keeps every state of a bar.

    Attributes:
        watched: what the rows are called that a Trainer evaluates on.
    """

    watched = "dev"

    def __init__(self, console: "Console") -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Yields a function that shows (done, total) on a bar, which disappears at the end."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        is_terminal = self.console.is_terminal and "JPY_PARENT_PID" not in os.environ
        with Progress(*columns, console=self.console, transient=True, disable=not is_terminal) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Says what the Trainer logs."""
        logs = kwargs["logs"]
        if "eval_loss" in logs:
            others = [(name.removeprefix("eval_"), value) for name, value in logs.items() if name.startswith("eval_")]
            self.say(f"step {state.global_step}: on {self.watched} {', '.join(f'{name} {value:.4f}' for name, value in others)}")
        elif "loss" in logs:
            rate = logs.get("learning_rate", 0.0)
            self.say(f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, learning rate {rate:.2e}")


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keeps Transformers and bitsandbytes from printing notes and warnings and, unless ``bars``, progress bars."""
    log, other = transformers.utils.logging, logging.getLogger("bitsandbytes")  # which speaks at every product
    verbosity, had_bars, level = log.get_verbosity(), log.is_progress_bar_enabled(), other.level
    log.set_verbosity_error()
    other.setLevel(logging.ERROR)
    if not bars:
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        other.setLevel(level)
        if had_bars and not bars:
            log.enable_progress_bar()
