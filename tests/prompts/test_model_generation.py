"""Generation with a cache against the loop by hand, which has none, and the cache's own dealings."""

import copy
from typing import Any

import prompt_reference as reference
import pytest
import torch
from prompted_models import DECODERS, prompt_config, prompted
from tiny_models import tiny_base
from transformers import DynamicCache, StaticCache

from gatewise.errors import GatewiseError

NEW = 4


@pytest.fixture
def batch(texts):
    """Left-padded prompts; with the new tokens all but the shortest outgrow Gemma's window."""
    width = 9
    ids = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in texts])
    mask = torch.stack([(torch.arange(width) >= width - len(text)).long() for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def settings(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}


def by_hand(model, text, new=NEW, gates=None):
    """Greedy, everything computed anew for every token, the prompt generated from the first ``len(text)`` tokens."""
    base, row = reference.plain_copy(model), text
    with torch.no_grad():
        for _ in range(new):
            row = torch.cat([row, reference.logits(base, model, row, read=len(text), gates=gates)[-1:].argmax(-1)])
    return row[len(text) :].tolist()


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_is_the_loop_by_hand(texts, batch, family, layers):
    model = prompted(family, prompt_layers=layers)
    expected = [by_hand(model, text) for text in texts]
    for mode in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert model.generate(**batch, **settings(**mode))[:, 9:].tolist() == expected, mode
    ids = batch["input_ids"][:1]
    assert model.generate(input_ids=ids, **settings())[:, 9:].tolist() == expected[:1]
    assert model.generate(input_ids=ids, **settings(prompt_lookup_num_tokens=2))[:, 9:].tolist() == expected[:1]
    assert model.get_base_model().generate(**batch, **settings())[:, 9:].tolist() == expected
    with model.disable_adapter():
        assert model.generate(**batch, **settings())[:, 9:].tolist() != expected


@pytest.mark.parametrize("mode", [{}, {"use_cache": False}], ids=str)
def test_told_prompts_of_beams_and_samples(batch, mode):
    """Each row of a prompt has what was told of it."""
    model = prompted("llama")
    told = batch["attention_mask"] * (torch.arange(9) < 8)
    for more, times in (({"num_beams": 2}, 1), ({"do_sample": True, "top_k": 1, "num_return_sequences": 2}, 2)):
        with model.prompt_positions(told):
            written = model.generate(**batch, **settings(**mode, **more))
        for row in range(4):
            alone = {name: value[row : row + 1] for name, value in batch.items()}
            with model.prompt_positions(told[row : row + 1]):
                got = model.generate(**alone, **settings(**mode, **more))
            assert written[row * times : (row + 1) * times].tolist() == got.tolist()
    with model.prompt_positions(told[:2]), pytest.raises(GatewiseError, match=r"shape \(4, 9\) were given for .* \(8, 9\)"):
        model.generate(**batch, **settings(num_beams=2))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_beams_and_samples(batch, family, layers, attention):
    model = prompted(family, attention, prompt_layers=layers)
    for mode in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}):
        torch.manual_seed(5)
        cached = model.generate(**batch, **settings(**mode))
        torch.manual_seed(5)
        assert model.generate(**batch, **settings(use_cache=False, **mode)).tolist() == cached.tolist()


@pytest.mark.parametrize("family", DECODERS)
def test_no_generator_runs_while_decoding(batch, family):
    model = prompted(family)
    runs = []
    for name, module in model.named_modules():
        if name.endswith("spt_generator.default"):
            module.register_forward_hook(lambda *_: runs.append(1))
    model.generate(**batch, **settings(num_beams=2))
    assert len(runs) == 3


def test_the_prompt_stays_that_of_the_first_pass(texts, batch):
    """A new one, read from prompt and answer, would be another; otherwise these tests could not fail."""
    model = prompted("llama")
    written = model.generate(**batch, **settings())
    mask = torch.cat([batch["attention_mask"], torch.ones(4, NEW, dtype=torch.long)], dim=1)
    with torch.no_grad():
        anew = model(input_ids=written, attention_mask=mask).logits[:, 8:-1]
        with model.prompt_positions(batch["attention_mask"]):
            told = model(input_ids=written, attention_mask=mask).logits[:, 8:-1]
    assert torch.equal(told.argmax(-1), written[:, 9:])
    assert not torch.allclose(anew, told, atol=1e-2)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_a_loop_with_a_cache(texts, family, chunk):
    """Several tokens at a time too, and the caller's cache is as long as the text in every layer."""
    model = prompted(family, prompt_layers=[1])
    base, text = reference.plain_copy(model), texts[0]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=text[None, :3], past_key_values=cache)
        assert [cache.get_seq_length(layer) for layer in range(3)] == [3, 3, 3]
        for start in range(3, 9, chunk):
            got = model(input_ids=text[None, start : start + chunk], past_key_values=cache).logits[0]
            wanted = reference.logits(base, model, text[: start + chunk], read=3)[start:]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert [cache.get_seq_length(layer) for layer in range(3)] == [9, 9, 9]


def test_caches_side_by_side_and_copied(texts):
    model = prompted("llama")
    base = reference.plain_copy(model)
    with torch.no_grad():
        one = model(input_ids=texts[0][None, :5], use_cache=True).past_key_values
        other = model(input_ids=texts[2][None, :5], use_cache=True).past_key_values
        twin = copy.deepcopy(one)
        for cache, text in ((one, texts[0]), (other, texts[2]), (twin, texts[0])):
            got = model(input_ids=text[None, 5:7], past_key_values=cache).logits[0]
            wanted = reference.logits(base, model, text[:7], read=5)[5:]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_a_cache_take_their_prompts_along(batch, texts):
    model = prompted("llama")
    step = {
        "input_ids": torch.tensor([[5]] * 4),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1),
    }
    step["position_ids"] = step["attention_mask"].sum(1, keepdim=True) - 1
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        cache = model(**batch, position_ids=positions, use_cache=True).past_key_values
        wanted = model(**step, past_key_values=copy.deepcopy(cache)).logits
        moved, chosen = copy.deepcopy(cache), copy.deepcopy(cache)
        moved.reorder_cache(order)
        got = model(**{key: value[order] for key, value in step.items()}, past_key_values=moved).logits
        torch.testing.assert_close(got, wanted[order])
        chosen.batch_select_indices(order[:2])
        got = model(**{key: value[order[:2]] for key, value in step.items()}, past_key_values=chosen).logits
        torch.testing.assert_close(got, wanted[order[:2]])


def test_a_cache_that_is_emptied_begins_a_new_text(texts):
    model = prompted("llama")
    ids = texts[2][None]
    for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=20)):
        with torch.no_grad():
            wanted = model(input_ids=ids).logits
            model(input_ids=texts[0][None], past_key_values=cache)
            cache.reset()
            torch.testing.assert_close(model(input_ids=ids, past_key_values=cache).logits, wanted, rtol=1e-4, atol=1e-4)
            cache.reset()
            with model.disable_adapter():
                plain = model(input_ids=ids).logits
                torch.testing.assert_close(model(input_ids=ids, past_key_values=cache).logits, plain, rtol=1e-4, atol=1e-4)
            cache.reset()
            model(input_ids=texts[0][None], past_key_values=cache)
            cache.reset()
            other = tiny_base("llama").eval()  # which knows of no prompts
            again = other(input_ids=ids, past_key_values=cache).logits
            torch.testing.assert_close(again, other(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_caches_that_do_not_fit(batch):
    model = prompted("llama")
    model.add_adapter("other", prompt_config())
    step = {"input_ids": torch.ones(4, 1, dtype=torch.long)}
    with torch.no_grad():
        with model.disable_adapter():
            plain = model(**batch, use_cache=True).past_key_values
        with pytest.raises(GatewiseError, match="did not read"):
            model(**step, past_key_values=plain)
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(GatewiseError, match="belongs to 4 texts, but the batch has 2 rows"):
            model(input_ids=step["input_ids"][:2], past_key_values=cache)
        with model.disable_adapter(), pytest.raises(GatewiseError, match="an adapter that is not in use now"):
            model(**step, past_key_values=cache)
        model.set_adapter("other")
        with pytest.raises(GatewiseError, match="filled with adapter 'default', but 'other' is in use"):
            model(**step, past_key_values=cache)
    with pytest.raises(GatewiseError, match="cut into chunks of 3"):
        model.generate(**batch, **settings(prefill_chunk_size=3))
    with pytest.raises(GatewiseError, match="past_key_values is a tuple: expected a Cache"):
        model.get_base_model().model(input_ids=batch["input_ids"], past_key_values=((torch.zeros(1),) * 2,))
