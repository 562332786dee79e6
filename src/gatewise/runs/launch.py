"""Starts a run in several processes on this machine, as ``accelerate launch`` would, and ends them all when one of them ends.

The settings are Accelerate's own: a strategy stands for some of them, and a recipe's ``launch`` section may name any other. They
reach the processes as Accelerate's environment variables, so that a run looks the same to the Trainer whether this file started
it or ``accelerate launch -m gatewise train ...`` or ``torchrun -m gatewise train ...`` did.
"""

import difflib
import json
import logging
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException, Std, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from gatewise.errors import GatewiseError
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
SECONDS_TO_END = 30
"""How long processes get to leave a run in order before they are killed."""


def is_launched() -> bool:
    """Whether a launcher, this one or another, started this process as one of several."""
    return "LOCAL_RANK" in os.environ


def environment(section: LaunchSection) -> dict[str, str]:
    """The environment variables by which Accelerate knows how to train, beyond those of this process.

    Raises:
        GatewiseError: a setting that ``accelerate launch`` does not have or refuses, or that DeepSpeed's file contradicts.
    """
    settings = {**STRATEGIES[section.strategy], **(section.model_extra or {})}
    known: Namespace = launch_command_parser().parse_args(["gatewise"])
    for name in settings:
        if not hasattr(known, name):
            near = difflib.get_close_matches(name, vars(known), n=1)
            hint = f"; did you mean launch.{near[0]}?" if near else ""
            raise GatewiseError(
                f"launch.{name} is not a known key: expected processes, strategy or a setting of accelerate launch{hint}"
            )
    if settings.get("use_deepspeed"):
        _check_deepspeed(section, settings.get("deepspeed_config_file"))
    if settings.get("num_machines", 1) != 1:
        raise GatewiseError(
            "launch.num_machines is above 1, but gatewise starts processes on this machine only: for several machines use "
            "accelerate launch -m gatewise train ... on each of them"
        )
    needed = {"num_machines": 1, "num_processes": section.processes, "mixed_precision": "no", "dynamo_backend": "no"}
    needed["deepspeed_fields_from_accelerate_config"] = ""  # there is no such file here
    threads = max(1, (os.cpu_count() or 1) // section.processes)
    for name, value in {**needed, "num_cpu_threads_per_process": threads, "main_process_port": _free_port(), **settings}.items():
        setattr(known, name, value)
    try:
        made = prepare_deepspeed_cmd_env(known)[1] if known.use_deepspeed else prepare_multi_gpu_env(known)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise GatewiseError(f"launch: accelerate does not take these settings: {' '.join(str(error).split())}") from error
    return {name: str(value) for name, value in made.items() if os.environ.get(name) != value}


def _check_deepspeed(section: LaunchSection, file: str | None) -> None:
    """Refuses DeepSpeed where it is not installed, or with a file that cannot be its own or is one of another strategy."""
    if find_spec("deepspeed") is None:
        raise GatewiseError("launch.strategy needs DeepSpeed, which is not installed: pip install 'gatewise[deepspeed]'")
    if file is None:
        return
    try:
        stage = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GatewiseError(
            f"launch.deepspeed_config_file is {file}, expected a JSON file of DeepSpeed's with a zero_optimization.stage"
        ) from error
    if section.strategy in ("zero2", "zero3") and stage != int(section.strategy[-1]):
        raise GatewiseError(f"launch.strategy is {section.strategy}, but {file} has zero_optimization.stage {stage}: change one")


def start(arguments: Sequence[str], section: LaunchSection) -> tuple[int, str | None]:
    """Runs ``gatewise`` with these arguments in ``section.processes`` processes, and waits for them.

    The first process shows its progress and its errors here. Those of the others are kept, and told if one of them is the one
    that failed. An interrupt reaches them all, and they get some time to end in order.

    Returns:
        The exit code, and where the first process has not said it itself, what went wrong.

    Raises:
        GatewiseError: as ``environment``.
    """
    made, count = environment(section), section.processes
    own = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environments = {rank: {**made, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)}
    # What it logs of processes that end, this function says in its own words.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with TemporaryDirectory(prefix="gatewise-") as logs:
        kept = DefaultLogsSpecs(log_dir=logs, redirects=dict.fromkeys(range(1, count), Std.ALL))
        command = ("-m", "gatewise", *arguments)
        processes = start_processes("gatewise", sys.executable, dict.fromkeys(range(count), command), environments, kept)
        try:
            failures = _ended(processes)
        except (KeyboardInterrupt, SignalException):
            processes.close(death_sig=signal.SIGINT, timeout=SECONDS_TO_END)
            return 130, None
        finally:
            processes.close(timeout=SECONDS_TO_END)
        if not failures:
            return 0, None
        first = min(failures.values(), key=lambda failure: failure.timestamp)
        if first.local_rank == 0 and first.exitcode > 0:
            return first.exitcode, None
        return (first.exitcode if first.exitcode == 2 else 1), _told(first, count, Path(logs))


def _ended(processes: PContext) -> Mapping[int, ProcessFailure]:
    """The failures by process, once all have ended well or one has not."""
    while (result := processes.wait(timeout=0.2, period=0.2)) is None:
        pass
    return result.failures


def _told(failure: ProcessFailure, count: int, logs: Path) -> str:
    """What a process that failed had to say, or how it ended."""
    logged = next(logs.glob(f"*/*/{failure.local_rank}/stderr.log"), None)
    lines = logged.read_text(encoding="utf-8", errors="replace").strip().splitlines() if logged else []
    if failure.exitcode == 2 and lines and lines[-1].startswith("error: "):
        return lines[-1].removeprefix("error: ")
    name = f"process {failure.local_rank + 1} of {count}"
    if failure.exitcode < 0:
        return f"{name} was ended by {signal.Signals(-failure.exitcode).name}, so the others were ended too"
    return "\n".join([f"{name} failed, so the others were ended; it said:", *lines[-30:]])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
