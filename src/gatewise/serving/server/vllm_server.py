"""vLLM's own server for OpenAI's API, whose adapters come and go as another process says. It imports nothing but vLLM.

    python vllm_server.py ARGUMENT...

The arguments are those of ``vllm serve``. Standard input has a JSON object a line: {"name": ..., "path": ...} has the adapter of a
folder served by a name, which answers that are being written go on without; {"name": ...} ends that. No client can do either. The
process leads a group of processes, and kills it when its standard input ends: whoever started it is gone then, however that came.

Bodies of requests have a limit. A server with a key answers nobody else, but for ``/health``; one without a key answers only under
the names that ``GATEWISE_HOSTS`` has, and no page of another site. vLLM's own server has no limit, asks for its key at some of its
addresses, and answers any page. Where gatewise is its plug-in, vLLM's ``/metrics`` have what prompts of routed adapters keep, too.

Read in vLLM 0.32: ``OpenAIServingModels``, ``LoRARequest``, ``init_app_state`` in the launcher of its server, and
``collective_rpc``.
"""

import asyncio
import hmac
import json
import os
import runpy
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

NO_VLLM = 3
"""The exit code of a Python that has no vLLM."""
NO_PLUGIN = 4
"""The exit code of one whose vLLM does not load gatewise's plug-in, though ``NEEDS_PLUGIN`` says that it is needed."""
NEEDS_PLUGIN = "GATEWISE_NEEDS_PLUGIN"
"""The environment variable that is set where routed adapters are to be served."""


REFUSED = "error: vLLM does not load the adapter "
"""What stands before the name of an adapter, and why."""
SERVED = "served by vLLM from here on: the adapter "
"""What stands before the name of one."""
OVERTAKEN = "not loaded, since a newer state came: the adapter "
"""What stands before the name of one."""


MODULE = "gatewise_vllm_server"
"""What this file is called in the process of vLLM's server."""
HOSTS = "GATEWISE_HOSTS"
"""The environment variable with what may stand in ``Host``, commas between; anything where there is none."""
ORIGINS = "GATEWISE_ORIGINS"
"""The environment variable with the sites whose pages may ask where there is no key, commas between; "*" is all."""
KEY = "VLLM_API_KEY"
"""vLLM's own environment variable: arguments can be seen by others."""
NO_KEY = "the key is missing or wrong: send it as Authorization: Bearer KEY"
NOT_HERE = "this server without a key answers only under the address that it was started with"
FOREIGN = "a page of another site asked, which a server without a key answers only where vLLM's --allowed-origins name it"
MOST_BYTES = 8 * 2**20
"""Of a request's body."""

COUNTS = "gatewise_counts"
"""The method of vLLM's workers that gatewise's plug-in gives them."""
ASKED_EVERY = 2.0  # seconds
PROMPTS = "Prompts that a layer's router of an adapter decided on."
KEPT = "Of these, the prompts for which a module was kept."


STATE = "\u2063"
"""In what vLLM calls an adapter's later states, after the name: no name has it, since it cannot be printed."""


def shown(name: str) -> str:
    """What clients call an adapter, whichever of its states vLLM's ``name`` is of."""
    return name.partition(STATE)[0]


class Adapters:
    """What standard input says of adapters, which is done as soon as the server has begun: the last that was said of each.

    Those that are served in an older state come first. Each state of an adapter has a name of its own, which only vLLM's metrics
    show: vLLM takes adapters of one name for one (``LoRARequest.__eq__``), and ended where a batch had two of its states.
    """

    def __init__(self) -> None:
        self._states: dict[str, int] = {}  # how many of each adapter there were
        self._told: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Reads standard input to its end, and then ends all."""
        held = b""
        while piece := os.read(0, 65536):  # not sys.stdin, whose lock a forked process would inherit
            *lines, held = (held + piece).split(b"\n")
            with self._lock:
                for line in lines:
                    self._hear(json.loads(line))
                if self._loop is not None and self._news is not None:
                    self._loop.call_soon_threadsafe(self._news.set)
        os.killpg(0, signal.SIGKILL)

    def _hear(self, one: dict[str, Any]) -> None:
        before = self._told.pop(one["name"], {})
        if "path" in before:
            print(f"{OVERTAKEN}{one['name']!r}", file=sys.stderr, flush=True)
        self._told[one["name"]] = one

    def begin(self, models: Any) -> None:
        """From here on vLLM's ``models`` have them; called in the server's loop."""
        with self._lock:
            self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
            self._news.set()
        of_request, list_all = models.model_name, models.show_available_models

        async def show_available_models() -> Any:
            found = await list_all()
            for card in found.data:
                card.id = shown(card.id)
            return found

        models.model_name = lambda *given, **more: shown(of_request(*given, **more))
        models.show_available_models = show_available_models
        self._task = asyncio.create_task(self._follow(models, self._news))

    async def _follow(self, models: Any, news: asyncio.Event) -> None:
        while True:
            await news.wait()
            news.clear()
            while True:
                with self._lock:
                    if not self._told:
                        break
                    name = next((one for one in self._told if one in models.lora_requests), next(iter(self._told)))
                    one = self._told.pop(name)
                await self._change(models, name, one.get("path"))

    async def _change(self, models: Any, name: str, path: str | None) -> None:
        from vllm.lora.request import LoRARequest

        if path is None:
            models.lora_requests.pop(name, None)
            return
        # A number of its own, so that requests that run go on with the adapter that they began with.
        state = self._states[name] = self._states.get(name, 0) + 1
        own = name if state == 1 else f"{name}{STATE}(state {state})"
        made = LoRARequest(lora_name=own, lora_int_id=models.lora_id_counter.inc(1), lora_path=path)
        try:
            await models.engine_client.add_lora(made)
        except Exception as error:
            print(f"{REFUSED}{name!r}: {error}", file=sys.stderr, flush=True)
            models.lora_requests.pop(name, None)
        else:
            models.lora_requests[name] = made
            print(f"{SERVED}{name!r}", file=sys.stderr, flush=True)


class Kept:
    """What the prompts of routed adapters keep, asked of a worker every few seconds, for Prometheus's client."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, int, dict[str, int]]] = []
        self._task: asyncio.Task[None] | None = None

    def begin(self, engine: Any) -> None:
        """Called in the server's loop."""
        from prometheus_client import REGISTRY

        REGISTRY.register(self)
        self._task = asyncio.create_task(self._ask(engine))

    async def _ask(self, engine: Any) -> None:
        while True:
            try:
                self._rows = (await engine.collective_rpc(COUNTS))[0]
            except Exception as error:
                print(f"note: /metrics say nothing of routed adapters: {error}", file=sys.stderr, flush=True)
                return
            await asyncio.sleep(ASKED_EVERY)

    def collect(self) -> Iterator[Any]:
        """Counters of the names that ``--engine transformers`` has them under."""
        from prometheus_client.core import CounterMetricFamily

        prompts = CounterMetricFamily("gatewise_routed_prompts", PROMPTS, labels=["model", "layer"])
        kept = CounterMetricFamily("gatewise_routing_kept", KEPT, labels=["model", "layer", "module"])
        for model, layer, count, modules in self._rows:
            prompts.add_metric([model, layer], count)
            for module, times in modules.items():
                kept.add_metric([model, layer, module], times)
        yield from (prompts, kept)


class Guard:
    """Stands before vLLM's server, by ``--middleware``. Refuses bodies of more than ``MOST_BYTES``, and whom it does not know."""

    def __init__(self, app: Any) -> None:
        self._app = app
        hosts = os.environ.get(HOSTS)
        self._hosts = None if hosts is None else hosts.split(",")
        self._origins = os.environ.get(ORIGINS, "").lower().split(",")
        self._key = os.environ.get(KEY) or None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if scope["type"] == "websocket":
            await (self._app(scope, receive, send) if refusal is None else send({"type": "websocket.close", "code": 1008}))
            return
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        said = headers.get(b"content-length", "")
        expected, came, messages, more = int(said) if said.isdecimal() else 0, 0, [], True
        # What is somewhat too large is read to its end, and thrown away, since a client that still sends does not hear.
        while max(expected, came) <= 8 * MOST_BYTES and more:
            message = await receive()
            came += len(message.get("body", b""))
            more = message.get("more_body", False)
            if max(expected, came) <= MOST_BYTES:
                messages.append(message)
        if max(expected, came) > MOST_BYTES:
            await _refuse(send, 413, "RequestTooLargeError", f"the body is too large: expected at most {MOST_BYTES // 2**20} MiB")
            return
        held = deque(messages)

        async def again() -> Any:
            return held.popleft() if held else await receive()

        await self._app(scope, again, send)

    def _refusal(self, scope: Any, headers: dict[bytes, str]) -> tuple[int, str, str] | None:
        """Status, kind and message for who is not let in."""
        host = headers.get(b"host", "").lower()
        if self._hosts is not None:
            if host_of(host) not in self._hosts:
                return 403, "PermissionDeniedError", NOT_HERE
            origins = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"origin"]
            if "*" not in self._origins and any(one.partition("://")[2] != host and one not in self._origins for one in origins):
                return 403, "PermissionDeniedError", FOREIGN
        is_open = scope["path"] == "/health" or _is_preflight(scope, headers)
        if not is_open and not has_key(headers.get(b"authorization", ""), self._key):
            return 401, "AuthenticationError", NO_KEY
        return None


def _is_preflight(scope: Any, headers: dict[bytes, str]) -> bool:
    """Whether a browser asks what it may ask, where it cannot send a key yet; vLLM's CORS answers it, and nothing else is done."""
    return scope.get("method") == "OPTIONS" and headers.keys() >= {b"origin", b"access-control-request-method"}


def has_key(authorization: str, key: str | None) -> bool:
    """Whether ``Authorization`` has the key, if there is one."""
    if key is None:
        return True
    scheme, _, given = authorization.partition(" ")
    return hmac.compare_digest(given.strip().encode(), key.encode()) and scheme.lower() == "bearer"


def host_of(header: str) -> str:
    """What ``Host`` names, without a port."""
    host = header.lower()
    name, _, port = host.rpartition(":")
    return name if port.isdigit() and name else host


async def _refuse(send: Any, status: int, kind: str, message: str) -> None:
    told = {"message": message, "type": kind, "param": None, "code": status}
    headers = [(b"content-type", b"application/json"), *([(b"www-authenticate", b"Bearer")] if status == 401 else [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": told}).encode()})


def has_plugin() -> bool:
    """Whether this Python's vLLM loads gatewise's plug-in."""
    allowed = os.environ.get("VLLM_PLUGINS")
    is_known = bool(entry_points(group="vllm.general_plugins", name="gatewise")) and find_spec("gatewise") is not None
    return is_known and (allowed is None or "gatewise" in allowed.split(","))


def follow(adapters: Adapters) -> None:
    """Has vLLM's server tell when it begins."""
    from vllm.entrypoints.launchers.api_server import entry

    init = entry.init_app_state

    async def init_app_state(engine: Any, state: Any, *given: Any, **more: Any) -> None:
        await init(engine, state, *given, **more)
        adapters.begin(state.openai_serving_models)
        if has_plugin():
            Kept().begin(engine)

    entry.init_app_state = init_app_state


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files would stand before libraries of their names
    if find_spec("vllm") is None:
        sys.exit(NO_VLLM)
    if NEEDS_PLUGIN in os.environ and not has_plugin():
        sys.exit(NO_PLUGIN)
    sys.modules[MODULE] = sys.modules["__main__"]
    coming = Adapters()
    threading.Thread(target=coming.listen, daemon=True).start()
    follow(coming)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
