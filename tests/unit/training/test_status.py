"""How a run stands is read from its files, whatever exit code a launcher lost."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from megagpt import files
from megagpt.cli import main
from megagpt.cluster import Rank
from megagpt.errors import UserError
from megagpt.training import status

HERE = socket.gethostname()


def beat(run, seconds_ago):
    path = run / "logs/rank-0.heartbeat"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"update": 7, "phase": "save", "lasted": 1.0, "at": 0.0}))
    os.utime(path, (time.time() - seconds_ago,) * 2)


def started(run, host=HERE, pid=None, state="running", seconds_ago=100):
    (run / "status.json").write_text(json.dumps({"state": state, "host": host, "pid": pid or os.getpid()}))
    os.utime(run / "status.json", (time.time() - seconds_ago,) * 2)


def nobody():
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


@pytest.mark.parametrize(
    ("code", "state", "answer"), [(0, "done", 1), (75, "requeue", 75), (1, "failed", 1), (2, "failed", 2)]
)
def test_what_rank_0_said_last_holds_but_done_needs_its_file(tmp_path, code, state, answer):
    record = status.StatusFile(tmp_path, Rank())
    record.start()
    assert status.read(tmp_path).state == "running"
    record.end(code, "a reason")
    assert (status.read(tmp_path).state, status.read(tmp_path).code) == (state if code else "failed", answer)
    (tmp_path / "DONE").touch()
    assert (status.read(tmp_path).state, status.read(tmp_path).code) == ("done", 0)


def test_other_ranks_say_nothing(tmp_path):
    other = status.StatusFile(tmp_path, Rank(1, 1, 2))
    other.start()
    other.end(1)
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_tells_life_from_death_on_another_host(tmp_path):
    started(tmp_path, host="elsewhere")
    assert status.read(tmp_path).why.startswith("starting on elsewhere, seen ")
    beat(tmp_path, 20)
    assert re.fullmatch("running: save of update 7 on elsewhere, seen 2[0-9] s ago", str(status.read(tmp_path)))
    beat(tmp_path, 70)
    assert status.read(tmp_path).code == 1
    assert "elsewhere) ended without recording why" in status.read(tmp_path).why
    started(tmp_path, host="elsewhere", seconds_ago=10)  # again, and it has not come to its first heartbeat
    assert str(status.read(tmp_path)) == "running: starting on elsewhere, seen 10 s ago"


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
    record = status.StatusFile(tmp_path / "not/there", Rank())
    record.start()
    record.end(0)


def test_the_command_exits_with_the_matching_code(tmp_path, capsys):
    status.StatusFile(tmp_path, Rank()).end(75, "SIGINT")
    assert main(["status", str(tmp_path)]) == 75
    stopped = "stopped: checkpoint saved after SIGINT; run the same command to resume\n"
    assert capsys.readouterr().out == stopped
    assert main(["status", str(tmp_path), "--json"]) == 75
    assert json.loads(capsys.readouterr().out)["state"] == "requeue"


def test_a_job_script_says_that_ranks_will_come(tmp_path):
    subprocess.run([sys.executable, "-m", "megagpt", "mark-starting", tmp_path, str(os.getpid())], check=True)
    assert str(status.read(tmp_path)).startswith(f"running: starting on {HERE}, seen ")
    gone = nobody()
    started(tmp_path, pid=gone, state="starting")
    assert status.read(tmp_path).why == f"the launcher (process {gone} on {HERE}) ended without recording why"


def test_a_request_to_stop_goes_to_a_run_that_is_running_or_that_a_job_script_starts(tmp_path, capsys):
    for state in ("starting", "running"):
        started(tmp_path, state=state)
        assert main(["stop", str(tmp_path)]) == 0
        assert capsys.readouterr().out == (
            f"Stop requested: {tmp_path} will save a checkpoint and exit with 75. Run the same command to resume.\n"
        )
        status.StatusFile(tmp_path, Rank()).start()
        assert (tmp_path / "STOP").exists() == (state == "starting")  # else it was made to the start before this one


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [
        ({"state": "done"}, 0, "done: the last checkpoint was saved and verified"),
        ({"state": "requeue"}, 75, "stopped: checkpoint saved; run the same command to resume"),
        ({"state": "failed", "code": 2, "why": "no such data"}, 2, "failed: no such data"),
        ({"state": "running", "pid": 0, "host": "elsewhere"}, 1,
         "failed: rank 0 (process 0 on elsewhere) ended without recording why"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_run_that_is_not_running_is_told_as_such_and_its_next_start_is_not_stopped(
    tmp_path, capsys, monkeypatch, ended, code, said, meanwhile
):
    """Also where it ends just as the request is made."""
    beat(tmp_path, 1000)

    def end():
        (tmp_path / "status.json").write_text(json.dumps(ended))
        os.utime(tmp_path / "status.json", (1, 1))
        if ended["state"] == "done":
            (tmp_path / "DONE").touch()

    def write(path, text, real=files.replace_text):
        real(path, text)
        end()

    if meanwhile:
        started(tmp_path)
        os.utime(tmp_path / "logs/rank-0.heartbeat")
        monkeypatch.setattr(files, "replace_text", write)
    else:
        (tmp_path / "STOP").touch()
        end()
    if meanwhile and ended["state"] == "running":  # it has died, and is given up in a minute
        assert main(["stop", str(tmp_path)]) == 0
        status.StatusFile(tmp_path, Rank()).start()
    else:
        assert main(["stop", str(tmp_path)]) == code
        assert capsys.readouterr().out == f"{tmp_path} is not running. {said}\n"
    assert not (tmp_path / "STOP").exists()


def test_a_run_that_is_not_there_cannot_be_stopped(tmp_path, capsys):
    assert main(["stop", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"megagpt: there is no run directory {tmp_path}/none\n")
