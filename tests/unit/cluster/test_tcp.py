"""Connections to rank 0: the job's own processes are accepted, and strangers can neither replace nor delay them."""

import os
import socket
import stat
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace

import pytest

from megagpt.cluster import Rank, env_forwarding, free_port, handshake, secret, tcp
from megagpt.cluster.secret import JobKey
from megagpt.cluster.tcp import Endpoint
from megagpt.errors import MachineError, UserError

SECRET = b"0123456789abcdef" * 4


@pytest.fixture
def endpoint(tmp_path):
    return Endpoint(Rank(0, 0, 3, 3, "127.0.0.1", free_port(), "slurm", "7.0"), free_port(), "prepare", tmp_path, None)


def of(endpoint, number, **other):
    return replace(endpoint, rank=replace(endpoint.rank, rank=number), **other)


@contextmanager
def strangers(endpoint, count=1):
    """Connections to rank 0 that have been greeted."""
    with ExitStack() as stack:
        made = [stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port))) for _ in range(count)]
        yield made


def proof(key, greeting, number, nonce=b"n" * 32):
    """What a caller with this key answers to a greeting."""
    packed = struct.pack(">I", number)
    transcript = greeting[-32:] + nonce + packed
    return nonce + packed + handshake.derive(key, b"caller", transcript)


def greeting(connection):
    received = b""
    while len(received) < len(b"megagpt 1\n") + 32:
        received += connection.recv(100)
    return received


def closed(connection):
    """Whether the other end closes the connection, and has sent nothing more than a refusal."""
    connection.settimeout(60)
    received = b""
    with suppress(ConnectionResetError):
        while block := connection.recv(1000):
            received += block
    return received in (b"", bytes(32))


def met(endpoint, callers):
    """The numbers of the two other processes, once both have come; each has exchanged a message."""
    with ThreadPoolExecutor() as pool:
        others = {number: pool.submit(tcp.connect, of(endpoint, number), 60) for number in (1, 2)}
        came = dict([next(callers), next(callers)])
        for number, channel in came.items():
            theirs = others[number].result()
            channel.send(b"to %d" % number)
            assert theirs.receive() == b"to %d" % number
            theirs.send(b"from %d" % number)
            assert channel.receive() == b"from %d" % number
            channel.close()
            theirs.close()
    return sorted(came)


@pytest.mark.parametrize("given", [None, SECRET])
def test_the_processes_of_a_job_meet(endpoint, given):
    endpoint = replace(endpoint, env_secret=given)
    with tcp.listen(endpoint, 60) as callers:
        assert met(endpoint, callers) == [1, 2]


def test_only_the_jobs_address_is_listened_on(endpoint):
    with tcp.listen(endpoint, 60) as callers:
        assert secret.read_key(endpoint.key_file).address == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", endpoint.port))
        assert met(endpoint, callers) == [1, 2]


def test_a_stranger_who_calls_first_with_whatever_bytes_is_sent_away(endpoint):
    texts = [b"1", b"\x80\x04\x95" * 200, b"\xff" * 10_000, struct.pack(">Q", 1 << 63) + b"x" * 100, b'{"a":' * 10_000]
    with tcp.listen(endpoint, 60) as callers, strangers(endpoint, len(texts)) as made:
        for connection, text in zip(made, texts, strict=True):
            assert greeting(connection).startswith(b"megagpt 1\n")
            connection.sendall(text)
        assert met(endpoint, callers) == [1, 2]
        made[0].shutdown(socket.SHUT_WR)
        assert all(map(closed, made))


def test_slow_strangers_delay_nobody_and_are_sent_away(endpoint, monkeypatch):
    monkeypatch.setattr(tcp, "_PROOF", 3.0)
    with tcp.listen(endpoint, 60) as callers, strangers(endpoint, 200) as made:  # more than are heard at a time
        assert met(endpoint, callers) == [1, 2]
        with suppress(ConnectionResetError, EOFError):
            handshake._exactly(made[0], 1000)  # dropped for the callers after it
        for connection in made[-3:]:  # dropped for their silence
            greeting(connection)
            assert closed(connection)


def test_a_stranger_who_trickles_bytes_is_dropped_at_the_limit(endpoint, monkeypatch):
    monkeypatch.setattr(tcp, "_PROOF", 1.0)
    with tcp.listen(endpoint, 60) as callers, strangers(endpoint) as (slow,):
        greeting(slow)

        def trickle():
            with suppress(ConnectionError):
                for _ in range(60):  # less than a proof has, and far longer than the limit
                    slow.sendall(b"\0")
                    time.sleep(0.2)
                raise AssertionError("it was heard to the end")

        with ThreadPoolExecutor() as pool:
            trickling = pool.submit(trickle)
            assert met(endpoint, callers) == [1, 2]
            trickling.result()


def test_a_recorded_proof_is_worthless(endpoint):
    endpoint = replace(endpoint, env_secret=SECRET)
    with tcp.listen(endpoint, 60) as callers, strangers(endpoint, 2) as (first, second):
        recorded = proof(endpoint.key(SECRET), greeting(first), 1)
        first.sendall(recorded)
        number, channel = next(callers)
        channel.close()
        assert number == 1  # the proof itself is right
        greeting(second)
        second.sendall(recorded)
        assert closed(second)
        assert met(endpoint, callers) == [1, 2]


@pytest.mark.parametrize("number", [0, 3, 2**32 - 1])
def test_numbers_that_are_none_of_the_callers_are_refused(endpoint, number):
    endpoint = replace(endpoint, env_secret=SECRET)
    with tcp.listen(endpoint, 60) as callers, strangers(endpoint) as (one,):
        one.sendall(proof(endpoint.key(SECRET), greeting(one), number))
        assert closed(one)
        assert met(endpoint, callers) == [1, 2]


@pytest.mark.parametrize("other", [{"job": "8.0"}, {"world_size": 4}])
def test_a_proof_for_another_job_is_refused_by_both_ends(endpoint, other):
    endpoint = replace(endpoint, env_secret=SECRET)
    theirs = replace(endpoint, rank=replace(endpoint.rank, **other))
    with tcp.listen(endpoint, 60) as callers:
        for wrong in (theirs, replace(endpoint, env_secret=SECRET[::-1]), replace(endpoint, purpose="doctor")):
            with pytest.raises(MachineError, match="it does not have the secret of this job"):
                tcp.connect(of(wrong, 1), 60)
        assert met(endpoint, callers) == [1, 2]


def test_a_proof_is_not_reflected_to_its_author(endpoint):
    """A listener without the secret returns to a caller what the caller itself has sent."""
    endpoint = replace(endpoint, env_secret=SECRET)
    with socket.create_server(("127.0.0.1", endpoint.port)) as server, ThreadPoolExecutor() as pool:

        def reflect():
            with server.accept()[0] as caller:
                caller.sendall(b"megagpt 1\n" + b"n" * 32)
                received = b""
                while len(received) < 68:
                    received += caller.recv(100)
                caller.sendall(received[-32:])
                return closed(caller)

        reflecting = pool.submit(reflect)
        with pytest.raises(MachineError, match=f"another program listens at 127.0.0.1:{endpoint.port}"):
            tcp.connect(of(endpoint, 1), 60)
        assert reflecting.result()


@pytest.mark.parametrize("says", [b"", b"\xff" * 100], ids=["nothing", "noise"])
def test_another_program_at_the_port_is_named(endpoint, monkeypatch, says):
    monkeypatch.setattr(tcp, "_ANSWER", 1.0)
    endpoint = replace(endpoint, env_secret=SECRET)
    with socket.create_server(("127.0.0.1", endpoint.port)) as server:
        with ThreadPoolExecutor() as pool:

            def speak():
                with server.accept()[0] as caller:
                    caller.sendall(says)
                    assert closed(caller)

            spoken = pool.submit(speak)
            with pytest.raises(MachineError, match=r"it does not have the secret of this job \(7.0\)"):
                tcp.connect(of(endpoint, 1), 60)
            spoken.result()
        with (
            pytest.raises(MachineError, match=f"port {endpoint.port} is in use on this host"),
            tcp.listen(endpoint, 60),
        ):
            pass


def test_a_taken_port_does_not_stop_a_job_with_a_key_file(endpoint):
    with socket.create_server(("127.0.0.1", endpoint.port)), tcp.listen(endpoint, 60) as callers:
        assert secret.read_key(endpoint.key_file).port != endpoint.port
        assert met(endpoint, callers) == [1, 2]


def test_what_a_dead_job_of_this_name_has_left_is_replaced(endpoint):
    secret.publish_key(endpoint.key_file, JobKey(b"k" * 32, "127.0.0.1", free_port()))
    with ThreadPoolExecutor() as pool:
        early = pool.submit(tcp.connect, of(endpoint, 1), 60)
        time.sleep(0.5)
        with tcp.listen(endpoint, 60) as callers:
            number, channel = next(callers)
            channel.close()
            early.result().close()
            assert number == 1
            assert met(endpoint, callers) == [1, 2]


def test_the_key_file_is_of_this_user_alone_and_gone_when_all_have_come(endpoint):
    old = os.umask(0)
    try:
        with tcp.listen(endpoint, 60):
            status = endpoint.key_file.stat()
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.geteuid())
            assert len(secret.read_key(endpoint.key_file).secret) == 32
    finally:
        os.umask(old)
    assert list(endpoint.folder.iterdir()) == []


def test_key_files_that_others_may_have_written_or_read_are_not_trusted(tmp_path, monkeypatch):
    path, key = tmp_path / "key", JobKey(b"k" * 32, "127.0.0.1", 20_000)
    assert secret.read_key(path) == "it does not exist"
    secret.publish_key(path, key)
    assert secret.read_key(path) == key
    for mode in (0o640, 0o604, 0o620, 0o666):
        path.chmod(mode)
        assert secret.read_key(path) == f"its mode is {mode:04o}"
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    assert secret.read_key(tmp_path / "link") == "Too many levels of symbolic links"
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert secret.read_key(tmp_path / "pipe") == "it is not a regular file"
    for text in ("", "[" * 4000, '{"secret": "00", "address": "x", "port": 1}', "x" * 100_000):
        path.write_text(text)
        assert secret.read_key(path) == "it is not a key file"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert secret.read_key(path) == f"it belongs to user {path.stat().st_uid}, this process to user 12345"
    with pytest.raises(UserError, match="a file here cannot be kept from others"):  # as on a disk without modes
        secret.publish_key(path, key)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["key", "link", "pipe"]


def test_the_secret_is_no_variable_that_is_compared_printed_or_written_for_other_hosts():
    assert env_forwarding.forwarded_variables({secret.VARIABLE: SECRET.decode()}) == {}


def test_a_short_secret_is_refused():
    assert secret.from_environment({}) is None
    assert secret.from_environment({secret.VARIABLE: "x" * 32}) == b"x" * 32
    with pytest.raises(UserError, match="has 7 characters, at least 32 are needed"):
        secret.from_environment({secret.VARIABLE: "hunter2"})


@pytest.fixture
def ends():
    pair = socket.socketpair()
    a, b = handshake.Channel(pair[0], b"to b", b"to a"), handshake.Channel(pair[1], b"to a", b"to b")
    with closing(a), closing(b):
        yield a, b, pair


def framed(key, sequence, message):
    return struct.pack(">Q", len(message)) + message + handshake._message_mac(key, sequence, message)


def test_messages_come_whole_and_in_order(ends):
    a, b, _ = ends
    sent = [b"", b"x" * (1 << 21), b"y"]
    thread = threading.Thread(target=lambda: [a.send(one) for one in sent])
    thread.start()
    assert [b.receive() for _ in sent] == sent
    thread.join()
    a.close()
    with pytest.raises(EOFError):
        b.receive()


@pytest.mark.parametrize(
    "forged",
    [
        framed(b"another key", 1, b"hello"),
        framed(b"to b", 0, b"hello"),  # a message that was sent before
        framed(b"to b", 2, b"hello"),  # one is lost
        framed(b"to a", 1, b"hello"),  # the receiver's own, reflected
        framed(b"to b", 1, b"hello").replace(b"hello", b"jello"),
        struct.pack(">Q", handshake.MAX_MESSAGE_BYTES + 1),
        struct.pack(">Q", 2**64 - 1),
    ],
    ids=["key", "repeated", "lost", "reflected", "changed", "long", "longest"],
)
def test_bytes_put_into_the_stream_of_a_channel_are_no_message(ends, forged):
    a, b, (raw, _) = ends
    a.send(b"first")
    assert b.receive() == b"first"
    raw.sendall(forged)
    with pytest.raises(handshake.ForgedMessage):
        b.receive()
