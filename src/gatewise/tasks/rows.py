"""The tasks on rows of text as parts of a recipe: a causal model that writes answers, and a classifier."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatewise.errors import GatewiseError, some
from gatewise.models.loading import class_names, load_model, pad_as
from gatewise.parts import METHODS, Count, Counting, DataSection, Features, Fraction, Measured, Run, Section, Task
from gatewise.tasks.chat import Answers, ChatFormat
from gatewise.tasks.encoding import PadCollator, Prompting, Template, default_template, encode, encode_classification
from gatewise.tasks.metrics import METRICS, cut_line, evaluate, worth
from gatewise.tasks.records import Records, check_labels, load_records
from gatewise.tasks.splitting import asked_again, asks_of, deal_out, shown_of, units_of

Label = Annotated[str, Field(strict=False, coerce_numbers_to_str=True), WithJsonSchema({"type": ["string", "number"]})]
"""Labels such as 0 and 1 may be written as numbers; inside they are text, as the records' labels are."""


def _source_or_part(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError("expected a file or another source of rows, or a part of data.train such as 0.1")


SourceOrPart = Annotated[str | Fraction, BeforeValidator(_source_or_part)]


class RowsSection(DataSection):
    """Where the rows come from: a JSONL, JSON, CSV or Parquet file, ``sample:NAME``, or a Hugging Face ``datasets`` name."""

    dev: SourceOrPart  # type: ignore[assignment]
    """Rows to measure on before, during and after the training, or the part of ``train`` that is taken out of it for that (0.1), by
    a hash of each row and with rows of each label."""
    test: SourceOrPart | None = None  # type: ignore[assignment]
    """Rows that are measured before and after, and that nothing else sees, or such a part of ``train``."""
    columns: dict[str, str] | None = None
    """Field of a row -> the column of the file that it is read from. A file with the field and no such column is read as it is."""
    group: str | None = None
    """With parts of ``train``: rows with the same value in this column stay on one side."""
    train_split: str | None = None
    """Which split of a Hugging Face data set ``train`` is; needed there."""
    dev_split: str | None = None
    """Which split ``dev`` is."""
    test_split: str | None = None
    """Which split ``test`` is."""
    labels: Annotated[list[Label], Field(min_length=2)] | None = None
    """All labels, in their order; left out: those of ``train``, sorted."""


class AnsweredRowsSection(RowsSection):
    """Rows to which a model writes answers."""

    max_new_tokens: Count | None = None
    """Tokens of a written answer where it is measured; left out: 16 more than the longest right one has, and 64 at least."""
    assistant: Answers | None = None
    """Which turns of a conversation are trained, ``all`` of the assistant's or the ``last``. Left out: all, and the last with
    methods whose adapter reads the prompt."""


class TemplateSection(Section):
    """How a row becomes a prompt."""

    prompt: str | None = None
    """The prompt, in which ``{field}`` stands for a field of the row. Left out: the usual one for such rows."""
    chat: str | None = None
    """The Jinja template of conversations, if not the base model's own. What it marks by ``{% generation %}`` is trained; without
    marks the assistant's messages are found in the text."""
    labels: Annotated[dict[Label, str], Field(min_length=2)] | None = None
    """Label -> the word that is written for it, if not the label itself."""


class Rows(Task):
    """What the tasks on rows have in common."""

    collator = PadCollator
    data: RowsSection
    train: Records
    measured: dict[str, Records]
    prompt: Prompting | None = None
    """How a row becomes a prompt; None where the model reads the row's own text."""
    told: list[str]
    """What is worth telling of the rows."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Parts that leave nothing to train on, and keys of sources that there are not."""
        data = self.data
        parts = self._parts()
        if sum(parts.values()) >= 1:
            yield "data.test", f"is {data.test} and data.dev {data.dev}: expected parts that leave some of data.train to train on"
        for name in parts:
            if getattr(data, f"{name}_split") is not None:
                yield f"data.{name}_split", f"is for a data set, but data.{name} is a part of data.train: leave one of them out"
        if data.group is not None and not parts and data.tuning is None:
            yield "data.group", "says what stays together where data.dev or data.test is a part of data.train, such as 0.1"
        columns = data.columns or {}
        if len(set(columns.values())) < len(columns):
            yield "data.columns", f"is {columns}: expected another column for each field"

    def _shown(self) -> Sequence[str]:
        """The fields of a row that a prompt of the recipe's shows."""
        return ()

    def _parts(self) -> dict[str, float]:
        """The parts of ``data.train`` to measure on."""
        return {name: part for name in ("dev", "test") if isinstance(part := getattr(self.data, name), float)}

    def read(self, noted: Mapping[str, Any] | None) -> None:
        """Rows to train on, and rows of the same kind, with the same labels in the same order, to measure on."""
        data = self.data
        whole = load_records(data.train, split=data.train_split, labels=data.labels, columns=data.columns)
        whole = replace(whole, shown=shown_of(whole.kind, self._shown()))
        check_labels(whole, "give rows with other labels too, or name them all in data.labels")
        found, self.told = {"train": whole}, []
        if parts := self._parts():
            found, self.told = deal_out(whole, parts, data.group)
        for name, split in (("dev", data.dev_split), ("test", data.test_split)):
            if isinstance(source := getattr(data, name), str):
                read = load_records(source, split=split, labels=whole.labels, columns=data.columns)
                found[name] = replace(read, shown=whole.shown)
        for name, limit in (("train", data.limit_train), ("dev", data.limit_dev)):
            if limit is not None and limit < len(found[name]):
                self.told.append(f"data.limit_{name}: the first {limit} of {len(found[name])} rows are taken")
                found[name] = replace(found[name], rows=found[name].rows[:limit])
        self.train = found.pop("train")
        self.measured = {name: found[name] for name in ("dev", "test") if name in found}
        for name, records in self.measured.items():
            if records.kind != self.train.kind:
                raise GatewiseError(
                    f"data.{name} ({records.source}) holds {records.kind} rows, but data.train ({self.train.source}) holds "
                    f"{self.train.kind} rows: expected the same kind"
                )
            if again := asked_again(records, self.train):
                self.told.append(
                    f"{again} of the {len(records)} rows of data.{name} ask what rows of data.train ask, word for word"
                )
        for name, records in {"train": self.train, **self.measured}.items():
            there = {row["label"] for row in records.rows} if whole.labels else set()
            if name == "train" and len(there) == 1:
                raise GatewiseError(
                    f"the {len(records)} rows to train on all have the label {there.pop()!r}: give {whole.source} in another "
                    "order, or more of it (data.limit_train)"
                )
            told = f"data.{name} has no row with label "
            if (missing := sorted(set(whole.labels or ()) - there)) and not any(line.startswith(told) for line in self.told):
                self.told.append(f"{told}{some(missing)}")

    def units(self, rows: Records) -> list[str]:
        """What each row asks, or the value of its group."""
        return units_of(rows, self.data.group)

    def asks(self, rows: Records) -> list[str]:
        """What each row asks."""
        return asks_of(rows)

    def _copies(self, rows: Records, features: Features) -> Features:
        """The encoded rows, of which those that ask the same are marked as one ``group``, where there are such."""
        asks = self.asks(rows)
        numbers = {ask: number for number, ask in enumerate(dict.fromkeys(asks))}
        if len(numbers) == len(asks):
            return features
        return [{**row, "group": numbers[ask]} for row, ask in zip(features, asks, strict=True)]

    def _tell(self, key: str, say: Callable[[str], None]) -> None:
        for line in self.told if key == "data.train" else ():
            say(line)

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the rows' kind."""
        return METRICS[self.train.kind]

    def note(self, base: PreTrainedModel) -> dict[str, Any]:
        """Labels, in the order of the classes, and how rows were read and dealt out."""
        parts = self._parts()
        dealt = {"parts": parts, "group": self.data.group, "shown": list(self.train.shown)} if parts else {}
        return {"labels": self.train.labels, "columns": self.data.columns, **dealt}

    def measure(self, run: Run, model: nn.Module, rows: Records, counting: Counting) -> Measured:
        """The numbers of ``gatewise.tasks.evaluate``, and how many answers were cut."""
        answers: list[dict[str, Any]] = []
        metrics = evaluate(
            model,
            run.tokenizer,
            rows,
            self.prompt,
            batch_size=self.recipe.training.eval_batch_size,
            max_new_tokens=getattr(self.data, "max_new_tokens", None),
            max_length=run.max_length,
            progress=counting,
            answers=answers,
        )
        return Measured(metrics, cut_line(answers, "data.max_new_tokens"), [worth(answer) for answer in answers])


class Causal(Rows):
    """A decoder that reads a prompt and writes the answer after it."""

    quantises = True
    data: AnsweredRowsSection
    template: TemplateSection

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Answers before which another prompt was read than the adapter is used with."""
        yield from super().contradictions()
        if self.data.assistant == "all" and METHODS[self.recipe.method].reads_prompt:
            yield (
                "data.assistant",
                f"is all, but what {self.recipe.method} trains decides by the prompt, everything before an answer: take last, "
                "or leave it out",
            )

    def read(self, noted: Mapping[str, Any] | None) -> None:
        """Rows, and the template that writes them."""
        super().read(noted)
        given = self.template.model_dump(exclude_none=True).keys()
        is_chat = self.train.kind == "chat"
        if wrong := sorted(given - {"chat"} if is_chat else given & {"chat"}):
            what = "conversations, which the chat template writes" if is_chat else f"{self.train.kind} rows, which have no messages"
            raise GatewiseError(f"template.{wrong[0]} was given, but {self.train.source} holds {what}: leave it out")
        kind, data = self.train.kind, self.data
        idle = {
            "template.labels": self.template.labels is not None and kind in ("choice", "number", "generation"),
            "data.labels": data.labels is not None and kind != "label",
            "data.max_new_tokens": data.max_new_tokens is not None and kind in ("label", "choice"),
            "data.assistant": data.assistant is not None and kind != "chat",
        }
        if nothing := [key for key, given in idle.items() if given]:
            raise GatewiseError(f"{nothing[0]} means nothing for {kind} rows, which {self.train.source} holds: leave it out")
        if is_chat:
            default: Answers = "last" if METHODS[self.recipe.method].reads_prompt else "all"
            self.prompt = ChatFormat(self.template.chat, self.data.assistant or default)
            return
        self.prompt = Template(self.template.prompt or default_template(self.train).prompt, self.template.labels)
        for records in (self.train, *self.measured.values()):
            self.prompt.check(records)

    def _shown(self) -> Sequence[str]:
        return Template(self.template.prompt).fields() if self.template.prompt else ()

    def base(self, dtype: Any, tokenizer: PreTrainedTokenizerBase, brought: Any) -> PreTrainedModel:
        """The base model, once it is known that its tokenizer can write the rows."""
        if isinstance(self.prompt, ChatFormat):
            self.prompt = self.prompt.of(tokenizer)
        return super().base(dtype, tokenizer, brought)

    def encode(
        self, rows: Records, tokenizer: PreTrainedTokenizerBase, max_length: int, *, key: str, say: Callable[[str], None]
    ) -> Features:
        """Prompt and answer, or a conversation."""
        self._tell(key, say)
        return self._copies(rows, encode(rows, tokenizer, self.prompt, max_length=max_length, say=say))

    def note(self, base: PreTrainedModel) -> dict[str, Any]:
        """Labels and how prompts and answers are written."""
        assert self.prompt is not None
        words: dict[str, Any]
        if isinstance(self.prompt, ChatFormat):
            words = {"template": None, "chat_template": self.prompt.text, "assistant": self.prompt.assistant}
        else:
            words = {"template": self.prompt.prompt, "label_words": self.prompt.labels}
        return {**super().note(base), **words, "max_new_tokens": self.data.max_new_tokens}


class Classification(Rows):
    """An encoder, or a decoder, with a head that says which of the labels a row has."""

    task_type = "SEQ_CLS"
    loads = "classification"
    in_float32 = True  # its new head is trained in full

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Half precision."""
        yield from super().contradictions()
        if self.recipe.dtype == "bfloat16":
            yield (
                "dtype",
                "is bfloat16, expected auto or float32 with task classification, whose new head is trained in full",
            )

    def read(self, noted: Mapping[str, Any] | None) -> None:
        """Rows, with classes in the recipe's order, or in that of a base model that is a classifier of these labels already."""
        super().read(noted)
        if self.data.labels is not None:
            return
        known = class_names(self.recipe.model) if noted is None else noted.get("labels")
        if known is not None and set(known) == set(self.train.labels or ()):
            self.train = replace(self.train, labels=known)
            self.measured = {name: replace(records, labels=known) for name, records in self.measured.items()}

    def base(self, dtype: Any, tokenizer: PreTrainedTokenizerBase, brought: Any) -> PreTrainedModel:
        """The base model with a class for each label."""
        count = len(self.train.labels or ())
        model = load_model(self.recipe.model, task="classification", num_labels=count, dtype=dtype, brought=brought)
        pad_as(model, tokenizer)
        return model

    def encode(
        self, rows: Records, tokenizer: PreTrainedTokenizerBase, max_length: int, *, key: str, say: Callable[[str], None]
    ) -> Features:
        """The row's own text."""
        self._tell(key, say)
        return self._copies(rows, encode_classification(rows, tokenizer, max_length=max_length, say=say))
