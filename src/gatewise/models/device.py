"""Where a model runs and in which precision: what a user names, or the best that this machine has.

A device is "auto" (a CUDA GPU, else Apple's, else the CPU), "cpu", "cuda", "cuda:1" or "mps". A precision is "auto", "float32" or
"bfloat16"; "auto" is bfloat16 where the device computes in it by itself. Elsewhere bfloat16 is emulated, and much slower.
"""

import ctypes
import gc
import platform
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    import torch

DEVICES = r"^(auto|cpu|cuda(:\d+)?|mps)$"
DTYPES = ("auto", "float32", "bfloat16")
Quantization = Literal["nf4", "int8"]
"""How bitsandbytes keeps the weights of a base model's linear layers: in 4 bits as QLoRA has them, or in 8."""


def pick_device(name: "str | torch.device" = "auto") -> "torch.device":
    """The device of a name.

    Raises:
        GatewiseError: an unknown name, or a device that this machine does not have.
    """
    import torch

    if isinstance(name, torch.device):
        return name
    if not re.match(DEVICES, name):
        raise GatewiseError(f"the device {name!r} is not known: expected auto, cpu, cuda, cuda:1 or mps")
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    device = torch.device(name)
    count = {"cuda": torch.cuda.device_count(), "mps": int(has_mps), "cpu": 1}[device.type]
    if (device.index or 0) >= count:
        raise GatewiseError(f"the device is {name}, but PyTorch finds {count} such devices here: take device auto or cpu")
    return device


def pick_dtype(
    name: "str | torch.dtype" = "auto", device: "str | torch.device" = "cpu", warn: Callable[[str], None] | None = None
) -> "torch.dtype":
    """The precision of a name on a device. A ``torch.dtype`` is returned unchanged.

    Args:
        warn: told in one line when bfloat16 was asked for and is slow on the device.

    Raises:
        GatewiseError: an unknown name.
    """
    import torch

    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise GatewiseError(f"the dtype {name!r} is not known: expected auto, float32 or bfloat16")
    quick = name != "float32" and has_bfloat16(pick_device(device))
    if name == "bfloat16" and not quick and warn is not None:
        warn("warning: bfloat16 is emulated on this processor and 11 to 18 times slower than float32: take dtype: auto or float32")
    return torch.bfloat16 if name == "bfloat16" or quick else torch.float32


class PeakMemory:
    """The most memory in use while it was entered, once or several times, whatever was used before.

    Attributes:
        most: bytes: on a CUDA device that PyTorch allocated, else of this process. None where that cannot be told: of a CPU only
            Linux begins to count anew.
    """

    def __init__(self, device: "torch.device") -> None:
        self.device, self.most = device, 0 if device.type in ("cuda", "cpu") else None

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.init()  # which a device with a number does not do by itself
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc keeps what an earlier run freed
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self.most = None

    def __exit__(self, *_: object) -> None:
        peak = peak_memory(self.device)
        self.most = None if self.most is None or peak is None else max(self.most, peak)


def peak_memory(device: "torch.device") -> int | None:
    """The most bytes that were in use since the process began, or since a ``PeakMemory`` was entered; None if that is not known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss, which on Linux may be that of the process that started this one.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8") if status.exists() else "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def machine(device: "str | torch.device" = "auto") -> dict[str, Any]:
    """Where something was computed: numbers and times may differ from one kind of machine to another."""
    import torch

    from gatewise.internals.cpu_features import multiplies_bfloat16

    device = pick_device(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return {
        "processor": next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
        ),
        "multiplies_bfloat16": multiplies_bfloat16(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


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

    The processor may have them and PyTorch be kept from them: ``ATEN_CPU_CAPABILITY=avx2`` makes an older machine of it.
    """
    import torch

    from gatewise.internals.cpu_features import multiplies_bfloat16

    return "AVX512" in torch.backends.cpu.get_cpu_capability() and multiplies_bfloat16()
