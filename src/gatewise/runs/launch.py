"""Starts a run in several processes on this machine, as ``accelerate launch`` would, and ends them all when one of them ends.

The settings are Accelerate's own: a strategy stands for some of them, and a recipe's ``launch`` section may name any other. They
reach the processes as Accelerate's environment variables, so that a run looks the same to the Trainer whether this file started
it or ``accelerate launch -m gatewise train ...`` or ``torchrun -m gatewise train ...`` did.
"""

import logging
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

from gatewise.errors import GatewiseError, reason_of
from gatewise.runs.recipe import LaunchSection

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {
        "use_fsdp": True,
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_reshard_after_forward": True,
    },
    "zero2": {"use_deepspeed": True, "zero_stage": 2},
    "zero3": {"use_deepspeed": True, "zero_stage": 3, "zero3_init_flag": False, "zero3_save_16bit_model": True},
}
"""What each strategy sets, by the names of ``accelerate launch``."""
SHARED_BY = {"fsdp2": "FSDP", "zero2": "DeepSpeed", "zero3": "DeepSpeed"}
"""What shares out the model, or what the optimiser keeps, under a strategy."""
SECONDS_TO_END = 30
"""How long processes get to leave a run in order before they are killed."""


def is_launched() -> bool:
    """Whether a launcher, this one or another, started this process as one of several."""
    return "LOCAL_RANK" in os.environ


def environment(section: LaunchSection) -> dict[str, str]:
    """The environment variables by which Accelerate knows how to train, beyond those of this process.

    Raises:
        GatewiseError: a setting that ``accelerate launch`` does not have or refuses, or no DeepSpeed.
    """
    settings = {**STRATEGIES[section.strategy], **(section.model_extra or {})}
    known: Namespace = launch_command_parser().parse_args(["gatewise"])
    for name in settings:
        if name in ("num_machines", "num_processes") or not hasattr(known, name):
            raise GatewiseError(
                f"launch.{name} is not a known key: expected processes, strategy or a setting of accelerate launch on one machine"
            )
    if settings.get("use_deepspeed") and find_spec("deepspeed") is None:
        raise GatewiseError("launch.strategy needs DeepSpeed, which is not installed: pip install 'gatewise[deepspeed]'")
    usual = {
        "num_machines": 1,
        "num_processes": section.processes,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "deepspeed_fields_from_accelerate_config": "",  # there is no such file here
        "num_cpu_threads_per_process": max(1, (os.cpu_count() or 1) // section.processes),
        "main_process_port": _free_port(),
    }
    for name, value in {**usual, **settings}.items():
        setattr(known, name, value)
    try:
        made = prepare_deepspeed_cmd_env(known)[1] if known.use_deepspeed else prepare_multi_gpu_env(known)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise GatewiseError(f"launch: accelerate does not take these settings: {reason_of(error)}") from error
    return {name: str(value) for name, value in made.items() if os.environ.get(name) != value}


def start(arguments: Sequence[str], section: LaunchSection, on_cpu: bool = False) -> tuple[int, str | None]:
    """Runs ``gatewise`` with these arguments in ``section.processes`` processes, and waits for them.

    Each says its own errors (see ``cli/main.py``). An interrupt reaches them all, and they get some time to end in order.

    Args:
        on_cpu: they see no GPU, which Accelerate and FSDP would else take wherever there is one.

    Returns:
        The exit code, and what happened to a process that could not say it itself.

    Raises:
        GatewiseError: as ``environment``.
    """
    made, count = environment(section), section.processes
    own = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if on_cpu:
        own["CUDA_VISIBLE_DEVICES"] = ""
    environments = {rank: {**made, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    command = dict.fromkeys(range(count), ("-m", "gatewise", *arguments))
    with TemporaryDirectory(prefix="gatewise-") as logs:
        processes = start_processes("gatewise", sys.executable, command, environments, DefaultLogsSpecs(log_dir=logs))
        try:
            while (result := processes.wait(timeout=0.2, period=0.2)) is None:
                pass
        except (KeyboardInterrupt, SignalException):
            processes.close(death_sig=signal.SIGINT, timeout=SECONDS_TO_END)
            return 130, None
        finally:
            processes.close(timeout=SECONDS_TO_END)
    if not result.failures:
        return 0, None
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    if first.exitcode > 0:
        return first.exitcode, None
    ended_by = signal.Signals(-first.exitcode).name
    return 1, f"process {first.local_rank + 1} of {count} was ended by {ended_by}, so the others were ended too"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
