"""Rows to text and token ids: the prompt that a model reads, what it may or should write after it, and batches of both.

Shapes: b batch, t tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from string import Formatter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.losses import IGNORED
from gatewise.tasks.chat import ChatFormat, chat_prompts, encode_chat
from gatewise.tasks.records import Records, Row

Features = dict[str, list[int]]

# What the model is asked for, by kind: a prompt that showed it would give the answer away.
_ANSWERS = {"label": ("label",), "choice": ("answer",), "number": ("answer",), "generation": ("target", "targets"), "chat": ()}


@dataclass(frozen=True)
class Template:
    """A prompt and the words written for labels.

    Attributes:
        prompt: text with the fields of a row in braces, such as ``"Review: {text}\\nSentiment:"``. ``{{`` writes a
            brace. A list, such as ``{choices}``, is written one entry a line. Spaces at the end are dropped: every
            continuation brings its own.
        labels: label -> the word written for it; None writes the labels themselves.

    Raises:
        GatewiseError: the braces of the prompt do not match, or hold more than a field's name.
    """

    prompt: str
    labels: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self.fields()

    def fields(self) -> list[str]:
        """The fields of a row that the prompt shows: plain names, without attributes or format codes."""
        try:
            parts = [part for part in Formatter().parse(self.prompt) if part[1] is not None]
        except ValueError as error:
            raise GatewiseError(f"the prompt {self.prompt!r} has unmatched braces ({error}); write {{{{ for a brace") from error
        if any(not str(field).isidentifier() or code or conversion for _, field, code, conversion in parts):
            raise GatewiseError(
                f"the prompt {self.prompt!r}: braces may hold only a field's name, such as {{text}}; write {{{{ for a brace"
            )
        return [str(field) for _, field, _, _ in parts]

    def check(self, records: Records) -> None:
        """Raises GatewiseError when the template cannot serve these records (see `render` and `candidates`)."""
        answers = _ANSWERS[records.kind]
        for field in self.fields():
            if field in answers:
                raise GatewiseError(f"the prompt {self.prompt!r} shows {{{field}}}, which is the answer; leave it out")
        if not self.fields():
            fields = ", ".join(f"{{{name}}}" for name in records.rows[0] if name not in answers)
            raise GatewiseError(f"the prompt {self.prompt!r} shows nothing of the row; write its fields in braces: {fields}")
        for row in records.rows:
            self.render(row)
        words = self.labels
        if words is not None and (missing := [label for label in records.labels or () if not words.get(label, "").strip()]):
            raise GatewiseError(f"the template's labels have no word for {missing[0]!r}; they have {', '.join(words)}")

    def render(self, row: Row) -> str:
        """The prompt of a row, with nothing in place of a field that is null.

        Raises:
            GatewiseError: the prompt names a field that the row does not have.
        """
        texts = {}
        for field in self.fields():
            if field not in row:
                raise GatewiseError(f"the prompt {self.prompt!r} has {{{field}}}, but a row has {', '.join(row)}")
            value = "" if row[field] is None else row[field]
            texts[field] = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        return self.prompt.format(**texts).rstrip(" ")

    def candidates(self, records: Records, row: Row) -> list[str]:
        """The continuations to choose from (kinds "label" and "choice"), each beginning with a space."""
        if records.labels is not None:
            return [" " + (label if self.labels is None else self.labels[label]).strip() for label in records.labels]
        return [" " + choice.strip() for choice in row["choices"]]

    def target(self, records: Records, row: Row) -> str:
        """The right text (kinds "generation" and "number"), beginning with a space. Of several targets it is the first."""
        if records.kind == "number":
            return " " + row["answer"].strip()
        return " " + references(row)[0].strip()


Prompting = Template | ChatFormat
"""How a row becomes what the model reads: by its fields, or by its messages."""


def default_template(records: Records) -> Template:
    """A plain template for records of this shape."""
    if records.kind == "label":
        pair = "premise" in records.rows[0]
        return Template("Premise: {premise}\nHypothesis: {hypothesis}\nLabel:" if pair else "Text: {text}\nLabel:")
    if records.kind == "generation":
        return Template("Input: {source}\nOutput:")
    return Template("Question: {question}\nAnswer:")


def chat_format(records: Records, template: Prompting | None) -> ChatFormat:
    """How conversations are written: as given, or as the tokenizer has it.

    Raises:
        GatewiseError: a prompt for rows with fields.
    """
    if isinstance(template, Template):
        raise GatewiseError(f"{records.source} holds conversations, which a chat template writes: leave the prompt out")
    return template or ChatFormat()


def fields_template(records: Records, template: Prompting | None) -> Template:
    """How rows with fields are written: as given, or plainly.

    Raises:
        GatewiseError: a chat template.
    """
    if isinstance(template, ChatFormat):
        raise GatewiseError(f"{records.source} holds {records.kind} rows, and a chat template writes conversations: give messages")
    return template or default_template(records)


def references(row: Row) -> list[str]:
    """All the right texts of a generation row, or the last answer of a conversation."""
    if "messages" in row:
        return [row["messages"][-1]["content"]]
    return list(row.get("targets") or [row["target"]])


def encode(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    template: Prompting | None,
    *,
    max_length: int = 512,
    say: Callable[[str], None] | None = None,
) -> list[Features]:
    """Prompt and answer of every row, for a causal model.

    The two are tokenised apart, so that training and evaluation see the same tokens. A prompt that is too long loses
    its beginning. Every answer ends with the end-of-text token, so that the model learns to stop. Conversations: see ``chat.py``.

    Args:
        say: told how many prompts or conversations were cut.

    Returns:
        One dict a row: ``input_ids``, and ``labels`` with -100 on the prompt.

    Raises:
        GatewiseError: the template does not fit the records, an answer does not fit in ``max_length``, or the tokenizer
            has no end-of-text token.
    """
    if records.kind == "chat":
        return encode_chat(records.source, records.rows, tokenizer, chat_format(records, template), max_length, say)
    template = fields_template(records, template)
    if tokenizer.eos_token_id is None:
        raise GatewiseError("the tokenizer has no end-of-text token (eos_token), which answers have to end with")
    if records.kind in ("label", "choice"):
        candidates = candidate_ids(records, tokenizer, template)
        texts = [list(row[gold]) for row, gold in zip(candidates, records.gold, strict=True)]
        room = room_for(candidates, max_length)
    else:
        texts = token_ids(tokenizer, [template.target(records, row) for row in records.rows])
        room = room_for([[text] for text in texts], max_length)
    answers = [[*text, int(tokenizer.eos_token_id)] for text in texts]
    prompts = prompt_ids(records, tokenizer, template, room, max_length, say)
    return [
        {"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def encode_classification(
    records: Records, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512, say: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Rows for a sequence classifier: a text, or premise and hypothesis as a pair, cut at ``max_length`` tokens.

    If the tokenizer puts nothing between the two texts of a pair, as those of decoders do, a line break separates them.

    Args:
        say: told how many were cut, by a tokenizer of the tokenizers library.

    Returns:
        One dict a row: ``input_ids``, ``token_type_ids`` if the tokenizer has them, and ``labels``, the index in
        `Records.labels`.

    Raises:
        GatewiseError: the records have no labels.
    """
    if records.labels is None:
        raise GatewiseError(f"{records.source} holds {records.kind} rows: a classifier needs rows with labels")
    fields = ("premise", "hypothesis") if "premise" in records.rows[0] else ("text",)
    columns = [[row[field] for row in records.rows] for field in fields]
    if len(columns) == 2 and tokenizer.num_special_tokens_to_add(pair=True) <= tokenizer.num_special_tokens_to_add(pair=False):
        columns[1] = ["\n" + text for text in columns[1]]  # in front of the second text: the end of the first may be cut
    room = min(max_length, tokenizer.model_max_length)
    encoded = tokenizer(*columns, truncation=True, max_length=room, return_attention_mask=False)
    if say and (cut := sum(bool(one.overflowing) for one in encoded.encodings or ())):
        say(f"{cut} of {len(records)} rows of {records.source} are longer than {room} tokens and lose their end")
    return [{**{key: encoded[key][index] for key in encoded}, "labels": gold} for index, gold in enumerate(records.gold)]


class PadCollator:
    """Pads features to the longest of a batch, on the right.

    Raises:
        GatewiseError: the tokenizer has no padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.pad_token_id is None:
            raise GatewiseError(
                "the tokenizer has no padding token; set one, for instance tokenizer.pad_token = tokenizer.eos_token"
            )
        self.pad_id = int(tokenizer.pad_token_id)
        self.type_pad_id = int(getattr(tokenizer, "pad_token_type_id", 0))

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` (b, t) and ``labels``: (b, t) padded with -100, or (b,) class indices."""
        rows = [feature["input_ids"] for feature in features]
        batch = {
            "input_ids": pad(rows, self.pad_id),
            "attention_mask": pad([[1] * len(row) for row in rows], 0),
        }
        if "token_type_ids" in features[0]:
            batch["token_type_ids"] = pad([feature["token_type_ids"] for feature in features], self.type_pad_id)
        if "labels" in features[0]:
            labels = [feature["labels"] for feature in features]
            batch["labels"] = pad(labels, IGNORED) if isinstance(labels[0], Sequence) else torch.tensor(labels)
        return batch


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Rows of different lengths -> (b, t) long tensor, filled up with ``value``."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts without special tokens."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def candidate_ids(records: Records, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[tuple[tuple[int, ...], ...]]:
    """Token ids of every candidate of every row (kinds "label" and "choice").

    Raises:
        GatewiseError: a choice has no tokens, or one label's are the beginning of another's: as candidates are compared without
            their ends, the longer one would never be likelier.
    """
    if records.labels is None:
        rows = [tuple(map(tuple, token_ids(tokenizer, template.candidates(records, row)))) for row in records.rows]
        if not all(ids for row in rows for ids in row):
            raise GatewiseError(f"{records.source}: a choice has no tokens in this tokenizer")
        return rows
    words = template.candidates(records, records.rows[0])
    tokens = tuple(map(tuple, token_ids(tokenizer, words)))
    for (word, ids), (other, longer) in permutations(zip(words, tokens, strict=True), 2):
        if longer[: len(ids)] == ids:
            raise GatewiseError(
                f"the label word {word!r} is the beginning of {other!r} to this tokenizer, which then would never be chosen; give "
                "the template other words for them"
            )
    return [tokens] * len(records.rows)


def room_for(candidates: Sequence[Sequence[Sequence[int]]], max_length: int) -> list[int]:
    """Tokens of each prompt at most: after it have to fit the longest of its candidates and the end of the text.

    Training and evaluation both cut a prompt to this, so that they read the same.
    """
    return [max_length - 1 - max(map(len, row)) for row in candidates]


def prompt_ids(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    template: Prompting,
    room: Iterable[int],
    max_length: int,
    say: Callable[[str], None] | None = None,
) -> list[list[int]]:
    """Token ids of every prompt, cut on the left to its ``room``; what the tokenizer puts first (such as bos) stays.

    The prompt of a conversation is all that its last answer is written to, and is cut between turns to the least room.

    Raises:
        GatewiseError: the template does not fit the records, or there is no room for one token of the prompt.
    """
    if records.kind == "chat":
        return chat_prompts(records.source, records.rows, tokenizer, chat_format(records, template), min(room))
    template = fields_template(records, template)
    template.check(records)
    texts = [template.render(row) for row in records.rows]
    prefix = text_prefix(tokenizer)
    prompts, cut = [], 0
    for text, ids, space in zip(texts, token_ids(tokenizer, texts), room, strict=True):
        left = space - len(prefix)
        if left < 1 or not (prefix or ids):
            raise GatewiseError(
                f"{records.source}: the prompt {text[:60]!r} has no tokens, or its answer of {max_length - space} tokens leaves "
                f"no room in {max_length}; raise max_length, lower max_new_tokens, or leave the row out"
            )
        prompts.append([*prefix, *ids[-left:]])
        cut += len(ids) > left
    if cut and say:
        say(f"{cut} of {len(texts)} prompts of {records.source} do not fit into {max_length} tokens and lose their beginning")
    return prompts


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text. Those after it are left out: the answer follows there."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return list(dressed[:start])
    return []
