"""The recipe: what to train, on what, and how. ``gatewise.runs.run.train`` carries it out.

First its sections with all keys and defaults, then keys that contradict each other. Every key is checked before anything is loaded.
``gatewise.runs.recipe_file`` reads and writes recipes as YAML files.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from gatewise.allocation import Schedule, Unit
from gatewise.allocation.scores import DEFAULT, NAMES
from gatewise.checks import is_number, is_whole
from gatewise.models.device import DEVICES, EXPECTED

Method = Literal["lora", "alora", "pi-lora", "milora", "adalora", "dora", "spt", "prompt-tuning", "prefix-tuning"]
ALLOCATING = ("alora", "pi-lora")
"""The methods with an ``allocation`` section."""


PROMPTING = ("spt", "prompt-tuning", "prefix-tuning")
"""The methods with a ``prompts`` section and no ``peft`` section: they tune prompts and leave the weights alone."""


FIXED_CHOICES = ("first", "last", "spread", "random")
"""What ``prompts.prompt_layers`` may be beside a list of layers, see ``gatewise.runs.build.fixed_layers``."""


def given(value: Any) -> str:
    """A value as the user would recognise it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57] + '...'!r}"
    if isinstance(value, dict):
        return f"a section with {', '.join(map(str, value))}" if value else "an empty section"
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of {len(value)}"
    return str(value)


def _labels_as_text(value: Any) -> Any:
    """Labels such as 0 and 1 may be written as numbers; inside they are text, as the records' labels are."""
    if isinstance(value, dict):
        return {_label(key): word for key, word in value.items()}
    return [_label(item) for item in value] if isinstance(value, list) else value


def _label(value: Any) -> Any:
    return str(value) if is_whole(value) else value


def _modules(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        return value
    raise PydanticCustomError("expected", "expected 'all-linear' or a list of module names, got {given}", {"given": given(value)})


def _span(value: Any) -> Any:
    """A length of training: a float counts epochs, an integer counts steps (and 1 is one epoch, as 1.0 is)."""
    if is_number(value) and math.isfinite(value) and value > 0:
        return value
    raise PydanticCustomError(
        "expected",
        "expected a number above 0 (1.0 or 0.25: epochs; an integer above 1: steps), got {given}",
        {"given": given(value)},
    )


def _initialisation(value: Any) -> Any:
    if value is True or value == "gaussian":
        return value
    raise PydanticCustomError("expected", "expected true or 'gaussian', got {given}", {"given": given(value)})


def _score(value: Any) -> Any:
    if isinstance(value, str) and value in NAMES:
        return value
    raise PydanticCustomError("literal_error", "{expected}", {"expected": ", ".join(f"'{name}'" for name in NAMES)})


def _device(value: Any) -> Any:
    if isinstance(value, str) and DEVICES.fullmatch(value):
        return value
    raise PydanticCustomError("expected", "{expected}, got {given}", {"expected": EXPECTED, "given": given(value)})


def _prompt_layers(value: Any) -> Any:
    numbers = isinstance(value, list) and bool(value) and all(is_whole(layer) and layer >= 0 for layer in value)
    if value is None or (isinstance(value, str) and value in FIXED_CHOICES):
        return value
    if numbers and len(set(value)) == len(value):
        return sorted(value)
    raise PydanticCustomError(
        "expected",
        "expected a list of different layer numbers from 0, such as [3, 7], or first, last, spread or random, got {given}",
        {"given": given(value)},
    )


Labels = Annotated[list[str], BeforeValidator(_labels_as_text), Field(min_length=2)]
LabelWords = Annotated[dict[str, str], BeforeValidator(_labels_as_text), Field(min_length=2)]
Modules = Annotated[Any, BeforeValidator(_modules)]
Score = Annotated[str, BeforeValidator(_score)]
Device = Annotated[str, BeforeValidator(_device)]
Span = Annotated[Any, BeforeValidator(_span)]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """One mapping of the recipe: no unknown keys, no silent conversions, not changed once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataSection(Section):
    """Where the rows come from: a JSONL, JSON or CSV file, ``sample:NAME``, or a Hugging Face ``datasets`` name.

    ``max_new_tokens``: of an answer that the model writes where it is measured, see ``gatewise.tasks.evaluate``.
    """

    train: str
    dev: str
    test: str | None = None
    train_split: str | None = None
    dev_split: str | None = None
    test_split: str | None = None
    limit_train: Count | None = None
    limit_dev: Count | None = None
    labels: Labels | None = None
    max_length: Annotated[int, Field(ge=8)] = 512
    max_new_tokens: Count | None = None


class TemplateSection(Section):
    """How a row becomes a prompt: ``{field}`` stands for a field of the row; ``labels`` has a word for each label."""

    prompt: str
    labels: LabelWords | None = None


class PeftSection(Section):
    """The settings of ``peft.LoraConfig``. With adalora, ``r`` is the mean rank at the end."""

    r: Count = 8
    lora_alpha: Count = 16
    target_modules: Modules = "all-linear"
    exclude_modules: list[str] | None = None
    lora_dropout: Share = 0.0
    use_rslora: bool = False
    init_lora_weights: Annotated[Any, BeforeValidator(_initialisation)] = True


class AllocationSection(Section):
    """The rounds of ALoRA and PI-LoRA, see ``gatewise.RankAllocation``. Only with method alora or pi-lora.

    ``score`` names a file in ``gatewise/allocation/scores``. With pi-lora, ``score`` left out is path_integral and
    ``module_pruning`` left out is true, but not with ``budget: modules``. With ``schedule: cubic`` every module starts with
    ``init_r`` ranks (left out: one and a half times ``peft.r``), and the adapter ends with the parameters (or ranks, see
    ``budget``) that ``peft.r`` everywhere would have; ``prune_fraction`` is not used. With ``budget: modules`` all start with
    ``peft.r`` ranks, and ``target_modules`` modules keep them.
    """

    score: Score = DEFAULT
    schedule: Schedule = "constant-budget"
    budget: Unit = "parameters"
    target_modules: Count | None = None
    rounds: Count = 8
    prune_fraction: Fraction = 0.125
    first_round: Span = 1.0
    recover: Span = 0.25
    r_max: Count | None = None
    init_r: Count | None = None
    smoothing: Share = 0.0
    module_pruning: bool = False
    grace_rounds: Annotated[int, Field(ge=0)] = 0
    validation_rows: Count = 32
    score_options: dict[str, Any] = Field(default_factory=dict)


class RoutingSection(Section):
    """The routers of MiLoRA, see ``gatewise.RoutedLoraConfig``. Only with method milora.

    The coefficients of the rational activation learn on ``validation_rows`` rows set aside of the training data, one step of rate
    ``activation_learning_rate`` after every ``activation_every`` steps of the rest (``gatewise.BilevelTrainer``); with 0 rows they
    learn with the rest.
    """

    top_k: Count = 3
    pooler: Literal["attention", "mean", "max", "last"] = "attention"
    activation: Literal["rational", "gelu", "relu", "identity"] = "rational"
    balance_weight: NotNegative = 1e-2
    normalize_gates: bool = True
    normalize_states: bool = True
    center_states: bool = True
    adapt: Literal["always", "after_prompt"] = "always"
    validation_rows: Annotated[int, Field(ge=0)] = 64
    activation_learning_rate: Positive = 1e-6
    activation_every: Count = 4

    @property
    def two_levels(self) -> bool:
        """Whether the activation learns on rows of its own."""
        return self.activation == "rational" and self.validation_rows > 0


class AdaloraSection(Section):
    """AdaLoRA's schedule, see ``peft.AdaLoraConfig``; ``total_step`` is the run's. Only with method adalora.

    ``init_r``, ``tinit`` and ``tfinal`` left out are derived: one and a half times ``peft.r``, a tenth and three
    tenths of the run.
    """

    init_r: Count | None = None
    tinit: Annotated[int, Field(ge=0)] | None = None
    tfinal: Annotated[int, Field(ge=0)] | None = None
    deltaT: Count = 1  # noqa: N815 (PEFT's name)
    beta1: Fraction = 0.85
    beta2: Fraction = 0.85
    orth_reg_weight: NotNegative = 0.5


class PromptsSection(Section):
    """The prompts of SPT, see ``gatewise.SelectivePromptConfig``, of prompt tuning, or of prefix tuning.

    ``prompt_layers`` left out is searched; it is a list of layers from 0, or with ``keep`` a fixed choice of so many layers. Prompt
    tuning has only ``num_prompt_tokens`` and ``init`` (token embeddings drawn from the vocabulary, or random numbers), prefix
    tuning only ``num_prompt_tokens``; the rest is SPT's.
    """

    num_prompt_tokens: Count = 10
    bottleneck: Count = 64
    prompt_layers: Annotated[Any, BeforeValidator(_prompt_layers)] = None
    keep: Count | None = None
    tau: Annotated[float, Field(gt=0, le=1)] = 1.0
    balanced: bool | None = None
    phm: Count | None = None
    activation: Literal["gelu", "relu", "tanh", "identity"] = "gelu"
    normalize_states: bool = True
    init: Literal["vocabulary", "random"] = "vocabulary"

    def keys_of(self, method: str) -> set[str]:
        """The keys that mean something for a method."""
        if method == "spt":
            return set(type(self).model_fields) - {"init"}
        return {"num_prompt_tokens", "init"} if method == "prompt-tuning" else {"num_prompt_tokens"}


class SearchSection(Section):
    """SPT-DARTS, the search for the layers that take a new prompt. Only with method spt and without ``prompts.prompt_layers``.

    ``max_steps`` or ``epochs`` (of the half of the training data that the weights learn on), or as many steps as the training that
    follows. ``keep`` is K, how many layers are kept, and ``choose`` says which: those with the largest gates, or those with the
    lowest mean loss when only K gates are open (``gatewise.prompts.search``). ``consistency`` is the weight λ of the distance
    between two passes, 0 for one pass without drops; ``drop`` the probability that a pass leaves a gate out.
    """

    keep: Count = 4
    choose: Literal["gates", "loss"] = "gates"
    max_steps: Count | None = None
    epochs: Positive | None = None
    gate_learning_rate: Positive = 1e-2
    reparameterise: bool = True
    consistency: NotNegative = 1.0
    drop: Fraction = 0.5


class PointingSection(Section):
    """The heads of a pointing model, see ``gatewise_mdt.pointing.heads``. Only with task text2mdt.

    ``swapped``: copies of each training passage whose phrases have changed places with those of others. ``width`` is that of the
    heads, ``dropout`` theirs in training. ``longest``: units (words, doses, Chinese characters) of the longest phrase that can be
    pointed at.
    """

    swapped: Annotated[int, Field(ge=0)] = 3
    width: Annotated[int, Field(gt=0, multiple_of=4)] = 128
    dropout: Share = 0.2
    longest: Count = 24


class LaunchSection(Section):
    """In how many processes the run trains, and how they share the model. Not for a run that another launcher started.

    ``strategy``: ddp has the whole model in every process; fsdp2 shards the base model; zero2 and zero3 are DeepSpeed's, which
    shard the optimiser's state, zero3 the base model too. Other keys are settings of ``accelerate launch``, by its own names.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    processes: Count = 1
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"


class TrainingSection(Section):
    """The training run. ``max_steps`` or ``epochs``; all other counts are in optimiser steps.

    ``batch_size`` is of all processes together: the same recipe trains the same adapter, whatever the number of processes.
    """

    max_steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 8
    eval_batch_size: Count = 16
    gradient_accumulation: Count = 1
    learning_rate: Positive = 2e-4
    warmup_ratio: Share = 0.06
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    eval_every: Count | None = None
    save_every: Count | None = None
    early_stopping_patience: Count | None = None
    load_best: bool = False
    log_every: Count = 10
    group_by_length: bool = False

    def total_steps(self, rows: int) -> int:
        """Optimiser steps of the whole run over ``rows`` training rows."""
        return self.max_steps or math.ceil((self.epochs or 3.0) * self.steps_per_epoch(rows))

    def steps_per_epoch(self, rows: int) -> int:
        """Optimiser steps of one pass over ``rows`` training rows."""
        return max(1, math.ceil(math.ceil(rows / self.batch_size) / self.gradient_accumulation))

    def checkpoint_steps(self, total: int) -> int:
        """Steps between checkpoints: ``save_every``, or with ``load_best`` ``eval_every``, or a fifth of the run."""
        return self.save_every or (self.eval_every if self.load_best else None) or max(1, math.ceil(total / 5))


class Recipe(Section):
    """A whole recipe. Paths in it are absolute once it was read by ``load_recipe``.

    ``dtype`` is that of the base model's weights; auto is bfloat16 where the device computes in it by itself, else float32, and
    float32 for classification. ``device`` is auto, cpu, cuda, cuda:1 or mps.
    """

    method: Method
    model: str
    task: Literal["causal", "classification", "text2mdt"] = "causal"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Device = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataSection
    template: TemplateSection | None = None
    peft: PeftSection = PeftSection()
    allocation: AllocationSection | None = None
    adalora: AdaloraSection | None = None
    routing: RoutingSection | None = None
    prompts: PromptsSection | None = None
    search: SearchSection | None = None
    pointing: PointingSection | None = None
    launch: LaunchSection | None = None
    training: TrainingSection = TrainingSection()

    @property
    def searched(self) -> bool:
        """Whether the layers with a prompt are to be searched before they are trained."""
        return self.method == "spt" and (self.prompts or PromptsSection()).prompt_layers is None

    def search_steps(self, rows: int) -> int:
        """Optimiser steps of the search over ``rows`` training rows, of which one half is the weights'."""
        section = self.search or SearchSection()
        if section.epochs is not None:
            return math.ceil(section.epochs * self.training.steps_per_epoch((rows + 1) // 2))
        return section.max_steps or self.training.total_steps(rows)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("method") in PROMPTING and tree.get("peft", 0) is None:
            return {key: value for key, value in tree.items() if key != "peft"}
        if isinstance(tree, dict) and tree.get("method") == "pi-lora" and isinstance(tree.get("allocation", {}), dict | None):
            section = tree.get("allocation") or {}
            own = {"score": "path_integral", "module_pruning": section.get("budget") != "modules"}
            return {**tree, "allocation": {**own, **section}}
        return tree

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        for path, problem in _contradictions(self):
            raise PydanticCustomError("combination", "{problem}", {"path": path, "problem": problem})
        return self

    def as_tree(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain values that make an equal recipe."""
        tree = self.model_dump(mode="json")
        if self.method in PROMPTING:
            tree["peft"] = None
        if self.prompts is not None:
            tree["prompts"] = {key: value for key, value in tree["prompts"].items() if key in self.prompts.keys_of(self.method)}
        return tree


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that are each fine and cannot be meant together."""
    training, method = recipe.training, recipe.method
    if recipe.allocation is not None and method not in ALLOCATING:
        yield (
            "allocation",
            f"is for methods alora and pi-lora, but the method is {method}: remove the section, or set method: alora",
        )
    if recipe.adalora is not None and method != "adalora":
        yield (
            "adalora",
            f"is for method adalora, but the method is {method}: remove the section, or set method: adalora",
        )
    if recipe.routing is not None and method != "milora":
        yield (
            "routing",
            f"is for method milora, but the method is {method}: remove the section, or set method: milora",
        )
    yield from _contradictions_of_prompts(recipe)
    if training.max_steps is not None and training.epochs is not None:
        yield "training.epochs", "cannot be given together with training.max_steps: keep the one that ends the run"
    if training.early_stopping_patience is not None and training.eval_every is None:
        yield "training.early_stopping_patience", "needs training.eval_every: it counts evaluations without progress"
    if training.load_best and training.eval_every is None:
        yield (
            "training.load_best",
            "needs training.eval_every: the best checkpoint is the one with the lowest loss on dev",
        )
    if training.load_best and training.save_every and training.eval_every and training.save_every != training.eval_every:
        yield (
            "training.save_every",
            f"is {training.save_every}, expected training.eval_every ({training.eval_every}) or nothing: training.load_best can "
            "only load a checkpoint that was evaluated, and the best evaluation must have one",
        )
    if recipe.task != "causal" and recipe.template is not None:
        who = "a classifier reads the row" if recipe.task == "classification" else "a pointing model reads the text"
        yield "template", f"is for task causal: {who} itself, so remove the section"
    if recipe.task != "causal" and recipe.data.max_new_tokens is not None:
        yield "data.max_new_tokens", f"is for answers that are written, of which task {recipe.task} has none: remove the key"
    yield from _contradictions_of_pointing(recipe)
    if recipe.task == "classification" and recipe.dtype == "bfloat16":
        yield (
            "dtype",
            "is bfloat16, expected auto or float32 with task classification, whose new head is trained in full",
        )
    allocation, adalora = recipe.allocation, recipe.adalora
    if allocation is not None and allocation.r_max is not None and allocation.r_max < recipe.peft.r:
        yield (
            "allocation.r_max",
            f"is {allocation.r_max}, expected at least peft.r ({recipe.peft.r}), the rank every module starts with",
        )
    if allocation is not None and allocation.schedule == "cubic" and allocation.r_max is not None:
        yield "allocation.r_max", "is for schedule constant-budget: a cubic budget starts with init_r and only comes down"
    if allocation is not None and allocation.schedule == "cubic" and allocation.grace_rounds:
        yield "allocation.grace_rounds", "is for ranks that grow, and with schedule cubic none do: remove the key"
    if allocation is not None:
        yield from _contradictions_of_budgets(allocation)
    if allocation is not None and allocation.schedule != "cubic" and allocation.init_r is not None:
        yield "allocation.init_r", f"is for schedule cubic, but the schedule is {allocation.schedule}: remove the key"
    if allocation is not None and allocation.init_r is not None and allocation.init_r <= recipe.peft.r:
        yield (
            "allocation.init_r",
            f"is {allocation.init_r}, expected more than peft.r ({recipe.peft.r}), the mean rank to come down to",
        )
    if adalora is not None and adalora.init_r is not None and adalora.init_r <= recipe.peft.r:
        yield (
            "adalora.init_r",
            f"is {adalora.init_r}, expected more than peft.r ({recipe.peft.r}), the mean rank to come down to",
        )
    if method == "adalora" and recipe.peft.use_rslora:
        yield "peft.use_rslora", "is true, but AdaLoRA scales by lora_alpha / init_r: remove the key"
    if method == "adalora" and recipe.peft.init_lora_weights is not True:
        yield "peft.init_lora_weights", "is for the other methods: AdaLoRA has its own start, so remove the key"


def _contradictions_of_pointing(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.task != "text2mdt":
        if recipe.pointing is not None:
            yield "pointing", f"is for task text2mdt, but the task is {recipe.task}: remove the section, or set task: text2mdt"
        return
    if recipe.method in ("prompt-tuning", "prefix-tuning"):
        yield (
            "method",
            f"is {recipe.method}, whose prompts stand before the text, where a pointing model would point at them: take lora, "
            "alora, pi-lora, milora, dora, adalora or spt",
        )
    if recipe.searched and (recipe.search or SearchSection()).consistency:
        yield (
            "search.consistency",
            "compares the classes or words that two passes predict, of which a pointing model has none: set it to 0, or name the "
            "layers in prompts.prompt_layers",
        )
    for key in ("labels", "train_split", "dev_split", "test_split"):
        if getattr(recipe.data, key) is not None:
            yield f"data.{key}", "is for rows of other tasks: texts with their trees are read from files, so remove the key"


def _contradictions_of_budgets(allocation: AllocationSection) -> Iterator[tuple[str, str]]:
    if allocation.budget != "modules":
        if allocation.target_modules is not None:
            yield "allocation.target_modules", f"is for budget modules, but the budget is {allocation.budget}: remove the key"
        return
    if allocation.schedule != "cubic":
        yield (
            "allocation.budget",
            f"is modules, which only come down, but the schedule is {allocation.schedule}: set schedule: cubic",
        )
    if allocation.module_pruning:
        yield "allocation.module_pruning", "is for budgets that take single ranks: budget modules takes whole modules anyway"
    if allocation.target_modules is None:
        yield "allocation.target_modules", "is needed with budget modules: how many modules keep their ranks"
    if allocation.init_r is not None:
        yield (
            "allocation.init_r",
            "is for budgets that take single ranks: with budget modules all start with peft.r, so remove the key",
        )


def _contradictions_of_prompts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    method, prompts, search = recipe.method, recipe.prompts, recipe.search
    if prompts is not None and method not in PROMPTING:
        yield (
            "prompts",
            f"is for methods spt, prompt-tuning and prefix-tuning, but the method is {method}: remove it, or set method: spt",
        )
        return
    if method in PROMPTING and "peft" in recipe.model_fields_set:
        yield (
            "peft",
            f"is for the methods that train LoRA, but the method is {method}: remove the section, prompts has its settings",
        )
    if search is not None and method != "spt":
        yield "search", f"is for method spt, but the method is {method}: remove the section, or set method: spt"
    if search is not None and search.choose == "loss" and not search.consistency:
        yield "search.choose", "is loss, which needs subsets of gates that were trained: set search.consistency above 0"
    if method == "prefix-tuning" and recipe.training.gradient_checkpointing:
        yield (
            "training.gradient_checkpointing",
            "is true, but prefix tuning keeps its prompts in the key-value cache, which recomputing would fill twice: remove it",
        )
    prompts = prompts or PromptsSection()
    for key in sorted(prompts.model_fields_set - prompts.keys_of(method)) if method in PROMPTING else ():
        owner = "prompt-tuning" if key == "init" else "spt"
        yield f"prompts.{key}", f"is for method {owner}, but the method is {method}: remove the key"
    if prompts.phm is not None and prompts.bottleneck % prompts.phm:
        yield "prompts.phm", f"is {prompts.phm}, expected a divisor of prompts.bottleneck ({prompts.bottleneck})"
    layers = prompts.prompt_layers
    if isinstance(layers, str) and prompts.keep is None:
        yield "prompts.keep", f"is missing: with prompt_layers: {layers} say how many layers take a prompt, such as keep: 4"
    if prompts.keep is not None and not isinstance(layers, str):
        hint = "search.keep says how many layers a search keeps" if layers is None else "the list says which layers take a prompt"
        yield "prompts.keep", f"is for prompt_layers: {', '.join(FIXED_CHOICES)}; remove the key, {hint}"
    if search is not None and layers is not None:
        yield "search", "goes without prompts.prompt_layers, which says already which layers take a prompt: remove one of the two"
    if search is not None and search.max_steps is not None and search.epochs is not None:
        yield "search.epochs", "cannot be given together with search.max_steps: keep the one that ends the search"
