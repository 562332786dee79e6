"""A place to listen at, for every server of gatewise: without it, one sentence."""

import socket

from gatewise.errors import GatewiseError


def resolved(host: str, port: int) -> tuple[socket.AddressFamily, str]:
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


def listening(family: socket.AddressFamily, address: str, port: int, host: str, hint: str) -> socket.socket:
    """A socket that listens at what :func:`resolved` gave; port 0 takes a free one.

    Args:
        host: as the user gave it.
        hint: what to do where the port cannot be had.

    Raises:
        GatewiseError: it cannot be had.
    """
    try:
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server((address, port), family=family, backlog=128, dualstack_ipv6=both)
    except OSError as error:
        what = f"port {port} cannot be had" if host == "127.0.0.1" else f"port {port} of {host} cannot be had"
        raise GatewiseError(f"{what} ({error.strerror or error}): {hint}") from error
