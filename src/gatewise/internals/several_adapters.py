"""Has a Trainer load all active adapters of a checkpoint, each from where PEFT saved it.

Transformers resumes with the first active adapter alone: the others are loaded and switched off, so that they would not be trained
and the optimiser, made anew, does not fit what was saved. As the best checkpoint it loads what lies in the folder itself, which
is the adapter called "default", into the first active one, whichever that is.

Read in Transformers 5.24: ``_load_from_checkpoint`` and ``_load_best_model``, which no callback is told of.
"""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import Trainer


def load_all_active_adapters() -> None:
    """Changes how the Trainer that is being made, from a callback of whose this is called, loads checkpoints, and no other Trainer.

    Where one adapter is active then that is called "default", Transformers loads what it should, and does it.
    """
    frame: Any = inspect.currentframe()  # callbacks are given the model, but not the Trainer
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    if frame is not None and "_load_best_model" not in vars(trainer := frame.f_locals["self"]):
        trainer._load_from_checkpoint = partial(_resume, trainer, trainer._load_from_checkpoint)
        trainer._load_best_model = partial(_load_best, trainer, trainer._load_best_model)


def _resume(trainer: Any, resume: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
    adapted: Any = trainer.model if model is None else model
    active = _active(adapted)
    trained = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    resume(resume_from_checkpoint, model)
    if len(active) > 1:
        adapted.base_model.set_adapter(active)
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(trained[name])


def _load_best(trainer: Any, load_best: Any) -> None:
    best = Path(trainer.state.best_model_checkpoint or "")
    # Where PEFT saves an adapter of several: one that is not called "default" has a folder of its own.
    folders = {name: best / ("" if name == "default" else name) for name in _active(trainer.model)}
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # all that is trained lies in one file
    if sharded or not folders or not all((folder / SAFETENSORS_WEIGHTS_NAME).is_file() for folder in folders.values()):
        load_best()
        return
    for name, folder in folders.items():
        trainer.model.load_adapter(str(folder), name, is_trainable=True)


def _active(model: Any) -> list[str]:
    """The active adapters, where Transformers does not load them rightly."""
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    return [] if active == ["default"] else active
