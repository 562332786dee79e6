"""Gives each request an id, which its answer carries, and tells of it in one line when it has ended, if that is wanted.

A line has no text of a prompt or an answer and no key, and what a client chose is written so that it can neither break the line nor
move a terminal's cursor.
"""

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

TOLD = "gatewise"
"""Where in an ASGI scope the ``id`` of its request is, and what the app adds for the line."""

_HEADER = b"x-request-id"
_PLAIN = re.compile(r"[\w./:@+-]{1,200}", re.ASCII)
_QUIET = ("/health", "/metrics")  # which are asked all the time


class RequestLog:
    """An ASGI app around another one.

    Args:
        say: told the line of each request that is no look at ``/health`` or ``/metrics``; None leaves it at ids.
    """

    def __init__(self, app: Any, say: Callable[[str], None] | None) -> None:
        self._app, self._say = app, say

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == _HEADER), "")
        told: dict[str, Any] = {"id": given if _PLAIN.fullmatch(given) else uuid.uuid4().hex}
        scope[TOLD] = told
        began, status = time.monotonic(), 0

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (_HEADER, told["id"].encode())]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if self._say is not None and scope["path"] not in _QUIET:
                self._say(_line(scope, {**told, "seconds": f"{time.monotonic() - began:.3f}", "status": status or "none"}))


def _line(scope: Any, told: Mapping[str, Any]) -> str:
    fields = " ".join(f"{name}={_escaped(value)}" for name, value in told.items())
    return f"request {_escaped(scope['method'])} {_escaped(scope['path'])} {fields}"


def _escaped(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text[:200])
