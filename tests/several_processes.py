"""Functions of tests, and runs of the command line, in several gloo processes.

Where the system can fork, the processes are forks of one that has imported only what takes long; elsewhere each imports it anew.
"""

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from gatewise import processes
from gatewise.cli.main import main

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
if FORKS:
    multiprocessing.set_forkserver_preload(["transformers.trainer", "gatewise.runs.run"])


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
    torch.multiprocessing.start_processes(
        _one_process,
        args=(count, port, str(folder), work, arguments),
        nprocs=count,
        start_method="forkserver" if FORKS else "spawn",
    )
    return [torch.load(folder / f"{rank}-of-{count}.pt", weights_only=False) for rank in range(count)]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "gatewise", *words]


def one_of_none() -> dict[str, str]:
    """The environment of a process that no launcher has started."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def launched(folder: Path, *words: str, anew: bool = False) -> subprocess.CompletedProcess[str]:
    """What ``gatewise WORDS`` ends as and prints, where the words ask for several processes: no forks, if they begin ``anew``."""
    if not FORKS:
        return subprocess.run(command(*words), capture_output=True, text=True, timeout=600, env=one_of_none())
    launcher, out, err = forked(folder, *words, anew=anew)
    launcher.join(600)
    if launcher.exitcode is None:
        launcher.terminate()  # and ends its processes
        launcher.join(60)
        raise TimeoutError(err.read_text())
    return subprocess.CompletedProcess(words, launcher.exitcode, out.read_text(), err.read_text())


def forked(folder: Path, *words: str, anew: bool = False) -> tuple[Any, Path, Path]:
    """The process of ``gatewise WORDS``, just begun, and the files that get what it prints."""
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    arguments = (words, one_of_none(), str(out), str(err), anew)
    launcher = multiprocessing.get_context("forkserver").Process(target=_launch, args=arguments)
    launcher.start()
    return launcher, out, err


def _launch(words: Sequence[str], environment: Mapping[str, str], out: str, err: str, anew: bool) -> NoReturn:
    if not anew:
        subprocess_handler.Popen = _Forked
    with open(out, "w") as stdout, open(err, "w") as stderr:
        _become(words, environment, stdout, stderr)


class _Forked:
    """As much of ``subprocess.Popen`` as a launcher needs."""

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str], stdout: IO[str] | None, stderr: IO[str] | None, start_new_session: bool
    ) -> None:
        assert tuple(args[:3]) == (sys.executable, "-m", "gatewise")
        self.args = args
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(args[3:], env, stdout, stderr)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code


def _become(words: Sequence[str], environment: Mapping[str, str], stdout: IO[str] | None, stderr: IO[str] | None) -> NoReturn:
    """Ends this fork as a process that was started as ``gatewise WORDS`` would."""
    code: Any = 1
    try:
        os.setsid()
        for descriptor, stream in ((1, stdout), (2, stderr)):
            if stream is not None:
                os.dup2(stream.fileno(), descriptor)
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ |= environment
        torch.set_num_threads(1)
        gc.freeze()
        sys.argv = ["gatewise", *words]
        main()
    except SystemExit as end:
        code = 0 if end.code is None else end.code
    except BaseException:
        traceback.print_exc()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
