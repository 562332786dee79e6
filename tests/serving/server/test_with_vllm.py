"""What vLLM is told of adapters, and that nothing of it is left behind. With the real one: `make test-serve`."""

import asyncio
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from served_models import adapter_folder, base_folder, client, text_of, words, writes
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect
from test_vllm import PYTHON, on

from gatewise.errors import GatewiseError
from gatewise.serving.server import app, vllm_server
from gatewise.serving.server.catalogue import Catalogue
from gatewise.serving.server.with_vllm import Room, VllmServer, arguments_for, settings_of

WIDE = {"hidden_size": 64, "head_dim": 32}  # vLLM's attention needs heads of 32 numbers and more


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    base = base_folder(root / "base", **WIDE)
    adapter_folder(base, root / "adapters" / "one", seed=1)
    adapter_folder(base, root / "adapters" / "two", seed=2, r=12, target_modules=["q_proj", "down_proj"])
    adapter_folder(base, root / "adapters" / "routed", "routed", seed=3)
    adapter_folder(base, root / "dora", "dora", seed=4)
    return root


def versions(*places: Path) -> dict[str, Any]:
    return {one.name: one for one in Catalogue([str(one) for one in places], settled=0.0).all()}


def test_what_vllm_is_told(made: Path) -> None:
    found = {name: (one, settings_of(one, "llama")) for name, one in versions(made / "adapters").items()}
    arguments, room = arguments_for([found["one"]], 96, 32)
    assert arguments[:2] == ["--enable-lora", "--lora-target-modules"]
    assert arguments[arguments.index("--max-lora-rank") + 1] == "8"
    assert "model.layers.1.self_attn.qkv_proj" in arguments
    assert arguments[-4:] == ["--max-loras", "2", "--max-cpu-loras", "32"]
    assert room.problem(*found["two"]) == "has rank 12, more than the 8 that this vLLM was started for"
    assert room.problem(*found["routed"]) == "is routed, which this vLLM was not started for"
    arguments, room = arguments_for([found["two"]], 96, 1)
    assert room.rank == 16
    assert arguments[-4:] == ["--max-loras", "2", "--max-cpu-loras", "2"]
    assert room.problem(*found["one"]) is not None
    assert "modules that this vLLM was not started for" in str(room.problem(*found["one"]))
    arguments, room = arguments_for([found["one"], found["routed"]], 4096, 32)
    assert {"--no-enable-chunked-prefill", "--enforce-eager"} < set(arguments)
    assert arguments[arguments.index("--max-num-batched-tokens") + 1] == "4096"
    assert room.routed
    assert room.problem(*found["routed"]) is None
    arguments, room = arguments_for([], 96, 32, ["--max_lora_rank=64", "--max-loras", "3"])
    assert room == Room(64, None, False, False)
    assert arguments == ["--enable-lora", "--max-cpu-loras", "32"]
    with pytest.raises(GatewiseError, match="no number behind it"):
        arguments_for([], 96, 32, ["--max-lora-rank"])


def test_vllms_own_arguments_are_taken_as_it_takes_them(made: Path) -> None:
    for rest, expected in (
        (["--max-loras", "64"], ["--max-cpu-loras", "64"]),
        (["--max_loras=8", "--max-loras", "40"], ["--max-cpu-loras", "40"]),
        (["--max-loras", "4"], ["--max-cpu-loras", "32"]),
        (["--max-cpu-loras", "2"], ["--max-loras", "2"]),
        (["--max-cpu-loras=64"], ["--max-loras", "2"]),
    ):
        arguments, _ = arguments_for([], 96, 32, ["--max-lora-rank=16", *rest])
        assert arguments == ["--enable-lora", *expected]
    assert arguments_for([], 96, 32, ["--max-lora-rank", "8", "--max-lora-rank=32"])[1].rank == 32
    for name in ("--max-loras", "--max-cpu-loras"):
        with pytest.raises(GatewiseError, match=f"{name} has no number behind it: give one"):
            arguments_for([], 96, 32, [name, "--seed"])
    with pytest.raises(GatewiseError, match=r"--api-key is among vLLM's own arguments, .* GATEWISE_API_KEY"):
        VllmServer(str(made / "base"), [], port=0, rest=["--api-key", "secret"])


def test_no_slot_is_lost_to_the_users_own_arguments(made: Path) -> None:
    """With one fewer, vLLM 0.32 gives rows without an adapter that of the last slot on a CPU."""
    one = versions(made / "adapters")["one"]
    found = [(one, settings_of(one, "llama"))]
    for count, needed in ((0, 2), (1, 2), (3, 4), (20, 9)):
        enough = ["--max-cpu-loras", str(needed)]
        assert arguments_for(found * count, 96, 32, enough)[0][-2:] == ["--max-loras", str(needed)]
        few = [f"--max_cpu_loras={needed - 1}"]
        with pytest.raises(GatewiseError, match=rf"--max-cpu-loras is {needed - 1} .* give at least {needed}, or --max-loras too$"):
            arguments_for(found * count, 96, 32, few)
        assert "--max-loras" not in arguments_for(found * count, 96, 32, [*few, "--max-loras", "1"])[0]


def test_modules_that_the_user_names_are_all_that_there_is_room_for(made: Path) -> None:
    found = {name: (one, settings_of(one, "llama")) for name, one in versions(made / "adapters").items()}
    for given, others in (("q_proj down_proj", "one"), ("qkv_proj down_proj", "one"), ("q_proj", "two"), ("o_proj", "one")):
        for known in ([], [found["two"]]):
            rest = ["--seed", "3", "--lora-target-modules", *given.split(), "--max-lora-rank", "16"]
            arguments, room = arguments_for(known, 96, 32, rest)
            assert "--lora-target-modules" not in arguments
            assert "has modules that this vLLM was not started for" in str(room.problem(*found[others]))
            assert (room.problem(*found["two"]) is None) == ("down_proj" in given)
    with pytest.raises(GatewiseError, match=r"one has modules that .* not started for .*: change vLLM's arguments after --$"):
        VllmServer(str(made / "base"), [str(made / "adapters" / "one")], port=0, rest=["--lora-target-modules", "q_proj"])


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ([], "has rank 12, .*: start the server again"),
        (["--max-lora-rank", "8"], "has rank 12, .*: change vLLM's arguments after --"),
        (["--max-lora-rank", "16", "--lora-target-modules", "o_proj"], "has modules .*: change vLLM's arguments after --"),
        (["--max-lora-rank", "16"], "has modules .*: start the server again"),
    ],
)
def test_what_has_to_be_changed_for_an_adapter_that_came_later_is_told(
    made: Path, tmp_path: Path, rest: list[str], said: str
) -> None:
    lines: list[str] = []
    watched, copies = tmp_path / "watched", tmp_path / "copies"
    copies.mkdir()
    adapter_folder(made / "base", watched / "one", seed=1, target_modules=["o_proj"])
    server = VllmServer(str(made / "base"), [str(watched)], port=0, say=lines.append, settled=0.0, rest=rest)
    shutil.copytree(made / "adapters" / "two", watched / "two")
    for _ in range(2):
        server.catalogue.scan()
        telling(server, copies)
    assert len(lines) == 1
    assert re.search(f"^note: the adapter {watched / 'two'} {said} to serve it$", lines[0]), lines


def test_what_vllm_does_not_serve_is_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=r"vLLM does not serve the adapter .*dora: take --engine transformers"):
        VllmServer(str(made / "base"), [str(made / "dora")], port=0)
    said: list[str] = []
    shutil.copytree(made / "dora", tmp_path / "dora")
    server = VllmServer(str(made / "base"), [str(tmp_path)], port=0, say=said.append, settled=0.0)
    assert len(said) == 1
    assert "note: vLLM does not serve the adapter" in said[0]
    assert server.names == []


def test_vllm_is_told_of_what_goes_whatever_came_before(made: Path, tmp_path: Path) -> None:
    folder, copies = tmp_path / "x", tmp_path / "copies"
    copies.mkdir()
    shutil.copytree(made / "adapters" / "one", folder)
    server = VllmServer(str(made / "base"), [str(tmp_path)], port=0, say=lambda text: None, settled=0.0)

    def told() -> list[bool]:
        """Of each line to vLLM, whether it names files to be served; no other name is in it."""
        process: Any = SimpleNamespace(stdin=io.BytesIO())
        server._tell(process, copies)
        lines = [json.loads(line) for line in process.stdin.getvalue().splitlines()]
        assert all(line["name"] == "x" and Path(line.get("path", copies)).is_dir() for line in lines)
        return ["path" in line for line in lines]

    def put(source: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(source, folder)
        server.catalogue.scan()

    assert (told(), told()) == ([True], [])
    put(made / "dora")  # which vLLM does not serve
    assert (told(), server.names, told()) == ([False], [], [])
    put(made / "adapters" / "one")
    assert (told(), server.names) == ([True], ["x"])
    put(made / "adapters" / "one")
    shutil.rmtree(folder)  # before it was copied
    assert (told(), server.names) == ([], ["x"])
    server.catalogue.scan()
    assert (told(), server.names) == ([False], [])


def telling(server: VllmServer, copies: Path) -> list[str]:
    """Of which adapters' files vLLM is told now."""
    process: Any = SimpleNamespace(stdin=io.BytesIO())
    server._tell(process, copies)
    return [line["name"] for line in map(json.loads, process.stdin.getvalue().splitlines()) if "path" in line]


def test_a_bad_folder_is_passed_over(made: Path, tmp_path: Path) -> None:
    said: list[str] = []
    watched, copies = tmp_path / "watched", tmp_path / "copies"
    shutil.copytree(made / "adapters" / "one", watched / "one")
    copies.mkdir()
    server = VllmServer(str(made / "base"), [str(watched)], port=0, say=said.append, settled=0.0)
    for name, change in (("deep", None), ("odd", {"lora_alpha": 10**400})):
        config = shutil.copytree(made / "adapters" / "one", watched / name) / "adapter_config.json"
        config.write_text("[" * 200000 if change is None else json.dumps(json.loads(config.read_text()) | change))
    for told in (["one"], []):
        server.catalogue.scan()
        assert telling(server, copies) == told
    assert [one.partition(" (")[0] for one in said] == [
        f"note: {watched / 'deep' / 'adapter_config.json'} is not valid JSON",
        f"note: the adapter {watched / 'odd'} cannot be read",
    ]
    with pytest.raises(GatewiseError, match=r"odd cannot be read \(OverflowError"):
        VllmServer(str(made / "base"), [str(watched / "odd")], port=0)


@pytest.mark.parametrize("call", ["copyfile", "move"])
def test_an_adapter_for_which_there_is_no_room_waits(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    said: list[str] = []
    watched, copies = tmp_path / "watched", tmp_path / "copies"
    shutil.copytree(made / "adapters" / "one", watched / "one")
    copies.mkdir()
    server = VllmServer(str(made / "base"), [str(watched)], port=0, say=said.append, settled=0.0)

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, call, full)
            assert [telling(server, copies) for _ in range(3)] == [[], [], []]
        assert len(said) == 1
        assert f"error: the adapter {watched / 'one'} cannot be copied (No space left on device): " in said[0]
    assert telling(server, copies) == ["one"]
    assert server.names == ["one"]


def test_what_vllm_says_is_read_on_while_adapters_come(made: Path) -> None:
    class Name(str):
        def __repr__(self) -> str:
            server._told[f"{len(server._told)}"] = version  # as the other thread does, at any time
            return super().__repr__()

    said: list[str] = []
    server = VllmServer(str(made / "base"), [str(made / "adapters" / "one")], port=0, say=said.append)
    version = server.catalogue["one"]
    server._told = {Name("one"): version, Name("two"): version}
    server._read(io.BytesIO(f"{vllm_server.REFUSED}'two': no\nlater\n".encode()))
    assert said[-1] == "later"
    assert "two" not in server.names
    assert "one" in server.names


def test_no_proxy_is_asked_whether_vllm_answers(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers['Authorization']}")
            self.send_response(502)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = Thread(target=proxy.serve_forever)
        thread.start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        try:
            server = VllmServer(str(made / "base"), [], port=0, key="secret")
            assert not server._answers()
            assert asked == []
            server.url = f"http://127.0.0.1:{proxy.server_port}"  # and it does ask
            assert not server._answers()
            assert asked == ["/v1/models Bearer secret"]
        finally:
            proxy.shutdown()
            thread.join()


def test_vllm_loads_the_last_state_of_each_adapter_and_first_what_it_serves(capsys: pytest.CaptureFixture[str]) -> None:
    adapters, done = vllm_server.Adapters(), []
    models = SimpleNamespace(lora_requests={"held": 1, "gone": 2}, model_name=None, show_available_models=None)

    async def change(models: Any, name: str, path: str | None) -> None:
        done.append((name, path))

    adapters._change = change  # type: ignore[method-assign]
    for name, path in [("a", "a1"), ("b", "b1"), ("a", "a2"), ("held", "h2"), ("gone", None), ("b", None), ("c", "c1")]:
        adapters._hear({"name": name} | ({"path": path} if path else {}))

    async def run() -> None:
        adapters.begin(models)
        while adapters._told:
            await asyncio.sleep(0)

    asyncio.run(run())
    assert done == [("held", "h2"), ("gone", None), ("a", "a2"), ("b", None), ("c", "c1")]
    assert capsys.readouterr().err == f"{vllm_server.OVERTAKEN}'a'\n{vllm_server.OVERTAKEN}'b'\n"


@pytest.mark.parametrize("hosts", [None, "127.0.0.1,localhost,[::1]"])
def test_the_guard_lets_in_what_the_other_engine_does(monkeypatch: pytest.MonkeyPatch, hosts: str | None) -> None:
    assert vllm_server.MOST_BYTES == app.MOST_BYTES
    monkeypatch.delenv(vllm_server.KEY, raising=False)
    if hosts is None:
        monkeypatch.delenv(vllm_server.HOSTS, raising=False)
    else:
        monkeypatch.setenv(vllm_server.HOSTS, hosts)
    monkeypatch.setattr(vllm_server, "MOST_BYTES", 2**20)

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        body = await request.body() if request.method == "POST" else b""
        await Response(str(len(body)), 200)(scope, receive, send)

    asked = TestClient(vllm_server.Guard(echo), base_url="http://localhost:8000")
    assert asked.get("/health").text == "0"
    assert asked.post("/v1/completions", content=b"x" * 2**20).text == str(2**20)
    pieces = [b"x" * 1000] * 1000
    assert asked.post("/v1/completions", content=iter(pieces)).text == "1000000"
    for content in (b"x" * (2**20 + 1), iter(pieces + pieces)):
        answer = asked.post("/v1/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, 413)
        assert answer.json()["error"]["message"] == "the body is too large: expected at most 1 MiB"
    for host in ("localhost", "127.0.0.1:8000", "[::1]:1", "[::1]"):
        assert asked.get("/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example:8000", "evil.example", "", "localhost.evil.example"):
        answer = asked.get("/health", headers={"Host": host})
        assert answer.status_code == (200 if hosts is None else 403)


Guarded = Callable[..., TestClient]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """guarded(VARIABLE=value, ...) -> a client of a guard with that environment, before what answers anything."""

    async def anything(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            socket = WebSocket(scope, receive, send)
            await socket.accept()
            await socket.close()
        else:
            await Response("let in")(scope, receive, send)

    def make(**given: str) -> TestClient:
        for name in (vllm_server.HOSTS, vllm_server.ORIGINS, vllm_server.KEY):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return TestClient(vllm_server.Guard(anything), base_url="http://localhost:8000")

    return make


def is_connected(asked: TestClient, **headers: str) -> bool:
    try:
        with asked.websocket_connect("ws://localhost:8000/v1/realtime", headers=headers):
            return True
    except WebSocketDisconnect:
        return False


def test_the_key_keeps_others_out_everywhere(guarded: Guarded) -> None:
    asked = guarded(VLLM_API_KEY="secret")
    for method, path in (("POST", "/invocations"), ("POST", "/pause"), ("GET", "/metrics"), ("POST", "/tokenize"), ("GET", "/v1")):
        for key in ("", "secret", "Bearer Secret", "Bearer secret2", "Basic secret"):
            answer = asked.request(method, path, headers={"Authorization": key} if key else {})
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert asked.request(method, path, headers={"Authorization": "Bearer secret"}).text == "let in"
        assert asked.request(method, path, headers={"Authorization": "bearer secret", "Origin": "http://a.example"}).is_success
    assert asked.get("/health").text == "let in"
    assert asked.get("/health/x").status_code == 401
    assert not is_connected(asked)
    assert is_connected(asked, Authorization="Bearer secret")
    # What a browser asks first, for a page that will send the key.
    first = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    assert asked.options("/v1/completions", headers=first).is_success
    assert asked.options("/v1/completions").status_code == 401
    assert asked.post("/v1/completions", headers=first).status_code == 401
    assert guarded(VLLM_API_KEY="").get("/metrics").is_success  # which vLLM takes for none, too


def test_no_page_of_another_site_asks_without_a_key(guarded: Guarded) -> None:
    asked = guarded(GATEWISE_HOSTS="127.0.0.1,localhost,[::1]")
    foreign = ["http://evil.example", "https://evil.example", "null", "http://localhost:3000", "http://localhost"]
    for origin in foreign:
        for method in ("GET", "POST", "OPTIONS"):
            answer = asked.request(method, "/v1/models", headers={"Origin": origin})
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "PermissionDeniedError")
        assert not is_connected(asked, Origin=origin)
    assert not is_connected(asked, Host="evil.example")
    for headers in ({}, {"Origin": "http://localhost:8000"}, {"Origin": "http://127.0.0.1:1", "Host": "127.0.0.1:1"}):
        assert asked.post("/v1/completions", headers=headers).text == "let in"
    assert is_connected(asked)
    assert is_connected(asked, Origin="http://localhost:8000")
    both: Any = [("Origin", "http://localhost:8000"), ("Origin", "http://evil.example")]
    assert asked.get("/v1/models", headers=both).status_code == 403
    asked = guarded(GATEWISE_HOSTS="localhost", GATEWISE_ORIGINS="http://localhost:3000,https://A.example")
    allowed = {"http://localhost:3000", "https://a.example"}
    for origin in (*foreign, *allowed):
        assert asked.get("/v1/models", headers={"Origin": origin}).is_success == (origin in allowed)
    asked = guarded(GATEWISE_HOSTS="localhost", GATEWISE_ORIGINS="*")
    assert all(asked.get("/v1/models", headers={"Origin": origin}).is_success for origin in foreign)


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ((), ""),
        (("--allowed-origins", '["http://a.example", "http://b.example"]'), "http://a.example,http://b.example"),
        (("--allowed_origins=nonsense",), ""),  # which vLLM refuses itself
        (("--allowed-origins", "3"), ""),
    ],
)
def test_the_guard_is_told_what_the_user_allows(made: Path, tmp_path: Path, rest: tuple[str, ...], told: str) -> None:
    python = fake(tmp_path, f'echo "$GATEWISE_HOSTS $GATEWISE_ORIGINS" > {tmp_path}/told; exit 1')
    server = VllmServer(str(made / "base"), [], python=python, port=0, say=lambda _: None, rest=rest)
    with pytest.raises(GatewiseError, match="exit code 1"):
        server.run()
    assert (tmp_path / "told").read_text() == f"127.0.0.1,[::1],localhost {told}\n"


def fake(tmp_path: Path, script: str) -> Path:
    """Stands in for a Python that has vLLM."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "has no vLLM: give the Python of an environment that has it"),
        ("exit 4", "has no gatewise, whose plug-in serves them"),
        ("echo INFO all well; echo 'ValueError: no such device'; echo later; exit 1", "exit code 1: ValueError: no such device"),
        ("echo the end; kill -9 $$", "killed by signal 9, as where memory runs out; the last it said: the end"),
    ],
)
def test_its_end_is_told_in_a_sentence(made: Path, tmp_path: Path, script: str, said: str) -> None:
    log: list[str] = []
    server = VllmServer(str(made / "base"), [], python=fake(tmp_path, script), port=0, say=log.append)
    with pytest.raises(GatewiseError, match=re.escape(said)):
        server.run()
    with pytest.raises(GatewiseError, match="could not be run"):
        VllmServer(str(made / "base"), [], python=tmp_path / "none", port=0).run()


def test_routed_adapters_need_the_plug_in(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation from before gatewise had one hid it from vLLM, which then refused adapter after adapter."""
    python = fake(tmp_path, 'exit "${GATEWISE_NEEDS_PLUGIN:-3}"')
    for adapter, said in (("routed", "exit code 1: "), ("one", "has no vLLM")):
        server = VllmServer(str(made / "base"), [str(made / "adapters" / adapter)], python=python, port=0, say=lambda _: None)
        with pytest.raises(GatewiseError, match=said):
            server.run()
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert vllm_server.has_plugin()
    for allowed, is_loaded in (("", False), ("other", False), ("other,gatewise", True)):
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
        assert vllm_server.has_plugin() == is_loaded
    monkeypatch.setattr(vllm_server, "entry_points", lambda **_: ())
    assert not vllm_server.has_plugin()


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True


def test_nothing_is_left_behind(made: Path, tmp_path: Path) -> None:
    """vLLM's engine is a process of its own, which must go too; and the key is no argument, which others see."""
    script = f'echo "$VLLM_API_KEY" > {tmp_path}/key; echo $VLLM_USE_V2_MODEL_RUNNER > {tmp_path}/runner; '
    script += f'echo "$@" > {tmp_path}/arguments; sleep 100 & echo $! > {tmp_path}/engine; wait'
    command = [sys.executable, "-m", "gatewise", "serve", str(made / "base"), "--engine", "vllm", "--port", "0"]
    command += ["--python", str(fake(tmp_path, script)), "--trees", "--", "--seed", "3"]
    process = subprocess.Popen(command, env={**os.environ, "GATEWISE_API_KEY": "secret"}, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 60
    while not (tmp_path / "engine").exists() or not (tmp_path / "engine").read_text().strip():
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.05)
    engine = int((tmp_path / "engine").read_text())
    assert is_there(engine)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "serving ended"
    limit = time.monotonic() + 10
    while is_there(engine):  # the system takes a moment to end what was killed
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert (tmp_path / "key").read_text() == "secret\n"
    told = (tmp_path / "arguments").read_text()
    assert "secret" not in told
    assert told.endswith("--logits-processors gatewise_mdt.extraction.in_vllm:TreeLogits --seed 3\n")
    assert (tmp_path / "runner").read_text() == "0\n"


# ---- the real vLLM ----

real = pytest.mark.skipif(PYTHON is None, reason="GATEWISE_VLLM_PYTHON names no Python that has vLLM: run `make test-serve`")


@real
def test_the_real_vllm_without_the_plug_in_is_not_started(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    server = VllmServer(str(made / "base"), [str(made / "adapters" / "routed")], python=str(PYTHON), port=0, say=lambda _: None)
    with pytest.raises(GatewiseError, match="VLLM_PLUGINS leaves it out: install gatewise beside vLLM"):
        server.run()


@pytest.fixture(scope="module", params=("V1", "V2"))
def served(made: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """``gatewise serve`` with the real vLLM, in a process of its own."""
    folder = tmp_path_factory.mktemp("watched")
    for name in ("one", "two", "routed"):
        shutil.copytree(made / "adapters" / name, folder / name)
    with vllm_serving(made / "base", folder, request.param, "--", "--block-size", "32") as server:
        yield server


@contextmanager
def vllm_serving(base: Path, folder: Path, runner: str, *rest: str) -> Iterator[SimpleNamespace]:
    command = [sys.executable, "-m", "gatewise", "serve", str(base), "--adapters", str(folder), "--python", str(PYTHON)]
    command += ["--port", "0", "--served-model-name", "tiny", "--dtype", "float32", "--poll", "0.3", *rest]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **on(runner)}
    with (folder.parent / "log").open("w+") as log:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            said = (folder.parent / "log").read_text()
            assert line.startswith("serving: "), said[-3000:]
            yield SimpleNamespace(url=line.split()[1].removesuffix("/v1"), folder=folder)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@real
def test_many_clients_at_once(served: SimpleNamespace, made: Path) -> None:
    asked = client(served)
    names = ["tiny", "one", "two", "routed"]
    assert {one.id for one in asked.models.list()} == set(names)
    jobs = [(name, [7 + number, 19, 23 + number][: 1 + number % 3], 4 + number) for number in range(6) for name in names]

    def run(job: tuple[str, list[int], int]) -> str:
        name, prompt, tokens = job
        given: Any = prompt if tokens % 2 else words(prompt)
        answer = asked.completions.create(model=name, prompt=given, max_tokens=tokens, temperature=0, stream=tokens % 3 == 0)
        return "".join(one.choices[0].text for one in answer) if tokens % 3 == 0 else answer.choices[0].text

    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(run, jobs))
    for (name, prompt, tokens), text in zip(jobs, found, strict=True):
        alone = writes(made / "base", None if name == "tiny" else made / "adapters" / name, prompt, tokens)
        assert text.strip() == text_of(alone).strip(), (name, prompt)


@real
def test_metrics_have_what_routed_prompts_keep(served: SimpleNamespace, made: Path) -> None:
    def shares() -> dict[str, float]:
        """Of the adapter's second layer: prompts that were routed, and modules that they kept."""
        with urllib.request.urlopen(f"{served.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        found = {"gatewise_routed_prompts_total": 0.0, "gatewise_routing_kept_total": 0.0}
        for line in lines:
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("} ")
            if name in found and {'model="routed"', 'layer="model.layers.1"'} <= set(labels.split(",")):
                found[name] += float(value)
        return found

    before = shares()
    for number in range(3):
        client(served).completions.create(model="routed", prompt=[5 + number, 23], max_tokens=3)
    limit = time.monotonic() + 30
    while (now := shares())["gatewise_routed_prompts_total"] < before["gatewise_routed_prompts_total"] + 3:
        assert time.monotonic() < limit, now
        time.sleep(0.2)
    top_k = json.loads((made / "adapters" / "routed" / "adapter_config.json").read_text())["top_k"]
    assert now["gatewise_routing_kept_total"] == top_k * now["gatewise_routed_prompts_total"]


@real
def test_adapters_come_are_replaced_and_go(served: SimpleNamespace, made: Path) -> None:
    prompt = [7, 19, 23]

    def text(name: str) -> str | None:
        try:
            return client(served).completions.create(model=name, prompt=prompt, max_tokens=8, temperature=0).choices[0].text
        except openai.NotFoundError:
            return None

    def soon(name: str, expected: Path | None) -> None:
        wanted = None if expected is None else text_of(writes(made / "base", expected, prompt, 8))
        limit = time.monotonic() + 60
        while text(name) != wanted:
            assert time.monotonic() < limit, text(name)
            time.sleep(0.2)

    assert text("new") is None
    for name in ("one", "routed", "two"):
        shutil.copytree(made / "adapters" / name, served.folder / ".new")
        shutil.rmtree(served.folder / "new", ignore_errors=True)
        (served.folder / ".new").rename(served.folder / "new")
        soon("new", made / "adapters" / name)
    shutil.rmtree(served.folder / "new")
    soon("new", None)
    assert text("../one") is None
    assert text(str(made / "adapters" / "one")) is None


@real
def test_two_states_of_an_adapter_write_in_one_batch(tmp_path: Path) -> None:
    """vLLM takes adapters of one name for one, and ended where it had to load the second state of a batch."""
    base = base_folder(tmp_path / "base", max_position_embeddings=32768, **WIDE)
    states = [adapter_folder(base, tmp_path / f"state{number}", seed=number) for number in range(2)]
    others = [adapter_folder(base, tmp_path / f"other{number}", seed=9) for number in range(4)]
    folder, prompt = tmp_path / "served", [7, 19, 23]
    shutil.copytree(states[0], folder / "one")
    shutil.copytree(states[1], folder / ".new")
    wanted = text_of(writes(base, states[1], prompt, 8, ends=False))
    more = {"prompt": prompt, "temperature": 0, "extra_body": {"ignore_eos": True}}
    rest = ["--", "--block-size", "32", "--max-loras", "2", "--max-cpu-loras", "2"]
    with vllm_serving(base, folder, "V1", *rest) as server, ThreadPoolExecutor(1) as thread:
        asked, enough = client(server), Event()

        def read() -> tuple[set[str], str]:
            models, texts = set(), []
            with asked.completions.create(model="one", max_tokens=30000, stream=True, **more) as stream:
                for piece in stream:
                    models.add(piece.model)
                    texts.append(piece.choices[0].text)
                    if enough.is_set():
                        return models, "".join(texts)
            raise AssertionError("it ended too early")

        held = thread.submit(read)
        limit = time.monotonic() + 40
        try:
            (folder / "one").rename(tmp_path / "gone")
            (folder / ".new").rename(folder / "one")
            while asked.completions.create(model="one", max_tokens=8, **more).choices[0].text != wanted:
                assert time.monotonic() < limit
                time.sleep(0.1)
            for place in others:  # whose loading takes the second state out of vLLM's slots
                place.rename(folder / place.name)
            while len(asked.models.list().data) < 6:
                assert time.monotonic() < limit
                time.sleep(0.1)
            answers = [asked.completions.create(model="one", max_tokens=8, **more) for _ in range(2)]
        finally:
            enough.set()
        assert [(one.model, one.choices[0].text) for one in answers] == [("one", wanted)] * 2
        models, text = held.result()
        assert models == {"one"}
        assert text.startswith(text_of(writes(base, states[0], prompt, 40, ends=False)))
        assert {one.id for one in asked.models.list()} == {"tiny", "one", *(place.name for place in others)}


@real
def test_bodies_and_names_have_limits(served: SimpleNamespace) -> None:
    def status(body: bytes, **headers: str) -> int:
        asked = urllib.request.Request(f"{served.url}/v1/completions", body, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(asked) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    body = json.dumps({"model": "tiny", "prompt": "w5", "max_tokens": 1}).encode()
    assert status(body) == 200
    assert status(body, Host="evil.example") == 403
    assert status(body + b" " * vllm_server.MOST_BYTES) == 413
    assert status(body) == 200
