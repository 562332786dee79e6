"""What prompts have in common, taken note of in training: once a prompt, by the adapter that it is routed by, and kept with it."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter

from gatewise.routed.router import Router

FAMILIES = ["llama", "gpt2", "bert"]


def new(family: str = "llama", **settings: Any) -> PeftModel:
    """A model whose routers tell prompts apart and have seen none."""
    model = trained_routers(random_adapter(get_peft_model(routed_base(family), routed_config(family, **settings))))
    for router in routers(model):
        if router.center_states:
            for buffer in (router.center, router.spread, router.observed):
                buffer.zero_()
    return model


def routers(model: PeftModel, adapter: str = "default") -> list[Router]:
    return [m for name, m in model.named_modules() if isinstance(m, Router) and name.endswith(f".{adapter}")]


def observed(model: PeftModel, adapter: str = "default") -> list[int]:
    return [int(router.observed) for router in routers(model, adapter)]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_observed_in_training_alone_until_there_are_enough(batch, family):
    model, data = new(family), batch(family)
    rows = len(data["input_ids"])
    with torch.no_grad():
        model.eval()(**data)
    assert set(observed(model)) == {0}
    model.train()
    for step in range(1, 70 // rows + 2):
        model(**data).loss.backward()
        assert set(observed(model)) == {min(step, -(-64 // rows)) * rows}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight", [0.5, 0.0])
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointing_observes_each_prompt_once(batch, family, forwards, weight):
    """The second run of a layer decides as the first did, while prompts are still observed, those of another batch too."""
    plain, data = new(family, balance_weight=weight).train(), batch(family)
    again = copy.deepcopy(plain)
    again.gradient_checkpointing_enable()
    batches = [data, {name: value.flip(0)[:3] for name, value in batch(family, side="left").items()}][:forwards]
    for _ in range(2):
        for model in (plain, again):
            model.zero_grad()
            sum(model(**one).loss for one in batches).backward()
        assert observed(again) == observed(plain)
        for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_what_a_layer_reads_is_what_it_observes(batch):
    """The first layer's router, from the embeddings of the prompts."""
    model, data = new(pooler="mean").train(), batch()
    model(**data)
    embedded = model.get_input_embeddings()(data["input_ids"])
    normed = embedded / (embedded.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    prompts = (data["attention_mask"] == 1) & (data["labels"] == -100)  # the answers of this batch are at the rows' ends
    means = [states[prompt].mean(dim=0) for states, prompt in zip(normed, prompts, strict=True)]
    torch.testing.assert_close(routers(model)[0].center, torch.stack(means).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_each_adapter_observes_its_own_prompts(batch):
    model, data = new(), batch()
    model.add_adapter("other", routed_config(top_k=2))
    model.train()(**data)
    assert (set(observed(model)), set(observed(model, "other"))) == ({len(data["input_ids"])}, {0})
    model.set_adapter("other")
    model(**{name: value[:2] for name, value in data.items()})
    assert (set(observed(model)), set(observed(model, "other"))) == ({len(data["input_ids"])}, {2})


def test_what_was_observed_is_saved(batch, tmp_path):
    model, data = new(), batch()
    model.train()(**data)
    model.eval().save_pretrained(tmp_path)
    base = routed_base("llama")
    base.load_state_dict(copy.deepcopy(model).unload().state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    for one, other in zip(routers(model), routers(loaded), strict=True):
        assert float(other.observed) == len(data["input_ids"])
        assert float(other.spread) > 0
        torch.testing.assert_close(other.center, one.center, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**data).logits, model(**data).logits)


def test_it_can_be_left_out(batch, tmp_path):
    model = new(center_states=False).train()
    model(**batch()).loss.backward()
    assert not [name for name, _ in model.named_buffers() if "prompt_router" in name]


def test_an_adapter_of_the_same_configuration_observes_prompts_of_its_own(batch):
    config = routed_config("llama")
    model, data = get_peft_model(routed_base("llama"), config).train(), batch("llama")
    model(**data).loss.backward()
    model.add_adapter("other", config)
    assert set(observed(model, "other")) == {0}
