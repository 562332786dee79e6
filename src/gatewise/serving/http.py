"""A small web server: an address to listen at, uvicorn with limits, bodies with limits. For gatewise and packages on top of it.

uvicorn waits for ever for the head of a request, and for a client that does not read its answer, and holds such connections until
``limit_concurrency`` is reached. A server that strangers can reach needs a proxy in front of it, for TLS too.
"""

import socket
from typing import Any

from gatewise.errors import GatewiseError
from gatewise.serving.server.guard import read_body

__all__ = ["listen", "read_body", "resolve_host", "web_server"]


def resolve_host(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Family and address of ``--host``.

    Raises:
        GatewiseError: it has none.
    """
    try:
        found = socket.getaddrinfo(host or "?", port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise GatewiseError(f"--host is {host[:100]!r}, expected an address or a name of this machine ({said})") from error
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, str(address[0])


def listen(host: str, port: int, hint: str) -> socket.socket:
    """A socket that listens at a host; port 0 takes a free one.

    Args:
        hint: what to do where the port cannot be had.

    Raises:
        GatewiseError: the host has no address, or the port cannot be had.
    """
    family, address = resolve_host(host, port)
    try:
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server((address, port), family=family, backlog=128, dualstack_ipv6=both)
    except OSError as error:
        what = f"port {port} cannot be had" if host == "127.0.0.1" else f"port {port} of {host} cannot be had"
        raise GatewiseError(f"{what} ({error.strerror or error}): {hint}") from error


def web_server(app: Any, connections: int = 256) -> Any:
    """An ``uvicorn.Server`` for an ASGI app, to be run with a socket. It prints nothing: the app prints what the user has to know.

    Args:
        connections: at most; requests of further ones are answered with status 503. Fewer than the files a process may have open.
    """
    import uvicorn  # of the extra "server"

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=connections,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=5,
        )
    )
