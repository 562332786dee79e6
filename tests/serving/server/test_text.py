"""Pieces of a text as they come: together they are the text, and none of them has half a character or a part of a stop string."""

import random
from typing import Any

import pytest
from tiny_models import word_tokenizer
from tiny_run import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gatewise.serving.server.text import Writing

TEXT = "Zürich 東京 – 🙂🙃 naïve  two  spaces\nend"


def pieces(text: str, stop: tuple[str, ...] = (), prompt: str = "Où 京 ") -> tuple[list[str], bool]:
    """What is given out for the bytes of a text, one token each, to the first stop string."""
    tokenizer = byte_tokenizer()
    writing = Writing(tokenizer, tokenizer(prompt, add_special_tokens=False)["input_ids"], stop)
    given = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        given.append(writing.add(token))
        if writing.stopped:
            return given, True
    return [*given, writing.end()], writing.stopped


def test_pieces_are_the_text() -> None:
    given, stopped = pieces(TEXT)
    assert "".join(given) == TEXT
    assert not stopped
    assert not any("\ufffd" in one for one in given)
    assert sum(map(bool, given)) == len(TEXT)


def test_half_a_character_at_the_end_is_shown() -> None:
    tokenizer = byte_tokenizer()
    writing = Writing(tokenizer, [], ())
    tokens = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert writing.add(tokens[0]) == ""
    assert writing.end() == "\ufffd"


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Small letters and blanks, and a token a byte for all else, as Llama 2 has it: those of no character are a mark each."""
    tokens = ["<unk>", *"abcdefghijklmnopqrstuvwxyz ", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({one: place for place, one in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("kind", [byte_tokenizer, fallback_tokenizer])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_within_which_the_prompt_ends_is_given_out_whole(cut: int, kind: Any) -> None:
    tokenizer = kind()
    ids, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab🙂", "🙃xyz🙃 uv"))
    writing = Writing(tokenizer, ids[:-cut])
    given = [writing.add(token) for token in ids[-cut:] + after]
    assert given[:cut] == [""] * (cut - 1) + ["🙂"]
    assert "".join(given[cut:]) + writing.end() == "🙃xyz🙃 uv"


@pytest.mark.parametrize("kind", [byte_tokenizer, fallback_tokenizer])
@pytest.mark.parametrize(
    ("text", "place", "cut"),
    [("aééx", 2, 1), ("aé€🙂x", 3, 2), ("🙂🙂é", 2, 0), ("é€€ ", 2, 1), ("ab🙂🙂éxyz", 4, 0)],
)
def test_whole_characters_of_the_prompt_are_not_given_out_again(text: str, place: int, cut: int, kind: Any) -> None:
    """Where a prompt ends within a character, or what is read of it begins within one."""
    tokenizer = kind()
    before, whole = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (text[:place], text))
    writing = Writing(tokenizer, whole[: len(before) + cut])
    assert "".join(writing.add(token) for token in whole[len(before) + cut :]) + writing.end() == text[place:]


@pytest.mark.parametrize("kind", [byte_tokenizer, fallback_tokenizer])
def test_an_answer_is_what_the_prompt_lacks(kind: Any) -> None:
    tokenizer, chance = kind(), random.Random(1)
    for _ in range(300):
        text = "".join(chance.choice("ab 🙂é€x") for _ in range(chance.randint(2, 14)))
        parts = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in text]
        ids, place = [token for part in parts for token in part], chance.randrange(len(text))
        cut = sum(map(len, parts[:place])) + chance.randrange(len(parts[place]))
        writing = Writing(tokenizer, ids[:cut])
        assert "".join(writing.add(token) for token in ids[cut:]) + writing.end() == text[place:], (text, cut)


def test_a_mark_of_the_prompts_own_is_not_given_out_again() -> None:
    tokenizer = byte_tokenizer()
    writing = Writing(tokenizer, tokenizer("ab\ufffd", add_special_tokens=False)["input_ids"])
    assert "".join(writing.add(token) for token in tokenizer("xé", add_special_tokens=False)["input_ids"]) == "xé"


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings(seed: int) -> None:
    """Against the obvious: cut the whole text at the first place where any of them stands."""
    chance = random.Random(seed)
    text = "".join(chance.choice("abé🙂") for _ in range(40))
    stops = tuple("".join(chance.choice("abé🙂") for _ in range(chance.randint(1, 4))) for _ in range(2))
    places = [text.find(one) for one in stops if one in text]
    # What comes first is what is whole first.
    ends = [text.find(one) + len(one) for one in stops if one in text]
    given, stopped = pieces(text, stops)
    assert stopped == bool(places)
    if stopped:
        whole = text[: min(ends)]
        assert "".join(given) == whole[: min(whole.find(one) for one in stops if one in whole)]
    else:
        assert "".join(given) == text


def test_words_keep_their_spaces() -> None:
    writing = Writing(word_tokenizer(), [5, 6])
    assert [writing.add(7), writing.add(8), writing.add(0), writing.add(9)] == [" w5", " w6", "", " w7"]
