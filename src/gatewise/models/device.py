"""Where a model runs and in which precision: what a user names, or the best that this machine has.

A device is "auto" (a CUDA GPU, else Apple's, else the CPU), "cpu", "cuda", "cuda:1" or "mps". A precision is "auto", "float32" or
"bfloat16"; "auto" is bfloat16 where the device computes in it by itself. Elsewhere bfloat16 is emulated, and much slower.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    import torch

DEVICES = r"^(auto|cpu|cuda(:\d+)?|mps)$"
DEVICE_NAMES = "auto, cpu, cuda, cuda:1 or mps"
DTYPES = ("auto", "float32", "bfloat16")


def pick_device(name: "str | torch.device" = "auto") -> "torch.device":
    """The device of a name.

    Raises:
        GatewiseError: an unknown name, or a device that this machine does not have.
    """
    import torch

    if isinstance(name, torch.device):
        return name
    if not re.match(DEVICES, name):
        raise GatewiseError(f"the device {name!r} is not known: expected {DEVICE_NAMES}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GatewiseError(f"the device is {name}, but PyTorch finds no CUDA GPU here: take device auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise GatewiseError(f"the device is {name}, but the last CUDA GPU here is cuda:{count - 1}: take that, or device auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise GatewiseError("the device is mps, but PyTorch finds no Apple GPU here: take device auto or cpu")
    return device


def pick_dtype(
    name: "str | torch.dtype" = "auto", device: "str | torch.device" = "cpu", warn: Callable[[str], None] | None = None
) -> "torch.dtype":
    """The precision of a name on a device. A ``torch.dtype`` is what it is.

    Args:
        warn: told in one line when bfloat16 was asked for and is slow on the device; None makes it a Python warning.

    Raises:
        GatewiseError: an unknown name.
    """
    import torch

    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise GatewiseError(f"the dtype {name!r} is not known: expected auto, float32 or bfloat16")
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(pick_device(device)) else torch.float32
    if name == "bfloat16" and not has_bfloat16(pick_device(device)):
        say_slow(warn)
    return torch.float32 if name == "float32" else torch.bfloat16


def say_slow(warn: Callable[[str], None] | None = None) -> None:
    """Says that bfloat16 is slow here."""
    text = "bfloat16 is emulated on this processor and 11 to 18 times slower than float32: take dtype: auto or float32"
    if warn is None:
        warnings.warn(text, stacklevel=3)
    else:
        warn(f"warning: {text}")


def has_bfloat16(device: "torch.device") -> bool:
    """Whether a device computes in bfloat16 by itself."""
    import torch

    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "cpu" and cpu_has_bfloat16()


@cache
def cpu_has_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 numbers with the processor's own instructions.

    The processor may have them and PyTorch be kept from them: ``ATEN_CPU_CAPABILITY=avx2`` and ``ONEDNN_MAX_CPU_ISA=AVX2`` let one
    machine stand in for an older one.
    """
    import torch

    from gatewise.internals.cpu_features import multiplies_bfloat16

    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "default").lower()
    kept_from = limit not in ("default", "all") and not re.search(r"bf16|amx|fp16|avx10", limit)
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and not kept_from and multiplies_bfloat16()


@contextmanager
def random_state_kept(device: "torch.device") -> Iterator[None]:
    """Puts the random state of the CPU and of the device back at the end, and touches no other device's."""
    import torch

    if device.type == "mps":  # has one state and no index, which fork_rng does not know
        state = torch.mps.get_rng_state()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            torch.mps.set_rng_state(state)
    else:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
