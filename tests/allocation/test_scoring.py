"""The state in which ranks are scored: what is converted, what is left alone, and that all of it is undone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, random_adapter
from transformers import FalconConfig, FalconForCausalLM

from gatewise.allocation.scores.taylor import taylor
from gatewise.allocation.scoring import scoring


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


def test_scoring_leaves_packed_weights_alone(adapted):
    """As bitsandbytes keeps 4-bit weights with bfloat16 storage: the dtype says how bytes are packed, not what they are."""
    model = adapted().to(torch.bfloat16)
    packed = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False)
    packed.quant_state = object()
    model.register_parameter("packed", packed)
    model.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
    with scoring(model):
        assert model.packed.dtype == model.scale.dtype == torch.bfloat16
        assert model.get_base_model().lm_head.weight.dtype == torch.float32
    assert all(value.dtype == torch.bfloat16 for value in model.parameters())


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
        (torch.bfloat16, None, True, False),
        (torch.bfloat16, None, False, True),  # emulated: slower than float32
        (torch.float16, None, True, True),  # small gradients would be lost
        (torch.bfloat16, True, True, True),
        (torch.bfloat16, False, False, False),
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
