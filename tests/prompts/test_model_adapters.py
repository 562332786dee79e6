"""What PEFT does with adapters: saving, loading, several of them, taking them off; and what is refused."""

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from prompted_models import DECODERS, FAMILIES, open_gates, prompt_config, prompted, prompted_base, task_of
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from gatewise import GatewiseError, SelectivePromptConfig
from gatewise.prompts.cache import PromptedCache


@pytest.fixture
def batch(texts) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(tmp_path, batch, family, layers):
    torch.manual_seed(1)
    model = prompted(family, prompt_layers=layers, phm=2, tau=0.5)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SELECTIVE_PROMPT"
    assert saved["prompt_layers"] == layers
    assert saved["made_for"]["layers"] == 3
    assert "target_modules" not in saved
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sum("spt_gate_logit" in name for name in names) == (3 if layers is None else 0)
    assert sum("spt_generator.down_a" in name for name in names) == (3 if layers is None else 1)
    assert any(part in name for name in names for part in ("classifier", "score")) == (task_of(family) == "SEQ_CLS")
    for quick in (False, True):
        torch.manual_seed(1)
        loaded = PeftModel.from_pretrained(prompted_base(family), tmp_path, low_cpu_mem_usage=quick)
        torch.testing.assert_close(logits(loaded, batch), expected)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(prompted_base(family), tmp_path, is_trainable=True, adapter_name="mine")
    torch.testing.assert_close(logits(loaded, batch), expected)
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".mine" in name for name in trainable)


def test_an_adapter_goes_on_no_other_base(tmp_path):
    prompted("llama", prompt_layers=[1]).save_pretrained(tmp_path)
    with pytest.raises(GatewiseError, match=r"was made for .*'llama'.*, but the base model is .*'gpt2'"):
        PeftModel.from_pretrained(prompted_base("gpt2"), tmp_path)
    config = prompt_config("llama", prompt_layers=[1])
    for family in ("llama", "gpt2"):  # a new configuration goes on any
        get_peft_model(prompted_base(family), config)


def test_another_adapter_is_active_once_the_active_one_is_deleted(batch):
    model = prompted("llama")
    model.add_adapter("late", prompt_config("llama", prompt_layers=[2], num_prompt_tokens=5))
    model.set_adapter("late")
    assert model.gates().tolist() == [0.0, 0.0, 1.0]
    late = logits(model, batch)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["late"]
    torch.testing.assert_close(logits(model, batch), late)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and "spt_gen" in name} == {"late"}


def test_unload_gives_the_base_model_back(batch):
    base = prompted_base("llama")
    plain, kinds, names = logits(base, batch), [type(layer) for layer in base.model.layers], list(base.state_dict())
    model = get_peft_model(base, prompt_config())
    assert not torch.allclose(logits(model, batch), plain, atol=1e-4)
    assert [type(layer).__name__ for layer in base.model.layers] == [kind.__name__ for kind in kinds]
    unloaded = model.unload()
    assert unloaded is base
    assert torch.equal(logits(base, batch), plain)
    assert [type(layer) for layer in base.model.layers] == kinds
    assert list(base.state_dict()) == names
    again = open_gates(get_peft_model(base, prompt_config()))
    assert not torch.allclose(logits(again, batch), plain, atol=1e-4)


def test_a_head_without_weights_of_its_own_is_unloaded_too(batch):
    model = prompted("roberta")
    model.base_model.model.classifier.modules_to_save["default"].dense.weight.data.mul_(2)
    trained = model.base_model.model.classifier.modules_to_save["default"]
    assert model.unload().classifier is trained


def test_gates_are_read_and_dropped(batch):
    model = prompted("llama")
    logits_ = torch.cat(list(model.gate_parameters().values()))
    torch.testing.assert_close(model.gates(), logits_.detach().sigmoid())
    fresh = get_peft_model(prompted_base("llama"), prompt_config())
    assert fresh.gates().tolist() == [0.5, 0.5, 0.5]
    with model.gates_dropped([False, True, True]):
        dropped = logits(model, batch)
    for parameter in list(model.gate_parameters().values())[1:]:
        parameter.data.fill_(-1e9)
    torch.testing.assert_close(dropped, logits(model, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_with_gates_dropped_is_the_discrete_one(batch, family):
    """Below the first layer with an open gate it is the base model, as the discrete model is, and carried prompts are carried."""
    for layers in ([0, 2], [1], [1, 2], [2]):
        discrete = prompted(family, prompt_layers=layers)
        model = get_peft_model(copy.deepcopy(discrete).unload(), prompt_config(family)).eval()
        names = dict(discrete.named_parameters())
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.data.copy_(names[name])
        for logit in model.gate_parameters().values():
            logit.data.fill_(1e9)
        closed = torch.tensor([layer not in layers for layer in range(3)])
        with model.gates_dropped(closed):
            torch.testing.assert_close(logits(model, batch), logits(discrete, batch))
    with model.gates_dropped([True] * 3), discrete.disable_adapter():
        torch.testing.assert_close(logits(model, batch), logits(discrete, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_part_when_gates_are_dropped(batch, family):
    """Data-parallel training needs that; and what is dropped learns nothing."""
    model = prompted(family).train()
    with model.gates_dropped([True, True, False]):
        labels = {"labels": batch["input_ids"]} if family in DECODERS else {}
        model(**batch, **labels).logits.square().sum().backward()
    for layer in range(3):
        found = [p.grad for name, p in model.named_parameters() if f".{layer}.selective_prompt." in name]
        assert len(found) == 3
        assert all((gradient != 0).any() == (layer == 2) for gradient in found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_many_dropped_gates_leave_gradients_finite(attention):
    """A prompt of zeros carried through so many layers has a gradient beyond float32, which times a gate of zero is no number."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 40, "vocab_size": 64}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=attention)), prompt_config()).train()
    ids = torch.arange(3, 11)[None]
    with model.gates_dropped([True] * 39 + [False]):
        model(input_ids=ids, labels=torch.where(torch.arange(8) < 5, -100, ids)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.gate_parameters().popitem()[1].grad != 0


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompt_tokens": 0}, "num_prompt_tokens is 0: expected a whole number of at least 1"),
        ({"bottleneck": 2.5}, "bottleneck is 2.5: expected a whole number"),
        ({"tau": 0}, "tau is 0: expected a number above 0 and at most 1"),
        ({"tau": 1.5}, "tau is 1.5"),
        ({"balanced": "yes"}, "balanced is 'yes': expected True, False or None"),
        ({"phm": 3, "bottleneck": 4}, "phm is 3, which does not divide bottleneck 4"),
        ({"phm": True}, "phm is True: expected a whole number"),
        ({"activation": "swish"}, "activation is 'swish': expected one of gelu, relu, tanh, identity"),
        ({"prompt_layers": []}, r"prompt_layers is \[\]: expected a list of different layer numbers from 0"),
        ({"prompt_layers": [1, 1]}, r"prompt_layers is \[1, 1\]"),
        ({"prompt_layers": [-1]}, r"prompt_layers is \[-1\]"),
        ({"prompt_layers": "all"}, "prompt_layers is 'all'"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(GatewiseError, match=message):
        SelectivePromptConfig(**settings)


def test_settings_that_do_not_fit_the_model():
    base = prompted_base("llama")
    with pytest.raises(GatewiseError, match="names layer 3, but the model has 3 layers: expected numbers from 0 to 2"):
        get_peft_model(base, prompt_config(prompt_layers=[1, 3]))
    with pytest.raises(GatewiseError, match="phm is 3, which does not divide the model's hidden size 16"):
        get_peft_model(base, prompt_config(phm=3, bottleneck=6))
    get_peft_model(base, prompt_config(prompt_layers=[1, 2]))  # and the base is none the worse


def test_other_architectures():
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    crossing = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, add_cross_attention=True))
    lora = get_peft_model(prompted_base("llama"), LoraConfig(target_modules=["q_proj"])).get_base_model()
    for base, message in (
        (
            OlmoForCausalLM(OlmoConfig(**tiny, num_key_value_heads=2)),
            "not built for olmo models: supported are llama, .*a$",
        ),
        (nn.Linear(2, 2), "not into a Linear"),
        (BertLMHeadModel(BertConfig(**tiny, is_decoder=True)), "bert model has is_decoder=True"),
        (crossing, "gpt2 model has add_cross_attention=True"),
        (lora, "carries an adapter already"),
    ):
        with pytest.raises(GatewiseError, match=message):
            get_peft_model(base, prompt_config(task_type=None))


@pytest.mark.parametrize("kind", [BertForPreTraining, BertLMHeadModel])
def test_an_encoder_reads_all_of_a_text_whatever_its_head(texts, kind):
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = get_peft_model(kind(config), prompt_config("bert-mlm")).eval()
    given = {"input_ids": texts[0][None]}
    labels = torch.full((1, 9), -100)
    labels[0, 2] = 7
    with torch.no_grad():
        name = "logits" if kind is BertLMHeadModel else "prediction_logits"
        assert torch.equal(model(**given, labels=labels)[name], model(**given)[name])
    model.train()(**given)  # and its training need not say where a prompt ends


def test_what_a_model_with_prompts_does_not_do(batch):
    model, ids = prompted("llama"), batch["input_ids"]
    model.add_adapter("other", prompt_config())
    for call, message in (
        (model.merge_adapter, "cannot be merged, because they are tokens"),
        (model.merge_and_unload, "cannot be merged, because they are tokens"),
        (lambda: model.base_model.set_adapter(["default", "other"]), "activate one at a time"),
        (lambda: model(**batch, adapter_names=["default"] * 4), "adapter_names was given"),
        (lambda: model.base_model.model.model.layers[0](torch.zeros(1, 2, 16)), "outside the forward of its model"),
        (lambda: model(input_ids=ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])), "packed samples"),
        (lambda: model.train()(**batch), "trained without labels"),
    ):
        with pytest.raises(GatewiseError, match=message):
            call()
    model.base_model.model.model.config._attn_implementation = "flex_attention"
    with pytest.raises(GatewiseError, match="attn_implementation is 'flex_attention'"):
        model.eval()(**batch)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_models_and_caches_are_copied(batch, family):
    model = prompted(family, prompt_layers=[1])
    expected = logits(model, batch)
    torch.testing.assert_close(logits(copy.deepcopy(model), batch), expected)
    if family == "llama":
        with torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        assert isinstance(copied, PromptedCache)
        assert copied.gatewise_prompts.states.keys() == cache.gatewise_prompts.states.keys()
