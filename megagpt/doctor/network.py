"""This host's interfaces and addresses, and by which of them the ranks of other hosts would reach it. No torch."""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Any

_GET_ADDRESS = 0x8915  # SIOCGIFADDR, linux/sockios.h


def interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that has one, by its name, in the system's order."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:  # no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def facts() -> dict[str, Any]:
    """The interfaces, and what this host's own name resolves to: gloo and NCCL begin with these."""
    try:
        resolved = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        resolved = []
    return {"interfaces": interfaces(), "resolved": resolved}


def outside(found: dict[str, str]) -> tuple[str, str]:
    """The first interface but the loopback, and its address, as `hostname -I` has it; empty if there is none."""
    others = ((name, address) for name, address in found.items() if not address.startswith("127."))
    return next(others, ("", ""))
