"""Where a server is found, and whom it lets in."""

import ipaddress
import socket

from gatewise.errors import GatewiseError

HOST, PORT = "127.0.0.1", 8000


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


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at a host; port 0 takes a free one.

    Raises:
        GatewiseError: the host has no address, or the port cannot be had.
    """
    family, address = resolve_host(host, port)
    try:
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server((address, port), family=family, backlog=128, dualstack_ipv6=both)
    except OSError as error:
        raise GatewiseError(f"port {port} of {host} cannot be had ({error.strerror or error}): give another --port") from error


def check_reach(host: str, port: int, key: str | None) -> frozenset[str] | None:
    """Refuses to let everybody in. Returns the names under which a server without a key answers, None for one that has a key.

    Raises:
        GatewiseError: other machines could reach it, and there is no key; or no client could send the key.
    """
    _, address = resolve_host(host, port)
    if key is not None:
        if not key.strip() or key != key.strip() or not key.isascii() or not key.isprintable():
            raise GatewiseError("the API key is empty, has a blank at an end, or has other than printable ASCII: give another one")
        return None
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise GatewiseError(f"--host {host} lets other machines in: give a key, in GATEWISE_API_KEY or with --api-key")
    return frozenset({"127.0.0.1", "localhost", "[::1]", _bracketed(host).lower()})


def url_of(host: str, port: int) -> str:
    """The address of a server for a client on this machine."""
    _, address = resolve_host(host, port)
    reached = {"0.0.0.0": HOST, "::": "::1"}.get(address, host)
    return f"http://{_bracketed(reached)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
