"""What stays of a request and for how long: nothing of it reaches the next one, or another model."""

import gc
import threading
import weakref

import pytest
import torch
from torch.distributed.utils import _apply_to_tensors

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
    assert all(module.now is now for module in model.modules() if isinstance(module, RoutedLinear))


def watched_states(model):
    """Weak references to what enters the second layer, one for every time it is run."""
    seen = []
    layer = model.base_model.model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    return seen


def test_calls_of_several_threads_come_one_after_the_other(routed, batch):
    """One begins in the middle of another."""
    model = routed("llama", top_k=1)
    prompts = prompts_of(batch)
    other = {name: value[:2] for name, value in prompts.items()}
    expected = [model.generate(**one, **WRITE) for one in (prompts, other)]
    written, began, ended = [], threading.Event(), threading.Event()

    def write():
        began.set()
        written.append(model.generate(**other, **WRITE))
        ended.set()

    thread = threading.Thread(target=write)

    def start_the_other(*_):
        hook.remove()
        thread.start()
        began.wait(60)
        ended.wait(0.5)  # it waits for this call, which is not over

    hook = model.base_model.model.model.layers[0].register_forward_hook(start_the_other)
    with model.prompt_positions(prompts["attention_mask"].bool()):
        written.insert(0, model.generate(**prompts, **WRITE))
    thread.join(60)
    assert [one.tolist() for one in written] == [one.tolist() for one in expected]
    check_at_rest(model)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_training_step_keeps_no_hidden_states(routed, batch, weight, is_checkpointed):
    """The last decision may keep its graph, for ``balance_loss``, but not what the backward pass is done with."""
    model = routed("llama", balance_weight=weight).train()
    seen = watched_states(model)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    model(**batch()).loss.backward()
    gc.collect()
    assert seen
    assert not any(state() is not None for state in seen)
    check_at_rest(model)


def test_a_new_request_lets_the_last_one_go(routed, batch):
    """Before its layers run: in training, that is the last batch's whole graph, whether or not anyone ran backwards through it."""
    model = routed("llama", balance_weight=0.5).train()
    model(**batch())
    last, alive = weakref.ref(tracker_of(model).now.last), []
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
    last = tracker_of(model).now.last
    assert not any(one.gates.requires_grad for made in last.decided.values() for one in made.values())
    check_at_rest(model)


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


# ---- calls that fail ----


def test_a_forward_that_failed_leaves_nothing(routed, batch):
    model, prompts = routed("llama"), prompts_of(batch)
    base = model.get_base_model()
    with torch.no_grad():
        expected = base(**prompts).logits
        with pytest.raises(ValueError, match="input_ids"):
            base(input_ids=prompts["input_ids"], inputs_embeds=torch.zeros(2, 3, 4))
        check_at_rest(model)
        torch.testing.assert_close(base(**prompts).logits, expected)


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
