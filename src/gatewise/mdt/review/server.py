"""The review as a page on this machine: a server bound to 127.0.0.1 that answers nobody but the page it opened.

Other pages in the same browser, and other users of the machine, can reach the port as well. So every call needs the token that
stands behind the "#" of the address (browsers never send that part anywhere), the names in ``Host`` and ``Origin`` have to be this
server's (against DNS rebinding), and what changes something has to come as JSON (which a form of another page cannot send).
"""

import json
import secrets
import sys
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gatewise.errors import GatewiseError
from gatewise.mdt.review.actions import NothingThereError, Review, refused
from gatewise.mdt.review.extracting import Extracting
from gatewise.mdt.review.session import OldPageError, Session

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
    "/conflict.js": ("review", "conflict.js"),
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


class _RefusedError(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ReviewServer(ThreadingHTTPServer):
    """Serves a session.

    Args:
        port: 0 takes a free one.
        extracting: None where there is no model; ``reason`` then says why.

    Attributes:
        url: what to open, with the token.

    Raises:
        GatewiseError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # there it would share the port with another program

    def __init__(self, session: Session, extracting: Extracting | None = None, *, port: int = 0, reason: str = "") -> None:
        self.session, self.review = session, Review(session, extracting, reason)
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except OverflowError:
            raise GatewiseError(f"the port is {port}, expected a number from 0 to 65535") from None
        except OSError as error:
            raise GatewiseError(
                f"port {port} cannot be had ({error.strerror or error}): leave --port out for a free one"
            ) from error
        self.names = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/#token={self.token}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a connection early is nothing to report."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gatewise", ""
    timeout = 60  # seconds that a connection may be silent

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is for what the user has to know."""

    # ---- requests ----

    def _get(self) -> tuple[str, bytes]:
        address = urlsplit(self.path)
        if address.path in _PAGES:
            return _file(*_PAGES[address.path])
        if not address.path.startswith("/api/"):
            raise _RefusedError(404, "there is nothing at this address")
        self._check_token()
        asked = {name: values[-1] for name, values in parse_qs(address.query).items()}
        return _json(self.server.review.shown(address.path.removeprefix("/api/"), asked))

    def _post(self) -> tuple[str, bytes]:
        self._check_token()
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(415, "expected a body of type application/json")
        try:
            asked = json.loads(self._body())
        except (ValueError, RecursionError):
            raise _RefusedError(400, "the body is not valid JSON") from None
        if not isinstance(asked, dict):
            raise _RefusedError(400, "the body is not a JSON object")
        return _json(self.server.review.done(urlsplit(self.path).path.removeprefix("/api/"), asked))

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise _RefusedError(411, "expected a body with its Content-Length")
        if int(length) > MOST_BYTES:
            raise _RefusedError(413, f"the file is too large: expected at most {MOST_BYTES * 3 // 4 // 2**20} MB")
        self._unread = False
        return self.rfile.read(int(length))

    def _drain(self) -> None:
        """Reads what came with a request that is refused, if it is little: unread, it could cut the answer off."""
        length = self.headers.get("Content-Length", "")
        if self._unread and length.isascii() and length.isdigit() and len(length) < 7:
            self.rfile.read(int(length))
        elif self._unread:
            self.close_connection = True

    def _check_caller(self) -> None:
        if self.headers.get("Host", "") not in self.server.names:
            raise _RefusedError(403, "this server answers only to the address that the terminal shows")
        origin = self.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in self.server.names:
            raise _RefusedError(403, "a page of another site asked, which is not answered")

    def _check_token(self) -> None:
        given = self.headers.get(TOKEN_HEADER, "")
        if not secrets.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode()):
            raise _RefusedError(401, "this page has no token of the running review: open the address that the terminal shows")

    # ---- answers ----

    def _answer(self, make: Callable[[], tuple[str, bytes]]) -> None:
        status, self._unread = 200, True
        try:
            self._check_caller()
            kind, content = make()
        except _RefusedError as error:
            status, kind, content = error.status, *_json({"error": str(error)})
        except NothingThereError as error:
            status, kind, content = 404, *_json({"error": str(error)})
        except OldPageError as error:
            status, kind, content = 409, *_json({"error": str(error), **refused(error)})
        except GatewiseError as error:
            status, kind, content = 400, *_json({"error": str(error)})
        except (ConnectionError, TimeoutError):
            raise  # the browser is gone
        except Exception as error:  # a fault of ours must not look like one of the user's, nor end the review
            traceback.print_exc(file=sys.stderr)
            status, kind, content = 500, *_json({"error": f"a fault in gatewise ({type(error).__name__}): see the terminal"})
        if self.command == "POST":
            self._drain()
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def _file(room: str, name: str) -> tuple[str, bytes]:
    content = (resources.files(f"gatewise.mdt.{room}") / name).read_bytes()
    return f"{_TYPES[name[name.rindex('.') :]]}; charset=utf-8", content


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json; charset=utf-8", json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
