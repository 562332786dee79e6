"""``fast_lora`` gives what PEFT gives: in forwards and generation, one adapter and several, whatever they differ in."""

from typing import Any

import pytest
import torch
from mixed_models import NAMES, both, generation, logits, mixed_model, prompts
from peft import LoraConfig, PeftModel
from tiny_models import random_adapter
from torch import Tensor


def assert_same_generation(model: PeftModel, names: list[str] | None, inputs: dict[str, Tensor], **settings: Any) -> None:
    theirs, ours = both(model, lambda: generation(model, names, inputs, **settings))
    assert torch.equal(theirs.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_forward_is_peft_s(family: str, names: list[str] | None) -> None:
    model = mixed_model(family)
    for adapter in ("all", "some"):
        model.set_adapter(adapter)
        for width in (1, 7, 30):
            theirs, ours = both(model, lambda width=width: logits(model, names, prompts(5, width, padded=width > 1)))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_is_peft_s(family: str, names: list[str] | None, beams: int) -> None:
    assert_same_generation(mixed_model(family), names, prompts(5, padded=True), num_beams=beams)


def test_generation_of_one_row_and_many_adapters() -> None:
    model = mixed_model()
    assert_same_generation(model, None, prompts(1))
    assert_same_generation(model, ["other"], prompts(1))
    for number in range(20):
        model.add_adapter(f"more{number}", LoraConfig(r=1 + number % 3, target_modules=["v_proj", "down_proj"]))
    random_adapter(model)
    assert_same_generation(model, [f"more{number}" for number in range(20)], prompts(20))


@pytest.mark.parametrize("names", [None, NAMES["mixed"]], ids=["one adapter", "mixed"])
def test_generation_with_other_caches(names: list[str] | None) -> None:
    model = mixed_model()
    for settings in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert_same_generation(model, names, prompts(5), **settings)


def test_sampling_several_sequences() -> None:
    model = mixed_model()

    def sample() -> Tensor:
        torch.manual_seed(5)
        return model.generate(**prompts(2), max_new_tokens=8, do_sample=True, num_return_sequences=3, pad_token_id=0)

    assert torch.equal(*both(model, sample))


def test_several_active_adapters_add_up() -> None:
    model = mixed_model()
    model.base_model.set_adapter(["all", "some", "other"])
    theirs, ours = both(model, lambda: logits(model, None, prompts(3)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_no_further_from_the_truth_than_peft(names: list[str] | None, autocast: bool) -> None:
    """The truth is the same model in float32; without autocast PEFT keeps its adapters in float32 on a bfloat16 base."""
    model = random_adapter(mixed_model(dtype=torch.float32 if autocast else torch.bfloat16), scale=0.05)
    if not autocast:
        assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["all"].weight.dtype == torch.float32

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return logits(model, names, prompts(5, 30)).float()

    theirs, ours = both(model, run)
    truth = logits(model.float(), names, prompts(5, 30))
    assert (ours - truth).abs().mean() < 1.25 * (theirs - truth).abs().mean()
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1 * float(truth.std()))


def test_float16_adapters() -> None:
    model = mixed_model(dtype=torch.float16)
    theirs, ours = both(model, lambda: logits(model, NAMES["mixed"], prompts(5)).float())
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)
