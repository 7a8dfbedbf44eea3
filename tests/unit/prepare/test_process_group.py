"""Real MPI ranks and SLURM tasks write the same bytes, with or without a shared disk; a failed rank ends all."""

import os
import pickle
import shutil
import signal
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest

from megagpt.cluster import free_port, from_mpi_or_slurm, secret
from megagpt.errors import MachineError
from megagpt.prepare import chunks, sockets
from megagpt.prepare.command import PrepareOptions, prepare_command
from tests.unit.prepare.conftest import content, finish, jsonl, wait_for

mpi = pytest.mark.skipif(
    not shutil.which("mpirun"), reason="preparing with MPI ranks: mpirun is not installed (tests/install.sh)"
)
STEP = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe")


@pytest.fixture
def lines(texts, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(jsonl(texts * 4))
    return path


@pytest.fixture
def expected(lines, model, tmp_path):
    prepare_command([str(lines)], model, tmp_path / "alone", PrepareOptions(0.2, workers=1))
    return content(tmp_path / "alone")


def test_ranks_pack_the_same_bytes(command, lines, model, tmp_path):
    prepare_command([str(lines)], model, tmp_path / "alone", PrepareOptions(0.2, workers=1, pack=64))
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2, "--pack", 64)
    finish(command("prepare", lines, *options, chunk=5000, launcher=(*MPIRUN, "-n", 3)))
    assert content(tmp_path / "c") == content(tmp_path / "alone")


CHOSEN = [(2, {}), (3, {}), (3, {"deduplicate": True, "shuffle": True})]


@mpi
@pytest.mark.parametrize(("ranks", "chosen"), CHOSEN, ids=["2", "3", "3 with selection"])
def test_ranks_write_the_same_bytes_and_each_writes_a_part(command, lines, model, tmp_path, monkeypatch, ranks, chosen):
    monkeypatch.setattr(chunks, "_MIN_BYTES", 5000 if chosen else 1 << 30)
    prepare_command([str(lines)], model, tmp_path / "alone", PrepareOptions(0.2, workers=1, **chosen))
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2)
    options += tuple(f"--{name}" for name in chosen)
    offsets = tmp_path / "offsets"
    monkeypatch.setenv("OFFSETS", str(offsets))
    output, errors = finish(command("prepare", lines, *options, chunk=5000, launcher=(*MPIRUN, "-n", ranks)))
    assert content(tmp_path / "c") == content(tmp_path / "alone")
    assert not (tmp_path / "c.prepare").exists()
    assert output.count("prepared in") == 1, errors
    written = sorted(tuple(map(int, line.split())) for line in offsets.read_text().splitlines())
    sizes = [(tmp_path / f"c.{part}.bin").stat().st_size for part in ("train", "validation")]
    assert len({start for start, _ in written}) == 2 * ranks - 1  # both parts begin at offset 0
    assert sum(size for _, size in written) == sum(sizes)
    assert max(size for _, size in written) < 0.75 * sizes[0]


@mpi
def test_ranks_that_were_killed_resume_where_they_stopped(command, lines, model, expected, tmp_path):
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2)
    process = command("prepare", lines, *options, chunk=5000, pause=0.1, launcher=(*MPIRUN, "-n", 2))
    folder = tmp_path / "c.prepare" / "shards"
    wait_for(folder, "3.json", process)
    partial = wait_for(folder, "*.bin.*.partial", process)[0]
    os.kill(int(partial.name.split(".")[2]), signal.SIGKILL)
    process.communicate(timeout=240)
    assert process.returncode != 0
    assert not list(tmp_path.glob("c.*.idx"))
    kept = len(list(folder.glob("*.json")))
    assert kept >= 3
    damaged = min(folder.glob("*.json")).with_suffix(".bin")
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    _, errors = finish(command("prepare", lines, *options, chunk=5000, launcher=(*MPIRUN, "-n", 3)))
    assert f"resuming, {kept} of " in errors
    assert errors.count(f"shard {damaged.stem} is damaged and is encoded again") == 1
    assert content(tmp_path / "c") == expected


@mpi
def test_a_full_disk_of_one_rank_leaves_no_corpus_and_the_ranks_resume_later(command, lines, model, expected, tmp_path):
    """Files are limited to less than the size of the merged ones, so that the last rank cannot write its part."""
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2)
    launcher, limit = (*MPIRUN, "-n", 2), len(expected[".train.bin"]) - 1000
    _, errors = finish(command("prepare", lines, *options, chunk=5000, file_limit=limit, launcher=launcher), 1)
    assert errors.count("megagpt: cannot write: File too large") == 1
    assert not [path for path in tmp_path.glob("c.*") if path.suffix in (".idx", ".bin", ".json")]
    finish(command("prepare", lines, *options, chunk=5000, launcher=launcher))
    assert content(tmp_path / "c") == expected


@mpi
def test_ranks_without_a_shared_disk_send_their_shards_to_the_first(command, lines, model, expected, tmp_path):
    """Two ranks in two folders, with an output relative to them. They are killed in the middle, and started again."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()

    def start(pause):
        line = [sys.executable, tmp_path / "program.py", 5000, pause, 0, "prepare", lines, "--tokenizer", model]
        line += ["--output", "c", "--validation-fraction", 0.2]
        second = (":", "-n", "1", "-wdir", tmp_path / "two", *line)
        first = (*MPIRUN, "-n", "1", "-wdir", tmp_path / "one")
        return command(*line[5:], *second, chunk=5000, pause=pause, launcher=first)

    shards = [tmp_path / name / "c.prepare/shards" for name in ("one", "two")]
    process = start(0.1)
    wait_for(shards[1], "3.json", process)
    os.kill(int(wait_for(shards[1], "*.bin.*.partial", process)[0].name.split(".")[2]), signal.SIGKILL)
    process.communicate(timeout=240)
    assert process.returncode != 0
    done = [{path.name for path in folder.glob("*.json")} for folder in shards]
    assert done[0]
    assert done[1]
    assert not done[0] & done[1]
    _, errors = finish(start(0))
    assert f"resuming, {len(done[0] | done[1])} of " in errors
    assert content(tmp_path / "one" / "c") == expected
    assert list((tmp_path / "two").iterdir()) == []


@mpi
def test_an_error_is_reported_once_and_ends_all_ranks(command, lines, model, tmp_path):
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--strict")
    _, errors = finish(command("prepare", lines, *options, chunk=5000, launcher=(*MPIRUN, "-n", 2)), 2)
    assert errors.count("unusual input: empty documents") == 1
    assert not list(tmp_path.glob("c.*.idx"))


@mpi
def test_an_mpirun_of_another_mpi_is_an_error(command, lines, model, tmp_path, monkeypatch):
    """MPICH starts a rank, which Open MPI takes for a single process."""
    for name, value in {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}.items():
        monkeypatch.setenv(name, value)
    _, errors = finish(command("prepare", lines, "--tokenizer", model, "--output", tmp_path / "c"), 2)
    what, where, do = errors.splitlines()[-3:]  # mpi4py warns before
    assert what == "megagpt: 2 processes were started, but MPI sees 1"
    assert where.startswith("  Open MPI")
    assert do == "  do: start them with the mpirun of this MPI"
    assert not list(tmp_path.glob("c*"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("python", 0, 1)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            ("openmpi", 1, 3),
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, ("mpich", 0, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ("python", 0, 1)),  # in an allocation, but not started by srun
        (STEP | {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, ("slurm", 3, 4)),
        (STEP | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "PMI_RANK": "1", "PMI_SIZE": "2"}, ("slurm", 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "8"}, ("python", 0, 1)),  # of torchrun, which is not a launcher for prepare
    ],
)
def test_the_rank_and_world_size_come_from_the_launcher(environment, expected):
    found = from_mpi_or_slurm(environment)
    assert (found.launcher, found.rank, found.world_size) == expected


@pytest.fixture
def tasks(command, lines, model, tmp_path, monkeypatch):
    """Start tasks as srun does, with their number and the hosts of the step in the environment, and without MPI."""

    def start(count, only=None, port=None, **limits):
        monkeypatch.setenv("MASTER_PORT", str(port or free_port()))
        options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2)
        started = []
        for number in range(count) if only is None else [only]:
            for name, value in (STEP | {"SLURM_PROCID": str(number), "SLURM_NTASKS": str(count)}).items():
                monkeypatch.setenv(name, value)
            started.append(command("prepare", lines, *options, chunk=5000, **limits))
        return started

    return start


def test_tasks_of_slurm_need_no_mpi(tasks, expected, tmp_path):
    outputs = [finish(task)[0] for task in tasks(3)]
    assert content(tmp_path / "c") == expected
    assert ["prepared in" in output for output in outputs] == [True, False, False]


def test_an_error_names_tasks_that_do_not_connect(monkeypatch, tmp_path):
    monkeypatch.setattr(sockets, "JOIN_LIMIT", timedelta(seconds=3))
    rank = from_mpi_or_slurm(
        STEP | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "localhost"}
    )

    def connect(**other):
        with pytest.raises(MachineError) as error, sockets.connected(replace(rank, **other), tmp_path, None) as task:
            task.bcast(None)  # the first one exits instead
        return str(error.value)

    with ThreadPoolExecutor() as pool:
        others = [pool.submit(connect, rank=2), pool.submit(connect, rank=1, job="8.0")]
        with pytest.raises(MachineError) as error, sockets.connected(rank, tmp_path, None):
            pass
        errors = [one.result().splitlines()[0] for one in others]
    assert errors == [
        "megagpt: task 0 ended before its work was done",
        f"megagpt: rank 1 on {socket.gethostname()} found no key file of its job within 3 s: it does not exist",
    ]
    assert str(error.value) == (
        "megagpt: not all tasks have connected within 3 s\n  missing: 1, 3\n  do: see their messages"
    )


def test_tasks_without_a_common_folder_share_the_secret_of_the_environment(tasks, expected, tmp_path, monkeypatch):
    monkeypatch.setenv(secret.VARIABLE, "0123456789abcdef" * 4)
    outputs = [finish(task)[0] for task in tasks(2)]
    assert content(tmp_path / "c") == expected
    assert ["prepared in" in output for output in outputs] == [True, False]


def test_a_pickle_sent_to_the_port_of_a_job_runs_nothing_and_the_job_completes(tasks, expected, tmp_path):
    """A known attack: read the greeting, claim to be task 1, and send a pickle that runs a command."""
    port = free_port()
    (first,) = tasks(2, only=0, port=port)
    attack = Bomb(tmp_path / "owned").messages()
    strangers = []
    for message in attack:
        strangers.append(wait_for_port(port))
        strangers[-1].sendall(message)
    (second,) = tasks(2, only=1, port=port)
    outputs = [finish(task)[0] for task in (first, second)]
    for stranger in strangers:
        stranger.close()
    assert not (tmp_path / "owned").exists()
    assert content(tmp_path / "c") == expected
    assert ["prepared in" in output for output in outputs] == [True, False]
    assert not list(tmp_path.glob("*.key"))


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)

    def messages(self):
        """The pickle alone, and after the number of task 1, framed as multiprocessing.connection does it."""
        bomb = pickle.dumps(self)
        framed = [struct.pack("!i", len(part)) + part for part in (b"1", bomb)]
        return [bomb, b"".join(framed), b"\0" * 100 + bomb]


def wait_for_port(port):
    for _ in range(600):
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("localhost", port))
        time.sleep(0.1)
    raise AssertionError("no process listens")


def test_a_task_that_dies_ends_all_and_the_command_resumes_later(tasks, expected, tmp_path):
    started = tasks(2, pause=0.1)
    wait_for(tmp_path / "c.prepare" / "shards", "3.json", started[0])
    started[1].kill()
    _, errors = finish(started[0], 1)
    assert errors == (
        "megagpt: task 1 ended before its work was done\n  srun\n"
        "  do: see its messages, then run the command again: it resumes where it stopped\n"
    )
    assert not list(tmp_path.glob("c.*.idx"))
    (_, errors), _ = [finish(task) for task in tasks(2)]
    assert "resuming, " in errors
    assert content(tmp_path / "c") == expected
