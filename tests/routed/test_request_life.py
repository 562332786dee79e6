"""What stays of a request and for how long: nothing of it reaches the next one, another model, or another thread."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter
from torch.distributed.utils import _apply_to_tensors

from gatewise.errors import GatewiseError
from gatewise.routed.layer import RoutedLinear

WRITE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def tracker_of(model):
    return model.base_model._tracker


def prompts_of(batch):
    return {name: value for name, value in batch(side="left").items() if name != "labels"}


def check_at_rest(model):
    """Between calls the model holds its last request only."""
    now = tracker_of(model).now
    assert (now.current, now.opened_by, now.arguments, now.prompt, now.call) == (None, None, {}, None, None)
    assert (now.runs, now.base_only, now.tokens) == ({}, False, 0)
    assert all(module.now is now for module in model.modules() if isinstance(module, RoutedLinear))


def watched_states(model):
    """Weak references to what enters the second layer, one for every time it is run."""
    seen = []
    layer = model.base_model.model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    return seen


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_a_training_step_keeps_no_hidden_states(routed, batch, weight, reentrant):
    """The last decision may keep its graph, for ``balance_loss``, but not what the backward pass is done with."""
    model = routed("llama", balance_weight=weight).train()
    seen = watched_states(model)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**batch()).loss.backward()
    gc.collect()
    assert seen
    assert not any(state() is not None for state in seen)
    check_at_rest(model)


def test_a_new_request_lets_the_last_one_go(routed, batch):
    """Before its layers run: in training, that is the last batch's whole graph, whether or not anyone ran backwards through it."""
    model = routed("llama", balance_weight=0.5).train()
    model(**batch())
    last, alive = weakref.ref(tracker_of(model).last), []
    model.base_model.model.model.layers[0].register_forward_pre_hook(lambda *_: alive.append(last() is not None))
    gc.disable()  # by counting references alone, for the collector may come late
    try:
        model(**batch())
    finally:
        gc.enable()
    assert alive == [False]


def test_generation_lets_its_cache_go(routed, batch):
    model = routed("llama")
    caches = []
    model.get_base_model().register_forward_hook(lambda *args: caches.append(weakref.ref(args[-1].past_key_values)))
    model.generate(**prompts_of(batch), **WRITE)
    gc.collect()
    assert len(caches) == 5
    assert not any(cache() is not None for cache in caches)
    last = tracker_of(model).last
    assert not any(one.gates.requires_grad for made in last.decided.values() for one in made.decisions)
    check_at_rest(model)


def test_evaluation_with_gradients_keeps_no_graph(routed, batch):
    """Saliency and the like: the pass has its gradients, the decision that is kept has none."""
    model = routed("llama")
    seen = watched_states(model)
    model(**batch()).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "prompt_router" in name)
    gc.collect()
    assert not any(state() is not None for state in seen)
    assert not tracker_of(model).last.decided["model.layers.0"].decisions[0].probabilities.requires_grad


def test_training_leaves_nothing_for_generation(routed, batch):
    """Not in the middle of an accumulated step either."""
    model, prompts = routed("llama"), prompts_of(batch)
    expected = model.generate(**prompts, **WRITE).tolist()
    gates = model.routing().gates
    loss = model.train()(**batch(rows=3)).loss
    assert model.eval().generate(**prompts, **WRITE).tolist() == expected
    torch.testing.assert_close(model.routing().gates, gates)
    assert float(model.balance_loss()) == 0.0
    loss.backward()  # its graph is still its own
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_two_models_do_not_see_each_other(batch):
    """Trained and asked in turn, a step of one inside the loop of the other."""

    def make(seed):
        torch.manual_seed(seed)
        return trained_routers(random_adapter(get_peft_model(routed_base("llama"), routed_config(balance_weight=0.5))))

    def step(model, data):
        loss = model.train()(**data).loss
        loss.backward()
        return float(loss.detach()), [float(p.grad.double().sum()) for p in model.parameters() if p.requires_grad]

    prompts, first, second = prompts_of(batch), batch(), batch(rows=3)
    alone = [step(make(0), first), step(make(1), second)]
    written = [make(seed).eval().generate(**prompts, **WRITE).tolist() for seed in (0, 1)]
    one, two = make(0), make(1)
    losses = [model.train()(**data).loss for model, data in ((one, first), (two, second))]
    for model, loss, (expected, gradients) in zip((one, two), losses, alone, strict=True):
        loss.backward()
        assert float(loss.detach()) == expected
        assert [float(p.grad.double().sum()) for p in model.parameters() if p.requires_grad] == pytest.approx(gradients, rel=1e-5)
    others = []
    one.eval().get_base_model().register_forward_hook(lambda *_: others.append(two.eval().generate(**prompts, **WRITE).tolist()))
    assert one.generate(**prompts, **WRITE).tolist() == written[0]
    assert others == [written[1]] * 5


# ---- adapters that come and go between two calls ----


def test_the_last_decision_keeps_its_names(batch):
    """An adapter that is added makes experts of other modules; the decision before it is not about them."""
    settings = {"target_modules": ["v_proj", "down_proj"], "top_k": 1}
    model = trained_routers(random_adapter(get_peft_model(routed_base("llama"), routed_config(**settings)))).eval()
    prompts = prompts_of(batch)
    with torch.no_grad():
        out = model(**prompts, use_cache=True)
        step = {
            "input_ids": out.logits[:, -1:].argmax(-1),
            "attention_mask": torch.nn.functional.pad(prompts["attention_mask"], (0, 1), value=1),
        }
        model.add_adapter("second", routed_config())
        assert model.routing().modules == (("self_attn.v_proj", "mlp.down_proj"),) * 2
        going_on = model(**step, past_key_values=out.past_key_values).logits
        again = model(**prompts, use_cache=True).past_key_values
        torch.testing.assert_close(model(**step, past_key_values=again).logits, going_on)


def test_a_deleted_adapters_decision_is_forgotten(routed, batch):
    model = routed("llama")
    model.add_adapter("second", routed_config(top_k=1))
    model.train()(**batch())
    model.delete_adapter("second")
    assert model.routing().gates.shape == (5, 2, 7)
    model.add_adapter("second", routed_config(top_k=1))
    model.delete_adapter("default")
    assert float(model.balance_loss()) == 0.0
    with pytest.raises(GatewiseError, match="no prompt has been routed yet"):
        model.routing()


# ---- calls that meet ----


def elsewhere(call):
    """What a call gives in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def in_between(model, call):
    """Has another thread make a call whenever this thread's has come to the first attention; a list of what they gave."""
    given, mine = [], threading.get_ident()

    def meet(*_):
        if threading.get_ident() == mine:
            given.append(elsewhere(call))

    return given, model.base_model.model.model.layers[0].self_attn.register_forward_hook(meet)


def test_a_second_thread_has_its_own_calls(routed, batch):
    """Its gates are not the first one's, which goes on as if nothing had been; through PEFT and of the base model alone."""
    model, prompts, others = routed("llama"), prompts_of(batch), prompts_of(lambda **_: batch(rows=3))
    expected, wanted = model.generate(**prompts, **WRITE).tolist(), model.generate(**others, **WRITE).tolist()
    with torch.no_grad():
        wanted_logits = model.get_base_model()(**others).logits

    def call():
        with torch.no_grad():
            return model.generate(**others, **WRITE).tolist(), model.get_base_model()(**others).logits

    given, handle = in_between(model, call)
    assert model.generate(**prompts, **WRITE).tolist() == expected
    assert len(given) == 5
    assert all(written == wanted and torch.equal(logits, wanted_logits) for written, logits in given)
    handle.remove()
    check_at_rest(model)
    assert elsewhere(lambda: model.generate(**prompts, **WRITE).tolist()) == expected


def test_each_thread_asks_for_its_own_routing(routed, batch):
    """A thread that has made no call is told of the newest, as where a thread writes and another waits for it."""
    model, data = routed("llama"), prompts_of(batch)
    with torch.no_grad():
        elsewhere(lambda: model(**{name: value[:2] for name, value in data.items()}))
        assert len(model.routing().gates) == 2
        model(**data)
        elsewhere(lambda: model(**{name: value[:3] for name, value in data.items()}))
    assert len(model.routing().gates) == 5


def test_training_beside_generation(routed, batch):
    """A training step whose layers meet another thread's generation; the gradients are those of a step by itself."""
    model, data, prompts = routed("llama", balance_weight=0.5).train(), batch(), prompts_of(batch)

    def gradients():
        model.zero_grad()
        model(**data).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with torch.no_grad():
        wanted = model(**prompts).logits

    def call():
        with torch.no_grad():
            return model(**prompts).logits

    given, _ = in_between(model, call)
    got = gradients()
    assert len(given) == 1
    assert torch.equal(given[0], wanted)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


def test_a_mixed_batch_beside_another(routed, batch):
    """And what ``prompt_positions`` says is for its own thread."""
    model, prompts = routed("llama"), prompts_of(batch)
    model.add_adapter("second", routed_config(top_k=1))
    trained_routers(random_adapter(model)).eval()

    def call(names):
        with torch.no_grad():
            return model(**prompts, adapter_names=names).logits

    first, second = ["default", "second", "__base__", "default", "second"], ["second"] * 5
    expected, wanted = call(first), call(second)
    given, _ = in_between(model, lambda: call(second))
    with model.prompt_positions(torch.ones(5, 2)):
        assert not torch.allclose(call(first), expected)
    assert torch.equal(call(first), expected)
    assert [torch.equal(one, wanted) for one in given] == [True, True]


def test_heads_of_a_mixed_batch_beside_another(routed, batch):
    """Each adapter has a head of its own, and each thread's rows go to the heads that it named, or to the active adapter's."""
    model = routed("bert")
    model.add_adapter("second", routed_config("bert"))
    trained_routers(random_adapter(model)).eval()
    data = {name: value[:2] for name, value in batch(side="right").items() if name != "labels"}

    def call(names=None):
        with torch.no_grad():
            return model(**data, adapter_names=names).logits if names else model(**data).logits

    mixed, other = ["default", "second"], ["second", "default"]
    expected, wanted = call(mixed), [call(), call(other)]
    given, mine = [], threading.get_ident()

    def meet(*_):
        if threading.get_ident() == mine:
            given.extend([elsewhere(call), elsewhere(lambda: call(other))])

    model.get_base_model().bert.encoder.layer[0].register_forward_hook(meet)
    assert torch.equal(call(mixed), expected)
    assert [torch.equal(one, right) for one, right in zip(given, wanted, strict=True)] == [True, True]
    assert not torch.allclose(expected, wanted[0])


def test_copies_of_a_cache_in_two_threads(routed, batch):
    """A prompt that many requests share is read once, and each goes on with a copy, whoever reads its weights anew meanwhile."""
    model, prompts = routed("llama"), prompts_of(batch)
    step = {"input_ids": torch.full((5, 1), 7), "attention_mask": F.pad(prompts["attention_mask"], (0, 1), value=1)}
    with torch.no_grad():
        cache = model(**prompts, use_cache=True).past_key_values

    def call():
        with torch.no_grad():
            return model(**step, past_key_values=copy.deepcopy(cache)).logits

    def trained_and_called():
        model(**batch()).loss.backward()
        return call()

    expected = call()
    model(**batch()).loss.backward()
    given, mine = [], threading.get_ident()

    def meet(*_):
        if threading.get_ident() == mine:
            given.append(elsewhere(trained_and_called))

    model.base_model.model.model.layers[0].register_forward_pre_hook(meet)
    assert torch.equal(call(), expected)
    assert len(given) == 1
    assert torch.equal(given[0], expected)


def test_a_forward_that_failed_leaves_nothing(routed, batch):
    model, prompts = routed("llama"), prompts_of(batch)
    base = model.get_base_model()
    with torch.no_grad():
        expected = base(**prompts).logits
        with pytest.raises(ValueError, match="input_ids"):
            base(input_ids=prompts["input_ids"], inputs_embeds=torch.zeros(2, 3, 4))
        check_at_rest(model)
        torch.testing.assert_close(elsewhere(lambda: base(**prompts).logits), expected)


def test_a_call_stopped_from_the_keyboard(routed, batch):
    model, prompts = routed("llama"), prompts_of(batch)
    expected = model.generate(**prompts, **WRITE).tolist()

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.base_model.model.model.layers[1].self_attn.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**prompts, **WRITE)
    handle.remove()
    check_at_rest(model)
    with torch.no_grad():
        model.get_base_model().model(**prompts)
    assert model.generate(**prompts, **WRITE).tolist() == expected


def test_fsdp_gives_layers_the_pass_itself(routed, batch):
    """Of dataclasses among a layer's arguments it makes new ones, and what was decided would be lost with them."""
    model, given = routed("llama"), []
    model.base_model._layers[0].enter = lambda *args: given.append(tracker_of(model).now.current) or given[-1]
    model(**batch())
    moved = _apply_to_tensors(torch.clone, {"routed_pass": given[0], "hidden_states": torch.ones(1)})
    assert moved["routed_pass"] is given[0]
