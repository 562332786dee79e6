"""Parts: a method says how a model is tuned, a task says what a row is. ``gatewise train`` finds both by name, in the tables below.

The runner (``gatewise/runs/run.py``) knows no method and no task: it calls the verbs of ``Method`` and ``Task``, in the order in
which they stand here. A part is one class. Its sections of the recipe are its annotated attributes whose type is a ``Section``: the
class says ``allocation: AllocationSection``, and in a run ``self.allocation`` holds what the recipe says, defaults included. What
``Method`` and ``Task`` do by themselves is right for most parts, so that a new one is a file of a few dozen lines. A method's part
is ``method.py`` in its room. What its adapter is worth to look at ``gatewise.inspection`` knows by the adapter's type.

Another distribution brings parts by entry points: of the group ``gatewise.methods`` or ``gatewise.tasks``, with the part's name and
``module:Class``. Names of gatewise's own parts stay gatewise's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, TypeVar, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gatewise.errors import GatewiseError, reason_of

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

P = TypeVar("P", bound="Part")
Features = list[dict[str, Any]]
Counting = Callable[[int, int], None]

# Sections of a recipe ---------------------------------------------------------------------------------------------------


class Section(BaseModel):
    """One mapping of the recipe: no unknown keys, no silent conversions, not changed once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _source(value: Any) -> Any:
    if isinstance(value, str):
        return value
    raise ValueError("expected a file or another source of rows, and no part of data.train: this task does not split its rows")


Source = Annotated[str, BeforeValidator(_source)]


class DataSection(Section):
    """Where the rows come from: a JSONL, JSON, CSV or Parquet file, or another source that the task knows."""

    train: str
    """Rows to train on."""
    dev: Source
    """Rows to measure on before, during and after the training. Early stopping, the best checkpoint and you choose by them."""
    test: Source | None = None
    """Rows that are measured before and after, and that nothing else sees."""
    held_out: Annotated[int, Field(ge=0)] = 32
    """So many rows of ``train``, at most a quarter, that no method trains on, so that all methods train on the same rows; methods
    that score ranks, or learn in two levels, do it with them."""
    tuning: Count | None = None
    """So many rows of ``train``, at most a quarter and the same for every seed, are taken out before: a learning rate can be chosen
    on them, early stopping and the best checkpoint go by them, and ``dev`` is left."""
    limit_train: Count | None = None
    """The first rows of ``train`` only."""
    limit_dev: Count | None = None
    """The first rows of ``dev`` only."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of the longest text, prompt and answer together."""


# A run, as parts see it -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run has once its base model is loaded and its rows are encoded.

    Attributes:
        recipe: the whole recipe, see ``gatewise.runs.recipe.Recipe``.
        output: the run's folder.
        progress: ``say(line)`` tells the user something, ``counting(what)`` yields what moves a bar.
        collate: makes encoded rows a batch.
        fresh_base: loads the base model once more, with the head that a task gives it drawn anew from torch's random state.
        base_parameters: how many numbers the base model has.
        train, dev: rows as the task encoded them. held_out: those of ``data.held_out``, which are not among train.
        watched: the name in ``task.measured`` of the rows that are looked at while it trains: "dev", or "tuning" where it is there.
        steps: optimiser steps of the training. steps_per_epoch: of one pass over ``train``.
        note: what is written beside the adapter and into every checkpoint, as ``gatewise.json``.
        model: the base model with its adapter.
        checkpoint: the one that the training goes on from, or None.
        seconds: of each phase.
        arguments: (steps, evaluates=True) -> the Trainer's arguments, as the recipe has them; without ``evaluates`` nothing is
            measured while it trains.
        trainer: makes the Trainer, see ``gatewise.runs.trainer.trainer_of``.
        report: what the method says of the adapter once it is written, in the main process.
    """

    recipe: Any
    task: "Task"
    output: Path
    progress: Any
    device: "torch.device"
    tokenizer: "PreTrainedTokenizerBase"
    collate: Callable[..., dict[str, "Tensor"]]
    fresh_base: Callable[[], "PreTrainedModel"]
    base_parameters: int
    max_length: int
    train: Features
    dev: Features
    held_out: Features
    watched: str
    steps: int
    steps_per_epoch: int
    note: dict[str, Any]
    checkpoint: Path | None
    seconds: dict[str, float] = field(default_factory=dict)
    model: Any = None
    arguments: Any = None
    trainer: Any = None
    report: "Report | None" = None


@dataclass
class Report:
    """What is told of the adapter that came of a run.

    Attributes:
        parameters: numbers stored in the adapter.
        numbers: what joins ``metrics.json``.
        table: makes what the command line prints, anything that rich can show.
        pictures: file name -> function that draws into a path.
    """

    parameters: int = 0
    numbers: dict[str, Any] = field(default_factory=dict)
    table: Callable[[], Any] | None = None
    pictures: dict[str, Callable[[Path], object]] = field(default_factory=dict)


class Measured(NamedTuple):
    """How well a model does on rows.

    Attributes:
        metrics: numbers by name, "n" among them.
        remark: what is worth telling of them, or None.
        rows: a number for each row, in their order: of the first of the task's ``metrics``, whose mean over rows they have where it
            is one. Empty where there is none.
    """

    metrics: dict[str, float | int]
    remark: str | None = None
    rows: Sequence[float] = ()


# The two kinds of parts -------------------------------------------------------------------------------------------------


class Part:
    """What methods and tasks have in common. An instance belongs to one recipe, and to one run of it."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        for name in self.sections():
            setattr(self, name, getattr(recipe, name))

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """The part's sections of the recipe: name -> model."""
        hints = get_type_hints(cls).items()
        return {name: kind for name, kind in hints if isinstance(kind, type) and issubclass(kind, Section)}

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Keys that are each fine and cannot be meant together: (path of the key, what is wrong with it and what to do)."""
        yield from ()


class Task(Part):
    """What a row is: how rows are read, encoded, padded and measured, and which base model reads them.

    Attributes:
        task_type: PEFT's name for such models.
        loads: what ``gatewise.models.load_model`` is asked for.
        collator: (tokenizer) -> what makes encoded rows a batch, such as ``gatewise.tasks.PadCollator``.
        in_float32: the base model is trained in float32 whatever ``dtype`` says.
        metrics: what ``measure`` gives beside the loss, for rows that were read; methods are compared by the first.
            lower_is_better: those of which less is better.
        quantises: ``base`` gives the base model that the recipe's ``quantization`` asks for.
        elsewhere: of adapters that ``gatewise eval``, ``inspect --scores`` and ``compress`` cannot run: what one does, and where to
            give it instead.
        train: rows to train on. measured: rows to measure on, by name ("dev", "test"). Both are set by ``read``; those of
            ``data.tuning`` go from the one to the other, as "tuning".
    """

    task_type = "CAUSAL_LM"
    loads = "causal"
    collator: Any
    in_float32 = False
    metrics: Sequence[str] = ()
    lower_is_better: Sequence[str] = ()
    quantises = False
    elsewhere: str | None = None
    data: DataSection
    train: Any
    measured: dict[str, Any]

    def read(self, noted: Mapping[str, Any] | None) -> None:
        """Reads and checks all rows, and decides what they alone do not say, such as which label is which class.

        Args:
            noted: the note of the checkpoint that the run goes on from; None where it begins.
        """
        raise NotImplementedError

    def units(self, rows: Any) -> Sequence[str]:
        """A text for each row: rows with the same one, such as two that ask the same, are never trained and measured on."""
        return [repr(row) for row in rows]

    def asks(self, rows: Any) -> Sequence[str]:
        """A text for each row: where units are larger, rows of two units may have the same one, and are kept apart all the same."""
        return self.units(rows)

    def base(self, dtype: "torch.dtype", tokenizer: "PreTrainedTokenizerBase", brought: Sequence[str]) -> "PreTrainedModel":
        """The base model; a head of its own is drawn from torch's random state.

        Args:
            brought: modules that may be in no file, as the adapter will have them whole.
        """
        from gatewise.models.loading import load_model

        how = self.recipe.quantization
        where = {"quantization": how, "device": self.recipe.device} if how else {}
        return load_model(self.recipe.model, task=self.loads, dtype=dtype, **where)  # type: ignore[arg-type]

    def encode(
        self, rows: Any, tokenizer: "PreTrainedTokenizerBase", max_length: int, *, key: str, say: Callable[[str], None]
    ) -> Features:
        """Rows as the model reads them, each with ``input_ids`` and ``labels``; those with the same ``group`` are copies.

        Args:
            max_length: tokens of the longest text.
            key: of the recipe, which the rows come from: "data.train" or "data.dev".
            say: tells the user something.
        """
        raise NotImplementedError

    def note(self, base: "PreTrainedModel") -> dict[str, Any]:
        """What ``gatewise.json`` says, so that the adapter is used as it was trained."""
        return {}

    def measure(self, run: Run, model: "nn.Module", rows: Any, counting: Counting) -> Measured:
        """How well a model does."""
        raise NotImplementedError

    def note_after(self, run: Run, model: "nn.Module") -> dict[str, Any]:
        """What joins the note once the model is trained."""
        return {}


class Method(Part):
    """How a model is tuned.

    Attributes:
        files: what it writes into the run's folder beside the adapter, by name.
        stage: the name of a stage of its own before the training, if it has one: that has its checkpoints in ``checkpoints/STAGE``,
            and ``STAGE.json`` in the run's folder says that it is done.
        is_lora: what it trains are LoRA's A and B, which may have rates of their own (``training.lora_plus_ratio``).
        changes_base: the base model is another one while it trains, so that each process needs it whole.
        trains_whole: what the base model lacks may be trained whole and saved with the adapter.
        prompt_tokens: positions of the model that it takes from the text.
        reads_prompt: the adapter decides by the prompt, once for the whole answer.
        size_key: the key of the recipe that says how many numbers the adapter stores, such as "peft.r", if one does.
        largest_size: the most that this key is set to, to store as many numbers as another method's adapter does.
        untrained: (model) -> a context manager that yields the model to call for what the base model computes: with a fresh LoRA,
            which changes nothing, itself.
        loss_term: (model, share) -> what the loss of a batch gains while training. ``share`` is the batch's share in the labels of
            its optimiser step: those of all batches of a step add up to one.
    """

    files: tuple[str, ...] = ()
    stage: str | None = None
    is_lora = False
    changes_base = False
    trains_whole = True
    prompt_tokens = 0
    reads_prompt = False
    size_key: str | None = None
    largest_size: int | None = None
    untrained: Any = staticmethod(nullcontext)
    loss_term: Any = None

    @property
    def scale(self) -> float | None:
        """What ``peft.lora_alpha`` is multiplied by in what its modules add; None where they have no such, or not the same."""
        return None

    def resume(self, output: Path) -> None:
        """Reads what an interrupted run left in its folder beside the checkpoints of its training."""

    def config(self, run: Run, base: "PreTrainedModel") -> "PeftConfig":
        """The adapter's configuration."""
        raise NotImplementedError

    def saved_config(self, run: Run, base: "PreTrainedModel") -> "PeftConfig":
        """The configuration of the adapter as it will be saved, as far as that is known: what it stores is counted of it.

        Args:
            run: has its recipe, its task and its numbers of steps, and nothing else.
            base: on the meta device, so that it has shapes alone.
        """
        return self.config(run, base)

    def resized(self, size: int) -> dict[str, Any]:
        """The keys of the recipe, with their values, that give ``size_key`` this value and leave the rest as it is meant."""
        return {str(self.size_key): size}

    def prepare(self, run: Run, base: "PreTrainedModel", config: Any) -> None:
        """Looks at the base model with training rows, before the adapter is put on it."""

    def adapt(self, run: Run, base: "PreTrainedModel") -> "PeftModel":
        """The base model with a fresh adapter, drawn from the recipe's seed.

        Raises:
            GatewiseError: modules or layers that the base model lacks, or settings that do not go with it.
        """
        from peft import get_peft_model
        from transformers import set_seed

        config = self.config(run, base)
        try:
            self.prepare(run, base, config)
            set_seed(self.recipe.seed)
            return get_peft_model(base, config)
        except ValueError as error:
            raise GatewiseError(f"PEFT cannot put this adapter on {self.recipe.model}: {reason_of(error)}") from error

    def stage_steps(self, rows: int) -> int:
        """Optimiser steps of the stage of its own over ``rows`` training rows."""
        return 0

    def before_training(self, run: Run) -> None:
        """A stage of the method's own; it may put another model into ``run.model``."""

    def callbacks(self, run: Run) -> list["TrainerCallback"]:
        """The Trainer's. One of them keeps the adapter whole where the base model is sharded."""
        from gatewise.adapters.whole import WholeAdapter

        return [WholeAdapter()]

    def trainer(self, run: Run) -> "Trainer":
        """The Trainer of the run."""
        return run.trainer(callbacks=self.callbacks(run), loss_term=self.loss_term)

    def finish(self, run: Run, model: "PeftModel") -> "PeftModel":
        """The trained model as it is measured and saved."""
        return model

    def report(self, adapter: Path) -> Report:
        """What there is to say of the saved adapter beside what ``gatewise.inspection`` says. More files may be written there."""
        return Report()


# Where they are found ---------------------------------------------------------------------------------------------------


class Table(Mapping[str, type[P]], Generic[P]):
    """Name -> class. A part is imported when it is asked for."""

    def __init__(self, group: str, own: dict[str, str]) -> None:
        self.group, self._own = group, own

    @cached_property
    def places(self) -> dict[str, str]:
        """Name -> ``module:Class``, of all packages that bring a part; gatewise's own names are its alone."""
        return {**{point.name: point.value for point in metadata.entry_points(group=self.group)}, **self._own}

    def __getitem__(self, name: str) -> type[P]:
        module, _, attribute = self.places[name].partition(":")
        part: type[P] = getattr(import_module(module), attribute)
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


METHODS: Table[Method] = Table(
    "gatewise.methods",
    {
        "lora": "gatewise.adapters.method:Lora",
        "alora": "gatewise.allocation.method:ALora",
        "pi-lora": "gatewise.allocation.method:PiLora",
        "milora": "gatewise.routed.method:RoutedLora",
        "adalora": "gatewise.runs.baselines:AdaLora",
        "dora": "gatewise.adapters.method:Dora",
        "spt": "gatewise.prompts.method:SelectivePrompts",
        "prompt-tuning": "gatewise.runs.baselines:PromptTuning",
        "prefix-tuning": "gatewise.runs.baselines:PrefixTuning",
    },
)
TASKS: Table[Task] = Table(
    "gatewise.tasks",
    {"causal": "gatewise.tasks.rows:Causal", "classification": "gatewise.tasks.rows:Classification"},
)
DEFAULT_TASK = "causal"
