"""What PyTorch says of the processor: names that an upgrade may change."""

from pathlib import Path

import pytest
import torch

from gatewise.internals import cpu_features

CHANGED = "PyTorch tells of the processor in another way: read torch/cpu/__init__.py and mend internals/cpu_features.py"


def test_pytorch_still_tells_of_bfloat16() -> None:
    told = getattr(torch.cpu, "get_capabilities", None)
    if told is None:
        assert any(hasattr(torch.cpu, name) for name in cpu_features._PRIVATE), CHANGED
    elif told().get("architecture") == "x86_64":
        assert all(name in told() for name in cpu_features.FEATURES), CHANGED


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux writes down what its processor has")
def test_it_agrees_with_the_kernel() -> None:
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    assert cpu_features.multiplies_bfloat16() == bool(flags & {"avx512_bf16", "amx_bf16"}), CHANGED


def test_an_older_pytorch_is_asked_by_its_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in cpu_features._PRIVATE:
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not cpu_features.multiplies_bfloat16()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert cpu_features.multiplies_bfloat16()
    for name in cpu_features._PRIVATE:
        monkeypatch.delattr(torch.cpu, name)
    assert not cpu_features.multiplies_bfloat16()
