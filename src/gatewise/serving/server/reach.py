"""Whom a server lets in."""

import ipaddress

from gatewise.errors import GatewiseError
from gatewise.internals.listening import resolved

HOST, PORT = "127.0.0.1", 8000


def check_reach(host: str, port: int, key: str | None) -> frozenset[str] | None:
    """Refuses to let everybody in. Returns the names under which a server without a key answers, None for one that has a key.

    Raises:
        GatewiseError: other machines could reach it, and there is no key.
    """
    _, address = resolved(host, port)
    if key is not None:
        if not key.strip() or not key.isascii() or not key.isprintable():
            raise GatewiseError("the API key is empty, or has more than ASCII characters that can be printed: give another one")
        if key != key.strip():
            raise GatewiseError("the API key has a blank at its beginning or end, which no client can send: take it off")
        return None
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise GatewiseError(f"--host {host} lets other machines in: give a key, in GATEWISE_API_KEY or with --api-key")
    shown = f"[{host}]" if ":" in host else host
    return frozenset({"127.0.0.1", "localhost", "[::1]", shown.lower()})
