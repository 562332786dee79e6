"""The page of a review over HTTP: whom it answers, and how. A Starlette app, served by uvicorn.

Other pages in the same browser, and other users of the machine, can reach the port as well. So every call needs the token that
stands behind the "#" of the address (browsers never send that part anywhere), the names in ``Host`` and ``Origin`` have to be this
server's (against DNS rebinding), and what changes something has to come as JSON (which a form of another page cannot send). A token
says who asks. TLS, and patience with clients that are slow or many, are tasks of a proxy in front of it.
"""

import ipaddress
import json
import re
import socket
import sys
import traceback
from collections.abc import Iterable
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gatewise.errors import GatewiseError
from gatewise_mdt.review.actions import NothingThereError, Review
from gatewise_mdt.review.session import OldPageError
from gatewise_mdt.review.shown import entries_json
from gatewise_mdt.review.users import OneUser, UserFile

HOST = "127.0.0.1"
TOKEN_HEADER = "X-Gatewise-Token"
MOST_BYTES = 40 * 2**20  # of a request: a document of 30 MB as Base64
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
# Address -> the room and the name of its file. The looks of trees are those of the HTML view.
_PAGES = {
    "/": ("review", "page.html"),
    "/page.js": ("review", "page.js"),
    "/editor.js": ("review", "editor.js"),
    "/calls.js": ("review", "calls.js"),
    "/history.js": ("review", "history.js"),
    "/items.js": ("review", "items.js"),
    "/list.js": ("review", "list.js"),
    "/source.js": ("review", "source.js"),
    "/words.js": ("review", "words.js"),
    "/page.css": ("review", "page.css"),
    "/views.css": ("formats", "page.css"),
    "/marking.js": ("formats", "marking.js"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def names_of(given: Iterable[str], host: str = HOST) -> frozenset[str]:
    """The names under which a server is reached: the loopback ones, the host, and those that were given. Ports do not count."""
    return frozenset({HOST, "localhost", "[::1]", host.lower(), *map(_without_port, given)})


def _without_port(host: str) -> str:
    return re.sub(r":\d+$", "", host.lower())


def refusal(headers: Headers, names: frozenset[str]) -> str:
    """Why a request with these headers is not answered by a server of these names; empty for one that is."""
    if _without_port(headers.get("host", "")) not in names:
        return "this server answers only to the address that the terminal shows, and to the names given with --allow-host"
    if not all(_without_port(origin.partition("://")[2]) in names for origin in headers.getlist("origin")):
        return "a page of another site asked, which is not answered"
    return ""


def app(review: Review, users: OneUser | UserFile, names: frozenset[str]) -> Starlette:
    """The app: the page, "/api/NAME" by GET for what :meth:`Review.show` shows, and by POST for what :meth:`Review.do` does."""

    said = ""

    def who(request: Request) -> str:
        nonlocal said
        try:
            reviewer = users.who(request.headers.get(TOKEN_HEADER, ""))
            said = ""
        except GatewiseError as error:
            if said != (said := str(error)):  # pages ask often
                print(f"error: nobody can be let in: {error}", file=sys.stderr)
            raise HTTPException(503, "the list of reviewers cannot be read at the moment: see the terminal") from error
        if reviewer is None:
            raise HTTPException(
                401,
                "this page has no token of the running review: open the address that the terminal shows, or that you were given",
            )
        return reviewer

    def shown(request: Request) -> Response:
        return _json(review.show(request.path_params["name"], dict(request.query_params), who(request)))

    async def done(request: Request) -> Response:
        reviewer = await run_in_threadpool(who, request)
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "expected a body of type application/json")
        if not 0 <= int(request.headers.get("Content-Length", "-1")) <= MOST_BYTES:
            raise HTTPException(413, f"the file is too large: expected at most {MOST_BYTES * 3 // 4 // 2**20} MB")
        content = await request.body()
        # A change waits for its turn and for the disk, and neither may keep others from being heard.
        return await run_in_threadpool(lambda: _json(review.do(request.path_params["name"], _object(content), reviewer)))

    made = Starlette(
        routes=[
            *(Route(address, _page, methods=["GET"]) for address in _PAGES),
            Route("/api/{name}", shown, methods=["GET"]),
            Route("/api/{name}", done, methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, names=names)],
        exception_handlers={
            HTTPException: _error_answer,
            ClientDisconnect: _error_answer,
            GatewiseError: _error_answer,
            Exception: _fault_answer,
        },
    )
    made.router.redirect_slashes = False
    return made


class _Guard:
    """Lets through what was asked under one of the names of the server."""

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        why = refusal(Headers(scope=scope), self.names)
        answer = _json({"error": why}, 403) if why else self.app
        await answer(scope, receive, send)


def _object(content: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(content)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not valid JSON") from None
    if not isinstance(asked, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return asked


# ---- answers ----


def _page(request: Request) -> Response:
    room, name = _PAGES[request.scope["path"]]
    content = (resources.files(f"gatewise_mdt.{room}") / name).read_bytes()
    return Response(content, headers={**_HEADERS, "Content-Type": f"{_TYPES[name[name.rindex('.') :]]}; charset=utf-8"})


def _json(value: Any, status: int = 200) -> Response:
    content = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return Response(content, status, {**_HEADERS, "Content-Type": "application/json; charset=utf-8"})


def _error_answer(request: Request, error: Exception) -> Response:
    """What the one who asked can put right, a sentence."""
    if isinstance(error, HTTPException):
        said = "there is nothing at this address" if error.status_code in (404, 405) else error.detail
        return _json({"error": said}, error.status_code)
    if isinstance(error, OldPageError):
        return _json({"error": str(error), "since": entries_json(error.since)}, 409)
    return _json({"error": str(error)}, 404 if isinstance(error, NothingThereError) else 400)


def _fault_answer(request: Request, error: Exception) -> Response:
    """A fault of ours, which must not look like one of the user's, nor end the review."""
    traceback.print_exception(error, file=sys.stderr)
    return _json({"error": f"a fault in gatewise ({type(error).__name__}): see the terminal"}, 500)


# ---- serving ----


class ReviewServer:
    """A review at an address of its own. What asks between its making and :meth:`run` waits.

    Args:
        users: who may come in; None makes a token for the one who started it, which stands in ``url``.
        host: a name or an address of this machine; without ``users`` one that other machines cannot reach.
        port: 0 takes a free one.
        allowed: other names under which it is reached, see :func:`names_of`.

    Attributes:
        url: what to open; a token of ``users`` has to be added.
        is_local: whether other machines cannot reach it.

    Raises:
        GatewiseError: the host or the port cannot be had, or would let everybody in.
    """

    def __init__(
        self, review: Review, users: UserFile | None = None, *, host: str = HOST, port: int = 0, allowed: Iterable[str] = ()
    ) -> None:
        self.review = review
        self.users: OneUser | UserFile = users or OneUser()
        try:
            self.socket = socket.create_server((host, port))
        except (OSError, OverflowError, UnicodeError) as error:
            said = getattr(error, "strerror", None) or error
            raise GatewiseError(
                f"port {port} of {host[:100]!r} cannot be had ({said}): leave --port out to take a free one; --host must be an"
                " address of this machine"
            ) from error
        ip = ipaddress.ip_address(self.socket.getsockname()[0])
        self.is_local = ip.is_loopback
        if users is None and not self.is_local:
            self.socket.close()
            raise GatewiseError(
                f"--host {host} lets other machines in: give --users FILE, so that each reviewer has a token (--add-user makes one)"
            )
        self.port: int = self.socket.getsockname()[1]
        shown = HOST if ip.is_unspecified else host
        self.url = f"http://{shown}:{self.port}/" + (f"#token={self.users.token}" if isinstance(self.users, OneUser) else "")
        self._server = uvicorn.Server(
            uvicorn.Config(
                app(review, self.users, names_of(allowed, shown)),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # what the user has to know is printed by _fault_answer
                access_log=False,
                proxy_headers=False,  # nothing is asked of who a proxy says that it asks for
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )

    def run(self) -> None:
        """Serves until :meth:`end`, or until an interrupt, which is raised when the answers under way have been given."""
        self._server.run(sockets=[self.socket])

    def end(self) -> None:
        """Ends :meth:`run`, from another thread."""
        self._server.should_exit = True

    def __enter__(self) -> "ReviewServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
