"""The recipe: what to train, on what, and how. ``gatewise.runs.run.train`` carries it out.

The sections that every recipe has are here. The others are those of its method and its task, see ``gatewise.parts``: ``checked``
makes a recipe's class of all of them. Every key is checked before anything is loaded.
"""

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from gatewise.models.device import DEVICE_NAMES, DEVICES
from gatewise.parts import (
    DEFAULT_TASK,
    METHODS,
    TASKS,
    Count,
    DataSection,
    Method,
    NotNegative,
    Positive,
    Section,
    Share,
    Table,
    Task,
    only_if,
)


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

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Keys that are each fine and cannot be meant together."""
        if self.max_steps is not None and self.epochs is not None:
            yield "training.epochs", "cannot be given together with training.max_steps: keep the one that ends the run"
        if self.early_stopping_patience is not None and self.eval_every is None:
            yield "training.early_stopping_patience", "needs training.eval_every: it counts evaluations without progress"
        if self.load_best and self.eval_every is None:
            yield (
                "training.load_best",
                "needs training.eval_every: the best checkpoint is the one with the lowest loss on dev",
            )
        if self.load_best and self.save_every and self.eval_every and self.save_every != self.eval_every:
            yield (
                "training.save_every",
                f"is {self.save_every}, expected training.eval_every ({self.eval_every}) or nothing: training.load_best can only "
                "load a checkpoint that was evaluated, and the best evaluation must have one",
            )


def _known_in(table: Table[Any]) -> Any:
    def known(value: Any) -> Any:
        if isinstance(value, str) and value in table:
            return value
        raise PydanticCustomError("literal_error", "{expected}", {"expected": ", ".join(f"'{name}'" for name in table)})

    return known


class Recipe(Section):
    """What every recipe has. Paths in it are absolute once it was read by ``load_recipe``.

    ``dtype`` is that of the base model's weights; auto is bfloat16 where the device computes in it by itself, else float32.
    ``device`` is auto, cpu, cuda, cuda:1 or mps.
    """

    method: Annotated[str, BeforeValidator(_known_in(METHODS))]
    model: str
    task: Annotated[str, BeforeValidator(_known_in(TASKS))] = DEFAULT_TASK
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Annotated[str, only_if(lambda value: isinstance(value, str) and bool(DEVICES.fullmatch(value)), DEVICE_NAMES)] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataSection
    launch: LaunchSection = LaunchSection()
    training: TrainingSection = TrainingSection()

    def parts(self) -> tuple[Task, Method]:
        """The recipe's task and method, for one run."""
        return TASKS[self.task](self), METHODS[self.method](self)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        for one in (self.training, *self.parts()):
            for path, problem in one.contradictions():
                raise PydanticCustomError("combination", "{problem}", {"path": path, "problem": problem})
        return self


class _UnknownParts(Recipe):
    """A recipe whose method or task is unknown, and so which sections it may have."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


def checked(tree: Mapping[str, Any]) -> Recipe:
    """A recipe from nested mappings. A section that is None is one without keys.

    Raises:
        pydantic.ValidationError: a key is unknown, of a wrong type or at odds with another.
    """
    kind = recipe_class(tree.get("method"), tree.get("task"))
    empty = {key for key, value in tree.items() if value is None}
    if empty - {*Recipe.model_fields}:  # only then is every part imported
        empty &= {
            *Recipe.model_fields,
            *(name for table in (METHODS, TASKS) for part in table.usable().values() for name in part.sections()),
        }
    return kind.model_validate({key: value for key, value in tree.items() if key not in empty})


def recipe_class(method: Any, task: Any) -> type[Recipe]:
    """The class of recipes with this method and this task. One that is None is left out."""
    task = DEFAULT_TASK if task is None else task
    known = isinstance(method, str) and method in METHODS and isinstance(task, str) and task in TASKS
    return _class_of((TASKS[task], METHODS[method])) if known else _UnknownParts


@lru_cache
def _class_of(parts: tuple[type[Task], type[Method]]) -> type[Recipe]:
    fields: dict[str, Any] = {}
    for part in parts:
        for name, kind in part.sections().items():
            needed = any(one.is_required() for one in kind.model_fields.values())
            fields[name] = (kind, ... if needed else kind())
    return create_model("Recipe", __base__=Recipe, **fields)


def owners(keys: tuple[str, ...]) -> tuple[str, list[str]] | None:
    """Which parts have a section, or a key of a section: ("method" or "task", their names); None where none has."""
    for table in (METHODS, TASKS):
        found = []
        for name, part in table.usable().items():
            section = part.sections().get(keys[0])
            if section is not None and (len(keys) == 1 or keys[1] in section.model_fields):
                found.append(name)
        if found:
            return table.kind, found
    return None
