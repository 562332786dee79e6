"""Shows the progress of a training run: a bar on a terminal, else a line now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gatewise.progress import ConsoleProgress


class RunProgress(ConsoleProgress, TrainerCallback):
    """Shows the phases of a run, and as a Trainer callback its steps, losses and rounds.

    Args:
        console: where to; the bar appears only on a terminal, so that logs stay readable.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._started = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what = "training"

    @contextmanager
    def training(self, what: str = "training") -> Iterator[None]:
        """Names the training bar, and closes it whatever ends the training."""
        self._what = what
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._started = time.monotonic()
        self._bar = self.new_bar()
        self._task = self._bar.add_task(self._what, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "eval_loss" in logs:
            self.say(f"step {state.global_step}: loss on dev {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            loss, rate = float(logs["loss"]), float(logs.get("learning_rate", 0.0))
            if self._bar is not None:
                self._bar.update(self._task, description=f"{self._what}, loss {loss:.4f}")
            if not self.console.is_terminal:
                seconds = time.monotonic() - self._started
                self.say(f"step {state.global_step}/{state.max_steps}: loss {loss:.4f}, learning rate {rate:.2e}, {seconds:.0f} s")
