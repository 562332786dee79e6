"""PEFT's AdaLoRA as a baseline: its schedule is called at every step, a run can be resumed, and ends in plain LoRA.

AdaLoRA (Zhang et al., 2023) writes an update as B diag(E) A and takes away entries of E. In PEFT the effective scale is
``lora_alpha / init_r`` throughout, not ``lora_alpha / r``: compare methods with that in mind.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gatewise.adapters.files import PEFT_PREFIX
from gatewise.allocation.slots import compact
from gatewise.files import whole_file
from gatewise.models.loading import HEADS

STATE_FILE = "adalora_state.safetensors"
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraSchedule(TrainerCallback):
    """Calls ``update_and_allocate`` after every optimiser step, while the gradients are there.

    PEFT cuts an adapter to its rank pattern when it is saved, which a checkpoint of an unfinished run cannot bear:
    masked entries may come back, and the full shapes are needed to load it. So between steps the pattern is kept here
    instead of in the config, and saved in each checkpoint together with the averages that importance is made of.

    Args:
        resume_from: the checkpoint the run continues from.
    """

    def __init__(self, resume_from: Path | None = None) -> None:
        self.resume_from = resume_from
        self.pattern: dict[str, Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.resume_from is not None:
            self._load(kwargs["model"], self.resume_from / STATE_FILE)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        config = model.peft_config[model.active_adapter]
        config.rank_pattern = self.pattern
        # The Trainer counts this step only afterwards; with its own count the last one would never be reached.
        model.base_model.update_and_allocate(state.global_step + 1)
        self.pattern, config.rank_pattern = config.rank_pattern, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        allocator = kwargs["model"].base_model.rankallocator
        tensors = {f"{kind}/{name}": value for kind in _AVERAGES for name, value in getattr(allocator, kind, {}).items()}
        path = Path(args.output_dir or "") / f"checkpoint-{state.global_step}" / STATE_FILE
        with whole_file(path) as part:
            save_file(tensors, part, metadata={"rank_pattern": json.dumps(self.pattern)})

    def _load(self, model: PeftModel, path: Path) -> None:
        allocator: Any = model.base_model.rankallocator
        with safe_open(str(path), framework="pt") as file:
            self.pattern = json.loads(file.metadata()["rank_pattern"])
            device = next(model.parameters()).device
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                kind, _, name = key.partition("/")
                getattr(allocator, kind)[name] = file.get_tensor(key).to(device)


def orthogonality(model: PeftModel) -> Tensor:
    """AdaLoRA's regulariser, unweighted: the mean over all factors P, that is A and B^T, of || P P^T - I ||_F."""
    total = [
        torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device, dtype=product.dtype))
        for layer in _layers(model).values()
        for product in _products(layer, model.active_adapter)
    ]
    return torch.stack(total).mean()


def ranks_asked_for(model: PeftModel) -> int:
    """The ranks that AdaLoRA's schedule comes down to, if it has time to."""
    config = model.peft_config[model.active_adapter]
    assert isinstance(config, AdaLoraConfig)
    return config.target_r * len(_layers(model))


def to_plain_lora(model: PeftModel) -> PeftModel:
    """The trained AdaLoRA model as a plain LoRA model of the same function, with every module at its true rank.

    E goes into A, and what PEFT adds to the divisor of the scale (1e-5) goes into B, so that the scale is a plain
    ``lora_alpha / init_r``. The AdaLoRA layers are taken out of the base model that the result wraps.
    """
    adapter = model.active_adapter
    config = model.peft_config[adapter]
    assert isinstance(config, AdaLoraConfig)
    scale = config.lora_alpha / config.init_r
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in _layers(model).items():
        live = layer.lora_E[adapter].detach().flatten() != 0
        ratio = float(layer.scaling[adapter]) / (float(layer.ranknum[adapter]) + 1e-5) / scale
        a = layer.lora_A[adapter].detach() * layer.lora_E[adapter].detach()
        b = layer.lora_B[adapter].detach() * ratio
        # A slot is dead when its row of A and its column of B are both zero.
        factors[path] = (a * live[:, None], b * live[None, :])
    is_classifier = config.task_type == TaskType.SEQ_CLS
    plain = get_peft_model(
        model.unload(),
        LoraConfig(
            r=config.init_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(factors),
            task_type=config.task_type,
            # The trained ones are in the base model now. PEFT has added a classifier's head, and adds it once more.
            modules_to_save=[name for name in config.modules_to_save or () if name not in HEADS or not is_classifier] or None,
        ),
    )
    for path, (a, b) in factors.items():
        target: Any = plain.get_submodule(PEFT_PREFIX + path)
        with torch.no_grad():
            target.lora_A["default"].weight.copy_(a)
            target.lora_B["default"].weight.copy_(b)
    compact(plain)
    return plain.eval()


def _layers(model: PeftModel) -> dict[str, Any]:
    return {path.removeprefix(PEFT_PREFIX): module for path, module in model.named_modules() if isinstance(module, AdaLoraLayer)}


def _products(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    return a @ a.T, b.T @ b
