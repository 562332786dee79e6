"""The layers of a model, the linear modules in them, and the models around them."""

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_base
from torch import nn

from gatewise.errors import GatewiseError
from gatewise.internals.layer_stack import Stack, models_around

PATHS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}


@pytest.mark.parametrize(("family", "experts"), [("llama", 7), ("gpt2", 4), ("bert", 6)])
def test_the_stack_and_its_linear_modules(family, experts):
    model = tiny_base(family)
    stack = Stack(model)
    assert stack.path == PATHS[family]
    assert stack.layers == list(model.get_submodule(stack.path))
    paths = stack.linear_modules(model)
    assert len(paths) == 2 * experts
    assert [stack.layer_of(path) for path in paths] == [0] * experts + [1] * experts
    assert stack.layer_of("lm_head") is None
    assert stack.layer_of(f"{stack.path}.1") is None
    adapted = get_peft_model(tiny_base(family), LoraConfig(target_modules="all-linear")).get_base_model()
    assert Stack(adapted).linear_modules(adapted) == paths


def test_models_without_a_stack_are_refused():
    with pytest.raises(GatewiseError, match="Linear has no list of layers with linear modules"):
        Stack(nn.Linear(2, 2))


@pytest.mark.parametrize("family", PATHS)
def test_models_around_a_layer(family):
    """With the head, and without; not the list of layers itself, nor an encoder that is no model by itself."""
    model = tiny_base(family)
    layer = Stack(model).layers[0]
    assert models_around(model, layer) == [model, model.base_model]


def test_experts_that_no_router_could_choose_are_refused():
    model = tiny_base("llama")
    stack = Stack(model)
    experts = stack.experts(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
    assert experts == {index: [f"model.layers.{index}.self_attn.q_proj", f"model.layers.{index}.mlp.up_proj"] for index in (0, 1)}
    for target, message in (("lm_head", "lies outside the layers of model.layers"), ("mlp", "only linear modules can be experts")):
        with pytest.raises(GatewiseError, match=message):
            stack.experts(model, LoraConfig(target_modules=[target]))
