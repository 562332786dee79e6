"""Pieces of a text as they come: together they are the text, and none of them has half a character or a part of a stop string."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_models import word_tokenizer
from tiny_run import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gatewise.adapters.files import chat_template_of
from gatewise.errors import GatewiseError
from gatewise.serving.server.catalogue import Version, _signature
from gatewise.serving.server.text import Tokenizers, Writing, chat_ids
from gatewise.tasks import Records, Template, encode


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Small letters and blanks, and a token a byte for all else, as Llama 2 has it: those of no character are a mark each."""
    tokens = ["<unk>", *"abcdefghijklmnopqrstuvwxyz ", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({one: place for place, one in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("kind", [byte_tokenizer, fallback_tokenizer])
def test_pieces_are_what_the_prompt_lacks(kind: Any) -> None:
    """Wherever the prompt ends: of a character within which it does, all is given out."""
    tokenizer, chance = kind(), random.Random(1)
    for _ in range(300):
        text = "".join(chance.choice("ab 🙂é€x") for _ in range(chance.randint(2, 14)))
        parts = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in text]
        ids, place = [token for part in parts for token in part], chance.randrange(len(text))
        cut = sum(map(len, parts[:place])) + chance.randrange(len(parts[place]))
        writing = Writing(tokenizer, ids[:cut])
        given = [writing.add(token) for token in ids[cut:]]
        assert "".join(given) + writing.end() == text[place:], (text, cut)
        assert not any("\ufffd" in one for one in given)


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings(seed: int) -> None:
    """Against the obvious: cut the whole text at the first place where any of them stands, once one is whole."""
    chance = random.Random(seed)
    text = "".join(chance.choice("abé🙂") for _ in range(40))
    stops = tuple("".join(chance.choice("abé🙂") for _ in range(chance.randint(1, 4))) for _ in range(2))
    ends = [text.find(one) + len(one) for one in stops if one in text]
    tokenizer = byte_tokenizer()
    writing, given = Writing(tokenizer, tokenizer("Où 京 ", add_special_tokens=False)["input_ids"], stops), []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        given.append(writing.add(token))
        if writing.stopped:
            break
    assert writing.stopped == bool(ends)
    whole = text[: min(ends)] if ends else text
    assert "".join(given) + writing.end() == whole[: min([len(whole), *(whole.find(one) for one in stops if one in whole)])]


def test_no_stop_text_is_found_in_what_an_answer_leaves_out() -> None:
    for before, stop, text, given in (
        (" ", " ", " b a", "b"),
        (" ", " b", " b b", "b"),
        ("ab", "a", "abba", "b"),
        ("ab", "b", "aab", "aa"),  # it begins otherwise
        ("ab", "c", "a", "a"),  # it ends before
    ):
        tokenizer = byte_tokenizer()
        writing, found = Writing(tokenizer, [5], [stop], before), ""
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            found += "" if writing.stopped else writing.add(token)
        assert found + writing.end() == given


def test_bytes_of_no_character_behind_a_whole_one_end_no_answer() -> None:
    """They take the character along: the tokenizers library decodes a run of bytes as a whole, and then finds its past changed."""
    tokenizer = fallback_tokenizer()
    whole, (letter,) = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in ("🙂", "a"))
    broken = tokenizer.convert_tokens_to_ids("<0xF0>")
    writing = Writing(tokenizer, [letter])
    given = [writing.add(token) for token in (*whole, broken, letter, letter)]
    assert "".join(given[:4]) == "🙂"
    assert "".join(given[4:]).endswith("aa")


def test_a_word_behind_bytes_of_no_character_keeps_its_space() -> None:
    """Llama 2's decoder takes the blank off a first word, and this is none."""
    tokens = ["<unk>", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({one: place for place, one in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    writing = Writing(tokenizer, [1])
    written = tokenizer.convert_tokens_to_ids(["▁a", "<0xC3>", "<0xA9>", "<0xE2>", "▁a", "▁a"])
    assert "".join(map(writing.add, written)) + writing.end() == " aé a a"


def test_words_keep_their_spaces_and_special_tokens_are_none() -> None:
    writing = Writing(word_tokenizer(), [5, 6])
    assert [writing.add(7), writing.add(8), writing.add(0), writing.add(9)] == [" w5", " w6", "", " w7"]


def test_tokenizers_that_differ_in_one_file_are_two(tmp_path: Path) -> None:
    for name in ("w1", "w2"):
        word_tokenizer().save_pretrained(tmp_path / name)
        (tmp_path / name / "special_tokens_map.json").write_text(json.dumps({"bos_token": name}))
    versions = [Version(name, tmp_path / name, "plain", _signature(tmp_path / name)) for name in ("w1", "w2")]
    tokenizers = Tokenizers(word_tokenizer())
    assert [tokenizers.of(version).bos_token for version in versions] == ["w1", "w2"]


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("prompt", ['Say {{{{ it }}}}: {text}\n"{{%}}\\ 🙂\nLabel:', "{text}"])
def test_a_chat_becomes_the_prompt_of_training(tmp_path: Path, prompt: str, has_bos: bool) -> None:
    """Token by token; a message of a user takes the place of the one field."""
    tokenizer = byte_tokenizer()
    if has_bos:  # and what it puts behind a text has no place in a prompt
        ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    (tmp_path / "gatewise.json").write_text(json.dumps({"template": prompt}))
    chat, text = chat_template_of(tmp_path), "{{ messages }} é{% if"
    (row,) = encode(Records("label", [{"text": text + "  ", "label": "a"}], ["a", "b"], "rows"), tokenizer, Template(prompt))
    trained = [one for one, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert chat_ids(tokenizer, [{"role": "user", "content": text + "  "}], chat) == trained
    assert (trained[0] == tokenizer.bos_token_id) == has_bos


def test_a_chat_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    def asked(note: dict[str, Any], *roles: str) -> list[int]:
        (tmp_path / "gatewise.json").write_text(json.dumps(note))
        return chat_ids(byte_tokenizer(), [{"role": role, "content": "a"} for role in roles], chat_template_of(tmp_path))

    for roles in (("system", "user"), ("user", "assistant", "user"), ("assistant",)):
        with pytest.raises(
            GatewiseError, match="trained on single texts: send one message, which has the role user, and no others"
        ):
            asked({"template": "A: {text}\nB:"}, *roles)
    with pytest.raises(
        GatewiseError, match=r"the fields premise, hypothesis: send the whole prompt to /v1/completions, as '\{premise\}"
    ):
        asked({"template": "{premise} {hypothesis}"}, "user")
    with pytest.raises(GatewiseError, match="has no chat template: ask /v1/completions"):
        asked({}, "user")
    with pytest.raises(GatewiseError, match=r"gatewise\.json: template has unmatched braces .*: restore the file"):
        asked({"template": "{text"}, "user")
    whole = asked({"template": None, "chat_template": "{% for m in messages %}{{ m.role }}{% endfor %}!"}, "system", "user")
    assert byte_tokenizer().decode(whole) == "systemuser!"
    for kept, written in (
        ("{{ messages[0].content }}.", "a."),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages[0].content }};"}], "a;"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": kept}))  # as older libraries save it
        assert byte_tokenizer().decode(asked({}, "user")) == written
    for other in ({}, {"chat_template": None}, {"chat_template": [{"name": "tool_use", "template": "x"}, 3]}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(other))
        assert chat_template_of(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}?")  # as TRL saves it with an adapter
    assert byte_tokenizer().decode(asked({}, "user")) == "a?"
