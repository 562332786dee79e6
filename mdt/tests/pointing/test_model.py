"""Encoders that look both ways, whatever they were made for; rows and batches."""

from typing import Any

import pytest
import torch
from gatewise_mdt.pointing.heads import HeadSettings
from gatewise_mdt.pointing.model import PointingCollator, PointingModel, encode_records, encode_texts
from pointing_models import GOUT, POSITIONS, RECORDS, encoder, pointing_model
from saved_models import tiny_tokenizer
from tiny_run import SIZES, byte_tokenizer
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
)

from gatewise.errors import GatewiseError
from gatewise.models.loading import most_tokens

SETTINGS = HeadSettings(hidden=16, width=16, longest=8, dropout=0.0)
_SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    **SIZES,
}


def made(family: str) -> Any:
    """A random encoder of a family, all of whose windows are shorter than the texts."""
    torch.manual_seed(0)
    if family in ("llama", "bert"):
        return encoder(family)
    if family == "gpt2":
        return GPT2Model(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS))
    if family == "gemma3":
        return Gemma3TextModel(Gemma3TextConfig(**_SMALL, head_dim=8, sliding_window=4, layer_types=["sliding_attention"] * 2))
    if family == "qwen3":
        return Qwen3Model(Qwen3Config(**_SMALL, head_dim=8))
    if family == "mistral":
        return MistralModel(MistralConfig(**_SMALL, sliding_window=4))
    return RobertaModel(RobertaConfig(vocab_size=300, max_position_embeddings=POSITIONS, **SIZES))


EVERY = ["llama", "gemma3", "qwen3", "mistral", "gpt2", "bert", "roberta"]


def batch_of(texts: list[str]) -> dict[str, Tensor]:
    return PointingCollator(byte_tokenizer())(encode_texts(texts, byte_tokenizer()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", EVERY)
def test_the_first_token_sees_the_last_and_nobody_sees_padding(family: str, attention: str) -> None:
    base = made(family)
    base.set_attn_implementation(attention)
    model = PointingModel(base, SETTINGS).eval()
    with torch.no_grad():
        one, other = model(**batch_of(["a long text of words 1", "a long text of words 2"])).states
        assert not torch.allclose(one[0], other[0], atol=1e-6)
        alone = model(**batch_of(["a short text"])).states[0]
        beside = model(**batch_of(["a short text", "a text that is a good deal longer than that"])).states[0]
        assert torch.allclose(alone, beside[: len(alone)], atol=1e-5)


class Blinkered(GPT2Model):
    """Looks back whatever mask it is given."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids)


def test_an_encoder_that_cannot_look_ahead_is_refused() -> None:
    base = Blinkered(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(GatewiseError, match="attention of gpt2 models cannot be made to look in both directions"):
        PointingModel(base, SETTINGS)


def test_rounding_does_not_refuse_a_decoder() -> None:
    """With several threads the rows of a batch are rounded in different ways, which looks like a decoder that sees its padding."""
    threads = torch.get_num_threads()
    config = LlamaConfig(vocab_size=99, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9)
    torch.set_num_threads(2)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            assert PointingModel(LlamaModel(config).eval().to(dtype), HeadSettings(hidden=576, width=16)).whole_mask
    finally:
        torch.set_num_threads(threads)


def test_positions_that_are_no_texts_do_not_count() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 10**6
    config = RobertaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=34, pad_token_id=1
    )
    model = RobertaModel(config)
    assert most_tokens(model, tokenizer) == 32
    model(input_ids=torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 33), 5))


def test_heads_of_another_width_are_refused() -> None:
    with pytest.raises(GatewiseError, match="the heads are made for states of 32 numbers, but the base model's have 16"):
        PointingModel(encoder(), HeadSettings(hidden=32, width=16))


def test_states_do_not_need_gold_and_losses_come_with_them() -> None:
    model, tokenizer = pointing_model(), byte_tokenizer()
    bare = model(**batch_of([GOUT.text]))
    assert bare.loss is None
    assert bare.row_losses is None
    (row,) = encode_records([GOUT], tokenizer, 8)[0]
    whole = model(**PointingCollator(tokenizer)([row]))
    assert torch.equal(bare.states, whole.states)
    assert torch.equal(whole.loss, whole.row_losses.mean())
    batch = batch_of([GOUT.text])
    del batch["attention_mask"]
    assert torch.allclose(model(**batch).states, bare.states)


def test_a_batch_has_a_row_a_text_and_is_padded_on_the_right() -> None:
    rows = encode_records(RECORDS, byte_tokenizer(), 8)[0]
    batch = PointingCollator(byte_tokenizer())(rows)
    assert {len(value) for value in batch.values()} == {len(RECORDS)}
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][i, :length].tolist() == row["input_ids"]
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        for name in ("units", "mentions"):
            assert batch[name][i, : len(row[name])].tolist() == row[name]
            assert bool((batch[name][i, len(row[name]) :] == -1).all())


def test_without_a_token_for_padding_there_is_no_batch() -> None:
    with pytest.raises(GatewiseError, match="the tokenizer has no padding token"):
        PointingCollator(tiny_tokenizer())
