"""A server of one base model and many adapters in vLLM, which may be in another Python than gatewise.

vLLM's own server answers. What is done here is to tell it what the adapters need, to keep it told of adapters that come and go, and
to leave nothing of it behind. Adapters are served from copies (see catalogue.py), each state of a folder from another one, so that
neither vLLM's prefix cache nor an answer that is being written mixes two of them.
"""

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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from transformers import AutoConfig

from gatewise.adapters.files import read_lora
from gatewise.errors import GatewiseError, reason_of, some
from gatewise.internals.listening import listening, resolved
from gatewise.models.cache import resolve
from gatewise.serving.checking import reason_in, without_plugin
from gatewise.serving.engines import VLLM_RANKS, is_told, serving_settings, settings_together
from gatewise.serving.server import vllm_server
from gatewise.serving.server.catalogue import SETTLED, Catalogue, ReplacedError, Version, fault_in
from gatewise.serving.server.reach import HOST, PORT, check_reach

MOST_IN_BATCH = 8
"""Adapters in one batch of vLLM, unless ``--max-loras`` is among its own arguments: it reserves memory for each."""

TREES = "gatewise_mdt.extraction.in_vllm:TreeLogits"
"""What keeps vLLM's requests for decision trees to these."""

_PATIENCE = 20.0  # seconds for vLLM to end by itself
_KEPT = 600.0  # seconds in which an answer with an adapter that is gone may need its files again


@dataclass(frozen=True)
class Room:
    """What an engine was started for; adapters that come later have to fit in.

    Attributes:
        rank: the largest.
        modules: the names that are told to vLLM, None for all.
        routed: whether it can serve routed adapters.
        whole_prompts: whether it reads prompts in one piece, which most of those need.
    """

    rank: int
    modules: frozenset[str] | None
    routed: bool
    whole_prompts: bool

    def problem(self, version: Version, settings: Mapping[str, Any]) -> str | None:
        """Why an adapter does not fit in, to follow "it"."""
        if version.kind == "routed" and not self.routed:
            return "is routed, which this vLLM was not started for"
        if settings["whole_prompts"] and not self.whole_prompts:
            return "reads prompts in one piece, which this vLLM was not started for"
        if settings["largest_rank"] > self.rank:
            return f"has rank {settings['largest_rank']}, more than the {self.rank} that this vLLM was started for"
        told, kind = self.modules, settings["model_type"]
        if told is not None and (others := [path for path in settings["modules"] if not is_told(path, told, kind)]):
            return f"has modules that this vLLM was not started for ({some(others)})"
        return None


def settings_of(version: Version, model_type: str | None, folder: Path | None = None) -> dict[str, Any]:
    """What vLLM must be told of an adapter, as ``serving_settings`` has it.

    Args:
        folder: with a copy of its files; by default its own.

    Raises:
        GatewiseError: vLLM does not serve it.
    """
    if version.kind == "alone":
        raise GatewiseError(f"vLLM does not serve the adapter {version.folder}: take --engine transformers")
    settings = serving_settings(read_lora(folder or version.folder), model_type)
    if settings["vllm"] is None:
        raise GatewiseError(
            f"vLLM does not serve the adapter {version.folder}, which has more than A and B or a rank above {VLLM_RANKS[-1]}: "
            "take --engine transformers"
        )
    return settings


def arguments_for(
    found: Sequence[tuple[Version, Mapping[str, Any]]], positions: int, most_loaded: int, rest: Sequence[str] = ()
) -> tuple[list[str], Room]:
    """What vLLM must be told of adapters, and what fits in beside them.

    Args:
        found: adapters with their ``settings_of``; none where they are still to come.
        positions: the most tokens of prompt and answer.
        most_loaded: adapters that vLLM keeps beside the model.
        rest: arguments that the user gives vLLM; those go before ours.
    """
    given = {one.partition("=")[0].replace("_", "-") for one in rest}
    routed = any(version.kind == "routed" for version, _ in found)
    arguments, rank = ["--enable-lora"], 16
    own = _values(rest, "--lora-target-modules")
    modules = None if own is None else frozenset(own)  # of adapters that nobody knows yet: all
    if found:
        together = settings_together([dict(settings) for _, settings in found])
        rank = together["vllm"]["max_lora_rank"]
        if own is None:
            told = together["vllm"]["arguments"]
            arguments += (names := told[told.index("--lora-target-modules") :])
            modules = frozenset(names[1:])
    if "--max-lora-rank" in given:
        rank = _number(rest, "--max-lora-rank")
    else:
        arguments += ["--max-lora-rank", str(rank)]
    # One more than are used: in a batch with others, vLLM 0.32 gives rows without an adapter that of the last slot on a CPU.
    slots = min(max(len(found), 1), MOST_IN_BATCH) + 1
    if "--max-loras" in given:
        slots = _number(rest, "--max-loras")
    else:
        if "--max-cpu-loras" in given and (few := _number(rest, "--max-cpu-loras")) < slots:  # vLLM takes no fewer of these
            raise GatewiseError(
                f"--max-cpu-loras is {few} among vLLM's own arguments, and {slots} are needed, one more than adapters in a batch: "
                f"give at least {slots}, or --max-loras too"
            )
        arguments += ["--max-loras", str(slots)]
    if "--max-cpu-loras" not in given:
        arguments += ["--max-cpu-loras", str(max(most_loaded, slots))]
    whole_prompts = any(settings["whole_prompts"] for _, settings in found)
    if routed:
        arguments.append("--enforce-eager")
    if whole_prompts:
        arguments.append("--no-enable-chunked-prefill")
        if "--max-num-batched-tokens" not in given:
            arguments += ["--max-num-batched-tokens", str(max(positions, 2048))]
    return arguments, Room(rank, modules, routed, whole_prompts)


class VllmServer:
    """Serves until an interrupt, or until vLLM ends.

    Args:
        python: of an environment that has vLLM; routed adapters need gatewise there too.
        rest: more arguments for vLLM.
        trees: requests can ask for decision trees; needs gatewise and llguidance there too.
        See :class:`gatewise.serving.server.running.AdapterServer` for the others.

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
        key: str | None = None,
        dtype: str = "auto",
        most_tokens: int | None = None,
        most_loaded: int = 32,
        most_running: int = 32,
        every: float = 2.0,
        settled: float = SETTLED,
        rest: Sequence[str] = (),
        trees: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._say = say or (lambda text: print(text, file=sys.stderr))
        self._every, self._key = every, key
        if _values(rest, "--api-key") is not None:
            raise GatewiseError("--api-key is among vLLM's own arguments, which others see: give the key in GATEWISE_API_KEY")
        self._hosts, self._origins = check_reach(host, port, key), _origins(rest)
        family, address = resolved(host, port)
        with listening(family, address, port, host, "give another --port") as free:  # told now, not in a log of vLLM's
            port = free.getsockname()[1]
        shown = {"0.0.0.0": HOST, "::": "::1"}.get(address, host)
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
        self.name = name or base
        self.catalogue = Catalogue(adapters, [self.name], self._say, settled)
        source = resolve(base)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise GatewiseError(
                f"the base model {base!r} has no configuration that Transformers reads: {reason_of(error)}"
            ) from error
        self._model_type = config.model_type
        self._positions = most_tokens or getattr(config.get_text_config(), "max_position_embeddings", None) or 4096
        self._most_loaded, self._rest = most_loaded, list(rest)
        self._said: set[str] = set()
        found = [one for version in self.catalogue.all() if (one := self._fitting(version, None, strict=version.is_named))]
        self._room: Room | None = None
        self._arguments = [
            "--model", source, "--served-model-name", self.name, "--host", address, "--port", str(port),
            "--max-num-seqs", str(most_running), "--middleware", f"{vllm_server.MODULE}.Guard",
            *(["--dtype", dtype] if dtype != "auto" else []),
            *(["--max-model-len", str(most_tokens)] if most_tokens else []),
        ]  # fmt: skip
        if adapters:
            more, self._room = arguments_for(found, self._positions, most_loaded, rest)
            self._arguments += more
            for version, settings in found:
                if version.is_named and (problem := self._room.problem(version, settings)) is not None:
                    raise GatewiseError(f"the adapter {version.folder} {problem}: change vLLM's arguments after --")
        self._on_first_runner = trees  # which what keeps to them was made for
        self._arguments += [*(["--logits-processors", TREES] if trees else []), *rest]
        self._python = str(python)
        self._told: dict[str, Version] = {}
        self._leaving: list[tuple[float, Path]] = []
        self._lines: deque[str] = deque(maxlen=400)
        self._is_up, self._began = False, 0.0
        self._refused: set[str] = set()
        self._loads_told = self._loads_done = 0

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Runs vLLM.

        Args:
            ready: called once it answers.

        Raises:
            GatewiseError: vLLM ended.
            KeyboardInterrupt: after an interrupt, or SIGTERM; nothing of vLLM is left.
        """
        with tempfile.TemporaryDirectory(prefix="gatewise-serve-") as copies, _interrupted_by_sigterm(), self._started() as process:
            looked = time.monotonic()
            while (code := process.poll()) is None:
                if time.monotonic() >= looked + self._every:  # while vLLM starts, too, which takes long
                    self.catalogue.scan()
                    looked = time.monotonic()
                self._tell(process, Path(copies))
                if not self._is_up and self._answers():
                    self._is_up = True
                    self._lines.clear()  # what vLLM said when it began does not tell why it ended
                    if ready is not None:
                        ready()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(self._every if self._is_up else 0.3)
        raise GatewiseError(self._end(code))

    @property
    def names(self) -> list[str]:
        """Of the adapters that vLLM was told of, and has not refused."""
        return sorted(set(self._told).difference(self._refused))

    @contextmanager
    def _started(self) -> Iterator["subprocess.Popen[bytes]"]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self._hosts is not None:
            environment[vllm_server.HOSTS] = ",".join(sorted(self._hosts))
            environment[vllm_server.ORIGINS] = self._origins
        if self._key is not None:
            environment[vllm_server.KEY] = self._key
        if self._room is not None and self._room.routed:
            environment[vllm_server.NEEDS_PLUGIN] = "1"
        if self._on_first_runner:
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        command = [self._python, str(Path(vllm_server.__file__)), *self._arguments]
        try:
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )  # fmt: skip
        except OSError as error:
            raise GatewiseError(f"{self._python} could not be run ({reason_of(error)}): give the Python that has vLLM") from error
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

    def _read(self, stream: IO[bytes]) -> None:
        """vLLM's log goes to stderr as it comes."""
        for line in iter(stream.readline, b""):
            text = line.decode(errors="replace").rstrip()
            self._lines.append(text)
            if text.startswith(vllm_server.REFUSED):
                told = tuple(self._told)  # the other thread changes it
                self._refused.update(name for name in told if text.startswith(f"{vllm_server.REFUSED}{name!r}:"))
            if text.startswith((vllm_server.REFUSED, vllm_server.SERVED, vllm_server.OVERTAKEN)):
                self._loads_done += 1
            self._say(text)

    def _tell(self, process: "subprocess.Popen[bytes]", copies: Path) -> None:
        """Tells vLLM of adapters that came, were replaced or went."""
        if self._room is None:
            return
        now = {one.name: one for one in self.catalogue.all()}
        for name, version in now.items():
            if self._told.get(name) is version:
                continue
            if version.key in self._said:
                self._take_back(process, copies, name)
                continue
            try:
                with version.copied() as folder:
                    if self._fitting(version, self._room, folder=folder) is None:
                        self._take_back(process, copies, name)
                        continue
                    shutil.move(folder, copies / version.key)
            except ReplacedError:
                continue  # the one before stays until the next look
            except (GatewiseError, OSError) as error:  # so it does here
                shutil.rmtree(copies / version.key, ignore_errors=True)
                problem = str(version.not_copied(error) if isinstance(error, OSError) else error)
                if version.is_news(problem):
                    self._say(f"error: {problem}")
                continue
            self._leave(copies, name)
            self._refused.discard(name)
            self._told[name] = version
            self._loads_told += 1
            self._send(process, {"name": name, "path": str(copies / version.key)})
        for name in self._told.keys() - now.keys():
            self._take_back(process, copies, name)
        for when, path in list(self._leaving):
            if when < time.monotonic():
                self._leaving.remove((when, path))
                shutil.rmtree(path, ignore_errors=True)

    def _take_back(self, process: "subprocess.Popen[bytes]", copies: Path, name: str) -> None:
        """vLLM serves nothing by this name any more."""
        if name in self._told:
            self._leave(copies, name)
            self._send(process, {"name": name})

    def _leave(self, copies: Path, name: str) -> None:
        """The files that a name had stay for a while."""
        version = self._told.pop(name, None)
        if version is not None:
            self._leaving.append((time.monotonic() + _KEPT, copies / version.key))

    @staticmethod
    def _send(process: "subprocess.Popen[bytes]", told: Mapping[str, str]) -> None:
        assert process.stdin is not None
        with suppress(OSError):  # it has ended, which is found out in a moment
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()

    def _fitting(
        self, version: Version, room: Room | None, strict: bool = False, folder: Path | None = None
    ) -> tuple[Version, dict[str, Any]] | None:
        """An adapter with its settings; None, which is said once, if vLLM does not serve it, or something is wrong with it."""
        if version.key in self._said:
            return None
        try:
            settings = settings_of(version, self._model_type, folder)
            problem = None if room is None else room.problem(version, settings)
            if problem is not None:
                raise GatewiseError(f"the adapter {version.folder} {problem}: {self._way_out(version, settings)} to serve it")
        except Exception as error:
            problem = fault_in(version.folder, error).replace(str(folder or version.folder), str(version.folder))
            if strict:
                raise GatewiseError(problem) from error
            self._said.add(version.key)
            self._say(f"note: {problem}")
            return None
        return version, settings

    def _way_out(self, version: Version, settings: Mapping[str, Any]) -> str:
        """What is to be done for an adapter that does not fit in: to start again is in vain where it would not fit in by itself."""
        _, own = arguments_for([(version, settings)], self._positions, self._most_loaded, self._rest)
        return "start the server again" if own.problem(version, settings) is None else "change vLLM's arguments after --"

    def _answers(self) -> bool:
        """Whether vLLM serves all adapters that it was told of, or has had a minute for them."""
        asked = urllib.request.Request(f"{self.url}/v1/models", headers={"Authorization": f"Bearer {self._key}"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the key is for no proxy
        with suppress(OSError, ValueError), direct.open(asked, timeout=2) as answer:
            self._began = self._began or time.monotonic()
            served = {one["id"] for one in json.load(answer)["data"]}
            all_served = served.issuperset(set(self._told).difference(self._refused))
            return (all_served and self._loads_done >= self._loads_told) or time.monotonic() > self._began + 60
        return False

    def _end(self, code: int) -> str:
        """One sentence for vLLM's end."""
        if code == vllm_server.NO_VLLM:
            return f"{self._python} has no vLLM: give the Python of an environment that has it (--python), or --engine transformers"
        if code == vllm_server.NO_PLUGIN:
            return without_plugin(self._python)
        said = reason_in("\n".join(self._lines))
        if code < 0:
            return f"vLLM was killed by signal {-code}, as where memory runs out; the last it said: {said}"
        return f"vLLM ended with exit code {code}: {said}"


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM is an interrupt, so that nothing of vLLM is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _values(rest: Sequence[str], name: str) -> list[str] | None:
    """The values of one of vLLM's arguments, the last ones where it is there twice, as vLLM has it; None where it is not there."""
    for place in reversed(range(len(rest))):
        head, equals, value = rest[place].partition("=")
        if head.replace("_", "-") == name:
            return [value] if equals else list(takewhile(lambda one: not one.startswith("-"), rest[place + 1 :]))
    return None


def _number(rest: Sequence[str], name: str) -> int:
    found = _values(rest, name) or [""]
    if not found[0].isdecimal():
        raise GatewiseError(f"vLLM's argument {name} has no number behind it: give one")
    return int(found[0])


def _origins(rest: Sequence[str]) -> str:
    """The sites whose pages may ask, as vLLM is told of them: commas between. What is no list vLLM refuses itself."""
    try:
        given = json.loads((_values(rest, "--allowed-origins") or ["[]"])[0])
    except ValueError:
        given = []
    return ",".join(map(str, given if isinstance(given, list) else []))
