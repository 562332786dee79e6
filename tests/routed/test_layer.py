"""Routed layers in gradient checkpointing, under Accelerate's hooks, and where they are run by themselves."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter
from transformers import AlbertConfig, AlbertForSequenceClassification

from gatewise.errors import GatewiseError

FAMILIES = ["llama", "gpt2", "bert"]


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


def test_shared_layers_are_refused(batch):
    sizes = {"vocab_size": 60, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 24}
    config = AlbertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_labels=3)
    model = get_peft_model(AlbertForSequenceClassification(config), routed_config("bert"))
    with pytest.raises(GatewiseError, match="more than once in a forward"):
        model(**batch("bert"))
