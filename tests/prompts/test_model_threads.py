"""Several threads that run one model, as web servers do: what one is doing, the others do not notice."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from prompted_models import prompted
from torch import Tensor

WRITE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call gives in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def in_between(model: Any, call: Callable[[], Any]) -> list[Any]:
    """Has another thread make a call whenever the second layer of this thread's has run; what the calls gave comes in a list."""
    given, mine = [], threading.get_ident()

    def meet(*_: Any) -> None:
        if threading.get_ident() == mine:
            given.append(elsewhere(call))

    model.get_base_model().model.layers[1].self_attn.register_forward_hook(meet)
    return given


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("same", [True, False])
def test_forwards_that_meet(texts, layers, same):
    model = prompted("llama", prompt_layers=layers)
    one, other = texts[0][None], (texts[0].flip(0) if same else texts[2])[None]
    wanted, wanted_of_other = logits(model, one), logits(model, other)
    given = in_between(model, lambda: logits(model, other))
    assert torch.equal(logits(model, one), wanted)
    assert len(given) == 1
    assert torch.equal(given[0], wanted_of_other)


def test_generation_that_meets(texts):
    model = prompted("llama")
    one, other = ({"input_ids": text[None], **WRITE} for text in (texts[0], texts[2]))
    for mode in ({}, {"use_cache": False}):
        wanted, wanted_of_other = model.generate(**one, **mode).tolist(), model.generate(**other, **mode).tolist()
        met = prompted_like(model)
        given = in_between(met, lambda met=met, mode=mode: met.generate(**other, **mode).tolist())
        assert met.generate(**one, **mode).tolist() == wanted
        assert given == [wanted_of_other] * 4


def prompted_like(model: Any) -> Any:
    """A model with the same numbers and no hooks of the test's."""
    twin = prompted("llama")
    twin.load_state_dict(model.state_dict())
    return twin


def test_many_at_a_time(texts):
    model = prompted("llama")
    wanted = [logits(model, text[None]) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda number: logits(model, texts[number % 4][None]), range(80)))
    for number, one in enumerate(given):
        torch.testing.assert_close(one, wanted[number % 4])


def test_what_one_thread_has_set_is_its_own(texts):
    model, ids = prompted("llama"), texts[0][None]
    wanted = logits(model, ids)
    with model.prompt_positions(torch.ones(1, 2)), model.gates_dropped([True, False, True]):
        assert not torch.allclose(logits(model, ids), wanted, atol=1e-3)
        assert torch.equal(elsewhere(lambda: logits(model, ids)), wanted)
    assert torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_another_thread(texts, reentrant):
    """On a GPU the backward pass has its own thread, in which layers are run again that a call of this one has left."""
    model = prompted("llama").train()
    labels = texts[0].clone()
    labels[:3] = -100

    def loss(dropped: bool) -> Tensor:
        with model.gates_dropped([False, dropped, False]):
            return model(input_ids=texts[0][None], labels=labels[None]).loss

    def gradients() -> dict[str, Tensor]:
        found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        model.zero_grad()
        return found

    loss(True).backward()
    wanted = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    made = loss(True)
    given = in_between(model, lambda: made.backward())
    with torch.no_grad():
        loss(False)
    assert given == [None]
    got = gradients()
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
