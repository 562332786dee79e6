"""Gates against the formula, on every row of a batch."""

import pytest
import torch

from gatewise.allocation import slots
from gatewise.allocation.gates import GateBank
from gatewise.errors import GatewiseError


def test_gates_multiply_ranks(adapted):
    model = adapted()
    path = "model.layers.1.self_attn.o_proj"
    layer = slots.lora_layers(model)[path]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 4, a.shape[1])
    with GateBank(model) as gates, torch.no_grad():
        gate = torch.tensor([1.0, 0.0, 0.5])
        gates.assign(path, gate)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 2.0 * ((x @ a.T) * gate) @ b.T)
        rows = torch.rand(2, 1, 3)
        gates.assign(path, rows)
        for row in range(2):
            torch.testing.assert_close(layer(x)[row], layer.base_layer(x[row]) + 2.0 * ((x[row] @ a.T) * rows[row]) @ b.T)
    assert not layer.lora_B["default"]._forward_pre_hooks


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_only_is_gates_of_zero_elsewhere(adapted, batch, settings):
    model, data, kept = adapted(**settings).eval(), batch(), "model.layers.0.mlp.up_proj"
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    with GateBank(model) as gates, torch.no_grad():
        for path, gate in gates.fill(0.0).items():
            if path == kept:
                gate.fill_(1.0)
        expected = model(**inputs).logits
        gates.open()
        with gates.only({kept}):
            torch.testing.assert_close(model(**inputs).logits, expected)
        on = model(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, on)


def test_gates_that_would_do_nothing_are_refused(adapted):
    model = adapted()
    model.merge_adapter()
    with pytest.raises(GatewiseError, match="unmerge_adapter"):
        GateBank(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(GatewiseError, match="not active"):
        GateBank(model)
