"""Prompts in a model of texts with images (Gemma 3): generators read the images of the prompt as they read its words."""

from typing import Any

import prompt_reference as reference
import pytest
import torch
from peft import get_peft_model
from prompted_models import prompt_config, prompted, prompted_base
from test_forward import padded, rows_of
from torch import Tensor

from gatewise.errors import GatewiseError

FAMILY = "gemma3-images"
BEGIN, END, IMAGE = 57, 58, 59
PICTURE = [BEGIN, *[IMAGE] * 4, END]


@pytest.fixture
def texts() -> list[Tensor]:
    """With one image, with two, with none. Gemma's window of four tokens ends inside of them."""
    return [torch.tensor(text) for text in ([5, *PICTURE, 6, 7, 8], [9, *PICTURE, 10, *PICTURE, 11, 12], [13, 14, 15, 16, 17, 18])]


@pytest.fixture
def pictures() -> list[Tensor | None]:
    """Those of each text."""
    drawn = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return [drawn[:1], drawn[1:], None]


def given(texts: list[Tensor], pictures: list[Tensor | None], side: str = "right") -> dict[str, Tensor]:
    batch = padded(texts, side, max(map(len, texts)) + 1)
    drawn = [one for one in pictures if one is not None]
    images = {"pixel_values": torch.cat(drawn)} if drawn else {}
    return {**batch, **images, "token_type_ids": (batch["input_ids"] == IMAGE).long()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, [1]], ids=str)
def test_prompts_concatenated_by_hand(texts: Any, pictures: Any, layers: Any, attention: str) -> None:
    model = prompted(FAMILY, attention, prompt_layers=layers, tau=0.7)
    base = reference.plain_copy(model)
    with torch.no_grad():
        expected = [reference.logits(base, model, *pair[:1], pixels=pair[1]) for pair in zip(texts, pictures, strict=True)]
        for side in ("right", "left"):
            batch = given(texts, pictures, side)
            for got, wanted in zip(rows_of(model(**batch).logits, batch["attention_mask"]), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        for text, drawn, wanted in zip(texts, pictures, expected, strict=True):
            alone = given([text], [drawn])
            alone = {name: value if name == "pixel_values" else value[:, :-1] for name, value in alone.items()}
            torch.testing.assert_close(model(**alone).logits[0], wanted, rtol=1e-4, atol=1e-4)
            del alone["attention_mask"]
            torch.testing.assert_close(model(**alone).logits[0], wanted, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            plain = model(**alone).logits[0]
        assert (plain - wanted).abs().max() > 1e-3


def settings(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}


def by_hand(model: Any, text: Tensor, pixels: Tensor | None) -> list[int]:
    """Greedy, everything computed anew for every token."""
    base, row = reference.plain_copy(model), text
    with torch.no_grad():
        for _ in range(4):
            row = torch.cat([row, reference.logits(base, model, row, read=len(text), pixels=pixels)[-1:].argmax(-1)])
    return row[len(text) :].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, [1]], ids=str)
def test_generation(texts: Any, pictures: Any, layers: Any, attention: str) -> None:
    model = prompted(FAMILY, attention, prompt_layers=layers)
    model.get_base_model().lm_head.weight.data[IMAGE] = 0  # it writes no image, which nobody would have drawn
    batch = given(texts, pictures, "left")
    expected = [by_hand(model, *pair) for pair in zip(texts, pictures, strict=True)]
    assert not any(IMAGE in row for row in expected)
    for mode in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert model.generate(**batch, **settings(**mode))[:, 17:].tolist() == expected, mode
    beams = [model.generate(**batch, **settings(num_beams=3, use_cache=cached)) for cached in (True, False)]
    assert torch.equal(*beams)
    with model.disable_adapter():
        assert model.generate(**batch, **settings())[:, 17:].tolist() != expected


def test_settings_of_its_text_model_that_are_refused(texts: Any, pictures: Any) -> None:
    base = prompted_base(FAMILY)
    base.config.text_config.use_bidirectional_attention = True
    with pytest.raises(GatewiseError, match="gemma3 model has use_bidirectional_attention=True"):
        get_peft_model(base, prompt_config(FAMILY))
    model = prompted(FAMILY)
    model.get_base_model().config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(GatewiseError, match="attn_implementation is 'flex_attention'"):
        model(**given(texts, pictures))
