"""What FSDP is told to leave whole, and launches that cannot work. Real runs: tests/allocation/test_processes.py."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_base
from torch import nn
from torch.distributed.fsdp import StateDictType

from gatewise.errors import GatewiseError
from gatewise.internals import sharding

CPU = torch.device("cpu")


def plugin(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> SimpleNamespace:
    settings: dict[str, Any] = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "ignored_modules": None}
    settings |= {"state_dict_type": StateDictType.FULL_STATE_DICT, "transformer_cls_names_to_wrap": None} | changes
    made = SimpleNamespace(**settings)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", made)
    return made


def test_exactly_the_parameters_given_are_left_out(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    others = nn.Linear(1, 1)
    made = plugin(monkeypatch, ignored_modules=[others])
    sharding.leave_out_of_sharding(model, [model[1].weight], CPU)
    left_out = {id(parameter) for module in made.ignored_modules for parameter in module.parameters()}
    assert left_out == {id(parameter) for parameter in (model[1].weight, *others.parameters())}


def test_a_best_checkpoint_in_pieces_is_refused(monkeypatch):
    plugin(monkeypatch, state_dict_type=StateDictType.SHARDED_STATE_DICT)
    sharding.leave_out_of_sharding(nn.Linear(1, 1), [nn.Parameter(torch.ones(1))], CPU)
    with pytest.raises(GatewiseError, match=r"SHARDED_STATE_DICT.* take FULL_STATE_DICT"):
        sharding.leave_out_of_sharding(nn.Linear(1, 1), [nn.Parameter(torch.ones(1))], CPU, loads_best=True)


def test_they_go_to_the_device_of_the_process(monkeypatch):
    """FSDP takes there only what it shards."""
    moved: list[Any] = []
    monkeypatch.setattr(nn.ParameterList, "to", lambda self, device: moved.append((list(self), device)) or self)
    plugin(monkeypatch)
    weight = nn.Parameter(torch.ones(1))
    sharding.leave_out_of_sharding(nn.Linear(1, 1), [weight], torch.device("cuda:1"))
    assert moved == [([weight], torch.device("cuda:1"))]


@pytest.mark.parametrize(("family", "sharded"), [("bert", {"BertLayer"}), ("llama", {"LlamaDecoderLayer"})])
def test_modules_around_the_input_embedding_are_not_sharded(monkeypatch, family, sharded):
    """Accelerate 1.15 shards the embedding afterwards, and torch then says "Invariant encountered: value was None"."""
    made = plugin(monkeypatch)
    model = get_peft_model(tiny_base(family), LoraConfig(target_modules="all-linear"))
    sharding.leave_out_of_sharding(model, [], CPU)
    assert set(made.transformer_cls_names_to_wrap) == sharded
    made.transformer_cls_names_to_wrap = ["BertEmbeddings", "Linear"]
    sharding.leave_out_of_sharding(model, [], CPU)
    assert made.transformer_cls_names_to_wrap == (["Linear"] if family == "bert" else ["BertEmbeddings", "Linear"])


def test_without_fsdp_nothing_is_told(monkeypatch):
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", None)
    sharding.leave_out_of_sharding(nn.Linear(1, 1), [nn.Parameter(torch.ones(1))], CPU)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fsdp_version": 1}, "take FSDP2"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_settings_that_contradict_it_are_refused(monkeypatch, changes, sentence):
    plugin(monkeypatch, **changes)
    with pytest.raises(GatewiseError, match=sentence):
        sharding.leave_out_of_sharding(nn.Linear(1, 1), [nn.Parameter(torch.ones(1))], CPU)


def test_a_launched_process_has_the_gpu_that_its_launcher_gave_it(monkeypatch):
    """Accelerate wraps the model for that one, wherever it is."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(GatewiseError, match=r"the device is cuda:1, .* here cuda:0: take --device cuda, and .* launch.gpu_ids"):
        sharding.join(torch.device("cuda:1"))
    for name in ("cuda:0", "cuda"):
        sharding.join(torch.device(name))


def test_old_drivers_of_two_consumer_gpus_talk_through_the_host(monkeypatch):
    """As Accelerate's launcher has it: Accelerate itself ends with an error there."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for supported, said in ((True, None), (False, "1")):
        monkeypatch.setattr(sharding, "check_cuda_p2p_ib_support", lambda answer=supported: answer)
        sharding.join(torch.device("cuda"))
        assert os.environ.get("NCCL_P2P_DISABLE") == os.environ.get("NCCL_IB_DISABLE") == said
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.delenv(name)


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sharding.join(torch.device("cuda:1"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("fsdp", [False, True])
def test_accelerate_is_changed_only_where_a_cpu_is_to_share_a_model(monkeypatch, fsdp):

    def before(self):
        """As Accelerate's own, which another test in this process may have changed; put back afterwards."""

    monkeypatch.setattr(AcceleratorState, "__init__", before)
    monkeypatch.setattr(sharding, "PartialState", lambda **_: None)
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": str(fsdp).lower()}.items():
        monkeypatch.setenv(name, value)
    sharding.join(CPU)
    assert (AcceleratorState.__init__ is before) is not fsdp
