"""Who is let in, with a key and without, and how much may be sent: before both engines."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from gatewise.errors import GatewiseError
from gatewise.serving.server import guard
from gatewise.serving.server.reach import check_reach

Guarded = Callable[..., TestClient]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """guarded(VARIABLE=value, ...) -> a client of a guard with that environment, before what tells the length of a body."""

    async def length(scope: Any, receive: Any, send: Any) -> None:
        await Response(str(len(await Request(scope, receive).body())))(scope, receive, send)

    def make(**given: str) -> TestClient:
        for name in (guard.HOSTS, guard.KEYS, guard.VLLM_KEY):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return TestClient(guard.GuardByEnvironment(length), base_url="http://localhost:8000")

    return make


@pytest.mark.parametrize("hosts", [None, "127.0.0.1,localhost,[::1]"])
def test_names_and_sizes(guarded: Guarded, monkeypatch: pytest.MonkeyPatch, hosts: str | None) -> None:
    monkeypatch.setattr(guard, "MOST_BYTES", 2**20)
    asked = guarded(**({} if hosts is None else {"GATEWISE_HOSTS": hosts}))
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


def test_bodies_that_are_held_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_HELD", 10)
    scope = {"type": "http", "method": "POST", "path": "/v1", "headers": []}

    async def all_at_once() -> list[list[Any]]:
        may_go, sent = asyncio.Event(), []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await may_go.wait()
            await send({"type": "http.response.start", "status": 200})

        guarded = guard.Guard(app, None, ())

        def ask(size: int) -> "asyncio.Task[None]":
            told: list[Any] = []
            sent.append(told)
            pieces = [{"type": "http.request", "body": b"x", "more_body": True}] * (size - 1)
            pieces.append({"type": "http.request", "body": b"x"})

            async def receive() -> Any:
                return pieces.pop(0)

            async def send(message: Any) -> None:
                told.append(message.get("status"))

            return asyncio.create_task(guarded(scope, receive, send))

        first = ask(6)
        await asyncio.sleep(0)
        await ask(5)
        may_go.set()
        await first
        await ask(10)
        return sent

    assert [told[0] for told in asyncio.run(all_at_once())] == [200, 503, 200]


def test_the_key_keeps_others_out_everywhere(guarded: Guarded) -> None:
    asked = guarded(GATEWISE_API_KEY="other secret", VLLM_API_KEY="third")
    for method, path in (("POST", "/invocations"), ("GET", "/metrics"), ("GET", "/v1")):
        for key in ("", "secret", "Bearer Secret", "Bearer secret2", "Basic secret", "Bearer other secret", "Bearer third"):
            answer = asked.request(method, path, headers={"Authorization": key} if key else {})
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for key in ("other", "secret"):
            assert asked.request(method, path, headers={"Authorization": f"Bearer {key}"}).is_success
        assert asked.request(method, path, headers={"Authorization": "bearer secret", "Origin": "http://a.example"}).is_success
    assert asked.get("/health").is_success
    assert asked.get("/health/x").status_code == 401
    # What a browser asks first, for a page that will send the key.
    first = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    assert asked.options("/v1/completions", headers=first).is_success
    assert asked.options("/v1/completions").status_code == 401
    assert asked.post("/v1/completions", headers=first).status_code == 401
    assert guarded(VLLM_API_KEY="third").get("/metrics").status_code == 401
    assert guarded(VLLM_API_KEY="").get("/metrics").is_success  # which vLLM takes for none, too


def test_nobody_else_is_let_in_without_a_key() -> None:
    assert check_reach("127.0.0.1", ()) == {"127.0.0.1", "localhost", "[::1]"}
    assert check_reach("0.0.0.0", ["one", "two"]) is None
    with pytest.raises(GatewiseError, match="lets other machines in: give a key"):
        check_reach("0.0.0.0", ())
    for key in ("", " ", "a\nb", "é", " secret", "secret ", "a secret"):  # HTTP takes blanks off, and nobody would be let in
        with pytest.raises(GatewiseError, match="an API key is empty, or has a blank"):
            check_reach("127.0.0.1", ["good", key])


def test_there_are_no_sockets(guarded: Guarded) -> None:
    with pytest.raises(WebSocketDisconnect), guarded().websocket_connect("ws://localhost:8000/v1/realtime"):
        pass


def test_no_page_of_another_site_asks_without_a_key(guarded: Guarded) -> None:
    asked = guarded(GATEWISE_HOSTS="127.0.0.1,localhost,[::1]")
    for origin in ("http://evil.example", "null", "http://localhost:3000", "http://localhost"):
        for method in ("GET", "POST", "OPTIONS"):
            answer = asked.request(method, "/v1/models", headers={"Origin": origin})
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "PermissionDeniedError")
            assert "needs a key, and --engine vllm or a proxy" in answer.json()["error"]["message"]  # a key alone is not enough
    for headers in ({}, {"Origin": "http://localhost:8000"}, {"Origin": "http://127.0.0.1:1", "Host": "127.0.0.1:1"}):
        assert asked.post("/v1/completions", headers=headers).is_success
    both: Any = [("Origin", "http://localhost:8000"), ("Origin", "http://evil.example")]
    assert asked.get("/v1/models", headers=both).status_code == 403
