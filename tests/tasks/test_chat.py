"""Conversations: rows of every writing, and the mask of the assistant's tokens, made the slow obvious way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import gatewise
from gatewise.errors import GatewiseError
from gatewise.tasks import ChatFormat, Records, Template, encode, evaluate, load_records

HEADER = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}" + HEADER
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}{{ '\\n' }}{% endfor %}" + HEADER
)
# The first marks the line break after the end too, the second the words alone; in the third nothing ends a turn; in the fourth
# the last answer has what earlier ones have lost.
LINE_MARKED = MARKED.replace("</s>{% endgeneration %}", "</s>{{ '\\n' }}{% endgeneration %}").replace(
    "{{ '\\n' }}{% endfor %}", "{{ '' if m.role == 'assistant' else '\\n' }}{% endfor %}"
)
HALF_MARKED = MARKED.replace("</s>{% endgeneration %}", "{% endgeneration %}</s>")
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
THINKING = PLAIN.replace("{{ m.content }}", "{{ '(hm) ' if loop.last and m.role == 'assistant' else '' }}{{ m.content }}")

TALK = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": "where is the parcel"},
    {"role": "assistant", "content": "the parcel is late"},
    {"role": "user", "content": "and the bill"},
    {"role": "assistant", "content": "the bill is wrong"},
]


def talks(*rows: list[dict[str, str]]) -> Records:
    return Records("chat", [{"messages": list(row)} for row in rows], None, "talks")


def by_hand(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], trained: list[int]) -> dict[str, list[int]]:
    """One message after the other: the header, the words, the end; a label for words and end of the messages ``trained``."""
    ids: list[int] = []
    labels: list[int] = []
    for number, message in enumerate(messages):
        header = [tokenizer.bos_token_id, *tokenizer(f"{message['role']}\n")["input_ids"]]
        words = [*tokenizer(message["content"])["input_ids"], tokenizer.eos_token_id]
        line = tokenizer("\n")["input_ids"]
        ids += [*header, *words, *line]
        labels += [-100] * len(header) + (words if number in trained else [-100] * len(words)) + [-100] * len(line)
    end = max(at for at, label in enumerate(labels) if label != -100) + 1  # nobody reads what stands behind the last answer
    return {"input_ids": ids[:end], "labels": labels[:end]}


@pytest.mark.parametrize("text", [PLAIN, MARKED, LINE_MARKED, HALF_MARKED])
def test_the_assistants_words_and_their_end_are_trained(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert encode(talks(TALK), tokenizer, ChatFormat(text)) == [by_hand(tokenizer, TALK, [2, 4])]
    assert encode(talks(TALK), tokenizer, ChatFormat(text, "last")) == [by_hand(tokenizer, TALK, [4])]


def test_the_last_answer_ends_the_text_however_the_template_ends_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    end, other = "</s>", "<pad>"
    for text, expected in (
        (ENDLESS, " the parcel is late\n the bill is wrong\n" + end),
        (PLAIN.replace(end, other), f"the parcel is late{other}the bill is wrong{other}{end}"),
    ):
        (row,) = encode(talks(TALK), tokenizer, ChatFormat(text))
        assert [label for label in row["labels"] if label != -100] == tokenizer(expected)["input_ids"]


def test_a_template_whose_prefix_is_no_prefix(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        GatewiseError, match="talks, conversation 1: the chat template writes the first 3 messages otherwise when more"
    ):
        encode(talks(TALK), tokenizer, ChatFormat(THINKING))
    (row,) = encode(talks(TALK), tokenizer, ChatFormat(THINKING, "last"))  # which needs no more than the text before it
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "(hm) the bill is wrong</s>"


def test_a_long_conversation_loses_turns_and_keeps_what_the_system_said(tokenizer: PreTrainedTokenizerFast) -> None:
    long = [*TALK, *TALK[1:3], *TALK[3:5]]
    room = len(by_hand(tokenizer, TALK, [2, 4])["input_ids"]) + 3
    said: list[str] = []
    assert (
        encode(talks(long, TALK), tokenizer, ChatFormat(PLAIN), max_length=room, say=said.append)
        == [by_hand(tokenizer, TALK, [2, 4])] * 2
    )
    assert said == [f"1 of 2 conversations of talks are longer than {room} tokens and lose their last turns"]
    kept = encode(talks([TALK[0], *TALK[3:], *TALK[1:]]), tokenizer, ChatFormat(PLAIN, "last"), max_length=room)
    assert kept == [by_hand(tokenizer, TALK, [4])]
    with pytest.raises(
        GatewiseError, match=r"2 of 2 conversations of talks do not fit into 9 tokens even with a single turn, which"
    ):
        encode(talks(long, TALK), tokenizer, ChatFormat(PLAIN), max_length=9)


def test_the_last_turn_is_written_and_compared(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    llama.eval()
    rows, template = talks(TALK, TALK[:3]), ChatFormat(PLAIN)
    answers: list[dict[str, Any]] = []
    metrics = evaluate(llama, tokenizer, rows, template, max_new_tokens=6, batch_size=2, answers=answers)
    losses = []
    for messages, trained, answer in ((TALK, [2, 4], answers[0]), (TALK[:3], [2], answers[1])):
        row = by_hand(tokenizer, messages, trained)
        with torch.no_grad():
            logits = llama(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        losses += [-float(logits[at, label]) for at, label in enumerate(row["labels"][1:]) if label != -100]
        text = tokenizer.apply_chat_template(messages[:-1], chat_template=PLAIN, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, return_tensors="pt")
        written = llama.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert answer["predicted"] == tokenizer.decode(written, skip_special_tokens=True)
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics.keys() == {"loss", "bleu", "rougeL", "n"}
    with pytest.raises(GatewiseError, match="talks holds conversations, which a chat template writes: leave the prompt out"):
        evaluate(llama, tokenizer, rows, Template("{text}"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"messages": [*TALK, {"role": "user", "content": "thanks"}], "tools": None},
        {"system": "be good", "messages": TALK[1:]},
        {"system": "be good", "prompt": TALK[1:4], "completion": TALK[4:]},
        {"prompt": TALK[:4], "completion": "the bill is wrong"},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], "system"), "value": m["content"]} for m in TALK
            ]
        },
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}], "tool_calls": None} for m in TALK]},
    ],
)
def test_rows_of_every_writing_are_the_same_conversation(write: Callable[..., Path], row: dict[str, Any]) -> None:
    records = load_records(write([row]))
    assert (records.kind, records.rows[0]["messages"]) == ("chat", TALK)


def test_prompt_and_completion_as_texts_come_from_csv_too(write: Callable[..., Path]) -> None:
    records = load_records(write("prompt,completion\nwhere is it,late\n", "rows.csv"))
    assert records.rows[0]["messages"] == [{"role": "user", "content": "where is it"}, {"role": "assistant", "content": "late"}]


def said(role: str, content: Any = "words", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = said("user")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": [said("assistant")]}, "line 2: the conversation begins with the assistant: expected a message of the user"),
        (
            {"messages": [ASKED, said("asistant")]},
            "line 2: message 2 has the role 'asistant', expected one of system, developer, user",
        ),
        ({"messages": [ASKED]}, "line 2: there is no message of the role assistant"),
        ({"messages": "hello"}, "line 2: expected 'messages', a list of objects with 'role' and 'content'"),
        ({"messages": ["hello"]}, "line 2: message 1: expected an object with 'role' and 'content'"),
        ({"messages": [ASKED, said("assistant", None, tool_calls=[{}])]}, "line 2: message 2 is of a tool or calls one"),
        ({"messages": [ASKED, said("tool"), said("assistant")]}, "line 2: message 2 is of a tool or calls one"),
        ({"messages": TALK, "tools": [{"name": "search"}]}, "line 2: it has tools"),
        (
            {"messages": [said("user", [{"type": "image"}])]},
            "line 2: message 1 has a part of type 'image', and only text is trained",
        ),
        ({"messages": [ASKED, said("assistant", " ")]}, r"line 2: message 2 \(assistant\) has no text"),
        ({"messages": [said("user", [{"type": "text"}])]}, r"line 2: message 1 \(user\) has no text"),
        ({"messages": [ASKED, said("assistant", weight=0)]}, "line 2: message 2 has the weight 0, and all count alike"),
        ({"messages": [ASKED, said("assistant", reasoning_content="hm")]}, "line 2: message 2 has 'reasoning_content', which is"),
        ({"prompt": "words", "completion": 5}, r"line 2: message 2 \(assistant\) has no text"),
        ({"messages": TALK, "system": "more"}, "line 2: it has 'system' and a first message of the role system"),
        ({"text": "words", "label": "x"}, "line 2: expected 'messages', a list of objects"),
    ],
)
def test_what_is_no_conversation_is_refused(write: Callable[..., Path], row: dict[str, Any], sentence: str) -> None:
    path = write("".join(json.dumps(one) + "\n" for one in ({"messages": TALK}, row)))
    with pytest.raises(GatewiseError, match=sentence):
        load_records(path)


def test_what_the_template_does_not_take_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
    deaf = PLAIN.replace("<s>", "{% if m.role == 'system' %}{% continue %}{% endif %}<s>", 1)
    for text, sentence in (
        (strict, "talks, conversation 1: the chat template does not take these messages: System role not supported"),
        (deaf, "talks, conversation 1: the chat template does not know the role 'system': it leaves such messages out"),
        ("{% generation %}{% endgeneration %}" + PLAIN, "the chat template marks nothing of the assistant's answers"),
        ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}", "the chat template writes nothing of the"),
    ):
        with pytest.raises(GatewiseError, match=sentence):
            encode(talks(TALK), tokenizer, ChatFormat(text))
    with pytest.raises(GatewiseError, match=r"the rows are conversations, but the tokenizer of .* has no chat template"):
        encode(talks(TALK), tokenizer, None)


# ---- rows held out in a script ----

NUMBERED = [[*TALK[:1], {"role": "user", "content": f"lamp {number}"}, *TALK[2:]] for number in range(12)]


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    own.chat_template = PLAIN
    return own


def labels_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return [[label for label in row if label != -100] for row in batch["labels"].tolist()]


@pytest.mark.parametrize("as_dataset", [True, False])
def test_conversations_are_trained_on_or_held_out(chat_tokenizer: PreTrainedTokenizerFast, as_dataset: bool) -> None:
    rows: Any = [{"messages": one} for one in NUMBERED]
    rows = Dataset.from_list(rows) if as_dataset else rows
    before = torch.random.get_rng_state()
    rest, batch = gatewise.hold_out(rows, chat_tokenizer, n=8, seed=1)  # no more than a quarter, three
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(rest, type(rows))
    held = [row for row in NUMBERED if row not in [one["messages"] for one in rest]]
    assert (len(rest), len(held)) == (9, 3)
    expected = [by_hand(chat_tokenizer, row, [2, 4]) for row in held]
    for ids, labels, own in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), expected, strict=True):
        assert (ids[: len(own["input_ids"])], labels[: len(own["labels"])]) == (own["input_ids"], own["labels"])


def test_other_rows_of_trainers(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = chat_tokenizer("the lamp is good")["input_ids"]
    end = chat_tokenizer.eos_token_id
    for row, expected in (
        ({"prompt": TALK[:4], "completion": TALK[4:]}, [*chat_tokenizer("the bill is wrong")["input_ids"], end]),
        ({"prompt": "the lamp", "completion": " is good"}, [*tokens[-2:], end]),  # as TRL joins texts
        ({"text": "the lamp is good"}, [*tokens, end]),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [6, 7]),
        ({"input_ids": [5, 6, 7]}, [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}, [6]),  # as TRL tokenises
    ):
        _, batch = gatewise.hold_out([row] * 4, chat_tokenizer, assistant="last")
        assert labels_of(batch) == [expected]
    with pytest.raises(GatewiseError, match="row 0 has question: expected messages, prompt and completion, text, or input_ids"):
        gatewise.hold_out([{"question": "x"}] * 2, chat_tokenizer)
    with pytest.raises(GatewiseError, match="1 of 1 rows cannot be held out"):
        gatewise.hold_out([{"text": "x"}], chat_tokenizer, n=1)
    with pytest.raises(GatewiseError, match="row 0 is a str: expected a mapping"):
        gatewise.hold_out(["x"] * 2, chat_tokenizer)
    with pytest.raises(GatewiseError, match="row 0 has one label, a classifier's"):
        gatewise.hold_out([{"input_ids": [5, 6], "labels": 1}] * 2, chat_tokenizer)
    with pytest.raises(GatewiseError, match=r"several splits \(train, test\): give one, such as data\['train'\]"):
        gatewise.hold_out(DatasetDict(train=Dataset.from_list([]), test=Dataset.from_list([])), chat_tokenizer)
