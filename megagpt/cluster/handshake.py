"""Mutual proof of a shared secret over a TCP connection, and authenticated messages after it.

    rank 0 -> caller    MAGIC, nonce of rank 0
    caller -> rank 0    nonce of the caller, number of the caller, HMAC("caller", both nonces, number)
    rank 0 -> caller    HMAC("rank 0", both nonces, number)

Fresh nonces prevent the replay of a recorded handshake. The role in each HMAC prevents a proof from being reflected to
the process that sent it. Every later message has a length limit and an HMAC that includes a sequence number. Its key
is different for each direction and is derived from both nonces, so an attacker who takes over the TCP stream can
neither insert, repeat nor drop a message.
Messages are authenticated but not encrypted. Received data is never unpickled or evaluated.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable

# Messages may be this large because memory is allocated only as their bytes arrive.
MAX_MESSAGE_BYTES = 1 << 30
_MAGIC = b"megagpt 1\n"
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
# Rank 0 sends this instead of a proof, so that a process of another job gets a clear answer.
_REFUSAL = bytes(_MAC_BYTES)
_NUMBER = struct.Struct(">I")
_SEQUENCE_AND_LENGTH = struct.Struct(">QQ")
_LENGTH = struct.Struct(">Q")
_BLOCK = 1 << 20  # maximum number of bytes per call of recv


class Rejected(Exception):
    """Raised if the other end of a connection has not proved that it knows the secret."""


class ForgedMessage(ConnectionError):
    """Raised for a message that is forged, modified or larger than the limit."""


class Channel:
    """Authenticated connection that sends and receives whole messages of bytes.

    Args:
        connection: The connection, which the channel now owns and closes.
        send_key: HMAC key for messages that are sent.
        receive_key: HMAC key for messages that are received.
    """

    def __init__(self, connection: socket.socket, send_key: bytes, receive_key: bytes) -> None:
        connection.settimeout(None)
        self._connection = connection
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0

    def send(self, message: bytes) -> None:
        """Send a message. Raises OSError if the other end has closed the connection."""
        self._connection.sendall(_LENGTH.pack(len(message)))
        self._connection.sendall(message)
        self._connection.sendall(_message_mac(self._send_key, self._sent, message))
        self._sent += 1

    def receive(self) -> bytes:
        """Wait for the next message and return it.

        Raises:
            ForgedMessage: The message is not authentic or is too large.
            EOFError: The other end has closed the connection.
            OSError: The connection has failed.
        """
        (length,) = _LENGTH.unpack(_exactly(self._connection, _LENGTH.size))
        if length > MAX_MESSAGE_BYTES:
            raise ForgedMessage(f"a message of {length:,} bytes, more than the limit of {MAX_MESSAGE_BYTES:,}")
        message = _exactly(self._connection, length)
        mac = _exactly(self._connection, _MAC_BYTES)
        if not hmac.compare_digest(mac, _message_mac(self._receive_key, self._received, message)):
            raise ForgedMessage("a message does not have the HMAC of its sender")
        self._received += 1
        return message

    def fileno(self) -> int:
        """Return the file descriptor of the connection, which becomes readable when a message begins to arrive."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the connection. A call of `receive` that waits in another thread raises EOFError."""
        close(self._connection)


def accept(connection: socket.socket, key: bytes, size: int, end: float) -> tuple[int, Channel]:
    """Verify on rank 0 that a caller knows the key, then prove to the caller that rank 0 knows it, too.

    Args:
        connection: A connection that a caller has opened.
        key: Key derived from the secret of the job (see `derive`).
        size: Number of processes of the job. Callers have the numbers 1 to `size - 1`.
        end: Time (`time.monotonic`) by which the caller must have proved that it knows the key.

    Returns:
        Number of the caller, and the channel to the caller.

    Raises:
        Rejected: The caller does not know the key.
        OSError, EOFError: The caller has closed the connection, or is too slow.
    """
    ours = secrets.token_bytes(_NONCE_BYTES)
    connection.settimeout(_left(end))
    connection.sendall(_MAGIC + ours)
    theirs = _exactly(connection, _NONCE_BYTES, end)
    packed = _exactly(connection, _NUMBER.size, end)
    mac = _exactly(connection, _MAC_BYTES, end)
    transcript = ours + theirs + packed
    (number,) = _NUMBER.unpack(packed)
    connection.settimeout(_left(end))
    if not hmac.compare_digest(mac, derive(key, b"caller", transcript)) or not 0 < number < size:
        connection.sendall(_REFUSAL)
        raise Rejected("wrong proof")
    connection.sendall(derive(key, b"rank 0", transcript))
    to_caller, to_rank_0 = derive(key, b"to caller", transcript), derive(key, b"to rank 0", transcript)
    return number, Channel(connection, to_caller, to_rank_0)


def prove(connection: socket.socket, key: bytes, number: int, end: float) -> Channel:
    """Prove to rank 0 that this process knows the key, and verify that rank 0 knows it, too.

    Args:
        connection: A connection to the address of rank 0.
        key: Key derived from the secret of the job (see `derive`).
        number: Number of this process in the job.
        end: Time (`time.monotonic`) by which rank 0 must have proved that it knows the key.

    Returns:
        The channel to rank 0.

    Raises:
        Rejected: The listening program does not know the key, is too slow, or is not megagpt.
        OSError, EOFError: The connection has been closed.
    """
    try:
        if _exactly(connection, len(_MAGIC), end) != _MAGIC:
            raise Rejected("not megagpt")
        theirs = _exactly(connection, _NONCE_BYTES, end)
        ours, packed = secrets.token_bytes(_NONCE_BYTES), _NUMBER.pack(number)
        transcript = theirs + ours + packed
        connection.settimeout(_left(end))
        connection.sendall(ours + packed + derive(key, b"caller", transcript))
        mac = _exactly(connection, _MAC_BYTES, end)
    except TimeoutError:
        raise Rejected("no answer") from None
    if not hmac.compare_digest(mac, derive(key, b"rank 0", transcript)):
        raise Rejected("wrong proof")
    to_caller, to_rank_0 = derive(key, b"to caller", transcript), derive(key, b"to rank 0", transcript)
    return Channel(connection, to_rank_0, to_caller)


def derive(key: bytes, purpose: bytes, context: bytes) -> bytes:
    """Return the HMAC-SHA256 of a purpose and a context, which serves as a proof or as a key for that purpose only."""
    return hmac.digest(key, _LENGTH.pack(len(purpose)) + purpose + context, "sha256")


def close(connection: socket.socket) -> None:
    """Close a connection, and wake up a thread that waits for data on it."""
    with contextlib.suppress(OSError):  # The other end may have closed the connection already.
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _message_mac(key: bytes, sequence: int, message: bytes) -> bytes:
    code = hmac.new(key, _SEQUENCE_AND_LENGTH.pack(sequence, len(message)), "sha256")
    code.update(message)
    return code.digest()


def _left(end: float) -> float:
    """Return the number of seconds until `end`. Raises TimeoutError if `end` has passed."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("too slow")
    return left


def _exactly(connection: socket.socket, count: int, end: float | None = None) -> bytes:
    """Receive exactly `count` bytes. Raises TimeoutError if they do not arrive before `end`, if it is given."""
    limit: Callable[[], float | None] = (lambda: None) if end is None else (lambda: _left(end))
    received = bytearray()
    while len(received) < count:
        connection.settimeout(limit())
        block = connection.recv(min(count - len(received), _BLOCK))
        if not block:
            raise EOFError("the other end has closed the connection")
        received += block
    return bytes(received)
