"""A server of one base model and many adapters in vLLM, which may be in another Python than gatewise.

vLLM's own server answers. What is done here is to tell it what the adapters need, to keep it told of adapters that come and go, and
to leave nothing of it behind. Adapters are served from copies (see catalogue.py), each state of a folder from another one, so that
neither vLLM's prefix cache nor an answer that is being written mixes two of them.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from gatewise.adapters.files import read_config, read_lora
from gatewise.errors import GatewiseError, reason_of, some
from gatewise.models.loading import load_config, resolve
from gatewise.serving.constraints import Constraint
from gatewise.serving.engines import CPU_LORA, VLLM_RANKS, keeps_lora, serving_settings, settings_together
from gatewise.serving.server import guard, vllm_server
from gatewise.serving.server.catalogue import MORE, SETTLED, Catalogue, Fit, ReplacedError, Version, describe_fault
from gatewise.serving.server.lanes import Kind
from gatewise.serving.server.reach import HOST, PORT, check_reach, listen, url_of

MOST_IN_BATCH = 8
"""Adapters in one batch of vLLM, unless ``--max-loras`` is among its own arguments: it reserves memory for each."""

_PATIENCE = 20.0  # seconds for vLLM to end by itself
_KEPT = 600.0  # seconds in which an answer with an adapter that is gone may need its files again


@dataclass(frozen=True)
class Room:
    """What an engine was started for; adapters that come later have to fit in.

    Attributes:
        rank: the largest.
        modules: those of ``--lora-target-modules``, None for all.
        routed: whether it can serve routed adapters.
    """

    rank: int
    modules: frozenset[str] | None
    routed: bool

    def problem(self, version: Version, settings: Mapping[str, Any]) -> str | None:
        """Why an adapter does not fit in, to follow "it"."""
        if version.kind == "routed" and not self.routed:
            return "is routed, which this vLLM was not started for"
        if settings["largest_rank"] > self.rank:
            return f"has rank {settings['largest_rank']}, more than the {self.rank} that this vLLM was started for"
        named = self.modules
        if named is not None and (others := [path for path in settings["modules"] if not keeps_lora(path, named)]):
            return f"has modules that this vLLM was not started for ({some(others)})"
        return None


def settings_of(version: Version, model_type: str | None, folder: Path | None = None) -> dict[str, Any]:
    """The ``serving_settings`` of an adapter.

    Args:
        folder: with a copy of its files; by default its own.

    Raises:
        GatewiseError: vLLM does not serve it.
    """
    settings = serving_settings(read_lora(folder or version.folder), model_type)
    if settings["vllm"] is None:
        raise _not_in_vllm(version.folder)
    return settings


def _not_in_vllm(folder: Path) -> GatewiseError:
    most = VLLM_RANKS[-1]
    return GatewiseError(
        f"the adapter {folder} has more than A and B or a rank above {most}, which vLLM does not serve: take --engine "
        "transformers, or write it as plain LoRA with gatewise export"
    )


def arguments_for(
    found: Sequence[tuple[Version, Mapping[str, Any]]], positions: int, most_loaded: int, rest: Sequence[str] = ()
) -> tuple[list[str], Room]:
    """vLLM's arguments for these adapters, and the room that they leave for later ones.

    Args:
        found: adapters with their ``settings_of``; none where they are still to come.
        positions: the most tokens of prompt and answer.
        most_loaded: adapters that vLLM keeps beside the model.
        rest: arguments that the user gives vLLM, which come after ours and override them.
    """
    own = _read_arguments(rest)
    arguments, rank, modules = ["--enable-lora"], 16, None  # without adapters to go by: all modules
    if found:
        together = settings_together([dict(settings) for _, settings in found])["vllm"]
        rank, names = together["max_lora_rank"], together["arguments"]
        modules = names[names.index("--lora-target-modules") + 1 :]
        arguments += ["--lora-target-modules", *modules]
    # One more than are used: in a batch with others, vLLM 0.32 gives rows without an adapter that of the last slot on a CPU.
    slots = own.max_loras or min(max(len(found), 1), MOST_IN_BATCH) + 1
    arguments += ["--max-lora-rank", str(rank), "--max-loras", str(slots), "--max-cpu-loras", str(max(most_loaded, slots))]
    routed = any(version.kind == "routed" for version, _ in found)
    if routed:
        arguments += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(positions, 2048))]
    modules = own.lora_target_modules or modules
    return arguments, Room(own.max_lora_rank or rank, modules and frozenset(modules), routed)


class VllmServer:
    """Serves until an interrupt, until vLLM ends, or :meth:`end`.

    Args:
        python: of an environment that has vLLM; routed adapters need gatewise there too.
        rest: more arguments for vLLM.
        constraints: what requests can have their answers kept to; their packages are needed there too.
        environment: more variables for vLLM.
        See :class:`gatewise.serving.server.running.AdapterServer` for the others.

    Attributes:
        url: of the server.
        name: of the base model.

    Raises:
        GatewiseError: something of it cannot be had, or an adapter that was named itself cannot be served.
    """

    def __init__(
        self,
        base: str,
        adapters: Sequence[str] = (),
        *,
        python: str | Path = sys.executable,
        name: str | None = None,
        host: str = HOST,
        port: int = PORT,
        keys: Sequence[str] = (),
        dtype: str = "auto",
        most_tokens: int | None = None,
        most_loaded: int = 32,
        most_running: int = 32,
        every: float = 2.0,
        settled: float = SETTLED,
        rest: Sequence[str] = (),
        constraints: Mapping[str, Constraint] | None = None,
        log_requests: bool = False,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._say = say or (lambda text: print(text, file=sys.stderr))
        self._python, self._every, self._keys, self._constraints = str(python), every, keys, constraints or {}
        self._environment = {CPU_LORA: "1", **os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        if _read_arguments(rest).api_key is not None:
            raise GatewiseError("--api-key is among vLLM's own arguments, which others see: give the key in GATEWISE_API_KEY")
        self._hosts = check_reach(host, keys)
        with listen(host, port) as free:  # so that a taken port is an error here, and not deep in vLLM's log
            port = free.getsockname()[1]
        self.url, self.name = url_of(host, port), name or base
        fit = Fit(base, self.name)

        def check(folder: Path, kind: Kind) -> str | None:
            note = fit.check(folder)
            # LoRA on embeddings is alone in the other engine, but not in vLLM.
            config = read_config(folder)
            is_lora = config["peft_type"] == "LORA" and not any(map(config.get, MORE))
            if kind == "alone" and (not is_lora or serving_settings(read_lora(folder), None)["vllm"] is None):
                raise _not_in_vllm(folder)
            return note

        self.catalogue = Catalogue(adapters, [self.name], self._say, settled, check)
        self.catalogue.tell_empty()
        config = load_config(base)
        self._model_type = config.model_type
        self._arguments = [
            "--model", resolve(base), "--served-model-name", self.name, "--host", host, "--port", str(port),
            "--max-num-seqs", str(most_running), "--shutdown-timeout", "5",
            "--middleware", f"{vllm_server.GUARD}.GuardByEnvironment",
            *(["--dtype", dtype] if dtype != "auto" else []),
            *(["--max-model-len", str(most_tokens)] if most_tokens else []),
        ]  # fmt: skip
        if log_requests:  # at its level INFO without prompts, and with --max-log-len at no other
            self._arguments += ["--enable-log-requests", "--enable-request-id-headers", "--max-log-len", "0"]
        self._room: Room | None = None
        if adapters:
            positions = most_tokens or getattr(config.get_text_config(), "max_position_embeddings", None) or 4096
            more, self._room = arguments_for(self._adapters_at_start(), positions, most_loaded, rest)
            self._arguments += more
        if self._constraints:
            self._arguments += ["--logits-processors", *(one.logits_processor for one in self._constraints.values())]
        self._arguments += rest
        self._served: dict[str, Version] = {}
        self._retired: list[tuple[float, Path]] = []
        self._is_up = self._is_ending = False

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Runs vLLM.

        Args:
            ready: called once it answers.

        Raises:
            GatewiseError: vLLM ended.
            KeyboardInterrupt: after an interrupt; nothing of vLLM is left.
        """
        with tempfile.TemporaryDirectory(prefix="gatewise-serve-") as copies, self._started() as process:
            looked = time.monotonic()
            while (code := process.poll()) is None:
                if time.monotonic() >= looked + self._every:  # while vLLM starts, too, which takes long
                    self.catalogue.scan()
                    looked = time.monotonic()
                self._update_adapters(process, Path(copies))
                if not self._is_up and self._answers():
                    self._is_up = True
                    if ready is not None:
                        ready()
                if self._is_ending:
                    return
                with suppress(subprocess.TimeoutExpired):
                    process.wait(self._every if self._is_up else 0.3)
        how = f"was killed by signal {-code}, as where memory runs out" if code < 0 else f"ended with exit code {code}"
        raise GatewiseError(f"vLLM {how}: its log says why")

    def end(self) -> None:
        """Ends :meth:`run`."""
        self._is_ending = True

    @property
    def names(self) -> list[str]:
        """The names of the adapters that were sent to vLLM."""
        return sorted(self._served)

    @contextmanager
    def _started(self) -> Iterator["subprocess.Popen[bytes]"]:
        self._check_python()
        environment = dict(self._environment)
        if self._hosts is not None:
            environment[guard.HOSTS] = ",".join(sorted(self._hosts))
        environment.pop(guard.KEYS, None)
        if self._keys:
            environment[guard.KEYS] = " ".join(self._keys)
            environment.pop(guard.VLLM_KEY, None)  # or vLLM would ask for that one besides
        if self._constraints:
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # logits processors were tried with the first alone
        command = [self._python, str(Path(vllm_server.__file__)), *self._arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )  # fmt: skip
        reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            yield process
        finally:
            if process.poll() is None:
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(5)

    def _check_python(self) -> None:
        try:
            done = subprocess.run([self._python, "-c", _MISSING, "vllm", "gatewise"], capture_output=True, text=True, check=False)
        except OSError as error:
            raise GatewiseError(f"{self._python} could not be run ({reason_of(error)}): give the Python that has vLLM") from error
        missing = done.stdout.split()
        if missing == ["gatewise"] and not (self._room is not None and self._room.routed):
            self._say(
                f"note: {self._python} has no gatewise, without which vLLM 0.32 on a processor answers requests for the base model "
                "with an adapter that shares their batch, or is on the output head"
            )
        elif missing:
            raise GatewiseError(
                f"{self._python} has no {missing[0]}: give the Python of an environment that has vLLM (--python), with gatewise "
                "for routed adapters, or take --engine transformers"
            )

    def _read(self, stream: IO[bytes]) -> None:
        """Passes vLLM's log on, line by line."""
        for line in iter(stream.readline, b""):
            self._say(line.decode(errors="replace").rstrip())

    # ---- adapters ----

    def _adapters_at_start(self) -> list[tuple[Version, dict[str, Any]]]:
        """The adapters that vLLM is started for."""
        found = []
        for version in self.catalogue.versions.values():
            try:
                found.append((version, settings_of(version, self._model_type)))
            except Exception as error:
                problem = describe_fault(version.folder, error)
                if version.is_named:
                    raise GatewiseError(problem) from error
                self.catalogue.tell({version.folder: problem})
        return found

    def _update_adapters(self, process: "subprocess.Popen[bytes]", copies: Path) -> None:
        """Tells vLLM of adapters that came, were replaced or went."""
        if self._room is None:
            return
        now = self.catalogue.versions
        for name, version in now.items():
            if self._served.get(name) is version or version.is_given_up:
                continue
            if version.problem is not None and name in self._served:  # the one before stays, as it is whole
                continue
            try:
                with version.copy() as folder:
                    problem = self._room.problem(version, settings_of(version, self._model_type, folder))
                    if problem is not None:
                        advice = "start the server again to serve it, or change vLLM's arguments after --"
                        raise GatewiseError(f"the adapter {version.folder} {problem}: {advice}")
                    shutil.move(folder, copies / version.key)
            except ReplacedError:
                continue  # the one before stays until the next look
            except Exception as error:
                shutil.rmtree(copies / version.key, ignore_errors=True)
                version.failed = time.monotonic()
                self.catalogue.tell({version.folder: describe_fault(version.folder, error)})
                self._tell(process, copies, name, None)
            else:
                self._tell(process, copies, name, version)
        for name in self._served.keys() - now.keys():
            self._tell(process, copies, name, None)
        for when, path in list(self._retired):
            if when < time.monotonic():
                self._retired.remove((when, path))
                shutil.rmtree(path, ignore_errors=True)

    def _tell(self, process: "subprocess.Popen[bytes]", copies: Path, name: str, version: Version | None) -> None:
        """Has vLLM serve a version by a name, or nothing any more. The files that the name had stay for a while."""
        before = self._served.pop(name, None)
        if before is not None:
            self._retired.append((time.monotonic() + _KEPT, copies / before.key))
        told: dict[str, Any] = {"name": name}
        if version is not None:
            self._served[name] = version
            told |= {"path": str(copies / version.key)} | ({"chat": asdict(version.chat)} if version.chat is not None else {})
        assert process.stdin is not None
        with suppress(OSError):  # it has ended, which ``run`` sees in a moment
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()

    def _answers(self) -> bool:
        """Whether vLLM answers; it loads the adapters that were sent till then first."""
        with suppress(OSError), DIRECT.open(f"{self.url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
        return False


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks the server without a proxy, which its key is not for."""

_MISSING = "import importlib.util, sys; print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])"


def _read_arguments(rest: Sequence[str]) -> argparse.Namespace:
    """Those of vLLM's arguments that matter here, as vLLM reads them: the last counts, and _ is the same as - in a name.

    Raises:
        GatewiseError: one has no value, or not a number.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--max-loras", "--max_loras", type=int)
    parser.add_argument("--max-lora-rank", "--max_lora_rank", type=int)
    parser.add_argument("--lora-target-modules", "--lora_target_modules", nargs="+")
    parser.add_argument("--api-key", "--api_key")
    try:
        return parser.parse_known_args(rest)[0]
    except argparse.ArgumentError as error:
        raise GatewiseError(f"among vLLM's own arguments, {error}") from error
