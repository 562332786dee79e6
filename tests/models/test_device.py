"""Which device and which precision a name stands for, with machines that are pretended."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from gatewise.errors import GatewiseError
from gatewise.models import device
from gatewise.models.device import PeakMemory, pick_device, pick_dtype


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine(cuda=2, capability=(8, 0), mps=False, macos=14, cpu=False) -> pretends this machine has these."""

    def make(cuda: int = 0, capability: tuple[int, int] = (8, 0), mps: bool = False, macos: int = 14, cpu: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor))
        monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: cpu)

    return make


def test_the_peak_is_that_of_what_is_watched_alone() -> None:
    watched = PeakMemory(torch.device("cpu"))
    with watched:
        torch.ones(20_000_000).sum()
    first = watched.most
    if first is None:  # no Linux, or one that does not let a process count anew
        pytest.skip("nobody can tell here")
    torch.ones(60_000_000).sum()
    second = PeakMemory(torch.device("cpu"))
    with second:
        torch.ones(10_000_000).sum()
    assert second.most is not None
    assert first - second.most > 20_000_000
    with second:
        torch.ones(20_000_000).sum()
    assert abs(second.most - first) < 20_000_000  # of both times the larger


def test_cuda_is_begun_before_its_peak_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with a number is looked up in what CUDA has set up, and nothing may have used it yet."""
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: done.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", done.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 7)
    watched = PeakMemory(torch.device("cuda:1"))
    with watched:
        pass
    assert (done, watched.most) == (["init", torch.device("cuda:1")], 7)


def test_auto_is_the_best_that_is_there(machine: Any) -> None:
    machine()
    assert pick_device() == torch.device("cpu")
    machine(mps=True)
    assert pick_device("auto") == torch.device("mps")
    machine(cuda=1, mps=True)
    assert pick_device("auto") == torch.device("cuda")


def test_a_device_that_is_named_is_taken(machine: Any) -> None:
    machine(cuda=2, mps=True)
    for name in ("cpu", "cuda", "cuda:1", "mps"):
        assert pick_device(name) == torch.device(name)
    assert pick_device(torch.device("meta")).type == "meta"


def test_a_device_that_is_not_there_is_refused_in_one_sentence(machine: Any) -> None:
    for name, cuda, said in (
        ("cuda", 0, "the device is cuda, but PyTorch finds 0 such devices here: take device auto or cpu"),
        ("cuda:2", 2, "the device is cuda:2, but PyTorch finds 2 such devices here"),
        ("mps", 1, "the device is mps, but PyTorch finds 0 such devices here"),
        ("gpu", 1, "the device 'gpu' is not known: expected auto, cpu, cuda, cuda:1 or mps"),
        ("cuda:one", 1, "the device 'cuda:one' is not known"),
    ):
        machine(cuda=cuda)
        with pytest.raises(GatewiseError, match=said):
            pick_device(name)


@pytest.mark.parametrize(
    ("where", "has", "expected"),
    [
        ("cpu", {"cpu": True}, torch.bfloat16),
        ("cpu", {"cpu": False}, torch.float32),
        ("cuda", {"cuda": 1, "capability": (8, 0)}, torch.bfloat16),
        ("cuda", {"cuda": 1, "capability": (7, 5)}, torch.float32),
        ("mps", {"mps": True, "macos": 14}, torch.bfloat16),
        ("mps", {"mps": True, "macos": 13}, torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_the_device_computes_in_it(
    machine: Any, where: str, has: dict[str, Any], expected: torch.dtype
) -> None:
    machine(**has)
    said: list[str] = []
    assert pick_dtype("auto", where, said.append) == expected
    assert pick_dtype("float32", where, said.append) == torch.float32
    assert said == []
    assert pick_dtype("bfloat16", where, said.append) == torch.bfloat16
    slow = "warning: bfloat16 is emulated on this processor and 11 to 18 times slower than float32: take dtype: auto or float32"
    assert said == ([] if expected == torch.bfloat16 else [slow])


def test_a_dtype_is_itself_and_a_name_that_is_not_known_is_refused() -> None:
    assert pick_dtype(torch.bfloat16, "cpu", pytest.fail) == torch.bfloat16  # somebody's own choice, made before
    with pytest.raises(GatewiseError, match="the dtype 'float16' is not known: expected auto, float32 or bfloat16"):
        pick_dtype("float16", "cpu")


def test_a_processor_that_is_kept_from_its_instructions_has_none() -> None:
    """As on an older machine; the variable is read when PyTorch starts."""
    code = "from gatewise.models.device import pick_dtype; print(pick_dtype('auto', 'cpu'))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch.float32"]
