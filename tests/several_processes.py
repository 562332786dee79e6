"""Runs a function of a test in several gloo processes and in one, and gives back what they return."""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gatewise import processes

# Processes are forks of one that has imported only what takes long, where the system can fork; elsewhere each imports it anew.
FORKS = "forkserver" in multiprocessing.get_all_start_methods()


def _one_process(rank: int, count: int, port: int, folder: str, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    torch.save(work(*arguments), Path(folder) / f"{rank}-of-{count}.pt")
    processes.leave()


def in_processes(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` returns in each of ``count`` processes. ``work`` is a function at the top of a module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if FORKS:
        multiprocessing.set_forkserver_preload(["transformers.trainer", "gatewise.runs.run"])
    torch.multiprocessing.start_processes(
        _one_process,
        args=(count, port, str(folder), work, arguments),
        nprocs=count,
        start_method="forkserver" if FORKS else "spawn",
    )
    return [torch.load(folder / f"{rank}-of-{count}.pt", weights_only=False) for rank in range(count)]
