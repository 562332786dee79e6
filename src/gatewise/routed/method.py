"""MiLoRA as a part of a recipe: LoRA modules that each prompt picks once, see ``RoutedLoraConfig``."""

from typing import Any, Literal

from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from gatewise.adapters.method import Lora
from gatewise.bilevel import BilevelMixin
from gatewise.losses import inside
from gatewise.parts import Count, NotNegative, Positive, Run, Section
from gatewise.routed import ACTIVATION_PARAMETERS, RoutedLoraConfig


class RoutingSection(Section):
    """The routers of MiLoRA, see ``gatewise.RoutedLoraConfig``."""

    top_k: Count = 3
    """How many of a layer's LoRA modules a prompt keeps."""
    pooler: Literal["attention", "mean", "max", "last"] = "attention"
    """How the prompt's hidden states become one vector: a learnt weighting of its tokens, their mean or maximum, or the last one.
"""
    activation: Literal["rational", "gelu", "relu", "identity"] = "rational"
    """The router's activation; ``rational`` has coefficients that learn."""
    balance_weight: NotNegative = 1e-2
    """Weight of the loss that keeps a layer's modules evenly used."""
    normalize_gates: bool = True
    """The gates of the kept modules add up to 1. ``false``: they are the router's probabilities."""
    normalize_states: bool = True
    """Scale each token's hidden state to unit size before pooling."""
    center_states: bool = True
    """Take off what all prompts have in common before routing, see docs/reports/milora.md."""
    activation_learning_rate: Positive = 1e-6
    """Rate of the coefficients of ``rational``, which learn on the rows of ``data.held_out``; without such rows they learn with the
    rest."""
    activation_every: Count = 4
    """One step of theirs after so many steps of the rest."""


class RoutedLora(Lora):
    """MiLoRA (Zhang et al., Findings of EMNLP 2024, arXiv 2410.18035)."""

    files = (*Lora.files, "routing.png")
    reads_prompt = True
    starts = (True, "gaussian")
    routing: RoutingSection

    @property
    def scale(self) -> float | None:
        """On average: the gates of a layer add up to one."""
        whole = super().scale if self.routing.normalize_gates else None
        return whole and whole / self.routing.top_k

    def config(self, run: Run, base: PreTrainedModel) -> LoraConfig:
        """Routed LoRA."""
        own = self.routing.model_dump(exclude={"activation_learning_rate", "activation_every"})
        return RoutedLoraConfig(r=self.peft.r, use_rslora=self.peft.use_rslora, **own, **self.settings(run, base))

    def loss_term(self, model: nn.Module, share: float | Tensor) -> Tensor:
        """The load balance, which the model adds to a loss of its own alone."""
        adapted: Any = inside(model)
        return share * adapted.base_model.balance_loss()

    def trainer(self, run: Run) -> Trainer:
        """One with a second level, if the activation has coefficients and rows of its own to learn on."""
        upper: dict[str, Any] = {}
        if run.held_out and self.routing.activation == "rational":
            upper = {
                "mixin": BilevelMixin,
                "upper_dataset": run.held_out,
                "upper_parameters": ACTIVATION_PARAMETERS,
                "upper_learning_rate": self.routing.activation_learning_rate,
                "upper_every": min(self.routing.activation_every, run.steps),
            }
        trainer: Trainer = run.trainer(callbacks=self.callbacks(run), loss_term=self.loss_term, **upper)
        return trainer
