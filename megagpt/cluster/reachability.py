"""Functions to find the address of this host, and to check whether other hosts resolve and answer."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

# No program listens on this port, but a host that refuses the connection has answered.
_UNUSED_PORT = 9
# Seconds to wait for an answer. A host on the same network answers within milliseconds.
_SECONDS = 2.0


def own_address() -> str:
    """Return the address by which other hosts reach this host, or its name if the address cannot be determined.

    If the host's name resolves to the loopback, the address of the default route is used. No packet is sent.
    """
    name = socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            address = socket.gethostbyname(name)
            if not address.startswith("127."):
                return address
            probe.connect(("192.0.2.1", 9))  # This address is reserved for documentation (RFC 5737).
            return str(probe.getsockname()[0])
        except OSError:
            return name


def resolves(name: str) -> bool:
    """Return True if this host can find the address of a host name."""
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError):  # UnicodeError is raised for an empty or overlong label, as in "node..2".
        return False
    return True


def unreachable_addresses(addresses: Sequence[str]) -> list[str]:
    """Return the addresses that do not answer within a few seconds, because the host is down or disconnected."""
    with ThreadPoolExecutor(64) as pool:
        answers = pool.map(_answers, addresses)
        return [address for address, answered in zip(addresses, answers, strict=True) if not answered]


def _answers(address: str) -> bool:
    try:
        socket.create_connection((address, _UNUSED_PORT), _SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
