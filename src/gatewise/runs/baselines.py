"""The baselines that need more than a configuration of PEFT's, as parts of a recipe: AdaLoRA, prompt tuning and prefix tuning.

AdaLoRA (Zhang et al., 2023) writes an update as B diag(E) A and takes away entries of E. It ends as plain LoRA here, and cannot be
resumed: its averages are in no checkpoint. In PEFT the effective scale is ``lora_alpha / init_r`` throughout, not
``lora_alpha / r``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gatewise.adapters.files import PEFT_PREFIX
from gatewise.adapters.method import Lora
from gatewise.allocation.slots import compact, ranks
from gatewise.errors import GatewiseError, reason_of
from gatewise.internals.soft_prompt_fixes import without_prompts
from gatewise.internals.zero import is_asked_for
from gatewise.losses import inside
from gatewise.models.loading import HEADS
from gatewise.parts import Count, Fraction, Method, NotNegative, Run, Section


class AdaloraSection(Section):
    """AdaLoRA's schedule, see ``peft.AdaLoraConfig``; ``total_step`` is the run's."""

    init_r: Count | None = None
    """The rank of every module at the start. Left out: one and a half times ``peft.r``."""
    tinit: Annotated[int, Field(ge=0)] | None = None
    """Steps before the first rank is removed. Left out: a tenth of the run."""
    tfinal: Annotated[int, Field(ge=0)] | None = None
    """Steps at the end in which none is removed. Left out: three tenths of the run."""
    deltaT: Count = 1  # noqa: N815 (PEFT's name)
    """Steps between two decisions."""
    beta1: Fraction = 0.85
    """Smoothing of the importance over steps."""
    beta2: Fraction = 0.85
    """Smoothing of its uncertainty."""
    orth_reg_weight: NotNegative = 0.5
    """Weight of the loss that keeps the factors orthogonal; the training loss that is shown includes it."""


class AdaLora(Lora):
    """AdaLoRA, which ends as plain LoRA."""

    is_lora = False
    adalora: AdaloraSection

    @property
    def init_r(self) -> int:
        """The rank of every module at the start."""
        return self.adalora.init_r or max(self.peft.r + 1, round(1.5 * self.peft.r))

    @property
    def scale(self) -> float | None:
        """PEFT divides by the first rank."""
        return 1 / self.init_r

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """What AdaLoRA does not take of LoRA's settings."""
        yield from super().contradictions()
        if self.adalora.init_r is not None and self.adalora.init_r <= self.peft.r:
            yield (
                "adalora.init_r",
                f"is {self.adalora.init_r}, expected more than peft.r ({self.peft.r}), the mean rank to come down to",
            )
        if self.recipe.quantization == "int8":  # PEFT's layer gives a bfloat16 model float32
            yield "quantization", "is int8, with which PEFT's AdaLoRA does not run: take nf4"
        if self.peft.use_rslora:
            yield "peft.use_rslora", "is true, but AdaLoRA scales by lora_alpha / init_r: remove the key"
        if self.peft.init_lora_weights is not True:
            yield "peft.init_lora_weights", "is for the other methods: AdaLoRA has its own start, so remove the key"

    def config(self, run: Run, base: PreTrainedModel) -> LoraConfig:
        """AdaLoRA with the run's schedule."""
        if is_asked_for():
            raise GatewiseError(
                "method adalora reads whole gradients, which DeepSpeed does not keep: take launch.strategy ddp, or method alora"
            )
        schedule = {
            "tinit": run.steps // 10,
            "tfinal": round(0.3 * run.steps),
            **self.adalora.model_dump(exclude_none=True),
            "init_r": self.init_r,
            "total_step": run.steps,
        }
        settings = self.settings(run, base)
        try:
            return AdaLoraConfig(target_r=self.peft.r, **schedule, **settings)
        except ValueError as error:
            raise GatewiseError(f"adalora: {reason_of(error)}") from error

    def saved_config(self, run: Run, base: PreTrainedModel) -> LoraConfig:
        """Plain LoRA. Its budget counts ranks, so that it may end somewhat smaller or larger."""
        return LoraConfig(r=self.peft.r, **self.settings(run, base))

    def resized(self, size: int) -> dict[str, Any]:
        """The ranks to come down from go with the rank."""
        given = self.adalora.init_r
        more = {"adalora.init_r": max(size + 1, round(given * size / self.peft.r))} if given else {}
        return {**super().resized(size), **more}

    def adapt(self, run: Run, base: PreTrainedModel) -> PeftModel:
        """AdaLoRA. PEFT would train the divisor of its scale where it casts it, on a bfloat16 base, and never save it."""
        model = super().adapt(run, base)
        for layer in _layers(model).values():
            layer.ranknum.requires_grad_(False)
        return model

    def resume(self, output: Path) -> None:
        """Refused."""
        raise GatewiseError(f"method adalora cannot be resumed, as checkpoints lack its averages: repeat {output} with --overwrite")

    def callbacks(self, run: Run) -> list[TrainerCallback]:
        """The schedule."""
        return [*super().callbacks(run), AdaLoraSchedule()]

    def loss_term(self, model: nn.Module, share: float | Tensor) -> Tensor:
        """The weighted regulariser, as PEFT adds it to the loss of every batch."""
        adapted: Any = inside(model)
        return self.adalora.orth_reg_weight * orthogonality(adapted) / self.recipe.training.gradient_accumulation

    def finish(self, run: Run, model: PeftModel) -> PeftModel:
        """Plain LoRA of the same function."""
        budget = self.peft.r * len(_layers(model))
        plain = to_plain_lora(model)
        left = sum(ranks(plain).values())
        if left > budget:
            run.progress.say(
                f"warning: AdaLoRA has {left} ranks left, and {budget} were its budget: training (or its best checkpoint) "
                "ended before its pruning did"
            )
        return plain


class PrefixSection(Section):
    """The prompts of prefix tuning."""

    num_prompt_tokens: Count = 10
    """Prompt tokens in front of the text."""


class PromptSection(PrefixSection):
    """The prompts of prompt tuning."""

    init: Literal["vocabulary", "random"] = "vocabulary"
    """They begin as token embeddings drawn from the ``vocabulary``, or as ``random`` numbers."""


class PrefixTuning(Method):
    """Prefix tuning (Li and Liang, arXiv 2101.00190), as PEFT has it: keys and values of a prompt in every layer."""

    trains_whole = False  # PEFT's prompts have no room for more
    size_key = "prompts.num_prompt_tokens"
    largest_size = 200  # as many as its authors tried; each is as slow as a token of the text
    untrained = staticmethod(without_prompts)
    prompts: PrefixSection

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Recomputing would fill the cache twice."""
        if self.recipe.training.gradient_checkpointing:
            yield (
                "training.gradient_checkpointing",
                "is true, but prefix tuning keeps its prompts in the key-value cache, which recomputing would fill twice: remove "
                "it",
            )

    @property
    def prompt_tokens(self) -> int:  # type: ignore[override]
        """Of the model's positions."""
        return self.prompts.num_prompt_tokens

    def config(self, run: Run, base: PreTrainedModel) -> PrefixTuningConfig:
        """Prefix tuning."""
        return PrefixTuningConfig(num_virtual_tokens=self.prompts.num_prompt_tokens, task_type=run.task.task_type)


class PromptTuning(PrefixTuning):
    """Prompt tuning (Lester et al., arXiv 2104.08691), as PEFT has it: embeddings before those of the text."""

    largest_size = 150  # as many as its authors tried
    prompts: PromptSection

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """None."""
        yield from ()

    def config(self, run: Run, base: PreTrainedModel) -> Any:
        """Prompt tuning.

        Raises:
            GatewiseError: a decoder that classifies.
        """
        if run.task.task_type == "SEQ_CLS" and hasattr(base, "score"):
            raise GatewiseError(
                f"{self.recipe.model} is a decoder, which classifies by the last token that is no padding, and does not see it "
                "with prompt tuning: take task causal, or method prefix-tuning or spt"
            )
        init = "SAMPLE_VOCAB" if self.prompts.init == "vocabulary" else "RANDOM"
        return PromptTuningConfig(
            num_virtual_tokens=self.prompts.num_prompt_tokens, prompt_tuning_init=init, task_type=run.task.task_type
        )


class AdaLoraSchedule(TrainerCallback):
    """Calls ``update_and_allocate`` after every optimiser step, while the gradients are there.

    PEFT cuts an adapter to its rank pattern when it is saved, which a checkpoint of an unfinished run cannot bear: masked entries
    may come back, and the full shapes are needed to load the best one. So between steps the pattern is here, not in the config.
    """

    pattern: dict[str, Any] | None = None

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        config = model.peft_config[model.active_adapter]
        config.rank_pattern = self.pattern
        # The Trainer counts this step only afterwards; with its own count the last one would never be reached.
        model.base_model.update_and_allocate(state.global_step + 1)
        self.pattern, config.rank_pattern = config.rank_pattern, None


def orthogonality(model: PeftModel) -> Tensor:
    """AdaLoRA's regulariser, unweighted: the mean over all factors P, that is A and B^T, of || P P^T - I ||_F."""
    total = [
        torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device, dtype=product.dtype))
        for layer in _layers(model).values()
        for product in _products(layer, model.active_adapter)
    ]
    return torch.stack(total).mean()


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
