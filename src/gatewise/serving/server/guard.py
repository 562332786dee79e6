"""Stands before a server: refuses those without its key, pages of other sites, and bodies that are too large. Needs no library.

Other pages in the browser of the same machine can reach the port too. So a server without a key answers under its own names only
(against DNS rebinding), and no page of another site. One with a key answers nobody else, but for ``/health``. Both engines have it:
vLLM's own server has no limit of bodies, asks for its key at some of its addresses only, and answers any page.
"""

import asyncio
import hmac
import json
import os
from collections.abc import Collection
from typing import Any

HOSTS = "GATEWISE_HOSTS"
"""The environment variable with what may stand in ``Host``, commas between; anything where there is none."""
KEY = "VLLM_API_KEY"
"""vLLM's own environment variable: arguments can be seen by others."""
MOST_BYTES = 8 * 2**20
"""Of a request's body."""
SILENCE = 60
"""Seconds without a byte of a body, after which it is given up."""


class Guard:
    """An ASGI app around another one.

    Args:
        hosts: what may stand in ``Host``; None for anything.
        key: what has to stand in ``Authorization: Bearer``; None for nothing.
    """

    def __init__(self, app: Any, hosts: Collection[str] | None, key: str | None) -> None:
        self._app, self._hosts, self._key = app, hosts, key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if scope["type"] == "websocket":
            await (self._app(scope, receive, send) if refusal is None else send({"type": "websocket.close", "code": 1008}))
            return
        if refusal is None:
            try:
                body = await read_body(scope, receive, MOST_BYTES)
            except ValueError:
                refusal = (413, "RequestTooLargeError", f"the body is too large: expected at most {MOST_BYTES // 2**20} MiB")
            except TimeoutError:
                refusal = (408, "RequestTimeoutError", "the request did not come whole: try again")
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        held = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return held.pop() if held else await receive()

        await self._app(scope, again, send)

    def _refusal(self, scope: Any) -> tuple[int, str, str] | None:
        """Status, kind and message for who is not let in."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").lower()
        if self._hosts is not None and _name_of(host) not in self._hosts:
            said = "this server without a key answers only under the address that it was started with"
            return 403, "PermissionDeniedError", said
        origins = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"origin"]
        if self._hosts is not None and any(one.partition("://")[2] != host for one in origins):
            return 403, "PermissionDeniedError", "a page of another site asked: start the server with a key for that"
        # A browser asks first what it may ask, and cannot send a key then. vLLM's CORS answers it.
        asks_first = scope.get("method") == "OPTIONS" and headers.keys() >= {b"origin", b"access-control-request-method"}
        if self._key is None or scope["path"] == "/health" or asks_first:
            return None
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        if hmac.compare_digest(given.strip().encode(), self._key.encode()) and scheme.lower() == "bearer":
            return None
        return 401, "AuthenticationError", "the key is missing or wrong: send it as Authorization: Bearer KEY"


class GuardByEnvironment(Guard):
    """For a server that is told of it by an argument: hosts and key are in the environment."""

    def __init__(self, app: Any) -> None:
        hosts = os.environ.get(HOSTS)
        super().__init__(app, None if hosts is None else hosts.split(","), os.environ.get(KEY) or None)


async def read_body(scope: Any, receive: Any, most: int) -> bytes:
    """The body of an HTTP request, of which no more is held than is allowed, whatever its length is said to be.

    Args:
        most: bytes.

    Raises:
        ValueError: it has more. Up to eight times as much was read then and thrown away: a client that still sends does not hear.
        TimeoutError: nothing came for ``SILENCE`` seconds, or the client went away.
    """
    said = dict(scope["headers"]).get(b"content-length", b"")
    expected, came, pieces, more = int(said) if said.isdigit() else 0, 0, [], True
    while more and max(expected, came) <= 8 * most:
        message = await asyncio.wait_for(receive(), SILENCE)
        if message["type"] == "http.disconnect":
            raise TimeoutError
        pieces.append(message.get("body", b""))
        came += len(pieces[-1])
        more = message.get("more_body", False)
        if came > most:
            pieces.clear()
    if max(expected, came) > most:
        raise ValueError(f"the body has more than {most} bytes")
    return b"".join(pieces)


def _name_of(host: str) -> str:
    """What ``Host`` names, without a port."""
    name, _, port = host.rpartition(":")
    return name if port.isdigit() and name else host


async def _refuse(send: Any, status: int, kind: str, message: str) -> None:
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
