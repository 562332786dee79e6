"""What several processes share: sums, work, gradients, and what the first of them finds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from several_processes import in_processes
from torch import nn

from gatewise import processes
from gatewise.errors import GatewiseError


def test_alone_a_process_is_the_main_one_and_its_sums_are_its_own():
    assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
    values = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    assert all(torch.equal(*pair) for pair in zip(processes.summed(values, "cpu"), values, strict=True))
    assert processes.own_share([1, 2, 3], even=True) == ([1, 2, 3], 1)
    assert processes.broadcast("word") == processes.by_main(lambda: "word") == "word"
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    processes.average_gradients([parameter], "cpu")
    assert torch.equal(parameter.grad, torch.ones(2))


def test_a_model_computes_where_its_parameters_are_or_where_fsdp_takes_them(monkeypatch):
    model = nn.Linear(1, 1, device="meta")
    assert processes.device_of(model) == torch.device("meta")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace(current_device=lambda: 3))
    for kind, expected in (("cpu", "cpu"), ("cuda", "cuda:3")):
        model = nn.Linear(1, 1)
        model.weight.device_mesh = SimpleNamespace(device_type=kind)  # FSDP with offloading keeps a parameter on the CPU
        assert processes.device_of(model) == torch.device(expected)


def refuse() -> str:
    raise GatewiseError("only the first process tries this")


def together() -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    index = processes.index()
    sums = processes.summed([torch.tensor([1.0, index]), torch.full((2, 2), float(index))], "cpu")
    one, other, neither = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    one.grad = torch.full((2,), float(index))
    if index == 0:
        other.grad = torch.full((2,), 4.0)
    processes.average_gradients([one, other, neither], "cpu")
    try:
        refused = processes.by_main(refuse)
    except GatewiseError as error:
        refused = str(error)
    return {
        "index": index,
        "sums": [value.tolist() for value in sums],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in (one, other, neither)],
        "shared": processes.own_share([1, 2, 3]),
        "even": processes.own_share([1, 2, 3], even=True),
        "told": processes.broadcast(index + 10),
        "refused": refused,
    }


def test_two_processes(tmp_path: Path) -> None:
    first, second = in_processes(2, tmp_path, together)
    assert (first["index"], second["index"]) == (0, 1)
    assert first["sums"] == second["sums"] == [[2.0, 1.0], [[1.0, 1.0], [1.0, 1.0]]]
    assert first["gradients"] == second["gradients"] == [[0.5, 0.5], [2.0, 2.0], None]
    assert (first["shared"], second["shared"]) == (([1, 3], 1), ([2], 1))
    assert first["even"] == second["even"] == ([1, 2, 3], 2)
    assert first["told"] == second["told"] == 10
    assert first["refused"] == second["refused"] == "only the first process tries this"


@pytest.mark.parametrize("attribute", ["device_mesh", "ds_id"])
def test_what_a_sharded_model_is(attribute: str) -> None:
    model = nn.Linear(2, 2)
    assert not processes.is_sharded(model)
    setattr(model.weight, attribute, 1)
    assert processes.is_sharded(model)
