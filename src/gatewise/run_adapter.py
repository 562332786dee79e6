"""The fresh adapter that a recipe describes, on its base model."""

import difflib
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from gatewise.errors import GatewiseError
from gatewise.recipe import AllocationSection, Recipe, RoutingSection
from gatewise.routed import RoutedLoraConfig


def adapted(recipe: Recipe, base: PreTrainedModel, steps: int) -> PeftModel:
    """The base model with a fresh adapter that changes nothing yet.

    Args:
        steps: of the whole run, for schedules.

    Raises:
        GatewiseError: modules that the base model lacks, or settings that do not go with it.
    """
    peft = recipe.peft
    _check_modules("peft.target_modules", peft.target_modules, base, recipe.model)
    _check_modules("peft.exclude_modules", peft.exclude_modules, base, recipe.model)
    common: dict[str, Any] = {
        "lora_alpha": peft.lora_alpha,
        "target_modules": peft.target_modules,
        "exclude_modules": peft.exclude_modules,
        "lora_dropout": peft.lora_dropout,
        "init_lora_weights": peft.init_lora_weights,
        "task_type": "SEQ_CLS" if recipe.task == "classification" else "CAUSAL_LM",
    }
    config: LoraConfig
    r = peft.r
    if recipe.allocation is not None and recipe.allocation.schedule == "cubic":
        # More ranks at the start, the scale of those wanted at the end.
        r = _initial_rank(recipe.allocation, peft.r)
        common["lora_alpha"] = peft.lora_alpha * ((r / peft.r) ** 0.5 if peft.use_rslora else r / peft.r)
    if recipe.method == "adalora":
        config = AdaLoraConfig(target_r=peft.r, **_adalora_schedule(recipe, steps), **common)
    elif recipe.method == "milora":
        section = recipe.routing or RoutingSection()
        settings = section.model_dump(exclude={"validation_rows", "activation_learning_rate", "activation_every"})
        config = RoutedLoraConfig(r=r, use_rslora=peft.use_rslora, **settings, **common)
    else:
        config = LoraConfig(r=r, use_rslora=peft.use_rslora, use_dora=recipe.method == "dora", **common)
    set_seed(recipe.seed)
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise GatewiseError(f"PEFT cannot put this adapter on {recipe.model}: {' '.join(str(error).split())}") from error


def _initial_rank(section: AllocationSection, r: int) -> int:
    return section.init_r or max(r + 1, round(1.5 * r))


def _check_modules(key: str, names: Any, base: PreTrainedModel, model: str) -> None:
    """PEFT passes over a name that fits no module as long as another one does."""
    if names is None or (isinstance(names, str) and names == "all-linear"):
        return
    linear = {path for path, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for name in [names] if isinstance(names, str) else names:
        if not any(path == name or path.endswith(f".{name}") for path in linear):
            endings = sorted({path.rpartition(".")[2] for path in linear})
            near = difflib.get_close_matches(name, endings, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise GatewiseError(
                f"{key}: {name!r} is no linear module of {model}, expected 'all-linear' or of {', '.join(endings)}{hint}"
            )


def _adalora_schedule(recipe: Recipe, steps: int) -> dict[str, Any]:
    given = recipe.adalora.model_dump(exclude_none=True) if recipe.adalora else {}
    schedule = {
        "init_r": max(recipe.peft.r + 1, round(1.5 * recipe.peft.r)),
        "tinit": steps // 10,
        "tfinal": round(0.3 * steps),
        **given,
        "total_step": steps,
    }
    if schedule["tinit"] >= steps - schedule["tfinal"]:
        raise GatewiseError(
            f"adalora: tinit ({schedule['tinit']}) and tfinal ({schedule['tfinal']}) leave no step of the run's {steps} in "
            "which ranks can be taken away: lower them or train longer"
        )
    return schedule
