"""Addresses of hosts: how others reach this one, and whether they resolve and answer."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

_UNUSED_PORT = 9  # nobody listens there, but a refused connection is an answer too
_SECONDS = 2.0  # time to wait for an answer, which a host on the same network sends within milliseconds


def own_address() -> str:
    """Return the address by which other hosts reach this one: that of the default route, found without sending."""
    name = socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            address = socket.gethostbyname(name)
            if not address.startswith("127."):
                return address
            probe.connect(("192.0.2.1", 9))  # an address reserved for documentation (RFC 5737)
            return str(probe.getsockname()[0])
        except OSError:
            return name


def resolves(name: str) -> bool:
    """Return True if this host can find the address of a host name."""
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError):  # UnicodeError: an empty or overlong label, such as in "node..2"
        return False
    return True


def unreachable_addresses(addresses: Sequence[str]) -> list[str]:
    """Return the addresses that do not answer within seconds: the cable is cut, or the host is down."""
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
