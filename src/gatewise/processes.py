"""Several processes that train one model: which of them this is, how work is shared out, and sums over all of them.

Everything here is about ``torch.distributed``'s default group, and is harmless without one: a single process has index 0, is the
main one, and its sums are its own.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


def count() -> int:
    """How many processes work together; 1 without a group."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def index() -> int:
    """This process's place among them, from 0."""
    from torch import distributed

    return distributed.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return index() == 0


def summed(tensors: Sequence["Tensor"], device: "Any") -> list["Tensor"]:
    """Tensors added up over all processes, in one message; every process gets the same numbers, bit for bit.

    Args:
        tensors: of one floating dtype, of the same shapes in every process.
        device: one that the group can send from: that of the model's parameters.
    """
    import torch
    from torch import distributed

    if count() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([one.detach().flatten() for one in tensors]).to(device)
    distributed.all_reduce(flat)
    parts = flat.split([one.numel() for one in tensors])
    return [part.view(one.shape).to(one.device) for part, one in zip(parts, tensors, strict=True)]


def average_gradients(parameters: Sequence["nn.Parameter"], device: "Any") -> None:
    """Replaces each gradient by its mean over all processes; None stays where no process has one."""
    import torch

    if count() == 1 or not parameters:
        return
    # Every process sends the same numbers in one message, whichever gradients it has.
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).to(device, torch.float32) for p in parameters]
    some, *sums = summed([present.to(device), *parts], device)
    for parameter, any_has, total in zip(parameters, some.tolist(), sums, strict=True):
        parameter.grad = (total / count()).to(parameter) if any_has else None


def told(value: T) -> T:
    """What the main process has for ``value``, in all of them. It travels pickled between the processes of one run."""
    from torch import distributed

    if count() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def by_main(do: Callable[[], T]) -> T:
    """What the main process gets by doing something, in all of them. What it refuses, they all refuse.

    Raises:
        GatewiseError: the main process's.
    """
    if count() == 1:
        return do()
    result: T | None = None
    refused: str | None = None
    if is_main():
        try:
            result = do()
        except GatewiseError as error:
            refused = str(error)
    result, refused = told((result, refused))
    if refused is not None:
        raise GatewiseError(refused)
    return result  # type: ignore[return-value]


def wait() -> None:
    """Waits until all processes are here."""
    from torch import distributed

    if count() > 1:
        distributed.barrier()


def leave() -> None:
    """Ends this process when all are here; alone it goes on.

    At Python's own end threads of a process group or of DeepSpeed may still run, which now and then aborts a process whose work is
    done; a launcher would take that for a failure.
    """
    from torch import distributed

    if count() == 1:
        return
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def is_sharded(model: "nn.Module") -> bool:
    """Whether processes hold a part of the model each, so that every forward is one of all of them (FSDP, ZeRO-3)."""
    return any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in model.parameters())


def shared_out(items: Sequence[T], even: bool = False) -> tuple[list[T], int]:
    """This process's part of the items, and how many processes each item falls to: divide sums over all processes by that.

    Args:
        even: every process must get as many as every other, as with a sharded model; where that cannot be, each gets all.
    """
    if count() == 1 or (even and len(items) % count()):
        return list(items), count()
    return list(items[index() :: count()]), 1
