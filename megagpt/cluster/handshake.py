"""Mutual proof of a shared secret over a TCP connection, and the authenticated messages that follow it.

    rank 0 -> caller    MAGIC, nonce of rank 0
    caller -> rank 0    nonce of the caller, its number, HMAC("caller", both nonces, number)
    rank 0 -> caller    HMAC("rank 0", both nonces, number)

Fresh nonces make a recorded handshake worthless, and the role in each HMAC keeps a proof from being reflected to its
author. Every later message has a length limit and an HMAC with a sequence number, under a key per direction that
is derived from both nonces, so that an attacker who takes over the TCP stream can neither insert, repeat
nor drop a message.
Messages are authenticated and not encrypted. Nothing that arrives is unpickled or evaluated.
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

MAX_MESSAGE_BYTES = 1 << 30  # memory is allocated only as bytes arrive
_MAGIC = b"megagpt 1\n"
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
_REFUSAL = bytes(_MAC_BYTES)  # sent instead of a proof, so that a process of another job gets a clear answer
_NUMBER = struct.Struct(">I")
_SEQUENCE_AND_LENGTH = struct.Struct(">QQ")
_LENGTH = struct.Struct(">Q")
_BLOCK = 1 << 20  # bytes per recv


class Rejected(Exception):
    """The other end of a connection has not proved that it has the secret."""


class ForgedMessage(ConnectionError):
    """A message that was not sent by the authenticated other end, was changed, or is larger than the limit."""


class Channel:
    """An authenticated connection: whole messages of bytes, in both directions.

    Args:
        connection: The connection, owned by the channel from now on.
        send_key: Key of the HMAC of each message sent.
        receive_key: Key of the HMAC of each message received.
    """

    def __init__(self, connection: socket.socket, send_key: bytes, receive_key: bytes) -> None:
        connection.settimeout(None)
        self._connection = connection
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0

    def send(self, message: bytes) -> None:
        """Send a message. Raises OSError if the other end is gone."""
        self._connection.sendall(_LENGTH.pack(len(message)))
        self._connection.sendall(message)
        self._connection.sendall(_message_mac(self._send_key, self._sent, message))
        self._sent += 1

    def receive(self) -> bytes:
        """Return the next message. Raises EOFError if the other end has closed, ForgedMessage, or OSError."""
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
        """File descriptor of the connection, readable when a message has begun to arrive."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the connection; a receive in another thread ends with EOFError."""
        close(self._connection)


def accept(connection: socket.socket, key: bytes, size: int, end: float) -> tuple[int, Channel]:
    """Let a caller prove that it has the key, then prove the same to it.

    Args:
        connection: A connection that a caller has made.
        key: Key derived from the secret of the job, see `derive`.
        size: Number of processes of the job; callers are 1 to `size - 1`.
        end: Time (`time.monotonic`) by which the caller must be done.

    Returns:
        Number of the caller, and the channel to it.

    Raises:
        Rejected: The caller does not have the key.
        OSError, EOFError: The caller is gone, or is slow.
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
    """Prove to rank 0 that this process has the key, and let rank 0 prove the same.

    Args:
        connection: A connection to the address of rank 0.
        key: Key derived from the secret of the job, see `derive`.
        number: Number of this process in the job.
        end: Time (`time.monotonic`) by which rank 0 must be done.

    Returns:
        The channel to rank 0.

    Raises:
        Rejected: The program that listens does not have the key, is slow, or is not megagpt.
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
    """Return HMAC-SHA256 of a purpose and its context: a proof, or a key for that purpose alone."""
    return hmac.digest(key, _LENGTH.pack(len(purpose)) + purpose + context, "sha256")


def close(connection: socket.socket) -> None:
    """Close a connection, and wake up a thread that waits for data on it."""
    with contextlib.suppress(OSError):  # the other end is already gone
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _message_mac(key: bytes, sequence: int, message: bytes) -> bytes:
    code = hmac.new(key, _SEQUENCE_AND_LENGTH.pack(sequence, len(message)), "sha256")
    code.update(message)
    return code.digest()


def _left(end: float) -> float:
    """Seconds until `end`. Raises TimeoutError if there are none."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("too slow")
    return left


def _exactly(connection: socket.socket, count: int, end: float | None = None) -> bytes:
    """Receive exactly `count` bytes, all of them before `end` if it is given."""
    limit: Callable[[], float | None] = (lambda: None) if end is None else (lambda: _left(end))
    received = bytearray()
    while len(received) < count:
        connection.settimeout(limit())
        block = connection.recv(min(count - len(received), _BLOCK))
        if not block:
            raise EOFError("the other end has closed the connection")
        received += block
    return bytes(received)
