"""Pieces of a text as they come: together they are the text, and none of them has half a character or a part of a stop string."""

import random

import pytest
from tiny_models import word_tokenizer
from tiny_run import byte_tokenizer

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
