"""The command itself on this machine: what it prints, and ranks that come by themselves."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from megagpt.doctor.finding import Finding, Report

from megagpt import doctor
from megagpt.distributed import Rank, free_port, secret
from megagpt.doctor import agent, ranks
from megagpt.errors import MachineError, UserError
from tests import training

ASKED = ("--deepspeed_config", str(training.ROOT / "ds_configs/zero1.json"))


def start(*words, **env):
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from megagpt.cli import main; sys.exit(main())", "doctor", *words],
        env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def report(visit):
    visit.hosts[1].facts["network"]["resolved"] = ["127.0.1.1"]
    visit.hosts[1].facts["limits"]["locked_memory"] = 65536
    return Report.of([*doctor.judge(visit), Finding("last", "unasked", "not asked: " + "long " * 40)])


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("colour", [False, True])
def test_the_table_fits_the_terminal_and_says_everything(report, monkeypatch, width, colour):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR" if colour else "NO_COLOR", "1")
    text = str(report)
    assert ("\x1b[" in text) == colour
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= width
    assert colour or not any(line.endswith(" ") for line in lines)
    words = [word for line in lines for word in line.split()]
    for row in report.findings:
        assert any(line[0] == {"good": "✓", "odd": "!", "bad": "✗", "unasked": "–"}[row.mark] and row.check in line
                   for line in lines if line)  # fmt: skip
        assert set(f"{row.what} {row.do}".split()) <= set(words)
    assert lines[-1] == "2 wrong, 19 good, 1 not asked"


def test_json_is_one_object_and_nothing_else(recipe):
    process = start("--json", "--recipe", str(recipe), *ASKED)
    printed, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert found["ok"] is True
    said = {row["check"]: row["what"] for row in found["findings"] if row["mark"] == "good"}
    assert said["data"] == "2 corpora (not compared: one host)"
    assert said["run directory"] == f"{recipe.with_suffix('')}, can be written to"
    assert said["recipe"].endswith("; they fit 1 rank")
    assert not recipe.with_suffix("").exists()


def test_a_rank_that_does_not_come_is_named():
    hosts = ranks.receive(Rank(0, 0, 2, port=free_port()), 0.5, os.environ)
    for link, _ in hosts[0].workers:
        link.close()
    assert [(host.name, host.ranks) for host in hosts] == [(socket.gethostname(), [0]), ("rank 1", [1])]
    assert hosts[0].lost is None
    lost = hosts[1].lost
    assert (lost.check, lost.mark, lost.hosts, lost.what, lost.do) == (
        "reach", "bad", ("rank 1",), "has not come in 0 s",
        "see what the launcher or that rank's log says: it has not been started, or does not find rank 0",
    )  # fmt: skip


def test_all_ranks_of_a_host_reduce_together():
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [start("--as-rank", "--json", RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in (0, 1)]
    printed, errors = zip(*(rank.communicate(timeout=240) for rank in started), strict=True)
    assert ([rank.returncode for rank in started], printed[1], errors) == ([0, 0], "", ("", ""))
    said = {row["check"]: row["what"] for row in json.loads(printed[0])["findings"]}
    assert re.fullmatch(r"2 ranks: gloo \d+\.\d\d GB/s", said["all-reduce"])


def refusal(kind, function, *arguments):
    with pytest.raises(kind) as caught:
        function(*arguments)
    return str(caught.value)


def test_a_port_in_use_and_one_that_nobody_knows_are_told():
    given = {secret.VARIABLE: "0123456789abcdef" * 4}  # where no key file says which port was taken instead
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal(MachineError, ranks.receive, Rank(0, 0, 2, port=port - 1), 5, given) == (
            f"megagpt: port {port} is in use on this host: by another job, or by what is left of an earlier one\n"
            "  rank 0, launcher: python, the port after MASTER_PORT\n"
            "  do: give this job another port: `deepspeed --master_port`, `torchrun --master_port`, or MASTER_PORT; "
            "`ss -ltnp` shows who listens"
        )
    unknown = Rank(1, 1, 2, address="", launcher="openmpi")
    assert refusal(UserError, ranks.serve, unknown, 5, {}) == (
        "megagpt: 2 ranks were started by openmpi, but none knows where rank 0 listens\n  MASTER_ADDR, MASTER_PORT\n"
        "  do: export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT to all ranks (mpirun -x, -genv)"
    )


def test_strangers_and_ranks_of_other_jobs_are_sent_away():
    rank, hosts = Rank(0, 0, 2, port=free_port(), job="7"), []
    receiving = threading.Thread(target=lambda: hosts.extend(ranks.receive(rank, 120, os.environ)))
    receiving.start()

    def come(job, *words, **env):
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": rank.address, "MASTER_PORT": str(rank.port)}
        return start("--as-rank", *words, RANK="1", LOCAL_RANK="1", MEGAGPT_JOB=job, **place, **env)

    with come("8", **{secret.VARIABLE: "0123456789abcdef" * 4}) as other:
        printed, errors = other.communicate(timeout=180)
    assert (other.returncode, printed) == (1, "")
    assert errors.startswith(
        f"megagpt: another program listens at {rank.address}:{rank.port + 1}: "
        "it does not have the secret of this job (8)"
    )
    with socket.create_connection((rank.address, rank.port + 1)) as stranger:  # who says nothing
        assert b"doctor" not in stranger.recv(100)
        with come("7") as ours:
            receiving.join(60)
            for link, _ in hosts[0].workers:
                link.close()
            assert ours.communicate(timeout=180) == ("", "")
    assert [(host.name, host.ranks, host.lost) for host in hosts] == [(socket.gethostname(), [0, 1], None)]


@pytest.mark.parametrize("given", [True, False])
def test_a_rank_that_does_not_find_rank_0_says_so(given, tmp_path):
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
            r"  do: see whether rank 0 has ended, whether its host's name means the same here, and for a firewall\n"
        )
        if given
        else r"megagpt: rank 1 on \S+ found no key of its job within 1 s: it is not there\n" + where
        + r"  do: see whether rank 0 has started; if hosts do not share this folder, export MEGAGPT_JOB_SECRET=.*\n",
        error,
    )  # fmt: skip


def test_an_agent_takes_the_orders_of_its_list_alone():
    for order in ("_say", "__init__", "__class__", "serve"):
        line = f'{agent.MARK}{{"order": "{order}"}}\n'
        with pytest.raises(ValueError, match="no such order"):
            agent.serve([line], io.StringIO())
