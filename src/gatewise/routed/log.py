"""Routing statistics in a Trainer's logs.

In a file of its own, because it needs Transformers' Trainer, which imports PEFT: it cannot be there yet when PEFT, being imported
by it, has our methods added (see _HOMES in internals/registry.py).
"""

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RoutingLog(TrainerCallback):
    """Writes the routing statistics of training into a Trainer's logs: the mean over the batches since the last entry.

    ``RoutingLog.attach(trainer)`` puts it before the Trainer's loggers, so that all of them get the numbers. Given to the Trainer
    in ``callbacks=`` it comes after the loggers that were built with it (TensorBoard, W&B and so on), and only the Trainer's own
    history and progress bar show them.

    Args:
        per_layer: also the share of every module of every layer, not only balance loss and entropy.
    """

    def __init__(self, per_layer: bool = True) -> None:
        self.per_layer = per_layer
        self._sums: dict[str, float] = {}
        self._batches = 0

    @classmethod
    def attach(cls, trainer: Trainer, per_layer: bool = True) -> "RoutingLog":
        """Adds one to a trainer, before its loggers."""
        log = cls(per_layer)
        trainer.callback_handler.callbacks.insert(0, log)
        return log

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._add(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._add(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        # An evaluation's entry, and the last one with the whole run's numbers, are not about the batches since the entry before.
        if not self._batches or logs is None or "loss" not in logs:
            return
        means = {name: value / self._batches for name, value in self._sums.items()}
        logs.update(means)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(means)
        self._sums, self._batches = {}, 0

    def _add(self, model: Any) -> None:
        statistics = model.routing_statistics().as_logs(self.per_layer)
        for name, value in statistics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._batches += 1
