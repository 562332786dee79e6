"""Lets a callback log numbers of its own, for the reporters of its Trainer (TensorBoard, W&B and others) and for the log history.

A Trainer gives its callbacks no way to do so: they do not know it, and what one adds to ``logs`` in ``on_log`` comes too late, as
the reporters are callbacks that stand before it.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


def log(
    callback: TrainerCallback,
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    logs: Mapping[str, float],
    **kwargs: Any,
) -> None:
    """Does what ``Trainer.log`` does, out of an event of a callback; what only prints is left out, which these numbers would flood.

    Args:
        kwargs: those of the event.
    """
    state.log_history.append({**logs, "step": state.global_step})
    for one in _callbacks_around(callback):
        if not isinstance(one, (PrinterCallback, ProgressCallback)):
            one.on_log(args, state, control, logs=dict(logs), **kwargs)


def _callbacks_around(callback: TrainerCallback) -> list[TrainerCallback]:
    """All callbacks of the Trainer that is calling this one, whose handler is among the callers; empty without a Trainer."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and callback in caller.callbacks:
            return list(caller.callbacks)
        frame = frame.f_back
    return []
