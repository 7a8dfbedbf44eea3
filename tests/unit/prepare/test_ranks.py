"""Real MPI ranks: the same bytes, on one disk or on two, and one that fails ends all."""

import os
import shutil
import signal
import sys

import pytest

from megagpt.data import pieces
from megagpt.distributed import mpi_place
from megagpt.prepare import Options, prepare_command
from tests.unit.prepare.conftest import content, finish, jsonl, wait_for

pytestmark = pytest.mark.skipif(not shutil.which("mpirun"), reason="needs mpirun: apt install openmpi-bin")
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe")


@pytest.fixture
def lines(texts, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(jsonl(texts * 4))
    return path


@pytest.fixture
def expected(lines, model, tmp_path):
    prepare_command([str(lines)], model, tmp_path / "alone", Options(0.2, workers=1))
    return content(tmp_path / "alone")


def test_ranks_pack_the_same_bytes(command, lines, model, tmp_path):
    prepare_command([str(lines)], model, tmp_path / "alone", Options(0.2, workers=1, pack=64))
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2, "--pack", 64)
    finish(command("prepare", lines, *options, piece=5000, launcher=(*MPIRUN, "-n", 3)))
    assert content(tmp_path / "c") == content(tmp_path / "alone")


CHOSEN = [(2, {}), (3, {}), (3, {"deduplicate": True, "shuffle": True})]


@pytest.mark.parametrize(("ranks", "chosen"), CHOSEN, ids=["2", "3", "3 that choose"])
def test_ranks_write_the_same_bytes_and_each_its_share_of_them(
    command, lines, model, tmp_path, monkeypatch, ranks, chosen
):
    monkeypatch.setattr(pieces, "_SMALLEST", 5000 if chosen else 1 << 30)
    prepare_command([str(lines)], model, tmp_path / "alone", Options(0.2, workers=1, **chosen))
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2)
    options += tuple(f"--{name}" for name in chosen)
    places = tmp_path / "places"
    monkeypatch.setenv("PLACES", str(places))
    output, errors = finish(command("prepare", lines, *options, piece=5000, launcher=(*MPIRUN, "-n", ranks)))
    assert content(tmp_path / "c") == content(tmp_path / "alone")
    assert not (tmp_path / "c.prepare").exists()
    assert output.count("prepared in") == 1, errors
    written = sorted(tuple(map(int, line.split())) for line in places.read_text().splitlines())
    sizes = [(tmp_path / f"c.{part}.bin").stat().st_size for part in ("train", "validation")]
    assert len({start for start, _ in written}) == 2 * ranks - 1  # both parts begin at 0
    assert sum(size for _, size in written) == sum(sizes)
    assert max(size for _, size in written) < 0.75 * sizes[0]


def test_ranks_that_were_killed_go_on_where_they_stopped(command, lines, model, expected, tmp_path):
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2)
    process = command("prepare", lines, *options, piece=5000, pause=0.1, launcher=(*MPIRUN, "-n", 2))
    folder = tmp_path / "c.prepare" / "shards"
    wait_for(folder, "3.json", process)
    partial = wait_for(folder, "*.bin.*.partial", process)[0]
    os.kill(int(partial.name.split(".")[2]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not list(tmp_path.glob("c.*.idx"))
    kept = len(list(folder.glob("*.json")))
    assert kept >= 3
    _, errors = finish(command("prepare", lines, *options, piece=5000, launcher=(*MPIRUN, "-n", 3)))
    assert f"going on, {kept} of " in errors
    assert content(tmp_path / "c") == expected


def test_a_full_disk_of_one_rank_leaves_no_corpus_and_they_go_on_later(command, lines, model, expected, tmp_path):
    """The files can grow to less than the joined ones have: what the last rank writes does not fit."""
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2)
    launcher, limit = (*MPIRUN, "-n", 2), len(expected[".train.bin"]) - 1000
    _, errors = finish(command("prepare", lines, *options, piece=5000, file_limit=limit, launcher=launcher), 1)
    assert errors.count("megagpt: cannot write: File too large") == 1
    assert not [path for path in tmp_path.glob("c.*") if path.suffix in (".idx", ".bin", ".json")]
    finish(command("prepare", lines, *options, piece=5000, launcher=launcher))
    assert content(tmp_path / "c") == expected


def test_ranks_without_a_common_disk_send_their_shards_to_the_first(command, lines, model, expected, tmp_path):
    """Two ranks in two folders, with an output that is relative to them."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    line = [sys.executable, tmp_path / "program.py", 5000, 0, 0, "prepare", lines, "--tokenizer", model]
    line += ["--output", "c", "--validation-fraction", 0.2]
    second = (":", "-n", "1", "-wdir", tmp_path / "two", *line)
    first = (*MPIRUN, "-n", "1", "-wdir", tmp_path / "one")
    finish(command(*line[5:], *second, piece=5000, launcher=first))
    assert content(tmp_path / "one" / "c") == expected
    assert list((tmp_path / "two").iterdir()) == []


def test_a_mistake_is_told_once_and_ends_all(command, lines, model, tmp_path):
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--strict")
    _, errors = finish(command("prepare", lines, *options, piece=5000, launcher=(*MPIRUN, "-n", 2)), 2)
    assert errors.count("odd input: empty documents") == 1
    assert not list(tmp_path.glob("c.*.idx"))


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, (1, 3)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, (0, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # in an allocation, but not started by srun
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, (3, 4)),
        ({"RANK": "1", "WORLD_SIZE": "8"}, (0, 1)),  # of torchrun's, which is no launcher of prepare
    ],
)
def test_the_launcher_says_which_rank_it_is_of_how_many(environment, place):
    assert mpi_place(environment) == place
