"""Several processes that train one model: which of them this is, how work is shared out, and sums over all of them.

Everything here is about ``torch.distributed``'s default group, and is harmless without one: a single process has index 0, is the
main one, and its sums are its own.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from gatewise.errors import GatewiseError

T = TypeVar("T")


def count() -> int:
    """How many processes work together; 1 without a group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def index() -> int:
    """This process's place among them, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """True in the one process that writes files and shows progress."""
    return index() == 0


def summed(tensors: Sequence[Tensor], device: Any) -> list[Tensor]:
    """Adds tensors up over all processes, in one message; every process gets the same numbers, bit for bit.

    Args:
        tensors: of one floating dtype, of the same shapes in every process.
        device: one that the group can send from: that of the model's parameters.
    """
    if count() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([one.detach().flatten() for one in tensors]).to(device)
    distributed.all_reduce(flat)
    parts = flat.split([one.numel() for one in tensors])
    return [part.view(one.shape).to(one.device) for part, one in zip(parts, tensors, strict=True)]


def average_gradients(parameters: Sequence[nn.Parameter], device: Any) -> None:
    """Replaces each gradient by its mean over all processes; None stays where no process has one."""
    if count() == 1 or not parameters:
        return
    # Every process sends the same numbers in one message, whichever gradients it has.
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).to(device, torch.float32) for p in parameters]
    some, *sums = summed([present.to(device), *parts], device)
    for parameter, any_has, total in zip(parameters, some.tolist(), sums, strict=True):
        parameter.grad = (total / count()).to(parameter) if any_has else None


def broadcast(value: T) -> T:
    """Returns the main process's value in every process. It travels pickled between the processes of one run."""
    box = [value]
    if count() > 1:
        distributed.broadcast_object_list(box, src=0)
    return box[0]


def by_main(do: Callable[..., T], *args: Any, **settings: Any) -> T:
    """Has the main process call a function with these arguments, and returns what it returns in every process.

    Raises:
        GatewiseError: in every process, where the main one raised it.
    """
    if count() == 1:
        return do(*args, **settings)
    result: Any = None
    if is_main():
        try:
            result = do(*args, **settings)
        except GatewiseError as error:
            result = error
    result = broadcast(result)
    if isinstance(result, GatewiseError):
        raise result
    return result


def wait() -> None:
    """Waits until every process has called this."""
    if count() > 1:
        distributed.barrier()


def leave() -> None:
    """Ends this process, once every process has called this; does nothing in a single one.

    When Python itself ends, threads of a process group or of DeepSpeed may still run and abort a process whose work is done, which
    a launcher would take for a failure.
    """
    if count() == 1:
        return
    wait()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def is_sharded(model: nn.Module) -> bool:
    """True where each process holds a part of the model (FSDP, ZeRO-3), so that all must run every forward together."""
    return any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """The device that a model computes on: where FSDP keeps its parameters on the CPU (offloading), not theirs."""
    parameter = next(model.parameters())
    kind = getattr(getattr(parameter, "device_mesh", None), "device_type", "cpu")
    return parameter.device if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def own_share(items: Sequence[T], even: bool = False) -> tuple[list[T], int]:
    """This process's part of the items, and how many processes get each item: divide sums over all processes by that.

    Args:
        even: give every process the same number, as a sharded model needs; where the items cannot be divided so, each gets all.
    """
    if count() == 1 or (even and len(items) % count()):
        return list(items), count()
    return list(items[index() :: count()]), 1
