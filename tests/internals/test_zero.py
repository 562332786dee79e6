"""What DeepSpeed may not be told, and what of it is read. Real runs: tests/allocation/test_processes.py."""

import inspect
import re
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import get_peft_model
from tiny_models import tiny_base
from torch import nn

from gatewise import RoutedLoraConfig, SelectivePromptConfig
from gatewise.errors import GatewiseError
from gatewise.internals import zero


def deepspeed(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3, **settings}})
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    monkeypatch.setitem(AcceleratorState._shared_state, "deepspeed_plugins", plugin)


def test_a_stage_that_shards_no_gradients_is_refused(monkeypatch):
    deepspeed(monkeypatch, stage=1)
    with pytest.raises(GatewiseError, match="ZeRO stage is 1, but gatewise knows its stages 2 and 3"):
        zero.check_settings(nn.Linear(1, 1))


def test_the_steps_of_a_fused_optimiser_lie_where_its_parameters_do():
    step, flat = torch.tensor(3.0), torch.empty(2, device="meta")
    for settings, place in (({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({"fused": None}, "cpu")):
        taken = zero._counter(step, flat, settings)
        assert taken.device.type == place
        assert taken is not step


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (RoutedLoraConfig(r=2, top_k=1, target_modules=["q_proj"], task_type="CAUSAL_LM"), "a routed adapter runs other modules"),
        (SelectivePromptConfig(prompt_layers=[0], task_type="CAUSAL_LM"), "selective prompts know positions by their tensors"),
    ],
    ids=["routed", "prompts"],
)
def test_adapters_that_zero3_does_not_bear_are_refused_there_alone(monkeypatch, config, sentence):
    model = get_peft_model(tiny_base("llama"), config)
    deepspeed(monkeypatch, stage=2)
    zero.check_settings(model)
    deepspeed(monkeypatch, stage=3)
    with pytest.raises(GatewiseError, match=rf"{sentence}.*take ZeRO-2"):
        zero.check_settings(model)


class Lion(torch.optim.SGD):
    """An optimiser of somebody else's."""


def test_optimisers_whose_state_cannot_be_found_are_refused(monkeypatch):
    deepspeed(monkeypatch)
    inner = SimpleNamespace(optimizer=Lion([nn.Parameter(torch.ones(1))], lr=1.0))
    with pytest.raises(GatewiseError, match=r"the optimizer is .*\.Lion, whose state ZeRO cuts up.*optim='adamw_torch'"):
        zero.zero_of(SimpleNamespace(optimizer=inner))


def test_without_deepspeed_there_is_nothing_of_zero():
    assert zero.zero_of(SimpleNamespace(optimizer=None)) is None


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("stage_1_and_2", ("single_partition_of_fp32_groups",)),
        ("stage3", ("grad_position", "get_param_id", "fp32_partitioned_groups_flat", "persistent_parameters")),
        ("partition_parameters", ("ds_tensor", "ds_shape", "ds_numel", "ds_persist", "ds_process_group", "is_external_param")),
        ("partition_parameters", ("convert_to_zero_parameters", "all_gather")),
    ],
)
def test_deepspeed_has_the_attributes_that_are_read(module, names):
    """They begin with no underscore, but are documented nowhere either."""
    pytest.importorskip("deepspeed")
    source = inspect.getsource(import_module(f"deepspeed.runtime.zero.{module}"))
    missing = [name for name in names if not re.search(rf"\b(self|param|p)\.{name}\b", source)]
    assert not missing, f"DeepSpeed has no {', '.join(missing)} any more, which gatewise/internals/zero.py reads"
