"""Real MPI ranks: the same bytes, on one disk or on two, and one that fails ends all."""

import shutil
import sys

import pytest

from megagpt.distributed import mpi_size
from megagpt.prepare import Options, prepare_command
from tests.unit.prepare.conftest import content, finish, jsonl

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


def test_ranks_write_the_same_bytes(command, lines, model, expected, tmp_path):
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--validation-fraction", 0.2)
    output, errors = finish(command("prepare", lines, *options, piece=5000, launcher=(*MPIRUN, "-n", 3)))
    assert content(tmp_path / "c") == expected
    assert not (tmp_path / "c.prepare").exists()
    assert output.count("prepared in") == 1, errors


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
    ("environment", "size"),
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"PMI_SIZE": "2"}, 2),
        ({"SLURM_NTASKS": "4"}, 1),  # in an allocation, but not started by srun
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, 4),
        ({"WORLD_SIZE": "8"}, 1),  # of torchrun's, which is no launcher of prepare
    ],
)
def test_the_launcher_says_how_many_ranks_there_are(environment, size):
    assert mpi_size(environment) == size
