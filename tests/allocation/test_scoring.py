"""Gates against the formula, and the state in which ranks are scored: what is converted, and that all of it is undone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, random_adapter
from transformers import FalconConfig, FalconForCausalLM

from gatewise.allocation import slots
from gatewise.allocation.scoring import GateBank, scoring
from gatewise.errors import GatewiseError
from gatewise.scores import taylor


def test_gates_multiply_ranks(adapted):
    model = adapted()
    path = "model.layers.1.self_attn.o_proj"
    layer = slots.lora_layers(model)[path]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 4, a.shape[1])
    with GateBank(model) as gates, torch.no_grad():
        gate = torch.tensor([1.0, 0.0, 0.5])
        gates.gates[path] = gate
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 2.0 * ((x @ a.T) * gate) @ b.T)
        rows = torch.rand(2, 1, 3)
        gates.gates[path] = rows
        for row in range(2):
            torch.testing.assert_close(layer(x)[row], layer.base_layer(x[row]) + 2.0 * ((x[row] @ a.T) * rows[row]) @ b.T)
    assert not layer.lora_B["default"]._forward_pre_hooks


def test_gates_that_would_do_nothing_are_refused(adapted):
    model = adapted()
    model.merge_adapter()
    with pytest.raises(GatewiseError, match="unmerge_adapter"):
        GateBank(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(GatewiseError, match="not active"):
        GateBank(model)


def test_scoring_undoes_accelerates_autocast(adapted, batch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another test's Trainer may have fixed another precision
    model = adapted()
    data = {key: value for key, value in batch().items() if key != "labels"}
    expected = model.eval()(**data).logits
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert not torch.equal(prepared(**data).logits, expected)
    with scoring(prepared):
        torch.testing.assert_close(prepared(**data).logits, expected)
    assert not torch.equal(prepared(**data).logits, expected)


def test_scoring_leaves_the_scales_of_packed_modules_alone(adapted):
    """As GPTQ and AWQ keep them: integers and half-precision scales, all of them buffers."""
    model = adapted().to(torch.float16)
    quantised = torch.nn.Module()
    quantised.register_buffer("qweight", torch.ones(2, 4, dtype=torch.int32))
    quantised.register_buffer("scales", torch.ones(1, 4, dtype=torch.float16))
    model.quantised = quantised
    model.register_buffer("positions", torch.arange(3))
    model.register_buffer("table", torch.ones(3, dtype=torch.float16))
    with scoring(model):
        assert model.quantised.scales.dtype == torch.float16
        assert model.table.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in model.parameters())
    assert model.quantised.scales.dtype == model.table.dtype == torch.float16


def test_inside_itself_it_converts_nothing_and_undoes_nothing(adapted):
    model = adapted().to(torch.bfloat16).train()
    weight = model.get_base_model().lm_head.weight
    with scoring(model):
        outer = weight.data_ptr()
        with scoring(model):
            assert weight.data_ptr() == outer
        assert weight.dtype == torch.float32
        assert not model.training
    assert weight.dtype == torch.bfloat16
    assert model.training


@pytest.mark.parametrize(
    ("dtype", "float32", "computes_in_it", "converted"),
    [
        (torch.bfloat16, False, True, False),
        (torch.bfloat16, False, False, True),  # emulated: slower than float32
        (torch.float16, False, True, True),  # small gradients would be lost
        (torch.bfloat16, True, True, True),
    ],
)
def test_what_is_converted(adapted, monkeypatch, dtype, float32, computes_in_it, converted):
    monkeypatch.setattr("gatewise.allocation.scoring.has_bfloat16", lambda device: computes_in_it)
    model = adapted().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with scoring(model, float32):
        assert {p.dtype for p in model.parameters()} == {torch.float32 if converted else dtype}
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_under_gradient_checkpointing_keep_no_activations(adapted, batch, reentrant):
    """Each layer runs again in the backward pass, with the same scores; re-entrant checkpointing takes no such gradients."""
    model, data = adapted().train(), batch()
    runs = []
    model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    expected = taylor(model, data)
    once = len(runs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = taylor(model, data)
    assert len(runs) - once == (once if reentrant else 2 * once)
    torch.testing.assert_close(found, expected)
    assert all(module.training for module in model.modules())


def test_layers_that_drop_out_themselves_do_not_while_scored(batch):
    """Falcon's reads its own mode, in which the modules inside it are not."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = FalconForCausalLM(FalconConfig(**sizes, hidden_dropout=0.5, attention_dropout=0.5))
    model = random_adapter(get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))).train()
    data = batch()
    expected = taylor(model, data)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = taylor(model, data)
    torch.testing.assert_close(found, expected)
