"""What ``routing()`` says."""

import pytest
import routed_reference as reference
import torch
from peft import get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter

from gatewise.errors import GatewiseError


def test_routing_names_layers_and_modules(routed, batch):
    model = routed("bert", top_k=2)
    with torch.no_grad():
        model(**batch("bert"))
    routing = model.routing()
    assert routing.gates.shape == (5, 2, 6)
    assert routing.gates.dtype == torch.float32
    assert routing.layers == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert routing.modules == (tuple(reference.EXPERTS["bert"]),) * 2
    assert ((routing.gates > 0).sum(dim=-1) == 2).all()


def test_layers_with_fewer_experts_are_padded(batch):
    config = routed_config(target_modules=r".*layers\.0\..*(q_proj|v_proj|up_proj)|.*layers\.1\..*(k_proj|down_proj)", top_k=2)
    model = trained_routers(random_adapter(get_peft_model(routed_base("llama"), config))).eval()
    with torch.no_grad():
        model(**batch())
    routing = model.routing()
    assert routing.gates.shape == (5, 2, 3)
    assert routing.modules == (("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"), ("self_attn.k_proj", "mlp.down_proj"))
    assert (routing.gates[:, 1, 2] == 0).all()
    assert (routing.gates[:, 1, :2] > 0).all()


def test_before_the_first_call(routed):
    model = routed("llama")
    with pytest.raises(GatewiseError, match="no prompt has been routed yet"):
        model.routing()
    assert float(model.balance_loss()) == 0.0
