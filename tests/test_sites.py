"""Paths of the architectures people use, read into layer and kind."""

import pytest

from gatewise.sites import KIND_ORDER, kind_key, layer_path, site, sites_in_order


@pytest.mark.parametrize(
    ("path", "layer", "kind"),
    [
        ("model.layers.11.self_attn.q_proj", 11, "q"),
        ("model.layers.0.mlp.gate_proj", 0, "gate"),
        ("transformer.h.3.attn.c_attn", 3, "qkv"),
        ("transformer.h.3.attn.c_proj", 3, "o"),
        ("transformer.h.3.mlp.c_proj", 3, "down"),
        ("bert.encoder.layer.5.attention.self.query", 5, "q"),
        ("bert.encoder.layer.5.attention.output.dense", 5, "o"),
        ("bert.encoder.layer.5.output.dense", 5, "down"),
        ("bert.encoder.layer.5.intermediate.dense", 5, "up"),
        ("bert.pooler.dense", None, "pooler"),
        ("gpt_neox.layers.2.attention.query_key_value", 2, "qkv"),
        ("model.language_model.layers.7.mlp.down_proj", 7, "down"),
        ("encoder.block.1.layer.0.SelfAttention.q", 1, "q"),
        ("decoder.block.1.layer.1.EncDecAttention.o", 1, "o"),
        ("decoder.block.0.layer.2.DenseReluDense.wi_0", 0, "gate"),
        ("decoder.block.0.layer.2.DenseReluDense.wo", 0, "down"),
        ("model.decoder.layers.3.encoder_attn.v_proj", 3, "v"),
        ("model.layers.3.mlp.experts.gate_up_proj[12]", 3, "gate_up"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_layer_and_kind(path, layer, kind):
    found = site(path)
    assert (found.path, found.layer, found.kind) == (path, layer, kind)


def test_the_layer_that_a_module_lies_in():
    paths = [
        "model.layers.11.self_attn.q_proj",
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.2.DenseReluDense.wo",
    ]
    assert [layer_path(path) for path in paths] == ["model.layers.11", "encoder.block.1", "decoder.block.1"]
    assert layer_path("lm_head") == ""


def test_kinds_sort_in_reading_order_with_unknown_ones_last():
    assert sorted(["zeta", "down", "q", "alpha"], key=kind_key) == ["q", "down", "alpha", "zeta"]
    assert sorted(KIND_ORDER, key=kind_key) == list(KIND_ORDER)


def test_sites_in_order_by_layer_then_kind_and_what_is_outside_the_stack_last():
    paths = ["lm_head", "model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.self_attn.v_proj"]
    assert [place.path for place in sites_in_order(paths)] == [paths[3], paths[2], paths[1], paths[0]]
