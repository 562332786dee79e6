"""Whom a server lets in, and where it is found."""

import ipaddress

from gatewise.errors import GatewiseError
from gatewise.serving.http import resolve_host

HOST, PORT = "127.0.0.1", 8000


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
