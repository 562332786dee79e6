"""The layers of a model, the linear modules in them, and the models around them."""

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_base
from torch import nn

from gatewise.errors import GatewiseError
from gatewise.internals.layer_stack import Stack

PATHS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}


@pytest.mark.parametrize(("family", "experts"), [("llama", 7), ("gpt2", 4), ("bert", 6)])
def test_the_stack_and_its_linear_modules(family, experts):
    model = tiny_base(family)
    stack = Stack(model)
    layers = {f"{PATHS[family]}.{index}": layer for index, layer in enumerate(model.get_submodule(PATHS[family]))}
    assert stack.layers == layers
    assert stack.around == [model, model.base_model]
    paths = stack.linear_modules(model)
    assert len(paths) == 2 * experts
    first, second = layers
    assert [stack.layer_of(path) for path in paths] == [first] * experts + [second] * experts
    assert [stack.layer_of(path) for path in (PATHS[family], first, "lm_head")] == [None] * 3
    adapted = get_peft_model(tiny_base(family), LoraConfig(target_modules="all-linear")).get_base_model()
    assert Stack(adapted).linear_modules(adapted) == paths


def test_models_without_one_stack_are_refused():
    with pytest.raises(GatewiseError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        Stack(tiny_base("t5"))
    empty = tiny_base("llama")
    empty.model.layers = nn.ModuleList()
    with pytest.raises(GatewiseError, match="LlamaForCausalLM has no list of layers with linear modules"):
        Stack(empty)
