"""Accelerate's hooks on the base model: put on and taken off around the adapter, and layers that are offloaded."""

import copy
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from peft import PeftModel, get_peft_model
from prompted_models import prompt_config, prompted, prompted_base

from gatewise import GatewiseError
from gatewise.prompts.layer import _device_of

CPU = torch.device("cpu")
PARTS = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", "model.layers.0": "cpu"}
ON_DISK = {**PARTS, "model.layers.1": "disk", "model.layers.2": "disk"}


@pytest.fixture
def ids(texts):
    return texts[0][None]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def hooked(base: Any) -> Any:
    for layer in base.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return base


def the_same_prompts(base: Any, **settings: Any) -> PeftModel:
    torch.manual_seed(4)
    return get_peft_model(base, prompt_config(prompt_layers=[1], **settings)).eval()


def test_hooks_that_were_removed_before_the_adapter_came(ids):
    base = prompted_base("llama")
    wanted = logits(the_same_prompts(copy.deepcopy(base)), ids)
    remove_hook_from_submodules(hooked(base))
    assert torch.equal(logits(the_same_prompts(base), ids), wanted)


def test_loaded_into_a_model_with_layers_on_disk(ids, tmp_path):
    base = prompted_base("llama")
    model = the_same_prompts(copy.deepcopy(base))
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    base = accelerate.dispatch_model(base, ON_DISK, main_device="cpu", offload_dir=tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", offload_folder=str(tmp_path / "again")).eval()
    torch.testing.assert_close(logits(loaded, ids), wanted)


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("family", ["llama", "t5-tokens"])
def test_offloaded_layers_get_prompts(ids, family, layers):
    base = prompted_base(family)
    twin = accelerate.cpu_offload(copy.deepcopy(base), execution_device=CPU)
    made = []
    for one in (base, twin):
        torch.manual_seed(4)
        made.append(get_peft_model(one, prompt_config(family, prompt_layers=layers)).eval())
    assert {p.device for name, p in made[1].named_parameters() if "spt_" in name} == {CPU}
    torch.testing.assert_close(logits(made[1], ids), logits(made[0], ids))


def test_where_an_offloaded_layer_runs():
    """Accelerate's hooks know; a layer without weights and hooks runs nowhere, and its prompts stay where they were made."""
    base = prompted_base("llama")
    assert _device_of(base.model.layers[0]) == CPU
    offloaded = accelerate.cpu_offload(copy.deepcopy(base), execution_device=CPU)
    for module in offloaded.modules():
        if isinstance(getattr(module, "_hf_hook", None), AlignDevicesHook):
            module._hf_hook.execution_device = "cuda:1"
    assert _device_of(offloaded.model.layers[0]) == torch.device("cuda:1")
    model = get_peft_model(base.to("meta"), prompt_config())
    assert {p.device for name, p in model.named_parameters() if "spt_" in name} == {CPU}


def test_an_offloaded_hyper_network_is_refused(ids):
    model = accelerate.cpu_offload(prompted("llama"), execution_device=CPU)
    for call in (lambda: logits(model, ids), model.gates):
        with pytest.raises(GatewiseError, match="gates of adapter 'default' are offloaded, but a hyper-network needs them"):
            call()
