"""Routing statistics in a Trainer's logs.

In a file of its own, because it needs Transformers' Trainer, which imports PEFT: it cannot be there yet when PEFT, being imported
by it, has our methods added (see _HOMES in internals/registry.py).
"""

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RoutingLog(TrainerCallback):
    """Writes the routing statistics of training into a Trainer's logs: the mean over the batches since the last entry.

    ``RoutingLog.attach(trainer)`` puts it before the Trainer's loggers (TensorBoard, W&B and so on), so that all of them get the
    numbers.
    """

    def __init__(self) -> None:
        self._batches: list[dict[str, float]] = []

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Adds one to a trainer, before its loggers."""
        trainer.callback_handler.callbacks.insert(0, cls())

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batches.append(kwargs["model"].routing_statistics())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batches.append(kwargs["model"].routing_statistics())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        # An evaluation's entry, and the last one with the whole run's numbers, are not about the batches since the entry before.
        if not self._batches or logs is None or "loss" not in logs:
            return
        means = {f"routing/{name}": sum(one[name] for one in self._batches) / len(self._batches) for name in self._batches[0]}
        logs.update(means)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(means)
        self._batches = []
