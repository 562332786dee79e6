"""Stands before a server: refuses those without a key, pages of other sites, and bodies that are too large. Needs no library.

Other pages in the browser of the same machine can reach the port too. So a server without a key answers under its own names only
(against DNS rebinding), and no page of another site. One with a key answers nobody else, but for ``/health``. Both engines have it:
vLLM's own server has no limit of bodies, asks for its key at some of its addresses only, and answers any page.
"""

import hmac
import json
import os
from collections.abc import Collection
from typing import Any

HOSTS = "GATEWISE_HOSTS"
"""The environment variable with what may stand in ``Host``, commas between; anything where there is none."""
KEYS = "GATEWISE_API_KEY"
"""The environment variable with the keys, blanks between: arguments can be seen by others."""
VLLM_KEY = "VLLM_API_KEY"
"""vLLM's own, of which it knows one alone, for some of its addresses; here it counts where there is no other."""
MOST_BYTES = 8 * 2**20
"""Of a request's body."""
MOST_HELD = 32 * MOST_BYTES
"""Of the bodies of all requests that are being answered."""


class Guard:
    """An ASGI app around another one.

    Args:
        hosts: what may stand in ``Host``; None for anything.
        keys: one of which has to stand in ``Authorization: Bearer``; none for nothing.
    """

    def __init__(self, app: Any, hosts: Collection[str] | None, keys: Collection[str]) -> None:
        self._app, self._hosts, self._keys = app, hosts, [one.encode() for one in keys]
        self._held = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        body, size, more = bytearray(), 0, True
        try:
            while more:  # to its end, also if it is too large: a client that still sends does not hear
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                piece, more = message.get("body", b""), message.get("more_body", False)
                size += len(piece)
                if size <= MOST_BYTES and self._held + len(piece) <= MOST_HELD:
                    body += piece
                    self._held += len(piece)
            if size > MOST_BYTES:
                said = f"the body is too large: expected at most {MOST_BYTES // 2**20} MiB"
                await _refuse(send, 413, "RequestTooLargeError", said)
            elif len(body) < size:
                said = "the server holds as many bodies as it can: ask again in a moment"
                await _refuse(send, 503, "ServiceUnavailableError", said)
            else:
                held = [{"type": "http.request", "body": bytes(body), "more_body": False}]

                async def again() -> Any:
                    return held.pop() if held else await receive()

                await self._app(scope, again, send)
        finally:
            self._held -= len(body)

    def _refusal(self, scope: Any) -> tuple[int, str, str] | None:
        """Status, kind and message for who is not let in."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").lower()
        name, _, port = host.rpartition(":")
        if self._hosts is not None and (name if name and port.isdigit() else host) not in self._hosts:
            said = "this server without a key answers only under the address that it was started with"
            return 403, "PermissionDeniedError", said
        origins = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"origin"]
        if self._hosts is not None and any(one.partition("://")[2] != host for one in origins):
            said = "a page of another site asked: that needs a key, and --engine vllm or a proxy that adds the headers of CORS"
            return 403, "PermissionDeniedError", said
        # A browser asks first what it may ask, and cannot send a key then. vLLM's CORS answers it.
        asks_first = scope.get("method") == "OPTIONS" and headers.keys() >= {b"origin", b"access-control-request-method"}
        if not self._keys or scope["path"] == "/health" or asks_first:
            return None
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode(), one) for one in self._keys]  # as long for a wrong one as for any
        if any(matches) and scheme.lower() == "bearer":
            return None
        return 401, "AuthenticationError", "the key is missing or wrong: send it as Authorization: Bearer KEY"


class GuardByEnvironment(Guard):
    """Reads hosts and keys from the environment: vLLM's --middleware takes the name of a class, and no arguments."""

    def __init__(self, app: Any) -> None:
        hosts = os.environ.get(HOSTS)
        keys = os.environ.get(KEYS, "").split() or [key for key in [os.environ.get(VLLM_KEY)] if key]
        super().__init__(app, None if hosts is None else hosts.split(","), keys)


async def _refuse(send: Any, status: int, kind: str, message: str) -> None:
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += {401: [(b"www-authenticate", b"Bearer")], 503: [(b"retry-after", b"2")]}.get(status, [])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
