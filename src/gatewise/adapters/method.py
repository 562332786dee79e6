"""LoRA and DoRA as parts of a recipe, and what all methods on LoRA have in common."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from peft import LoraConfig, PeftModel
from pydantic import AfterValidator, BeforeValidator, WithJsonSchema
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gatewise.adapters.files import UNFINISHED_START
from gatewise.adapters.starts import CHANGE_BASE, SETTINGS, back_on_base, look_after, look_first, ranks_of
from gatewise.errors import GatewiseError
from gatewise.parts import Count, Method, Run, Section, Share


def _modules(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError("expected 'all-linear' or a list of module names")


Modules = Annotated[
    Any,
    AfterValidator(_modules),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
PATTERN = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
"""What ``gatewise inspect --suggest`` writes."""


def _pattern(value: Any) -> Any:
    """The file that is named, read, so that a recipe that is written down holds the ranks themselves."""
    read = value
    if isinstance(value, str):
        try:
            read = json.loads(Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            read = None
    if value is not None and (not isinstance(read, dict) or read.keys() != PATTERN):
        raise ValueError("expected a file that `gatewise inspect ADAPTER --scores --data ROWS --suggest BUDGET --out FILE` wrote")
    return read


Pattern = Annotated[dict[str, Any] | None, BeforeValidator(_pattern), WithJsonSchema({"type": ["string", "object", "null"]})]
Start = Literal[True, "gaussian", "eva", "pissa", "pissa_niter_16", "olora", "corda", "lora_ga"]


class PeftSection(Section):
    """The settings of ``peft.LoraConfig``."""

    r: Count = 8
    """The rank of every module. With adalora, and with ``allocation.schedule: cubic``, the mean rank at the end."""
    lora_alpha: Count = 16
    """LoRA's alpha: what it adds is multiplied by alpha / r."""
    target_modules: Modules = "all-linear"
    """Which modules get LoRA: ``all-linear``, or a list of their names."""
    exclude_modules: list[str] | None = None
    """Which of them do not."""
    lora_dropout: Share = 0.0
    """Dropout on the input of the adapter."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(r) instead of alpha / r."""
    init_lora_weights: Start = True
    """How LoRA starts: ``true`` (B at zero, A as in PEFT), ``gaussian``, or one of PEFT's starts, see docs/reference/limits.md."""
    pattern: Pattern = None
    """A file that ``gatewise inspect --suggest`` wrote, for lora and dora: modules, ranks and alphas in place of ``r``,
    ``lora_alpha`` and ``target_modules``."""


class Lora(Method):
    """LoRA (Hu et al., arXiv 2106.09685), as PEFT has it."""

    files: tuple[str, ...] = ("ranks.png",)
    is_lora = True
    size_key: str | None = "peft.r"
    starts: tuple[Any, ...] = get_args(Start)
    peft: PeftSection
    _start: dict[str, tuple[Tensor, Tensor]] | None = None

    @property
    def scale(self) -> float | None:
        """Of all modules, unless a pattern says it of each."""
        return None if self.peft.pattern else self.peft.r ** (-0.5 if self.peft.use_rslora else -1)

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe)
        if self.peft.pattern:
            self.size_key = None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A start that needs a base model of the adapter's own, or more than LoRA has; ranks from a file, with others."""
        if self.peft.pattern and self.recipe.method not in ("lora", "dora"):
            yield (
                "peft.pattern",
                f"is given, but method {self.recipe.method} has ranks of its own: take lora or dora, or leave it out",
            )
        if self.peft.pattern and (self.peft.use_rslora or self.peft.init_lora_weights not in (True, "gaussian")):
            yield "peft.pattern", "is given with use_rslora or a start that has ranks of its own: leave one of the two out"
        if self.peft.init_lora_weights not in self.starts:
            known = ", ".join("true" if one is True else one for one in self.starts)
            yield (
                "peft.init_lora_weights",
                f"is {self.peft.init_lora_weights}, expected one of {known} with method {self.recipe.method}",
            )
        elif self.peft.init_lora_weights == "corda" and find_spec("attr") is None:
            yield "peft.init_lora_weights", "is corda, for which PEFT needs attrs: pip install attrs"

    @property
    def changes_base(self) -> bool:  # type: ignore[override]
        """Whether its start takes a part of the base weights."""
        return self.peft.init_lora_weights in CHANGE_BASE

    def settings(self, run: Run, base: PreTrainedModel) -> dict[str, Any]:
        """The arguments that all configurations of LoRA's kind take, but for rank and rank-stabilised scale.

        Raises:
            GatewiseError: a module that the base model does not have.
        """
        pattern = self.peft.pattern or {}
        targets = pattern.get("target_modules")
        if isinstance(targets, str):  # whole paths, see ``target_settings``
            targets = re.sub(r"\\(.)", r"\1", targets).split("|")
        _check_modules("peft.pattern", targets, base, self.recipe.model)
        _check_modules("peft.target_modules", self.peft.target_modules, base, self.recipe.model)
        _check_modules("peft.exclude_modules", self.peft.exclude_modules, base, self.recipe.model)
        whole = list(getattr(base, "trained_whole", ()))
        inside = tuple(f"{name}." for name in whole)
        linear = [path for path, module in base.named_modules() if isinstance(module, nn.Linear) and f"{path}.".startswith(inside)]
        return {
            "lora_alpha": self.peft.lora_alpha,
            "target_modules": self.peft.target_modules,
            "exclude_modules": [*(self.peft.exclude_modules or ()), *(linear if whole else ())] or None,
            "lora_dropout": self.peft.lora_dropout,
            "init_lora_weights": self.peft.init_lora_weights,
            **SETTINGS.get(str(self.peft.init_lora_weights), {}),
            "modules_to_save": whole or None,
            "task_type": run.task.task_type,
            **{key: value for key, value in pattern.items() if key != "r"},
        }

    @property
    def _rank(self) -> int:
        return int((self.peft.pattern or {}).get("r", self.peft.r))

    def config(self, run: Run, base: PreTrainedModel) -> LoraConfig:
        """Plain LoRA."""
        return LoraConfig(r=self._rank, use_rslora=self.peft.use_rslora, **self.settings(run, base))

    def saved_config(self, run: Run, base: PreTrainedModel) -> LoraConfig:
        """With its start beside it, where it is saved with that, see ``gatewise.adapters.starts``."""
        config = self.config(run, base)
        config.r, config.init_lora_weights = self._rank * (2 if self.changes_base else 1), True
        return config

    def resized(self, size: int) -> dict[str, Any]:
        """Alpha goes with the rank, so that the scale of B A stays."""
        more = size / self.peft.r
        return {
            "peft.r": size,
            "peft.lora_alpha": max(1, round(self.peft.lora_alpha * (more**0.5 if self.peft.use_rslora else more))),
        }

    def prepare(self, run: Run, base: PreTrainedModel, config: Any) -> None:
        """What a start looks at."""
        look_first(run, base, config)

    def adapt(self, run: Run, base: PreTrainedModel) -> PeftModel:
        """LoRA as the recipe starts it. The note of its checkpoints says on which weights they stand."""
        model = super().adapt(run, base)
        look_after(run, model)
        if self.changes_base:
            self._start, run.note[UNFINISHED_START] = ranks_of(model), self.peft.init_lora_weights
        return model

    def finish(self, run: Run, model: PeftModel) -> PeftModel:
        """The adapter of the base model as it is in its files."""
        if self._start is not None:
            back_on_base(model, self._start, run.fresh_base())
            del run.note[UNFINISHED_START]
        return model


class Dora(Lora):
    """DoRA (Liu et al., arXiv 2402.09353), as PEFT has it."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """8 bits."""
        yield from super().contradictions()
        if self.recipe.quantization == "int8":  # PEFT takes the norms of weights that bitsandbytes then no longer has
            yield "quantization", "is int8, with which PEFT's DoRA does not run: take nf4"

    def config(self, run: Run, base: PreTrainedModel) -> LoraConfig:
        """LoRA with magnitudes."""
        return LoraConfig(r=self._rank, use_rslora=self.peft.use_rslora, use_dora=True, **self.settings(run, base))


def _check_modules(key: str, names: Any, base: PreTrainedModel, model: str) -> None:
    """PEFT passes over a name that fits no module as long as another one does."""
    if names is None or names == "all-linear":
        return
    linear = {path for path, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for name in [names] if isinstance(names, str) else names:
        if not any(path == name or path.endswith(f".{name}") for path in linear):
            endings = sorted({path.rpartition(".")[2] for path in linear})
            raise GatewiseError(f"{key}: {name!r} is no linear module of {model}, expected 'all-linear' or of {', '.join(endings)}")
