"""What modules cost in time: layers are timed as they are, and a slow one costs more."""

import time
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, random_adapter, tiny_base
from transformers import AlbertConfig, AlbertForSequenceClassification, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from gatewise.allocation.slots import lora_layers
from gatewise.compress.timing import check_timed, seconds_a_step, time_costs
from gatewise.errors import GatewiseError


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
def test_a_module_that_takes_long_costs_what_it_takes(family: str) -> None:
    settings: dict[str, Any] = {"target_modules": "all-linear"}
    if family == "mixtral":
        settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    torch.manual_seed(0)
    model = random_adapter(get_peft_model(tiny_base(family), LoraConfig(r=2, **settings))).eval()
    layers = lora_layers(model, "default")
    slow = next(path for path in layers if "q_proj" in path or "c_attn" in path or "query" in path)
    layers[slow].lora_A["default"].register_forward_hook(lambda *_: time.sleep(0.01))
    costs = time_costs(model)
    assert costs.keys() == layers.keys()
    assert all(cost.fixed > 0 and cost.each == 0 for cost in costs.values())
    assert costs[slow].fixed == pytest.approx(0.01, rel=0.5)
    # Modules of its shape are taken to cost what it costs.
    shapes = {path: [layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape] for path, layer in layers.items()}
    other = [cost.fixed for path, cost in costs.items() if shapes[path] != shapes[slow]]
    assert max(other, default=0) < 0.005
    with_adapter = seconds_a_step(model, repeats=3)
    with model.disable_adapter():
        assert with_adapter - seconds_a_step(model, repeats=3) > 0.008


def test_a_layer_that_runs_several_times_a_step_costs_as_often() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "embedding_size": 8, "num_attention_heads": 2}
    base = AlbertForSequenceClassification(AlbertConfig(vocab_size=VOCABULARY, num_hidden_layers=5, **sizes))
    model = random_adapter(get_peft_model(base, LoraConfig(r=2, target_modules=["query", "ffn"]))).eval()
    slow = next(path for path in lora_layers(model, "default") if "query" in path)
    lora_layers(model, "default")[slow].lora_A["default"].register_forward_hook(lambda *_: time.sleep(0.01))
    assert time_costs(model)[slow].fixed == pytest.approx(0.05, rel=0.5)


def test_a_model_without_a_cache_is_timed_on_its_text() -> None:
    base = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    check_timed(model)
    assert time_costs(model).keys() == lora_layers(model, "default").keys()
    assert seconds_a_step(model, repeats=3) > 0


def test_models_of_which_no_step_is_known_are_refused() -> None:
    for family in ("llama", "gpt2", "bert"):
        check_timed(get_peft_model(tiny_base(family), LoraConfig(r=2, target_modules="all-linear")))
    for family in ("t5", "vit", "wav2vec2"):
        with pytest.raises(
            GatewiseError, match=r"time is measured on a step of a model that writes or classifies texts, .*: ask for"
        ):
            check_timed(get_peft_model(tiny_base(family), LoraConfig(r=2, target_modules=["q", "query", "q_proj"])))


def test_a_model_is_left_in_its_mode_and_random_state() -> None:
    model = get_peft_model(tiny_base("llama"), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)).train()
    state = torch.get_rng_state()
    time_costs(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
