"""Has a Trainer load all active adapters of a checkpoint, each from where PEFT saved it.

Transformers resumes with the first active adapter alone: the others are loaded and switched off, so that they would not be trained
and the optimiser, made anew, does not fit what was saved. As the best checkpoint it loads what lies in the folder itself, which
is the adapter called "default", into the first active one, whichever that is.

Read in Transformers 5.24: ``_load_from_checkpoint`` and ``_load_best_model``, which no callback is told of.
"""

from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import Trainer


def load_all_active_adapters() -> None:
    """From now on, in all Trainers of this process. With one active adapter that is called "default" nothing changes."""
    if getattr(Trainer._load_from_checkpoint, "_gatewise", False):
        return
    resume, load_best = Trainer._load_from_checkpoint, Trainer._load_best_model

    @wraps(resume)
    def _load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted: Any = self.model if model is None else model
        active = _active(adapted)
        trained = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
        resume(self, resume_from_checkpoint, model)
        if len(active) > 1:
            adapted.base_model.set_adapter(active)
            for name, parameter in adapted.named_parameters():
                parameter.requires_grad_(trained[name])

    @wraps(load_best)
    def _load_best_model(self: Trainer) -> None:
        adapted: Any = self.model
        folders = {name: folder_of(self.state.best_model_checkpoint or "", name) for name in _active(adapted)}
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # all that is trained lies in one file
        if sharded or not folders or not all((folder / SAFETENSORS_WEIGHTS_NAME).is_file() for folder in folders.values()):
            load_best(self)
            return
        for name, folder in folders.items():
            adapted.load_adapter(str(folder), name, is_trainable=True)

    _load_from_checkpoint._gatewise = True  # type: ignore[attr-defined]
    Trainer._load_from_checkpoint = _load_from_checkpoint  # type: ignore[method-assign]
    Trainer._load_best_model = _load_best_model  # type: ignore[method-assign]


def folder_of(folder: str | Path, name: str) -> Path:
    """Where PEFT saves an adapter of several: one that is not called "default" has a folder of its own."""
    return Path(folder) / ("" if name == "default" else name)


def _active(model: Any) -> list[str]:
    """The active adapters, where Transformers does not load them rightly."""
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    return [] if active == ["default"] else active
