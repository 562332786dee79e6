"""RoutedLoraConfig: defaults, round trip, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraRuntimeConfig
from routed_models import routed_base, routed_config
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from gatewise import RoutedLoraConfig, SelectivePromptConfig
from gatewise.errors import GatewiseError


def test_round_trip(tmp_path):
    given = {"r": 5, "lora_alpha": 7, "top_k": 2, "pooler": "max", "activation": "relu", "balance_weight": 0.5}
    config = RoutedLoraConfig(
        **given,
        normalize_gates=False,
        normalize_states=False,
        center_states=False,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ROUTED_LORA"
    for loaded in (PeftConfig.from_pretrained(tmp_path), RoutedLoraConfig.from_pretrained(tmp_path)):
        assert type(loaded) is RoutedLoraConfig
        assert loaded == config
    assert RoutedLoraConfig(**{k: v for k, v in config.to_dict().items() if k != "peft_type"}).to_dict() == config.to_dict()


def test_numbers_of_numpy_are_saved(tmp_path):
    config = RoutedLoraConfig(r=np.int64(5), top_k=np.int64(2), balance_weight=np.float32(0.5))
    config.save_pretrained(tmp_path)
    assert RoutedLoraConfig.from_pretrained(tmp_path).balance_weight == 0.5
    SelectivePromptConfig(tau=np.float32(0.5), num_prompt_tokens=np.int64(3)).save_pretrained(tmp_path)
    assert SelectivePromptConfig.from_pretrained(tmp_path).tau == 0.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"r": 0}, "r is 0: expected a whole number of at least 1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": True}, "top_k is True"),
        ({"pooler": "sum"}, "pooler is 'sum': expected one of attention, mean, max, last"),
        ({"activation": "silu"}, "activation is 'silu': expected one of rational, gelu, relu, identity"),
        ({"balance_weight": -1.0}, "balance_weight is -1.0"),
        ({"balance_weight": float("nan")}, "balance_weight is nan"),
        ({"balance_weight": "much"}, "balance_weight is 'much'"),
        ({"use_dora": True}, "use_dora=True does not go with routed experts"),
        ({"lora_bias": True}, "lora_bias=True does not go"),
        ({"layer_replication": [(0, 1)]}, "layer_replication="),
        ({"target_parameters": ["weight"]}, "target_parameters="),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying=True"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens is a LoRA variant"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ],
)
def test_refusals(setting, message):
    with pytest.raises(GatewiseError, match=message):
        RoutedLoraConfig(**setting)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_starts(batch, start):
    model = get_peft_model(routed_base("llama"), routed_config(r=4, init_lora_weights=start)).eval()
    with torch.no_grad():
        same = torch.allclose(model(**batch()).logits, model.unload()(**batch()).logits, atol=1e-5)
    assert same == (start is not False)


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("llama", {"top_k": 8}, r"top_k is 8, but layer model\.layers\.0 has 7 experts"),
        ("llama", {"target_modules": ["q_proj", "v_proj"]}, "top_k is 3, but layer .* has 2 experts"),
        ("gpt2", {"top_k": 5}, "top_k is 5, but layer .* has 4 experts"),
        (
            "llama",
            {"target_modules": ["q_proj", "lm_head"], "top_k": 1},
            "matches lm_head, which lies outside the layers of model.layers",
        ),
        ("bert", {"target_modules": ["dense"], "top_k": 1}, "matches bert.pooler.dense, which lies outside"),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "top_k": 1}, "matches model.embed_tokens, which lies outside"),
        ("llama", {"target_modules": ["self_attn"], "top_k": 1}, "is a LlamaAttention, and only linear modules"),
    ],
)
def test_targets_that_cannot_be_experts(batch, family, setting, message):
    """Refused before anything is done to the base model."""
    base = routed_base(family).eval()
    modules, with_grad = [type(module) for module in base.modules()], [p.requires_grad for p in base.parameters()]
    with pytest.raises(GatewiseError, match=message):
        get_peft_model(base, routed_config(family, **setting))
    assert [type(module) for module in base.modules()] == modules
    assert [p.requires_grad for p in base.parameters()] == with_grad
    assert not any(module._forward_pre_hooks for module in base.modules())
    get_peft_model(base, routed_config(family))(**batch(family))


def test_all_linear_leaves_out_what_lies_outside_the_layers():
    model = get_peft_model(routed_base("bert"), routed_config("bert"))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "prompt_router")}
    assert len(adapted) == 12
    assert not any("pooler" in name or "classifier" in name for name in adapted)
    excluded = get_peft_model(routed_base("llama"), routed_config(exclude_modules=["down_proj"]))
    assert sum(hasattr(module, "prompt_router") for module in excluded.modules()) == 12


def test_one_expert_of_a_mixture_is_refused():
    base = routed_base("llama")
    for layer in base.model.layers:
        layer.mlp.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    with pytest.raises(GatewiseError, match="one expert of a mixture"):
        get_peft_model(base, routed_config(target_modules=["q_proj", "experts.0"], top_k=1))
    model = get_peft_model(base, routed_config())
    assert not any(hasattr(module, "prompt_router") for module in model.base_model.model.model.layers[0].mlp.experts)


class QuantLinear(torch.nn.Module):
    """Stands for GPTQ's and AWQ's layers, which are no ``nn.Linear``."""

    def __init__(self, plain):
        super().__init__()
        self.infeatures, self.outfeatures, self.plain = plain.in_features, plain.out_features, [plain]
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))

    def forward(self, x):
        return self.plain[0](x)


def test_quantised_modules_are_linear_too(batch):
    base = routed_base("llama")
    for layer in base.model.layers:
        for path, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                layer.set_submodule(path, QuantLinear(module))
    with torch.no_grad():
        expected = base(**batch()).logits
        model = get_peft_model(base, routed_config()).eval()
        torch.testing.assert_close(model(**batch()).logits, expected)
    assert model.routing().gates.shape == (5, 2, 7)


def test_models_that_cannot_be_routed():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2}
    for recurrent in (MambaForCausalLM(MambaConfig(**sizes)), RwkvForCausalLM(RwkvConfig(**sizes, attention_hidden_size=8))):
        kind = recurrent.config.model_type
        with pytest.raises(
            GatewiseError, match=f"{kind} models keep their past in a recurrent state.*: use a model with attention"
        ):
            get_peft_model(recurrent, routed_config())
    with pytest.raises(GatewiseError, match="not on a Sequential"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), RoutedLoraConfig())
    adapted = get_peft_model(routed_base("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(GatewiseError, match="carries an adapter already"):
        get_peft_model(adapted.get_base_model(), routed_config())


def test_other_types_are_not_mixed_in(routed):
    with pytest.raises(ValueError, match="different peft types"):
        routed("llama").add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="different peft types"):
        routed("llama").add_adapter("ada", AdaLoraConfig(target_modules=["q_proj"], total_step=5))
    assert isinstance(RoutedLoraConfig().runtime_config, LoraRuntimeConfig)
