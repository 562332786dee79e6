"""Where a server is found, and whom it lets in."""

import socket
from collections.abc import Sequence

from gatewise.errors import GatewiseError, reason_of

HOST, PORT = "127.0.0.1", 8000


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at a host; port 0 takes a free one.

    Raises:
        GatewiseError: the host has no address, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        said = (
            f"port {port} of --host {host} cannot be had ({reason_of(error)}): give another --port, or an address of this machine"
        )
        raise GatewiseError(said) from error


def check_reach(host: str, keys: Sequence[str]) -> frozenset[str] | None:
    """Refuses to let everybody in. Returns what may stand in ``Host``: without a key this machine's names, with one anything.

    Raises:
        GatewiseError: other machines could reach it, and there is no key; or no client could send the key.
    """
    if any(not one.isascii() or not one.isprintable() or one.split() != [one] for one in keys):
        raise GatewiseError("an API key is empty, or has a blank or other than printable ASCII: give another one")
    if keys:
        return None
    if host not in (HOST, "localhost", "::1"):
        raise GatewiseError(f"--host {host} lets other machines in: give a key, in GATEWISE_API_KEY or with --api-key")
    return frozenset({HOST, "localhost", "[::1]"})


def url_of(host: str, port: int) -> str:
    """The address of a server for a client on this machine."""
    reached = {"0.0.0.0": HOST, "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
