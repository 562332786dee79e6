"""What bitsandbytes does to its layers in evaluation, and that it does not happen, or is undone."""

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gatewise import RoutedLoraConfig, SelectivePromptConfig
from gatewise.internals.quantised import evaluating, is_quantised, never_pack


@pytest.fixture(params=[False, True], ids=["single", "double"])
def layer(request):
    """A 4-bit layer, its scales quantised too or not, that thinks itself on a processor for which it packs."""
    made = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=request.param)
    made = made.to("cpu")
    made.support_avx512bf16_for_cpu = True
    return made


def values(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def pack(layer):
    """As ``Linear4bit.forward`` does in evaluation on a processor with AVX512-BF16; this much runs on any."""
    layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)


def gradient(layer):
    x = torch.ones(3, 128, requires_grad=True)
    layer(x).sum().backward()
    return x.grad


def test_a_packed_weight_is_unpacked(layer):
    before, data, slope = values(layer), layer.weight.data.clone(), gradient(layer)
    pack(layer)
    assert not torch.equal(layer.weight.data.flatten(), data.flatten())
    never_pack(nn.Sequential(layer))
    assert torch.equal(layer.weight.data, data)
    # What packing rounded to bfloat16 stays rounded.
    torch.testing.assert_close(values(layer), before, rtol=0.01, atol=0.01 * float(before.abs().max()))
    torch.testing.assert_close(gradient(layer), slope, rtol=0.05, atol=0.01 * float(slope.abs().max()))


def test_an_evaluation_does_not_pack_any_more(layer):
    never_pack(nn.Sequential(layer))
    before, place, scales = layer.weight.data.clone(), layer.weight.data_ptr(), layer.weight.quant_state.absmax.clone()
    with torch.no_grad():
        layer.eval()(torch.ones(3, 128))
    assert layer.weight.data_ptr() == place
    assert torch.equal(layer.weight.data, before)
    assert torch.equal(layer.weight.quant_state.absmax, scales)
    assert layer.train()(torch.ones(3, 128, requires_grad=True)).requires_grad


def test_in_evaluation_layers_compute_as_in_training(layer):
    eight = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False).to("cpu")
    model = nn.ModuleList([layer, eight])
    x = torch.randn(3, 128)
    expected = [one(x) for one in model.train()]
    places = [one.weight.data_ptr() for one in model]
    pack(layer)
    layer.eval()
    with evaluating(model), torch.no_grad():
        found = [one(x) for one in model]
    torch.testing.assert_close(found[0], expected[0], rtol=0.02, atol=0.02)  # packing has rounded its scales
    assert torch.equal(found[1], expected[1])
    assert [layer.training, eight.training] == [False, True]
    assert eight.weight.data_ptr() == places[1]


def four_bit_model():
    """In which each layer thinks itself on such a processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, pad_token_id=0, **sizes))
    for path, plain in list(model.model.named_modules()):
        if isinstance(plain, nn.Linear):
            four = bnb.nn.Linear4bit(plain.in_features, plain.out_features, False, torch.float32, quant_type="nf4")
            four.load_state_dict(plain.state_dict())
            four.support_avx512bf16_for_cpu = True
            model.model.set_submodule(path, four.to("cpu"))
    return model


@pytest.mark.parametrize("packed_before", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        RoutedLoraConfig(r=2, target_modules=["q_proj", "v_proj"], top_k=1, init_lora_weights=False, task_type="CAUSAL_LM"),
        SelectivePromptConfig(num_prompt_tokens=3, prompt_layers=[0, 1], task_type="CAUSAL_LM"),
    ],
    ids=["routed", "prompts"],
)
def test_an_adapter_learns_as_before_after_an_evaluation(config, packed_before):
    base = four_bit_model()
    four_bits = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    if packed_before:
        for module in four_bits:
            pack(module)
    model = get_peft_model(base, config)
    assert not any(getattr(module.weight.quant_state, "packing_format_for_cpu", False) for module in four_bits)
    ids = torch.randint(1, 60, (3, 8))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(8) < 4, -100)}

    def gradients():
        model.zero_grad()
        model.train()(**batch).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    found = gradients()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_is_quantised():
    eight = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False).to("cpu")
    four = bnb.nn.Linear4bit(64, 64).to("cpu")
    packed = nn.Module()  # as GPTQ and AWQ keep them
    packed.register_buffer("qweight", torch.ones(2, 2, dtype=torch.int32))
    assert all(map(is_quantised, [eight, four, packed]))
    counting = nn.BatchNorm1d(4)  # its counter is an int64 buffer
    assert not any(map(is_quantised, [nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), counting, nn.Sequential(four)]))
