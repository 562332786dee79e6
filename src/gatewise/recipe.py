"""The YAML recipe: what to train, on what, and how. Every key is checked before anything is loaded.

A recipe is one YAML file, read with a safe loader. An unknown key, a wrong type or a combination that makes no sense
is refused with the key's path, what was expected and, for a key that is not known, the nearest one that is.
``gatewise.run`` carries it out.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gatewise.errors import GatewiseError

Method = Literal["lora", "alora", "adalora", "dora"]
DATA_SUFFIXES = (".jsonl", ".json", ".csv")
PATH_KEYS = (("data", "train"), ("data", "dev"), ("data", "test"))


def _labels_as_text(value: Any) -> Any:
    """Labels such as 0 and 1 may be written as numbers; inside they are text, as the records' labels are."""
    if isinstance(value, dict):
        return {_label(key): word for key, word in value.items()}
    return [_label(item) for item in value] if isinstance(value, list) else value


def _label(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _modules(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        return value
    raise PydanticCustomError("expected", "expected 'all-linear' or a list of module names, got {given}", {"given": _given(value)})


def _span(value: Any) -> Any:
    """A length of training: a float counts epochs, an integer counts steps (and 1 is one epoch, as 1.0 is)."""
    if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value) and value > 0:
        return value
    raise PydanticCustomError(
        "expected",
        "expected a number above 0 (1.0 or 0.25: epochs; an integer above 1: steps), got {given}",
        {"given": _given(value)},
    )


def _initialisation(value: Any) -> Any:
    if value is True or value == "gaussian":
        return value
    raise PydanticCustomError("expected", "expected true or 'gaussian', got {given}", {"given": _given(value)})


Labels = Annotated[list[str], BeforeValidator(_labels_as_text), Field(min_length=2)]
LabelWords = Annotated[dict[str, str], BeforeValidator(_labels_as_text), Field(min_length=2)]
Modules = Annotated[Any, BeforeValidator(_modules)]
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
    """Where the rows come from: a JSONL, JSON or CSV file, ``sample:NAME``, or a Hugging Face ``datasets`` name."""

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
    """The rounds of ALoRA, see ``gatewise.RankAllocation``. Only with method alora."""

    score: Literal["ablation", "taylor", "sensitivity"] = "ablation"
    rounds: Count = 8
    prune_fraction: Fraction = 0.125
    first_round: Span = 1.0
    recover: Span = 0.25
    r_max: Count | None = None
    validation_rows: Count = 32
    score_options: dict[str, Any] = Field(default_factory=dict)


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


class TrainingSection(Section):
    """The training run. ``max_steps`` or ``epochs``; all other counts are in optimiser steps."""

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
    """A whole recipe. Paths in it are absolute once it was read by ``load_recipe``."""

    method: Method
    model: str
    task: Literal["causal", "classification"] = "causal"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataSection
    template: TemplateSection | None = None
    peft: PeftSection = PeftSection()
    allocation: AllocationSection | None = None
    adalora: AdaloraSection | None = None
    training: TrainingSection = TrainingSection()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        for path, problem in _contradictions(self):
            raise PydanticCustomError("combination", "{problem}", {"path": path, "problem": problem})
        return self

    def as_yaml(self) -> str:
        """The recipe with every default written out, as YAML that ``load_recipe`` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file. Relative data files, and a model given as a folder, are taken from the file's own folder.
        overrides: ``"a.b=c"`` settings in YAML syntax that replace or add keys. Their relative paths are taken from the
            working folder, where the one who types them is.

    Raises:
        GatewiseError: the file cannot be read, or a key is unknown, of a wrong type or at odds with another.
    """
    path = Path(path)
    tree = _read_yaml(path)
    _anchor_paths(tree, path.parent)
    given: list[tuple[tuple[str, ...], str]] = []
    for text in overrides:
        keys, part = _override(text)
        _anchor_paths(part, Path())
        _merge(tree, part, keys, text)
        given.append((keys, text))
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise GatewiseError("\n".join(_problems(error, path, given))) from None


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that are each fine and cannot be meant together."""
    training, method = recipe.training, recipe.method
    if recipe.allocation is not None and method != "alora":
        yield "allocation", f"is for method alora, but the method is {method}: remove the section, or set method: alora"
    if recipe.adalora is not None and method != "adalora":
        yield (
            "adalora",
            f"is for method adalora, but the method is {method}: remove the section, or set method: adalora",
        )
    if training.max_steps is not None and training.epochs is not None:
        yield "training.epochs", "cannot be given together with training.max_steps: keep the one that ends the run"
    if training.early_stopping_patience is not None and training.eval_every is None:
        yield "training.early_stopping_patience", "needs training.eval_every: it counts evaluations without progress"
    if training.load_best and training.eval_every is None:
        yield (
            "training.load_best",
            "needs training.eval_every: the best checkpoint is the one with the lowest loss on dev",
        )
    if training.load_best and training.save_every and training.save_every % (training.eval_every or 1):
        yield (
            "training.save_every",
            f"is {training.save_every}, expected a multiple of training.eval_every ({training.eval_every}), because "
            "training.load_best can only load a checkpoint that was evaluated",
        )
    if recipe.task == "classification" and recipe.template is not None:
        yield "template", "is for task causal: a classifier reads the row itself, so remove the section"
    if recipe.task == "classification" and recipe.dtype != "float32":
        yield (
            "dtype",
            f"is {recipe.dtype}, expected float32 with task classification, whose new head is trained in full",
        )
    allocation, adalora = recipe.allocation, recipe.adalora
    if allocation is not None and allocation.r_max is not None and allocation.r_max < recipe.peft.r:
        yield (
            "allocation.r_max",
            f"is {allocation.r_max}, expected at least peft.r ({recipe.peft.r}), the rank every module starts with",
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


# Reading YAML ---------------------------------------------------------------------------------------------------------


class _RecipeLoader(yaml.SafeLoader):
    """YAML as people expect it: 1e-4 is a number, only true and false are booleans, a key given twice is a fault."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float | bool) else id(key_node))
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where "1e-4" is text and "no" (a label, say) is a boolean.
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d[\d_]*\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_RecipeLoader)  # a SafeLoader


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GatewiseError(f"the recipe {path} does not exist: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise GatewiseError(f"the recipe {path} cannot be read: {reason}") from None
    try:
        tree = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise GatewiseError(f"{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise GatewiseError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise GatewiseError(f"{path}: expected keys such as 'method: alora' and 'model: ...', got {_given(tree)}")
    return tree


def _override(text: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """``"a.b=c"`` as its keys and the nested mapping it stands for."""
    name, equals, value = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise GatewiseError(f"--set {text}: expected KEY=VALUE with a dotted key, such as --set training.learning_rate=1e-4")
    try:
        tree: Any = _parse(value)
    except yaml.YAMLError:
        raise GatewiseError(f"--set {text}: the value is not valid YAML: quote it, as in --set 'template.prompt=\"...\"'") from None
    for key in reversed(keys):
        tree = {key: tree}
    return keys, tree


def _merge(tree: dict[str, Any], part: dict[str, Any], keys: tuple[str, ...], text: str) -> None:
    """Puts the one value of an override into the tree, making the sections on the way."""
    for depth, key in enumerate(keys[:-1]):
        part = part[key]
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise GatewiseError(
                f"--set {text}: {'.'.join(keys[: depth + 1])} is a single value ({_given(tree)}), so it has no keys"
            )
    tree[keys[-1]] = part[keys[-1]]


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths of a tree absolute. What is no path (a sample, a data set's or a model's name) stays."""
    data = tree.get("data")
    for section, key in PATH_KEYS:
        value = data.get(key) if section == "data" and isinstance(data, dict) else None
        if isinstance(value, str) and value.lower().endswith(DATA_SUFFIXES):
            data[key] = str((folder / Path(value).expanduser()).resolve())  # type: ignore[index]
    model = tree.get("model")
    if isinstance(model, str) and model and (model.startswith((".", "~", "/")) or (folder / model).is_dir()):
        tree["model"] = str((folder / Path(model).expanduser()).resolve())


# Refusals -------------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "expected an integer",
    "int_from_float": "expected an integer",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "list_type": "expected a list",
    "dict_type": "expected keys with values",
    "model_type": "expected a section with keys of its own",
    "model_attributes_type": "expected a section with keys of its own",
    "greater_than": "expected a number above {gt}",
    "greater_than_equal": "expected a number of at least {ge}",
    "less_than": "expected a number below {lt}",
    "less_than_equal": "expected a number of at most {le}",
    "too_short": "expected at least {min_length}",
}


def _problems(error: ValidationError, path: Path, overrides: Sequence[tuple[tuple[str, ...], str]]) -> list[str]:
    """One sentence for every fault, those of the file in the order of the schema."""
    lines = []
    for fault in error.errors(include_url=False):
        context = fault.get("ctx", {})
        keys = tuple(str(key) for key in fault["loc"] if key != "[key]")
        if fault["type"] == "combination":
            keys, text = tuple(context["path"].split(".")), f"{context['path']} {context['problem']}"
        elif fault["type"] == "extra_forbidden":
            text = _unknown_key(keys, fault["input"])
        elif fault["type"] == "missing":
            text = f"{'.'.join(keys)} is missing: {_missing(keys)}"
        elif fault["type"] == "literal_error":
            choices = [str(choice).strip("'\" ") for choice in re.findall(r"'([^']*)'", context["expected"])]
            got = f"{_given(fault['input'])}{_near(fault['input'], choices)}"
            text = f"{'.'.join(keys)}: expected {_either(choices)}, got {got}"
        elif fault["type"] in _EXPECTED:
            text = f"{'.'.join(keys)}: {_EXPECTED[fault['type']].format(**context)}, got {_given(fault['input'])}"
        else:
            text = f"{'.'.join(keys)}: {fault['msg']}"
        source = next((f"--set {given}" for at, given in overrides if at == keys[: len(at)]), str(path))
        lines.append(f"{source}: {text}")
    return lines


def _unknown_key(keys: tuple[str, ...], value: Any) -> str:
    parent, key = ".".join(keys[:-1]), keys[-1]
    everything = list(_known_keys(Recipe))
    siblings = [known.rpartition(".")[2] for known in everything if known.rpartition(".")[0] == parent]
    known = f"; known here: {', '.join(siblings)}"
    near = [".".join((*keys[:-1], word)) for word in difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)]
    # A key in the wrong section is as common as a misspelt one.
    near = near or [path for path in everything if path.rpartition(".")[2] == key]
    if near:
        known = ""
    else:
        near = [".".join((*keys[:-1], word)) for word in difflib.get_close_matches(key, siblings, n=1, cutoff=0.3)]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{'.'.join(keys)} is not a known key (given {_given(value)}){known}{hint}"


def _known_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _known_keys(kind, f"{prefix}{name}.")


def _missing(keys: tuple[str, ...]) -> str:
    return {
        ("method",): "expected lora, alora, adalora or dora",
        ("model",): "expected an embedded model such as smollm2-135m-instruct, a folder or a hub name",
        ("data",): "expected a section with train and dev",
        ("data", "train"): "expected a .jsonl, .json or .csv file, sample:NAME or a data set's name",
        ("data", "dev"): "expected a .jsonl, .json or .csv file, sample:NAME or a data set's name, to measure on",
        ("template", "prompt"): "expected text with the row's fields in braces, such as 'Review: {text}'",
    }.get(keys, "expected a value")


def _near(value: Any, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def _given(value: Any) -> str:
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
