"""Routed layers in gradient checkpointing, under Accelerate's hooks, and where they are run by themselves."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter

from gatewise.errors import GatewiseError

FAMILIES = ["llama", "gpt2", "bert"]


def gradients(model, batches):
    """Of the sum of the batches' losses, the balance loss among them; all forwards before the backward pass."""
    model.zero_grad()
    sum(model(**batch).loss for batch in batches).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointing_gives_the_same_gradients(routed, batch, family, forwards):
    """With two forwards, the layers of the first are run again when the second's request is the newest one."""
    model = routed(family, top_k=2, balance_weight=0.5).train()
    batches = [batch(family), {name: value.flip(0)[:3] for name, value in batch(family, side="left").items()}][:forwards]
    plain = gradients(model, batches)
    assert all(float(grad.abs().max()) > 0 for name, grad in plain.items() if "prompt_router" in name)
    model.gradient_checkpointing_enable()
    again = gradients(model, batches)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_reentrant_checkpointing_would_cut_the_balance_loss_off(routed, batch):
    model = routed("llama").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(GatewiseError, match=r"has no gradient: use gradient_checkpointing_kwargs=.*False"):
        model(**batch())
    model.peft_config["default"].balance_weight = 0.0
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_accelerates_hooks_do_not_go_round_the_router(routed, batch):
    """They keep a layer's forward from before the adapter came."""
    torch.manual_seed(0)
    plain = trained_routers(random_adapter(get_peft_model(routed_base("llama"), routed_config()))).eval()
    torch.manual_seed(0)
    base = routed_base("llama")
    for layer in base.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    hooked = trained_routers(random_adapter(get_peft_model(base, routed_config()))).eval()
    with torch.no_grad():
        torch.testing.assert_close(hooked(**batch()).logits, plain(**batch()).logits)
        bare = hooked.unload()
        with plain.disable_adapter():
            torch.testing.assert_close(bare(**batch()).logits, plain(**batch()).logits)


def test_a_copied_model_has_routers_of_its_own(routed, batch):
    model = routed("llama")
    other = copy.deepcopy(model)
    trained_routers(other)
    with torch.no_grad():
        expected = model(**batch()).logits
        gates = model.routing().gates
        assert not torch.allclose(other(**batch()).logits, expected)
        assert not torch.allclose(other.routing().gates, gates)
        torch.testing.assert_close(model.routing().gates, gates)
        torch.testing.assert_close(model(**batch()).logits, expected)


def test_layers_need_their_model(routed):
    layer = routed("llama").base_model.model.model.layers[0]
    with pytest.raises(GatewiseError, match=r"layer model\.layers\.0 was run outside the forward of its model"):
        layer(torch.randn(1, 3, 16))
    with pytest.raises(GatewiseError, match="run by itself"):
        layer.self_attn.q_proj(torch.randn(1, 3, 16))


def test_the_backbone_can_be_called_by_itself(routed, batch):
    model, data = routed("llama"), batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits
        hidden = model.get_base_model().model(**inputs).last_hidden_state
        torch.testing.assert_close(model.get_base_model().lm_head(hidden), logits)


def test_replicas_are_refused(routed, batch):
    """nn.DataParallel makes shallow copies, which hooks do not know."""
    replica = copy.copy(routed("llama").get_base_model())
    with pytest.raises(GatewiseError, match=r"do not run in replicas \(nn.DataParallel\)"):
        replica(**batch())
