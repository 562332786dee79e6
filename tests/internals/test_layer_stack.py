"""The layers of a model, the linear modules in them, and the models around them."""

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_base
from torch import nn
from transformers import AutoModel, BertConfig, DebertaConfig, DebertaV2Config, EncoderDecoderConfig, EncoderDecoderModel

from gatewise.errors import GatewiseError
from gatewise.internals.layer_stack import Stack, models_around

PATHS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}


@pytest.mark.parametrize(("family", "experts"), [("llama", 7), ("gpt2", 4), ("bert", 6)])
def test_the_stack_and_its_linear_modules(family, experts):
    model = tiny_base(family)
    stack = Stack(model)
    layers = {f"{PATHS[family]}.{index}": layer for index, layer in enumerate(model.get_submodule(PATHS[family]))}
    assert {path: layer.module for path, layer in stack.layers.items()} == layers
    assert all(layer.width == 16 and not layer.reads_encoder for layer in stack.layers.values())
    paths = stack.linear_modules(model)
    assert len(paths) == 2 * experts
    first, second = layers
    assert [stack.layer_of(path) for path in paths] == [first] * experts + [second] * experts
    assert [stack.layer_of(path) for path in (PATHS[family], first, "lm_head")] == [None] * 3
    adapted = get_peft_model(tiny_base(family), LoraConfig(target_modules="all-linear")).get_base_model()
    assert Stack(adapted).linear_modules(adapted) == paths


@pytest.mark.parametrize(
    ("family", "encoder", "decoder"), [("t5", "encoder", "decoder"), ("bart", "model.encoder", "model.decoder")]
)
def test_the_stacks_of_an_encoder_and_a_decoder(family, encoder, decoder):
    model = tiny_base(family)
    layers = Stack(model).layers.values()
    name = "block" if family == "t5" else "layers"
    assert [layer.path for layer in layers] == [f"{side}.{name}.{index}" for side in (encoder, decoder) for index in (0, 1)]
    assert [layer.reads_encoder for layer in layers] == [False, False, True, True]
    assert all(layer.module is model.get_submodule(layer.path) and layer.width == 16 for layer in layers)
    inner = [model.get_submodule(path) for path in (encoder, decoder)]
    outer = [model] if family == "t5" else [model, model.model]
    assert models_around(model, *(layer.module for layer in layers)) == [*outer, *inner]


def test_a_decoder_is_routed_by_states_of_the_width_that_it_is_given():
    sizes = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    reads, writes = (
        BertConfig(**sizes, hidden_size=8),
        BertConfig(**sizes, hidden_size=12, is_decoder=True, add_cross_attention=True),
    )
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(reads, writes))
    assert [layer.width for layer in Stack(model).layers.values()] == [8, 12]  # the model widens them for its decoder


def test_models_without_a_stack_are_refused():
    with pytest.raises(GatewiseError, match="Linear has no list of layers with linear modules"):
        Stack(nn.Linear(2, 2))


@pytest.mark.parametrize("family", PATHS)
def test_models_around_a_layer(family):
    """With the head, and without; not the list of layers itself, nor an encoder that is no model by itself."""
    model = tiny_base(family)
    layer = next(iter(Stack(model).layers.values())).module
    assert models_around(model, layer) == [model, model.base_model]


def test_experts_that_no_router_could_choose_are_refused():
    model = tiny_base("llama")
    stack = Stack(model)
    experts = stack.experts(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
    layers = [f"model.layers.{index}" for index in (0, 1)]
    assert experts == {layer: [f"{layer}.self_attn.q_proj", f"{layer}.mlp.up_proj"] for layer in layers}
    for target, message in (("lm_head", "lies outside the layers of model.layers"), ("mlp", "only linear modules can be experts")):
        with pytest.raises(GatewiseError, match=message):
            stack.experts(model, LoraConfig(target_modules=[target]))


@pytest.mark.parametrize(
    ("config", "settings", "names"),
    [
        (DebertaV2Config, {"share_att_key": True}, ["query_proj", "key_proj"]),
        (DebertaV2Config, {}, ["pos_key_proj", "pos_query_proj"]),
        (DebertaConfig, {}, ["pos_proj", "pos_q_proj"]),
    ],
)
def test_modules_that_project_positions_are_no_experts(config, settings, names):
    """DeBERTa's, which run on a table of positions and not on the tokens of a prompt."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    model = AutoModel.from_config(config(**sizes, **relative, **settings))
    for name in names:
        path = f"encoder.layer.0.attention.self.{name}"
        with pytest.raises(GatewiseError, match=rf"target_modules matches {path}, .*positions.*exclude_modules"):
            Stack(model).experts(model, LoraConfig(target_modules=[name]))
    rest = LoraConfig(target_modules=Stack(model).linear_modules(model), exclude_modules=names)
    assert len(Stack(model).experts(model, rest)["encoder.layer.0"]) == (4 if settings else 6 if config is DebertaV2Config else 4)
