"""Inference against the slow way, that of training, which adds adapter by adapter; and what happens in the middle of a request."""

import copy
import pickle
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import get_peft_model
from routed_models import routed_config, trained_routers
from tiny_models import random_adapter
from torch import nn

import gatewise.routed.layer
import gatewise.routed.request
from gatewise.errors import GatewiseError
from gatewise.serving import products

FAMILIES = ["llama", "gpt2", "bert"]
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
        targets = {"llama": ["v_proj", "o_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["key", "value", "query"]}[family]
        model = routed(family, **settings)
        model.add_adapter("narrow", routed_config(family, r=2, lora_alpha=3, top_k=1, pooler="mean"))
        model.add_adapter("partial", routed_config(family, r=5, top_k=2, target_modules=targets, use_rslora=True))
        return trained_routers(random_adapter(model)).eval()

    return make


def decode(model, data, names=None, steps=4):
    """The logits of the prompt and of some steps after it with a cache; an encoder's of the text alone."""
    more = {} if names is None else {"adapter_names": names}
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        if model.config.model_type == "bert":
            return [model(**inputs, **more).logits]
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
def test_in_float64_to_the_last_digits(three, batch, names):
    model, (data, names) = three().double(), of(batch(), names)
    with slowly():
        expected = decode(model, data, names)
    for got, one in zip(decode(model, data, names), expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-11, atol=1e-11)


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


def test_flattened_tokens(batch):
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    model = get_peft_model(OPTForCausalLM(OPTConfig(vocab_size=60, **sizes)), routed_config(top_k=2))
    model.add_adapter("second", routed_config(r=2))
    trained_routers(random_adapter(model)).eval()
    names = ["second", "default", "__base__", "second", "default"]
    seen = []
    model.base_model.model.model.decoder.layers[0].fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0].ndim))
    with slowly():
        expected = decode(model, batch(), names)
    for got, one in zip(decode(model, batch(), names), expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-5, atol=2e-5)
    layer = model.base_model.model.model.decoder.layers[0].fc1
    layer.register_forward_pre_hook(lambda _, args: args[0].reshape(-1, 16)[:-1])
    with torch.no_grad(), pytest.raises(GatewiseError, match="choice of tokens"):
        model(input_ids=batch()["input_ids"])


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


def test_weights_are_looked_at_once_a_call(three, batch, monkeypatch):
    looked, real = [], gatewise.routed.request.PreparedRequest.refresh
    monkeypatch.setattr(gatewise.routed.request.PreparedRequest, "refresh", lambda *args: looked.append(1) or real(*args))
    model, data = three(), batch(side="left")
    model.generate(input_ids=data["input_ids"], attention_mask=data["attention_mask"], **WRITE)
    assert len(looked) == 1
    decode(model, data, steps=4)
    assert len(looked) == 1 + 4


def in_place(model):
    """In every module: where one adapter alone keeps one, its weights may be used as they lie, without a copy."""
    for name, parameter in model.named_parameters():
        if ".lora_B.default." in name:
            nn.init.normal_(parameter, std=0.5)


def through_data(model):
    weight = layer_of(model).lora_A["default"].weight
    weight.data = torch.randn_like(weight)


def scaled(model):
    layer_of(model).scaling["default"] *= 3


def trained(model):
    """Fused optimisers leave no trace on what they write into."""
    parameters = [p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    model.train()(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    model.eval()


def added(model):
    model.add_adapter("another", routed_config(r=1))


def with_a_hook(model):
    """Where A is more than a matrix from now on; adding an adapter is what makes requests look again."""
    layer_of(model).lora_A["default"].register_forward_hook(lambda _, args, out: 2 * out)
    added(model)


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.v_proj


@pytest.mark.parametrize("names", [None, ["default", "__base__", "narrow", "default", "narrow"]], ids=["one adapter", "mixed"])
@pytest.mark.parametrize("change", [in_place, through_data, scaled, trained, added, with_a_hook])
def test_a_request_goes_on_with_the_weights_as_they_are(three, batch, change, names):
    """And with its decision. What changed A and B between two steps of a loop of one's own counts from the next step on."""
    results, before = [], []
    for context in (nullcontext, slowly):
        torch.manual_seed(0)
        model = three(top_k=7)
        more = {} if names is None else {"adapter_names": names}
        step = {"input_ids": torch.full((5, 1), 3)}
        with context():
            with torch.no_grad():
                cache = model(input_ids=batch()["input_ids"], use_cache=True, **more).past_key_values
                before.append(model(**step, past_key_values=copy.deepcopy(cache), **more).logits)
                gates = model.routing().gates
            with torch.enable_grad():
                change(model)
            with torch.no_grad():
                results.append(model(**step, past_key_values=cache, **more).logits)
            torch.testing.assert_close(model.routing().gates[:, :, : gates.shape[2]], gates)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(before[0], before[1], rtol=1e-5, atol=2e-5)
    assert (change is added) == torch.allclose(results[0], before[0], atol=1e-4)


def test_a_deleted_adapter_ends_its_requests(three, batch):
    """Also if another one has its name now. Requests of others go on."""
    model, ids, step = three(), batch()["input_ids"], {"input_ids": torch.full((5, 1), 3)}
    with torch.no_grad():
        caches = {}
        for name in ("default", "narrow"):
            model.set_adapter(name)
            caches[name] = model(input_ids=ids, use_cache=True).past_key_values
        model.set_adapter("default")
        expected = model(**step, past_key_values=copy.deepcopy(caches["default"])).logits
        model.delete_adapter("narrow")
        model.add_adapter("narrow", routed_config(r=4))
        torch.testing.assert_close(model(**step, past_key_values=caches["default"]).logits, expected)
        model.set_adapter("narrow")
        with pytest.raises(GatewiseError, match="adapter 'narrow', which has been deleted since, whatever has its name now"):
            model(**step, past_key_values=caches["narrow"])
        assert model(input_ids=ids, use_cache=True).past_key_values is not None


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


def test_a_single_layer_can_be_disabled(three, batch):
    model = three(top_k=7)
    with torch.no_grad():
        expected = model(**batch()).logits
        layer_of(model).enable_adapters(False)
        off = model(**batch()).logits
        layer_of(model).lora_B["default"].weight.zero_()
        layer_of(model).enable_adapters(True)
        torch.testing.assert_close(model(**batch()).logits, off)
        assert not torch.allclose(off, expected)


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


@pytest.mark.parametrize("at", [0, 1], ids=["in the prompt", "in a step"])
def test_a_loop_stopped_from_the_keyboard_goes_on(three, batch, at):
    model, data = three(), batch()
    expected = decode(model, data)[1]
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt

    handle = model.base_model.model.model.layers[1].self_attn.register_forward_hook(stop)
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    mask = torch.nn.functional.pad(data["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        if at == 0:
            with pytest.raises(KeyboardInterrupt):
                model(**inputs)
            handle.remove()
        cache = model(**inputs, use_cache=True).past_key_values
        if at == 1:
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=torch.full((5, 1), 3), attention_mask=mask, past_key_values=copy.deepcopy(cache))
        assert not model.base_model._tracker.now.runs
        with pytest.raises(GatewiseError, match="run by itself"):
            layer_of(model)(torch.randn(1, 3, 16))
        got = model(input_ids=torch.full((5, 1), 3), attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_models_and_caches_are_copied_and_pickled(three, batch):
    model, data, step = three(), batch(), {"input_ids": torch.full((5, 1), 3)}
    expected = decode(model, data)
    with torch.no_grad():
        cache = model(input_ids=data["input_ids"], use_cache=True).past_key_values
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    restored = pickle.loads(pickle.dumps(cache))
    with torch.no_grad():
        layer_of(model).lora_B["default"].weight.add_(1)
        for twin in twins:
            for got, one in zip(decode(twin, data), expected, strict=True):
                torch.testing.assert_close(got, one)
        with pytest.raises(GatewiseError, match="no routed adapter read"):
            model(**step, past_key_values=restored)


def test_a_layer_whose_class_was_exchanged_once_more(three, batch):
    """As FSDP2 does, before or after a request has begun."""
    model, data = three(), batch()
    expected = decode(model, data)
    for layer in model.base_model.model.model.layers:
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
    for got, one in zip(decode(model, data), expected, strict=True):
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


def test_hooks_that_come_between_two_calls_of_a_request_are_called(three, batch):
    model, seen, step = three(top_k=7), [], {"input_ids": torch.full((5, 1), 3)}
    with torch.no_grad():
        cache = model(input_ids=batch()["input_ids"], use_cache=True).past_key_values
        model(**step, past_key_values=cache)
        layer_of(model).register_forward_hook(lambda *_: seen.append(1))
        model(**step, past_key_values=cache)
    assert seen == [1]
