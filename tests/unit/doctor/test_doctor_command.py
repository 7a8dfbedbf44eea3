"""The command itself on this machine: what it prints, and ranks that connect by themselves."""

import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest

from megagpt.cluster import Rank, free_port, secret
from megagpt.doctor import agent, command
from megagpt.doctor import session as sessions
from megagpt.doctor.report import Finding, Report
from megagpt.doctor.transport import serve_as_rank
from megagpt.errors import MachineError, UserError
from tests import training

CONFIG = ("--deepspeed_config", str(training.ROOT / "ds_configs/zero1.json"))


def start(*arguments, **env):
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from megagpt.cli import main; sys.exit(main())", "doctor", *arguments],
        env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def report(session):
    session.hosts[1].facts["network"]["resolved"] = ["127.0.1.1"]
    session.hosts[1].facts["limits"]["locked_memory"] = 65536
    last = Finding("last", "skipped", "not available: " + "long " * 40)
    return Report.from_findings([*command.check(session).findings, last])


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("colour", [False, True])
def test_the_table_fits_the_terminal_and_has_every_finding(report, monkeypatch, width, colour):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR" if colour else "NO_COLOR", "1")
    text = str(report)
    assert ("\x1b[" in text) == colour
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= width
    assert colour or not any(line.endswith(" ") for line in lines)
    words = [word for line in lines for word in line.split()]
    for row in report.findings:
        symbol = {"ok": "✓", "warning": "!", "error": "✗", "skipped": "–"}[row.status]
        assert any(line[0] == symbol and row.check in line for line in lines if line)
        assert set(f"{row.what} {row.do}".split()) <= set(words)
    assert lines[-1] == "2 failed, 19 passed, 1 skipped"


def test_json_is_one_object_and_nothing_else(recipe):
    process = start("--json", "--recipe", str(recipe), *CONFIG)
    printed, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert found["ok"] is True
    passed = {row["check"]: row["what"] for row in found["findings"] if row["status"] == "ok"}
    assert passed["data"] == "2 corpora: one host only"
    assert passed["run directory"] == f"{recipe.with_suffix('')}, writable"
    assert passed["recipe"].endswith("; valid for 1 rank")
    assert not recipe.with_suffix("").exists()


def test_a_rank_that_does_not_connect_is_named():
    hosts = sessions.hosts_of_ranks(Rank(0, 0, 2, port=free_port()), 0.5, os.environ)
    for agent_of_rank in hosts[0].agents:
        agent_of_rank.connection.close()
    assert [(host.name, host.ranks) for host in hosts] == [(socket.gethostname(), [0]), ("rank 1", [1])]
    assert hosts[0].lost is None
    lost = hosts[1].lost
    assert (lost.check, lost.status, lost.hosts, lost.what, lost.do) == (
        "connection", "error", ("rank 1",), "has not connected within 0 s",
        "see the launcher's output or that rank's log: it has not been started, or cannot reach rank 0",
    )  # fmt: skip


def test_all_ranks_of_a_host_reduce_together():
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [start("--as-rank", "--json", RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in (0, 1)]
    printed, errors = zip(*(rank.communicate(timeout=240) for rank in started), strict=True)
    assert ([rank.returncode for rank in started], printed[1], errors) == ([0, 0], "", ("", ""))
    found = {row["check"]: row["what"] for row in json.loads(printed[0])["findings"]}
    assert re.fullmatch(r"2 ranks: gloo \d+\.\d\d GB/s", found["all-reduce"])


def refusal(kind, function, *arguments):
    with pytest.raises(kind) as caught:
        function(*arguments)
    return str(caught.value)


def test_a_port_in_use_and_a_missing_address_are_reported():
    given = {secret.VARIABLE: "0123456789abcdef" * 4}  # without a key file, rank 0 cannot publish another port
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal(MachineError, sessions.hosts_of_ranks, Rank(0, 0, 2, port=port - 1), 5, given) == (
            f"megagpt: port {port} is in use on this host, by another job or by processes left from an earlier one\n"
            "  rank 0, launcher: python, the port after MASTER_PORT\n"
            "  do: give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT; "
            "`ss -ltnp` shows which program listens"
        )
    unknown = Rank(1, 1, 2, address="", launcher="openmpi")
    assert refusal(UserError, serve_as_rank, unknown, 5, {}) == (
        "megagpt: openmpi started 2 ranks, but the address of rank 0 is not known\n  MASTER_ADDR, MASTER_PORT\n"
        "  do: export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT to all ranks (mpirun -x, -genv)"
    )


def test_strangers_and_ranks_of_other_jobs_are_rejected():
    rank, hosts = Rank(0, 0, 2, port=free_port(), job="7"), []
    receiving = threading.Thread(target=lambda: hosts.extend(sessions.hosts_of_ranks(rank, 120, os.environ)))
    receiving.start()

    def start_rank(job, *arguments, **env):
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": rank.address, "MASTER_PORT": str(rank.port)}
        return start("--as-rank", *arguments, RANK="1", LOCAL_RANK="1", MEGAGPT_JOB=job, **place, **env)

    with start_rank("8", **{secret.VARIABLE: "0123456789abcdef" * 4}) as other:
        printed, errors = other.communicate(timeout=180)
    assert (other.returncode, printed) == (1, "")
    assert errors.startswith(
        f"megagpt: another program listens at {rank.address}:{rank.port + 1}: "
        "it does not have the secret of this job (8)"
    )
    with socket.create_connection((rank.address, rank.port + 1)) as stranger:  # that sends nothing
        assert b"doctor" not in stranger.recv(100)
        with start_rank("7") as ours:
            receiving.join(60)
            for agent_of_rank in hosts[0].agents:
                agent_of_rank.connection.close()
            assert ours.communicate(timeout=180) == ("", "")
    assert [(host.name, host.ranks, host.lost) for host in hosts] == [(socket.gethostname(), [0, 1], None)]


@pytest.mark.parametrize("given", [True, False])
def test_a_rank_that_cannot_reach_rank_0_fails(given, tmp_path):
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {secret.VARIABLE: "0123456789abcdef" * 4} if given else {"XDG_STATE_HOME": str(tmp_path)}
    rank = start("--as-rank", "--limit", "1", RANK="1", LOCAL_RANK="1", **place)
    printed, error = rank.communicate(timeout=180)
    assert (rank.returncode, printed) == (1, "")
    where = rf"  {tmp_path}/megagpt/doctor\.\.\d+\.key\n"
    assert re.fullmatch(
        (
            r"megagpt: rank 1 on \S+ could not reach rank 0 at 127\.0\.0\.1:\d+\n"
            r"  \[Errno 111\] Connection refused, for 1 s\n"
            r"  do: check whether rank 0 has ended, whether its host's name resolves to the same "
            r"address here, and for a firewall\n"
        )
        if given
        else r"megagpt: rank 1 on \S+ found no key file of its job within 1 s: it does not exist\n" + where
        + r"  do: check whether rank 0 has started; if hosts do not share this folder, export MEGAGPT_JOB_SECRET=.*\n",
        error,
    )  # fmt: skip


def test_an_agent_handles_only_the_requests_of_its_list():
    for name in ("_say", "__init__", "__class__", "serve"):
        line = f'{agent.PREFIX}{{"request": "{name}"}}\n'
        with pytest.raises(ValueError, match="unknown request"):
            agent.serve([line], print)
