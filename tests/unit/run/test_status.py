"""How a run stands is read from its files, whatever exit code a launcher lost."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from megagpt.cli import main
from megagpt.distributed import Rank
from megagpt.errors import UserError
from megagpt.run import status

HERE = socket.gethostname()


def beat(run, seconds_ago):
    path = run / "logs/rank-0.heartbeat"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"update": 7, "phase": "save", "lasted": 1.0, "at": 0.0}))
    os.utime(path, (time.time() - seconds_ago,) * 2)


def started(run, host=HERE, pid=None):
    (run / "status.json").write_text(json.dumps({"state": "running", "host": host, "pid": pid or os.getpid()}))


def nobody():
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


@pytest.mark.parametrize(
    ("code", "state", "answer"), [(0, "done", 1), (75, "requeue", 75), (1, "failed", 1), (2, "failed", 2)]
)
def test_what_rank_0_said_last_holds_but_done_needs_its_file(tmp_path, code, state, answer):
    note = status.Note(tmp_path, Rank())
    assert status.read(tmp_path).state == "running"
    note.end(code, "a reason")
    assert (status.read(tmp_path).state, status.read(tmp_path).code) == (state if code else "failed", answer)
    (tmp_path / "DONE").touch()
    assert (status.read(tmp_path).state, status.read(tmp_path).code) == ("done", 0)


def test_other_ranks_say_nothing(tmp_path):
    status.Note(tmp_path, Rank(1, 1, 2)).end(1)
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_tells_life_from_death_on_another_host(tmp_path):
    started(tmp_path, host="elsewhere")
    assert status.read(tmp_path).why.startswith("starting on elsewhere, seen ")
    beat(tmp_path, 20)
    assert re.fullmatch("running: save of update 7 on elsewhere, seen 2[0-9] s ago", str(status.read(tmp_path)))
    beat(tmp_path, 70)
    assert status.read(tmp_path).code == 1
    assert "elsewhere) ended without a word" in status.read(tmp_path).why


def test_a_process_of_this_host_that_is_gone_did_fail_however_fresh_its_heartbeat(tmp_path):
    beat(tmp_path, 0)
    started(tmp_path)
    assert status.read(tmp_path).code == 3
    started(tmp_path, pid=nobody())
    assert status.read(tmp_path).code == 1
    (tmp_path / "DONE").touch()
    assert status.read(tmp_path).code == 0


def test_a_start_that_never_came_is_a_failure_and_half_a_file_too(tmp_path):
    assert status.read(tmp_path).code == 1
    (tmp_path / "status.json").write_text('{"state": "requ')
    assert status.read(tmp_path).code == 1
    with pytest.raises(UserError, match="there is no run directory"):
        status.read(tmp_path / "none")


def test_a_disk_that_takes_nothing_does_not_stop_the_run(tmp_path):
    status.Note(tmp_path / "not/there", Rank()).end(0)


def test_the_command_exits_with_the_matching_code(tmp_path, capsys):
    status.Note(tmp_path, Rank()).end(75)
    assert main(["status", str(tmp_path)]) == 75
    assert capsys.readouterr().out == "requeue: stopped and saved; the same command goes on\n"
    assert main(["status", str(tmp_path), "--json"]) == 75
    assert json.loads(capsys.readouterr().out)["state"] == "requeue"
