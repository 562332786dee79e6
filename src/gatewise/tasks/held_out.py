"""Rows set aside in a script of one's own: what ``RankAllocation`` scores on must not be trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.losses import IGNORED
from gatewise.tasks.chat import Answers, ChatFormat, conversation, encode_chat, is_conversation
from gatewise.tasks.encoding import PadCollator, token_ids
from gatewise.tasks.splitting import selected

R = TypeVar("R", bound=Sequence[Any])


def hold_out(
    rows: R, tokenizer: PreTrainedTokenizerBase, n: int = 32, seed: int = 0, *, max_length: int = 512, assistant: Answers = "all"
) -> tuple[R, dict[str, Tensor]]:
    """Takes rows out of training data and makes a batch of them.

    Args:
        rows: a ``datasets.Dataset``, such as TRL's trainers take, or a list of mappings. They have ``messages``; or ``prompt`` and
            ``completion``, as messages or as text (then joined without a chat template, as TRL does); or ``text``; or they are
            tokenised already (``input_ids``, and ``labels`` unless all tokens are trained).
        n: how many, and at most a quarter of all.
        seed: of the draw, which leaves torch's random state as it is.
        max_length: longer conversations lose turns, other rows their end.
        assistant: of conversations, whether all answers count or the last of each.

    Returns:
        The other rows, in their order, and the batch for ``RankAllocation(validation_batch=...)``, with labels on the answers.

    Raises:
        GatewiseError: fewer than two rows, or rows of none of these kinds.
    """
    if isinstance(rows, Mapping):
        raise GatewiseError(f"data of several splits ({', '.join(rows)}): give one, such as data[{next(iter(rows), 'train')!r}]")
    if n < 1 or len(rows) < 2:
        raise GatewiseError(f"{n} of {len(rows)} rows cannot be held out: expected at least 1 of at least 2")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: min(n, max(1, len(rows) // 4))].tolist()
    features = [_features(rows[at], f"row {at}", tokenizer, max_length, assistant) for at in sorted(drawn)]
    kept = [at for at in range(len(rows)) if at not in set(drawn)]
    return selected(rows, kept), PadCollator(tokenizer)(features)


def _features(
    given: object, where: str, tokenizer: PreTrainedTokenizerBase, max_length: int, assistant: Answers
) -> dict[str, list[int]]:
    if not isinstance(given, Mapping):
        raise GatewiseError(f"{where} is a {type(given).__name__}: expected a mapping, such as {{'text': ...}}")
    row = dict(given)
    if isinstance(row.get("labels"), int | float):
        raise GatewiseError(f"{where} has one label, a classifier's: take rows out yourself, and make the batch with your collator")
    if "input_ids" in row:
        ids = list(row["input_ids"])
        own = [list(row[name]) for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]  # TRL's
        labels = ids if row.get("labels") is None else list(row["labels"])
        labels = [label if all(marks) else IGNORED for label, *marks in zip(labels, *own, strict=True)]
        return {"input_ids": ids[:max_length], "labels": labels[:max_length]}
    texts = ("", row["text"]) if isinstance(row.get("text"), str) else (row.get("prompt"), row.get("completion"))
    if is_conversation(row) and not all(isinstance(text, str) for text in texts):
        try:
            messages = conversation(row)
        except GatewiseError as error:
            raise GatewiseError(f"{where}: {error}") from error
        return encode_chat(where, [{"messages": messages}], tokenizer, ChatFormat(assistant=assistant), max_length)[0]
    if not all(isinstance(text, str) for text in texts):
        raise GatewiseError(
            f"{where} has {', '.join(row) or 'nothing'}: expected messages, prompt and completion, text, or input_ids"
        )
    prompt, whole = token_ids(tokenizer, [str(texts[0]), f"{texts[0]}{texts[1]}{tokenizer.eos_token or ''}"])
    return {"input_ids": whole[:max_length], "labels": ([IGNORED] * len(prompt) + whole[len(prompt) :])[:max_length]}
