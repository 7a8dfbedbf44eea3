"""By which address other hosts reach this one, and whether they answer."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

_NOBODY = 9  # a port that nobody listens on: to refuse is an answer too
_SECONDS = 2.0  # for an answer, which a host of the same network gives within milliseconds


def own_address() -> str:
    """The address of this host by which others reach it: that of the way out, which sends nothing to find."""
    name = socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            address = socket.gethostbyname(name)
            if not address.startswith("127."):
                return address
            probe.connect(("192.0.2.1", 9))  # an address of documentation (RFC 5737): nobody is there
            return str(probe.getsockname()[0])
        except OSError:
            return name


def silent(addresses: Sequence[str]) -> list[str]:
    """Those addresses of which no answer comes, within seconds: a cut cable, or a host that is down."""
    with ThreadPoolExecutor(64) as pool:
        return [address for address, told in zip(addresses, pool.map(_answers, addresses), strict=True) if not told]


def _answers(address: str) -> bool:
    try:
        socket.create_connection((address, _NOBODY), _SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
