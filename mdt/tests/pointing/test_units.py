"""Texts in units and tokens."""

import unicodedata
from typing import Any

import pytest
from gatewise_mdt import sample
from gatewise_mdt.pointing.units import MOST_INSIDE, Units, tokens_of
from gatewise_mdt.spans import find
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import properties
from tiny_models import word_tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from gatewise.errors import GatewiseError

ODD = "ab sAS5.@-\n\t\x00\x1f\u200b\u200d\ufeff\u00ad\u0301é👩孕妇每日，½²㎎ﬁ"
texts = st.text(st.one_of(st.sampled_from(ODD), st.characters()), max_size=40)


def wrapped(inner: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def careful_tokenizer(special: bool = True) -> PreTrainedTokenizerFast:
    """Words, marks and Chinese characters as BERT parts them; it drops control characters and what is not to be seen."""
    inner = Tokenizer(WordLevel({"<unk>": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="<unk>"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if special:
        inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return wrapped(inner)


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Two characters in a token, whatever they are."""
    inner = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,2}"), "isolated")
    return wrapped(inner)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte in a token: several tokens in a Chinese character."""
    inner = Tokenizer(BPE({one: i for i, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return wrapped(inner)


TOKENIZERS = {"careful": careful_tokenizer(), "pair": pair_tokenizer(), "byte": byte_tokenizer(), "word": word_tokenizer()}


def parts(units: Units) -> list[str]:
    return [units.text[span.start : span.end] for span in units.spans]


# ---- units ----


@pytest.mark.parametrize(
    ("text", "expected", "population"),
    [
        ("adults with gout@Give  2.5 mg\n\ndaily.", ["adult", "s", "with", "gout", "@", "Give", "2.5 mg", "daily", "."], 4),
        ("孕妇@每日3-5mg/kg，口服 阿司匹林", [*"孕妇@", "每日3-5mg/kg", *"，口服阿司匹林"], 2),
        ("patches or PPIs, not sepsis", ["patch", "es", "or", "PPI", "s", ",", "not sepsis"], 0),
        ("\ufeffmen@ iron\u200b, zinc\u2060", ["men", "@", "iron", ",", "zinc"], 1),
        ("so\u00adft", ["so\u00adft"], 0),
        ("👩\u200d⚕ 5 mg", ["👩", "⚕", "5 mg"], 0),
        ("", [], 0),
        (" \n\u200b ", [], 0),
        ("@", ["@"], 0),
        ("  @ x", ["@", "x"], 0),
        ("a@b@c", ["a", "@", "b", "@", "c"], 1),
    ],
)
def test_units(text: str, expected: list[str], population: int) -> None:
    units = Units.of(text)
    assert parts(units) == expected
    assert len(units) == len(expected)
    assert units.population == population
    assert [units.of_span(span) for span in units.spans] == [(i, i + 1) for i in range(len(expected))]


@properties
@given(texts)
def test_units_follow_each_other_and_leave_out_nothing_that_is_seen(text: str) -> None:
    units = Units.of(text)
    rest, at = [], 0
    for span in units.spans:
        assert at <= span.start < span.end
        rest.append(text[at : span.start])
        at = span.end
    assert all(one.isspace() or unicodedata.category(one) == "Cf" for one in "".join([*rest, text[at:]]))
    assert all(part == part.strip() for part in parts(units))


@properties
@given(texts, st.integers(0, 39), st.integers(1, 12))
def test_every_phrase_that_is_found_in_a_text_is_made_of_units(text: str, begin: int, size: int) -> None:
    units = Units.of(text)
    for span in find(text, text[begin : begin + size]):
        place = units.of_span(span)
        assert place is not None
        assert units.phrase(*place) == " ".join(text[span.start : span.end].split())


def test_spans_that_cut_units_are_no_phrases() -> None:
    units = Units.of("Give 2.5 mg")
    assert units.of_span(find("Give 2.5 mg", "2.5 mg")[0]) == (1, 2)
    for begin, end in ((5, 8), (7, 11), (4, 11), (5, 5), (11, 5)):
        assert units.of_span(find("Give 2.5 mg", "Give")[0]._replace(start=begin, end=end)) is None
    assert units.phrase(0, 2) == "Give 2.5 mg"
    assert units.phrase(0, 0) == units.phrase(2, 2) == units.phrase(1, 0) == Units.of("").phrase(0, 0) == ""


# ---- tokens ----


def readable(text: str) -> str:
    """Half of a surrogate pair is no text for a tokenizer."""
    return "".join("\ufffd" if "\ud800" <= one <= "\udfff" else one for one in text)


def check_tokens(units: Units, tokenizer: Any) -> dict[str, list[int]]:
    """Against the tokenizer's own offsets, character by character."""
    made = tokens_of(units, tokenizer)
    text = readable(units.text)
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert made["input_ids"] == encoded["input_ids"]
    keys = ("unit_first", "unit_last", "unit_begins", "unit_ends")
    assert all(len(made[key]) == len(units) for key in keys)
    before = 0
    for span, first, last, begins, ends in zip(units.spans, *(made[key] for key in keys), strict=True):
        places = encoded["offset_mapping"]
        of = [[token for token, (begin, end) in enumerate(places) if begin <= at < end] for at in range(span.start, span.end)]
        of = [tokens for tokens in of if tokens]
        assert (first, last) == ((of[0][0], of[-1][-1]) if of else (before, before))
        assert 0 <= first <= last < len(places)
        if of:
            assert begins == min(MOST_INSIDE, len(text[places[first][0] : span.start].strip()))
            assert ends == min(MOST_INSIDE, len(text[span.end : places[last][1]].strip()))
        before = last
    return made


@pytest.mark.parametrize("name", TOKENIZERS)
def test_units_among_the_tokens_of_every_kind(name: str) -> None:
    for text in [record.text for record in sample()[:5]] + [
        "孕妇@每日3-5mg/kg，口服 阿司匹林",
        "👩\u200d⚕ \x00 iron\u200b é e\u0301 \ud800",
        "@",
    ]:
        check_tokens(Units.of(text), TOKENIZERS[name])


@properties
@given(texts, st.sampled_from(sorted(TOKENIZERS)))
def test_no_text_is_refused(text: str, name: str) -> None:
    units = Units.of(text)
    if units.spans and not TOKENIZERS[name](readable(text))["input_ids"]:
        with pytest.raises(GatewiseError, match="makes no token of this text"):
            tokens_of(units, TOKENIZERS[name])
    else:
        check_tokens(units, TOKENIZERS[name])


def test_units_within_a_token() -> None:
    made = tokens_of(Units.of("每天服药吧"), pair_tokenizer())
    assert made["unit_first"] == made["unit_last"] == [0, 0, 1, 1, 2]
    assert made["unit_begins"] == [0, 1, 0, 1, 0]
    assert made["unit_ends"] == [1, 0, 1, 0, 0]
    made = tokens_of(Units.of("妇"), byte_tokenizer())
    assert (made["unit_first"], made["unit_last"], len(made["input_ids"])) == ([0], [2], 3)


def test_a_unit_without_tokens_is_where_the_last_one_is() -> None:
    made = tokens_of(Units.of("\x00 iron \x07 zinc \x07"), careful_tokenizer())
    assert len(made["input_ids"]) == 4  # [CLS] iron zinc [SEP]
    assert made["unit_first"] == made["unit_last"] == [0, 1, 1, 2, 2]
    with pytest.raises(GatewiseError, match="makes no token of this text"):
        tokens_of(Units.of("\x07"), careful_tokenizer(special=False))
    assert tokens_of(Units.of(""), careful_tokenizer(special=False))["input_ids"] == []


def test_nothing_is_cut_off_or_filled_up() -> None:
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 4
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    made = tokens_of(Units.of("w1 w2 w3 w4 w5 w6"), tokenizer)
    assert len(made["input_ids"]) == 6
    assert made["unit_first"] == list(range(6))
    assert len(tokens_of(Units.of("w1"), tokenizer)["input_ids"]) == 1


def test_a_tokenizer_without_places_is_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "some/model"

    with pytest.raises(GatewiseError, match="the tokenizer of some/model does not say where"):
        tokens_of(Units.of("a"), Slow())  # type: ignore[arg-type]
