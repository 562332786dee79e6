"""Inference against the slow way, that of training, which adds adapter by adapter; and what happens in the middle of a request."""

import copy
import weakref
from contextlib import contextmanager

import pytest
import torch
from routed_models import routed_config, trained_routers
from tiny_models import random_adapter
from torch import nn

import gatewise.routed.layer
import gatewise.routed.request
from gatewise.serving import products

FAMILIES = ["llama", "gpt2"]
BATCHES = {
    "one adapter": None,
    "one row": "one row",
    "mixed": ["narrow", "__base__", "default", "partial", "default"],
    "one of several": ["partial"] * 5,
    "one and the base": ["__base__", "narrow", "__base__", "narrow", "__base__"],
    "the base": ["__base__"] * 5,
}


@contextmanager
def slowly():
    """While open, nothing passes for two matrices, and each adapter is added by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gatewise.routed.layer, "is_plain", lambda *_: False)
        yield


@pytest.fixture
def three(routed):
    """three(family, **settings) -> adapters that differ in rank, scaling, number of experts and targets."""

    def make(family="llama", **settings):
        targets = {"llama": ["v_proj", "o_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}[family]
        model = routed(family, **settings)
        model.add_adapter("narrow", routed_config(family, r=2, lora_alpha=3, top_k=1, pooler="mean"))
        model.add_adapter("partial", routed_config(family, r=5, top_k=2, target_modules=targets, use_rslora=True))
        return trained_routers(random_adapter(model)).eval()

    return make


def decode(model, data, names=None, steps=4):
    """The logits of the prompt and of some steps after it with a cache."""
    more = {} if names is None else {"adapter_names": names}
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model(**inputs, use_cache=True, **more)
        logits, mask = [out.logits], inputs["attention_mask"]
        for step in range(steps):
            ids = torch.full_like(mask[:, :1], 7 * step + 3)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, **more).logits)
    return logits


def of(data, names):
    """The batch, or its first row."""
    return ({name: value[:1] for name, value in data.items()}, None) if names == "one row" else (data, names)


@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_inference_is_what_the_slow_way_gives(three, batch, family, k, names):
    model, (data, names) = three(family, top_k=k), of(batch(family, side="left" if family == "llama" else "right"), names)
    with slowly():
        expected = decode(model, data, names)
    for got, one in zip(decode(model, data, names), expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
def test_in_bfloat16_as_near_as_rounding_allows(batch, three, names):
    """Adapters in float32 on a bfloat16 base, as PEFT has them; the truth is the same model in float32."""
    model, (data, names) = random_adapter(three(), 0.05), of(batch(), names)
    truth = decode(model, data, names)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and ".prompt_router." not in name:
            parameter.data = parameter.data.bfloat16()
    with slowly():
        slow = decode(model, data, names)
    got = decode(model, data, names)
    for ours, theirs, true in zip(got, slow, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - true).abs().mean() < 1.3 * (theirs - true).abs().mean() + 1e-4
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_several_active_adapters(three, batch):
    model, data = three(), batch()
    model.base_model.set_adapter(["default", "narrow"])
    with slowly():
        expected = decode(model, data)
    for got, one in zip(decode(model, data), expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-5, atol=2e-5)


def test_the_slow_way_is_another(three, batch, monkeypatch):
    """Or the tests above would compare a run with itself."""
    gathered = count_gathering(monkeypatch)
    model = three()
    with slowly():
        decode(model, batch())
    assert not gathered
    decode(model, batch())
    assert gathered


# ---- once a request, and when again ----


def count_gathering(monkeypatch):
    """A list that grows by one whenever a module's adapters are gathered."""
    made, real = [], products.Request.gather
    monkeypatch.setattr(products.Request, "gather", lambda *args, **more: made.append(1) or real(*args, **more))
    return made


WRITE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_weights_are_gathered_once_a_request(three, batch, monkeypatch):
    model, data, gathered = three(top_k=2), batch(side="left"), count_gathering(monkeypatch)
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    for run in (lambda: decode(model, data), lambda: model.generate(**inputs, **WRITE), lambda: decode(model, data)):
        gathered.clear()
        run()
        kept = int((model.routing().gates > 0).any(dim=0).sum())
        assert len(gathered) == kept > 0


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.v_proj


def test_a_step_with_gradients_in_the_middle(three, batch):
    model, data = three(), batch()
    expected = decode(model, data)[2]
    with torch.no_grad():
        cache = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"], use_cache=True).past_key_values
    mask = torch.nn.functional.pad(data["attention_mask"], (0, 1), value=1)
    out = model(input_ids=torch.full((5, 1), 3), attention_mask=mask, past_key_values=cache).logits
    out.sum().backward()
    reached = [p.grad for name, p in model.named_parameters() if ".lora_B.default" in name and p.grad is not None]
    assert any(float(grad.abs().max()) > 0 for grad in reached)
    with torch.no_grad():
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        got = model(input_ids=torch.full((5, 1), 10), attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("prompt", ["gradients", "train", "inference"])
def test_prompts_read_in_another_mode(three, batch, prompt):
    """The steps after it are inference all the same."""
    model, data = three(), batch()
    expected = decode(model, data)[1]
    context = {"gradients": torch.enable_grad, "train": torch.no_grad, "inference": torch.inference_mode}[prompt]
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with context():
        cache = model.train(prompt == "train")(**inputs, use_cache=True).past_key_values
    mask = torch.nn.functional.pad(data["attention_mask"], (0, 1), value=1)
    with torch.inference_mode(prompt == "inference"), torch.no_grad():
        got = model.eval()(input_ids=torch.full((5, 1), 3), attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_autocast_comes_and_goes(three, batch):
    model, data, step = three(), batch(), {"input_ids": torch.full((5, 1), 3)}
    with torch.no_grad():
        cache = model(input_ids=data["input_ids"], use_cache=True).past_key_values
        expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(**step, past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(cast.float(), expected, rtol=0.1, atol=0.1)
        torch.testing.assert_close(model(**step, past_key_values=cache).logits, expected)


def test_dropout_that_is_on_stays_on(three, batch):
    """As for the variance of predictions: dropout in training mode, the model in evaluation."""
    model = three(lora_dropout=0.5)
    with torch.no_grad():
        calm = [model(**batch()).logits for _ in range(2)]
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        wild = [model(**batch()).logits for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.allclose(*wild)


# ---- what a request leaves ----


def test_what_was_gathered_goes_with_the_cache(three, batch, monkeypatch):
    """By counting references alone: on a GPU there may be no time for a collector."""
    made, real = [], products.Request.gather

    def gather(*args, **more):
        one = real(*args, **more)
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr(products.Request, "gather", gather)
    model, ids, step = three(), batch()["input_ids"], {"input_ids": torch.full((5, 1), 3)}
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(**step, past_key_values=cache)
        assert all(one() is not None for one in made)
        del cache
        assert made
        assert not any(one() is not None for one in made)
        model(input_ids=ids, use_cache=False)
        model.generate(input_ids=ids, **WRITE)
        assert not any(one() is not None for one in made)


def test_models_are_copied(three, batch):
    model, data = three(), batch()
    expected = decode(model, data)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        layer_of(model).lora_B["default"].weight.add_(1)
        for got, one in zip(decode(twin, data), expected, strict=True):
            torch.testing.assert_close(got, one)


# ---- hooks ----


def test_hooks_on_modules_and_on_their_bases_are_called(three, batch):
    model, data, seen = three(top_k=7), batch(), []
    inputs = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    expected = model.generate(**inputs, **WRITE)
    watched = layer_of(model)
    handle = watched.register_forward_hook(lambda *_: seen.append("layer"))
    below = watched.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    assert torch.equal(model.generate(**inputs, **WRITE), expected)
    assert seen == ["base", "layer"] * WRITE["max_new_tokens"]
    handle.remove()
    below.remove()
    assert torch.equal(model.generate(**inputs, **WRITE), expected)
    assert len(seen) == 2 * WRITE["max_new_tokens"]
