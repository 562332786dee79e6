"""The recipe: what to train, on what, and how. Read from a YAML file with the changes of ``--set``, and written to one.

The sections that every recipe has are here. The others are those of its method and its task, see ``gatewise.parts``. Every key is
checked before anything is loaded. ``gatewise.runs.run.train`` carries a recipe out.
"""

import difflib
import io
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError, create_model
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

from gatewise.errors import GatewiseError, reason_of
from gatewise.models.device import DEVICES, Quantization
from gatewise.parts import DEFAULT_TASK, METHODS, TASKS, Count, DataSection, Method, NotNegative, Positive, Section, Share, Task

# The sections ---------------------------------------------------------------------------------------------------------


class LaunchSection(Section):
    """In how many processes the run trains, and how they share the model. Not for a run that another launcher started.

    Other keys are settings of ``accelerate launch``, by its own names.
    """

    model_config = ConfigDict(extra="allow")

    processes: Count = 1
    """How many processes, one a GPU where there are GPUs."""
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    """``ddp`` has the whole model in every process; ``fsdp2`` shards the base model; ``zero2`` and ``zero3`` are DeepSpeed's, which
    shard the optimiser's state, ``zero3`` the base model too."""


Reporter = Literal["tensorboard", "wandb", "mlflow", "trackio"]
TorchOptimizer = Literal["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"]
BitsAndBytesOptimizer = Literal[
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
]  # fmt: skip


class TrainingSection(Section):
    """The training run. Counts are in optimiser steps."""

    max_steps: Count | None = None
    """How many steps, in place of ``epochs``."""
    epochs: Positive | None = None
    """How many passes over the rows. Left out, with ``max_steps`` too: 3."""
    batch_size: Count = 8
    """Rows of a batch, of all processes together: the same recipe trains the same adapter, whatever their number, but that
    several fill the last batch of an epoch with rows of its beginning."""
    eval_batch_size: Count = 16
    """Rows of a batch where nothing is trained."""
    gradient_accumulation: Count = 1
    """Batches of one step."""
    optim: Literal[TorchOptimizer, "adafactor", BitsAndBytesOptimizer] = "adamw_torch_fused"
    """A name of Transformers' ``OptimizerNames``, of those in which ranks can be moved."""
    learning_rate: Positive = 2e-4
    """The highest rate, after ``warmup_ratio``. Look for it first: LoRA's best was 1e-3 to 5e-3 for models of 22 to 135 million
    parameters (docs/reports/comparison.md)."""
    lora_plus_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """LoRA's B learns so many times faster than its A (LoRA+, Hayou et al., arXiv 2402.12354). Left out: as fast."""
    warmup_ratio: Share = 0.06
    """Share of the steps in which the learning rate rises."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How it falls after that; to zero with ``linear`` and ``cosine``. ``constant`` begins at the full rate, without
    ``warmup_ratio``."""
    weight_decay: NotNegative = 0.0
    """Of the trained weights."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are clipped to this norm; 0: not at all."""
    bf16: bool = False
    """Compute in bfloat16 (autocast) where the weights are float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    eval_every: Count | None = None
    """Steps between measurements on dev while it trains. Left out: none."""
    save_every: Count | None = None
    """Steps between checkpoints, of which the last two are kept; with ``load_best`` or ``early_stopping_patience`` the best and the
    last. Left out: a fifth of the run."""
    early_stopping_patience: Count | None = None
    """Stop after so many measurements without a new best one (``best_by``). Left out: never."""
    load_best: bool = False
    """Keep the adapter that measured best (``best_by``), not the last one."""
    eval_metric: bool = True
    """An evaluation on dev also measures what the task is measured by (accuracy, BLEU, ...), not the loss alone."""
    best_by: str = "loss"
    """What load_best and early_stopping_patience go by: loss, or a metric of the task such as accuracy."""
    log_every: Count = 10
    """Steps between two lines of the log."""
    report_to: Reporter | list[Reporter] = Field(default_factory=list)
    """Where losses, metrics and rounds are shown while the run trains: packages to install. The run has its folder's name there,
    and TensorBoard's files are in that folder."""
    group_by_length: bool = False
    """Put rows of similar length into a batch: less padding, faster."""

    @property
    def reporters(self) -> list[str]:
        """``report_to`` as a list."""
        return [self.report_to] if isinstance(self.report_to, str) else [*self.report_to]

    def total_steps(self, rows: int) -> int:
        """Optimiser steps of the whole run over ``rows`` training rows."""
        return self.max_steps or math.ceil((self.epochs or 3.0) * self.steps_per_epoch(rows))

    def steps_per_epoch(self, rows: int) -> int:
        """Optimiser steps of one pass over ``rows`` training rows."""
        return max(1, math.ceil(math.ceil(rows / self.batch_size) / self.gradient_accumulation))

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Keys that are each fine and cannot be meant together."""
        if self.max_steps is not None and self.epochs is not None:
            yield "training.epochs", "cannot be given together with training.max_steps: keep the one that ends the run"
        if self.eval_every is None and (self.load_best or self.early_stopping_patience is not None):
            key = "load_best" if self.load_best else "early_stopping_patience"
            yield f"training.{key}", "needs training.eval_every, the steps between two evaluations on dev"
        if self.best_by != "loss" and not self.eval_metric:
            yield (
                "training.best_by",
                f"is {self.best_by}, but training.eval_metric is false, which measures the loss alone: leave one out",
            )
        if self.best_by != "loss" and not self.load_best and self.early_stopping_patience is None:
            yield (
                "training.best_by",
                f"is {self.best_by}, which nothing goes by: give training.load_best or early_stopping_patience too",
            )
        if self.load_best and self.save_every not in (None, self.eval_every):
            yield (
                "training.save_every",
                f"is {self.save_every}, expected training.eval_every ({self.eval_every}) or nothing: training.load_best can only "
                "load a checkpoint that was evaluated, and the best evaluation must have one",
            )
        if self.optim in get_args(BitsAndBytesOptimizer) and find_spec("bitsandbytes") is None:
            yield "training.optim", f"is {self.optim}, which needs bitsandbytes: pip install 'gatewise[quant]'"


class Recipe(Section):
    """What every recipe has. Paths in it are absolute once it was read by ``load_recipe``."""

    method: str
    """How the model is tuned."""
    model: str
    """The base model: an embedded one (``smollm2-135m-instruct``), a folder, or a hub id."""
    task: str = DEFAULT_TASK
    """What a row is."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the base model's weights; ``auto`` is bfloat16 where the device computes in it by itself, else float32. The
    adapter is in float32. Other commands go by the adapter's recipe."""
    quantization: Quantization | None = None
    """Keeps the weights of the base's linear layers in 4 bits (``nf4``) or 8 (``int8``), by bitsandbytes; they compute in
    ``dtype``. Left out: not."""
    device: Annotated[str, Field(pattern=DEVICES)] = "auto"
    """Where to train: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything that is drawn."""
    push_to_hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Where the finished adapter is uploaded on the Hugging Face Hub: NAME/REPOSITORY. Log in before, with ``hf auth login``. If
    the upload fails, the command that repeats it is printed."""
    hub_private: bool = True
    """Whether that repository, where it is new, is for its owner alone."""
    data: DataSection
    launch: LaunchSection = LaunchSection()
    training: TrainingSection = TrainingSection()

    def parts(self) -> tuple[Task, Method]:
        """The recipe's task and method, for one run."""
        return TASKS[self.task](self), METHODS[self.method](self)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """What does not go together in the whole recipe."""
        task, method = self.parts()
        yield from self.training.contradictions()
        if self.quantization and not task.quantises:
            yield "quantization", f"is {self.quantization}, but task {self.task} trains on the weights as they are: remove the key"
        if self.quantization and find_spec("bitsandbytes") is None:
            yield "quantization", f"is {self.quantization}, which needs bitsandbytes: pip install 'gatewise[quant]'"
        if self.quantization and method.changes_base:
            yield "quantization", f"is {self.quantization}, but peft.init_lora_weights changes the base's weights: leave one out"
        if self.training.lora_plus_ratio is not None and not method.is_lora:
            yield "training.lora_plus_ratio", f"is for LoRA, which method {self.method} is not: remove the key"
        for part in (task, method):
            yield from part.contradictions()


@lru_cache
def recipe_class(method: str, task: str) -> type[Recipe]:
    """The class of recipes with this method and this task.

    Raises:
        GatewiseError: one that there is not.
    """
    tables: dict[str, tuple[str, Mapping[str, Any]]] = {"method": (method, METHODS), "task": (task, TASKS)}
    for key, (name, table) in tables.items():
        if name not in table:
            near = _did_you_mean(name, table, "")
            raise GatewiseError(f"{key} is {reprlib.repr(name)}, expected one of {', '.join(table)}{near}")
    fields: dict[str, Any] = {}
    for name, kind in {**TASKS[task].sections(), **METHODS[method].sections()}.items():
        needed = any(one.is_required() for one in kind.model_fields.values())
        fields[name] = (kind, ... if needed else kind())
    return create_model("Recipe", __base__=Recipe, **fields)


def checked(tree: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """A recipe from nested mappings. A key of it that is None has its default.

    Args:
        source: where it comes from, for errors.

    Raises:
        GatewiseError: a key is unknown, of a wrong type or at odds with another. One line for each.
    """
    try:
        recipe = _validated(tree)
        for key, problem in recipe.contradictions():
            raise GatewiseError(f"{key} {problem}")
    except GatewiseError as error:
        raise GatewiseError(f"{source}: {error}") from None
    except ValidationError as error:
        raise GatewiseError("\n".join(f"{source}: {_problem(fault, tree)}" for fault in error.errors())) from None
    return recipe


def _class_of(tree: Mapping[str, Any]) -> type[Recipe]:
    method, task = tree.get("method"), tree.get("task")
    if method is None:
        raise GatewiseError(f"method is missing, expected one of {', '.join(METHODS)}")
    return recipe_class(str(method), DEFAULT_TASK if task is None else str(task))


def _validated(tree: Mapping[str, Any]) -> Recipe:
    kind = _class_of(tree)
    return kind.model_validate({key: value for key, value in tree.items() if value is not None or key not in kind.model_fields})


def _problem(fault: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    """One sentence about a fault that pydantic found."""
    *sections, key = (str(part) for part in fault["loc"])
    name = ".".join((*sections, key))
    if fault["type"] == "extra_forbidden":
        kind: Any = _class_of(tree)
        for section in sections:
            kind = kind.model_fields[section].annotation
        near = _did_you_mean(key, kind.model_fields, f"; known here: {', '.join(kind.model_fields)}")
        return f"{name} is not a known key (given {reprlib.repr(fault['input'])}){near}"
    if fault["type"] == "missing":
        return f"{name} is missing"
    return f"{name}: {fault['msg'].removeprefix('Value error, ')}, got {reprlib.repr(fault['input'])}"


def _did_you_mean(word: str, known: Mapping[str, Any], otherwise: str) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else otherwise


# Files and the changes of --set ---------------------------------------------------------------------------------------

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_DATA_KEYS: list[tuple[str, ...]] = [("data", "train"), ("data", "dev"), ("data", "test")]
_PATTERN_KEY = ("peft", "pattern")
_OTHER_END = {"max_steps": "epochs", "epochs": "max_steps"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe. A section without keys has its defaults.

    Args:
        path: the YAML file. Relative data files, a pattern's, and a model given as a folder are taken from the file's own folder.
        overrides: ``"a.b=c"`` settings in YAML syntax that replace or add keys; where the key takes text, and where it is not
            valid YAML, the value is the text as it stands. ``max_steps`` replaces the file's ``epochs``, and the other way round.
            Their relative paths are taken from the working folder, where the one who types them is.

    Raises:
        GatewiseError: the file cannot be read, or a key is unknown, of a wrong type or at odds with another.
    """
    return checked(changed(read_tree(path), overrides), f"{path} with its --set" if overrides else str(path))


def read_tree(path: str | Path) -> dict[str, Any]:
    """What a recipe's file says, with absolute paths. Its keys are not checked.

    Raises:
        GatewiseError: it cannot be read.
    """
    path = Path(path)
    try:
        tree = _yaml().load(path)
    except (OSError, YAMLError, ValueError, RecursionError) as error:
        raise GatewiseError(f"the recipe {path} cannot be read: {reason_of(error)}") from error
    if not isinstance(tree, dict):
        raise GatewiseError(f"{path}: expected keys such as 'method: alora' and 'model: ...', got {reprlib.repr(tree)}")
    for key in [("model",), *_DATA_KEYS, _PATTERN_KEY]:
        section = tree if len(key) == 1 else tree.get(key[0])
        if isinstance(section, dict) and key[-1] in section:
            section[key[-1]] = _absolute(key, section[key[-1]], path.parent)
    return tree


def changed(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What a recipe's file says with the ``overrides`` of ``load_recipe``.

    Raises:
        GatewiseError: one that is no KEY=VALUE, or goes below a single value.
    """
    new, changes = deepcopy(dict(tree)), dict(map(_parsed, overrides))
    for key, text in changes.items():
        _change(new, key, _value(text))
    for key in _text_expected(new) & changes.keys() if changes else ():
        _change(new, key, changes[key])
    return new


def takes(tree: Mapping[str, Any], override: str) -> bool:
    """Whether recipes of this tree's method and task have the key of an override."""
    kind: Any = _class_of(tree)
    for key in _parsed(override)[0]:
        if not (isinstance(kind, type) and issubclass(kind, Section)):  # below a value that has keys of its own
            return True
        if key not in kind.model_fields:
            return kind.model_config.get("extra") == "allow"
        kind = kind.model_fields[key].annotation
    return True


def by_key(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says as "section.key" -> value, and what stands in no section by its own name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def recipe_as_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that ``load_recipe`` reads back to an equal recipe."""
    stream = io.StringIO()
    _yaml().dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


_NOT_TEXT = {
    "null": (r"(?:~|null|Null|NULL)?\Z", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)\Z", list("-+0123456789")),
    "float": (
        r"(?:[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))\Z",
        list("-+.0123456789"),
    ),
    "merge": (r"<<\Z", ["<"]),
}
"""What stands for something else than text when it is not quoted, with the characters it can begin with."""


class _Resolver(VersionedResolver):
    """YAML 1.2 without its dates and its numbers such as 010, which are labels more often than anything else."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for tag, (pattern, first) in _NOT_TEXT.items():
            self.add_version_implicit_resolver((1, 2), f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)


class _Representer(SafeRepresenter):
    """Quotes text with the line breaks of other alphabets, which would be read back as spaces."""

    def represent_str(self, text: str) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Representer = _Resolver, _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # said to be None, which sorts
    return yaml


def _parsed(setting: str) -> tuple[tuple[str, ...], str]:
    """The keys and the text of a ``--set KEY=VALUE``."""
    name, equals, text = setting.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise GatewiseError(f"--set {setting}: expected KEY=VALUE with a dotted key, such as --set training.learning_rate=1e-4")
    return keys, text


def _value(text: str) -> Any:
    """The value as YAML. Text without quotes is the text as it stands, as is what is not valid YAML."""
    try:
        value = _yaml().load(text)
    except YAMLError:
        return text
    # YAML would end it at " #" and join its lines.
    return text.strip() if isinstance(value, str) and text.lstrip()[:1] not in tuple("'\"|>!&") else value


def _change(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Sets one key, or with None takes it out; of the two ends that a run can have, the other one goes."""
    for depth, key in enumerate(keys[:-1], 1):
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise GatewiseError(f"--set {'.'.join(keys)}: {'.'.join(keys[:depth])} is a single value, so it has no keys")
    if value is None:
        tree.pop(keys[-1], None)
    else:
        tree[keys[-1]] = _absolute(keys, value, Path())
        tree.pop(_OTHER_END.get(keys[-1], ""), None)


def _text_expected(tree: dict[str, Any]) -> set[tuple[Any, ...]]:
    """The keys that take text and have something else: 'Review: {text}' and '{text}' are mappings in YAML."""
    try:
        _validated(tree)
    except ValidationError as error:
        return {fault["loc"] for fault in error.errors() if fault["type"] == "string_type"}
    except GatewiseError:  # said by whoever checks it all
        pass
    return set()


def _absolute(key: tuple[str, ...], value: Any, folder: Path) -> Any:
    """A relative file or model folder, taken from a folder; a sample and the name of a data set or model stay."""
    if not isinstance(value, str) or not value:
        return value
    is_file = (key in _DATA_KEYS and value.lower().endswith(DATA_SUFFIXES)) or key == _PATTERN_KEY
    is_model = key == ("model",) and (value.startswith((".", "~", "/")) or (folder / value).is_dir())
    return str((folder / Path(os.path.expanduser(value))).resolve()) if is_file or is_model else value
