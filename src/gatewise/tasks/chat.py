"""Conversations: what a row of one must be, the text that a chat template makes of it, and which of its tokens are the assistant's.

The template is Jinja, the base model's own or one that the recipe has. It says itself what the assistant wrote, where it has
``{% generation %}``; else the assistant's turn is what the text gains by it: the text of the messages before it, with the header
of an answer, must be the beginning of the text of all messages (TRL's rule). The end of the turn is trained in both, and
the end of the text after the last.

A conversation that is too long is cut between turns. To train on all answers it loses its last ones, so that each answer is
learned after all that stood before it; to train on the last answer, or to write it, it loses its first ones, as a client that
runs out of room leaves them out. The system's messages stay.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError, reason_of
from gatewise.losses import IGNORED

Message = dict[str, str]
Messages = list[Message]
Answers = Literal["all", "last"]
Ids = list[int]
Marked = tuple[Ids, list[bool]]
"""Ids of tokens, and which of them are learned."""

ROLES = ("system", "developer", "user", "assistant")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


# ---- what a row must be ----


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of a conversation."""
    return any(row.get(name) is not None for name in ("messages", "conversations")) or {"prompt", "completion"} <= row.keys()


def conversation(row: Mapping[str, Any]) -> Messages:
    """The messages of a row, up to the last of the assistant's.

    Args:
        row: ``messages`` (or ``conversations``), or ``prompt`` and ``completion``, each a text or messages; ``system`` may stand
            beside both. A message has ``role`` and ``content``, or ``from`` and ``value``; its content is a text or a list of
            texts in parts.

    Raises:
        GatewiseError: anything else, such as tools or images; said without the row's place.
    """
    if any(row.get(name) for name in ("tools", "functions")):
        raise GatewiseError("it has tools, which are not trained: leave the row out, or the tools")
    if any(row.get(name) for name in ("images", "image", "videos", "audio")):
        raise GatewiseError("it has images or sounds, and only text is trained: leave the row out")
    given = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    if given is None and {"prompt", "completion"} <= row.keys():
        given = [*_as_messages(row["prompt"], "user"), *_as_messages(row["completion"], "assistant")]
    if not isinstance(given, list | tuple) or not given:
        raise GatewiseError("expected 'messages', a list of objects with 'role' and 'content', or 'prompt' and 'completion'")
    found = [_message(one, number) for number, one in enumerate(given, 1)]
    if row.get("system"):
        if found[0]["role"] == "system":
            raise GatewiseError("it has 'system' and a first message of the role system: keep one of them")
        found.insert(0, _message({"role": "system", "content": row["system"]}, 0))
    first = next((one["role"] for one in found if one["role"] not in ("system", "developer")), None)
    if first == "assistant":
        raise GatewiseError("the conversation begins with the assistant: expected a message of the user before its first answer")
    last = max((at for at, one in enumerate(found) if one["role"] == "assistant"), default=None)
    if last is None:
        raise GatewiseError("there is no message of the role assistant, so that there is no answer to learn")
    return found[: last + 1]


def _as_messages(value: Any, role: str) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [{"role": role, "content": value}]


def _message(given: Any, number: int) -> Message:
    role = given.get("role", given.get("from")) if isinstance(given, Mapping) else None
    if not isinstance(role, str):
        raise GatewiseError(f"message {number}: expected an object with 'role' and 'content'")
    role = _OTHER_NAMES.get(role, role)
    if given.get("tool_calls") or given.get("function_call") or role in ("tool", "function", "ipython"):
        raise GatewiseError(f"message {number} is of a tool or calls one, which is not trained: leave the row out")
    if role not in ROLES:
        raise GatewiseError(f"message {number} has the role {role!r}, expected one of {', '.join(ROLES)}")
    content = given.get("content", given.get("value"))
    if isinstance(content, list | tuple):
        others = [one.get("type") for one in content if isinstance(one, Mapping) and one.get("type") not in ("text", None)]
        if others:
            raise GatewiseError(f"message {number} has a part of type {others[0]!r}, and only text is trained: leave the row out")
        parts = [one.get("text") if isinstance(one, Mapping) else one for one in content]
        content = "\n".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str) or not content.strip():
        raise GatewiseError(f"message {number} ({role}) has no text")
    if given.get("weight") not in (None, 1):
        raise GatewiseError(f"message {number} has the weight {given['weight']!r}, and all count alike: leave the row out")
    if thought := [name for name in ("reasoning_content", "reasoning", "thinking") if given.get(name)]:
        raise GatewiseError(
            f"message {number} has {thought[0]!r}, which is not trained: write it into the content, or leave it out"
        )
    try:
        content.encode()
    except UnicodeEncodeError:
        raise GatewiseError(f"message {number} ({role}) has half of a surrogate pair, which UTF-8 cannot write") from None
    return {"role": role, "content": content}


# ---- how it is written ----


@dataclass(frozen=True)
class ChatFormat:
    """How conversations are written, and which answers in them are trained.

    Attributes:
        text: the Jinja template; None for the tokenizer's own, see ``of``.
        assistant: all answers of the assistant, or the last one of each conversation.
    """

    text: str | None = None
    assistant: Answers = "all"

    def of(self, tokenizer: PreTrainedTokenizerBase) -> "ChatFormat":
        """The same with the tokenizer's template where there is no other.

        Raises:
            GatewiseError: the tokenizer has none either.
        """
        if self.text is not None:
            return self
        if not tokenizer.chat_template:
            raise GatewiseError(
                f"the rows are conversations, but the tokenizer of {tokenizer.name_or_path} has no chat template: take a model "
                "that was trained to chat, such as smollm2-135m-instruct, or give a template (template.chat)"
            )
        return replace(self, text=str(tokenizer.get_chat_template()))

    def render(self, row: Mapping[str, Any]) -> str:
        """What the last answer of a conversation is written to, for a reader."""
        return "\n".join(f"{one['role']}: {one['content']}" for one in row["messages"][:-1])


def encode_chat(
    source: str,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatFormat,
    max_length: int,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Ids]]:
    """Ids and labels of conversations, which lose turns where they are longer than ``max_length``.

    Args:
        source: where they come from, for messages.
        say: called with how many were cut.

    Raises:
        GatewiseError: the template does not take one, or one is too long with one answer alone.
    """
    writer, last = _Writer(tokenizer, template), template.assistant == "last"
    made = _fitted(source, [row["messages"] for row in rows], writer.tokens, max_length, last, say)
    return [
        {"input_ids": ids, "labels": [token if own else IGNORED for token, own in zip(ids, mask, strict=True)]}
        for ids, mask in made
    ]


def chat_prompts(
    source: str, rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template: ChatFormat, room: int
) -> list[Ids]:
    """Ids of what the last answer of each conversation is written to, without its first turns where it is longer than ``room``.

    Raises:
        GatewiseError: the template does not take one, or the last message before the answer is too long.
    """
    writer = _Writer(tokenizer, template)
    return [ids for ids, _ in _fitted(source, [row["messages"][:-1] for row in rows], writer.prompt, room, True, None)]


class _Writer:
    """A template and the tokenizer that reads what it writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatFormat) -> None:
        if not tokenizer.is_fast:
            raise GatewiseError(f"conversations need a tokenizer of the tokenizers library, not a {type(tokenizer).__name__}")
        self.tokenizer, template = tokenizer, template.of(tokenizer)
        self.text, self.assistant = str(template.text), template.assistant
        added = {number for number, one in tokenizer.added_tokens_decoder.items() if one.special}
        self.special = {*tokenizer.all_special_ids, *added}

    def prompt(self, messages: Messages) -> Marked:
        """Ids of messages and of the header of the answer to them; none of them is the assistant's to learn."""
        ids = list(self.tokenizer(self._written(messages, header=True), add_special_tokens=False, verbose=False)["input_ids"])
        return ids, [False] * len(ids)

    def tokens(self, messages: Messages) -> Marked:
        """Ids of a conversation that ends with an answer, and which of them are the assistant's to learn.

        Raises:
            GatewiseError: the template does not take the messages, or does not say which tokens are the assistant's.
        """
        text = self._written(messages)
        marks = _GENERATION.search(self.text) is not None
        ids, mask = self._marked(messages) if marks else self._by_prefixes(messages, text)
        if not any(mask):
            raise GatewiseError(f"the chat template {'marks' if marks else 'writes'} nothing of the assistant's answers")
        self._end_turns(ids, mask)
        end = max(at for at, own in enumerate(mask) if own) + 1
        ids, mask = ids[:end], mask[:end]
        # Where turns end otherwise, or not at all: a base model with a chat template stops at nothing else.
        if self.tokenizer.eos_token_id not in (None, ids[-1]):
            ids, mask = [*ids, int(self.tokenizer.eos_token_id)], [*mask, True]
        return ids, mask

    def _end_turns(self, ids: Ids, mask: list[bool]) -> None:
        """Lets each answer go up to the token that ends it, and no further.

        What stands between it and the next turn, mostly a line break, comes after the answer has stopped. Where the template marks
        words alone, or has no end of turns, what comes straight after them and is no text ends them.
        """
        for start in [at for at, own in enumerate(mask) if own and not (at and mask[at - 1])]:
            end = next((at for at in range(start, len(ids)) if not mask[at]), len(ids))
            after = max((at + 1 for at in range(start, end) if ids[at] in self.special), default=start)
            if after > start and not str(self.tokenizer.decode(ids[after:end])).strip():
                mask[after:end] = [False] * (end - after)
            elif end < len(ids) and ids[end] in self.special:
                mask[end] = True

    def _marked(self, messages: Messages) -> Marked:
        """What the template itself marks."""
        made = self._applied(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(made["input_ids"]), [bool(one) for one in made["assistant_masks"]]
        starts = [at for at, own in enumerate(mask) if own and not (at and mask[at - 1])]
        return ids, mask if self.assistant == "all" else [own and at >= max(starts) for at, own in enumerate(mask)]

    def _by_prefixes(self, messages: Messages, text: str) -> Marked:
        """TRL's rule, on the tokens of the whole text: they are those that a server reads in a history."""
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = list(made["input_ids"]), made["offset_mapping"]
        mask = [False] * len(ids)
        turns = [at for at, one in enumerate(messages) if one["role"] == "assistant"]
        for at in turns if self.assistant == "all" else turns[-1:]:
            before = self._written(messages[:at], header=True)
            through = text if at + 1 == len(messages) else self._written(messages[: at + 1])
            if not text.startswith(before) or not text.startswith(through):
                last = ", or train the last answer alone (data.assistant: last)" if self.assistant == "all" else ""
                raise GatewiseError(
                    f"the chat template writes the first {at + 1} messages otherwise when more follow, so that nobody can tell "
                    f"which tokens are the assistant's: give one that marks them by {{% generation %}} (template.chat){last}"
                )
            own = [i for i, (start, end) in enumerate(spans) if max(start, len(before)) < min(end, len(through))]
            for i in own:
                mask[i] = True
        return ids, mask

    def _written(self, messages: Messages, header: bool = False) -> str:
        """The text of messages, with ``header`` that of an answer of the assistant's after them."""
        text = str(self._applied(messages, tokenize=False, add_generation_prompt=header))
        for one in messages:
            if one["role"] in ("system", "developer") and one["content"].strip() not in text:
                raise GatewiseError(f"the chat template does not know the role {one['role']!r}: it leaves such messages out")
        return text

    def _applied(self, messages: Messages, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.text, **options)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise GatewiseError(f"the chat template does not take these messages: {reason_of(error)}") from error


def _fitted(
    source: str,
    conversations: Sequence[Messages],
    make: Callable[[Messages], Marked],
    room: int,
    keep_last: bool,
    say: Callable[[str], None] | None,
) -> list[Marked]:
    """What ``make`` makes of conversations, each cut between turns to ``room`` tokens: its last turns are kept, or its first."""
    found, long, cut = [], [], 0
    for number, messages in enumerate(conversations, 1):
        try:
            made = make(messages)
            if len(made[0]) > room:
                head, turns = _turns(messages)

                def shorter(count: int, head: Messages = head, turns: list[Messages] = turns) -> Marked:
                    kept = turns[-count:] if keep_last else turns[:count]
                    return make([*head, *(message for turn in kept for message in turn)])

                least = shorter(1)
                if len(least[0]) > room:
                    long.append(len(least[0]))
                    continue
                count = bisect_left(range(2, len(turns)), True, key=lambda count: len(shorter(count)[0]) > room) + 1
                made, cut = shorter(count), cut + 1
        except GatewiseError as error:
            raise GatewiseError(f"{source}, conversation {number}: {error}") from error
        found.append(made)
    if long:
        raise GatewiseError(
            f"{len(long)} of {len(conversations)} conversations of {source} do not fit into {room} tokens even with a single turn, "
            f"which takes up to {max(long)}: raise max_length, or leave them out"
        )
    if cut and say:
        which = "first" if keep_last else "last"
        say(f"{cut} of {len(conversations)} conversations of {source} are longer than {room} tokens and lose their {which} turns")
    return found


def _turns(messages: Messages) -> tuple[Messages, list[Messages]]:
    """What the system says first, and the turns: what somebody says with the answers to it."""
    head = list(takewhile(lambda one: one["role"] in ("system", "developer"), messages))
    turns: list[Messages] = []
    for before, one in zip([None, *messages[len(head) :]], messages[len(head) :], strict=False):
        if before is None or (before["role"] == "assistant" and one["role"] != "assistant"):
            turns.append([])
        turns[-1].append(one)
    return head, turns
