"""Gates against the formula, on every row of a batch."""

import pytest
import torch
from peft import LoraConfig
from tiny_models import OTHER_LAYERS

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


@pytest.mark.parametrize("family", OTHER_LAYERS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_gates_of_embeddings_are_scaled_rows_of_a(adapted, batch, family, settings):
    model, data = adapted(family, target_modules=OTHER_LAYERS[family], **settings).eval(), batch(family)
    inputs = {key: value for key, value in data.items() if key != "labels"}
    layers = slots.lora_layers(model)
    gates_of = {path: torch.rand(3) for path in layers}
    with GateBank(model) as gates, torch.no_grad():
        open_gates = model(**inputs).logits
        for path, gate in gates_of.items():
            gates.assign(path, gate)
        got = model(**inputs).logits
        with gates.watching() as rows_apart:
            model(**inputs)
        assert not rows_apart(len(data["labels"]))
    torch.testing.assert_close(model(**inputs).logits, open_gates)
    with torch.no_grad():
        for path, layer in layers.items():
            a, _ = slots.factors(layer, "default")
            a *= gates_of[path][:, None]
    torch.testing.assert_close(got, model(**inputs).logits)
    assert not torch.allclose(got, open_gates)


def test_a_second_adapter_on_an_embedding_has_no_gates(adapted, batch):
    model = adapted(target_modules=["embed_tokens"]).eval()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    layer = next(iter(slots.lora_layers(model, "default").values()))
    ids = batch()["input_ids"]
    with GateBank(model, "default") as gates, torch.no_grad():
        for gate in gates.fill(0.0).values():
            assert len(gate) == 3
        got = layer(ids)
        model.base_model.set_adapter("second")
        torch.testing.assert_close(got, layer(ids))


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
