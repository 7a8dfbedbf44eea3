"""Many workers, killed workers, killed commands, damaged shards, full disks: the same bytes, or an error, no corpus."""

import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from megagpt.corpus.reader import CorpusReader
from megagpt.errors import MachineError, UserError
from megagpt.prepare import chunks, corpus
from megagpt.prepare.command import PrepareOptions, prepare_command
from megagpt.prepare.workdir import WorkDirectory, create_memmap, work_directory
from tests.unit.prepare.conftest import alive, content, finish, jsonl, wait_for


@pytest.fixture(scope="module")
def large(texts, tmp_path_factory):
    """A folder of 1.3 MB with files of lines and text files."""
    folder = tmp_path_factory.mktemp("large")
    draw = random.Random(5)
    for number in range(6):
        mixed = [" ".join(draw.sample(text.split(), len(text.split()))) for text in texts for _ in range(20)]
        (folder / f"{number}.jsonl").write_text(jsonl(mixed))
        (folder / f"{number}.txt").write_text("\n".join(mixed[:7]))
    return folder


@pytest.fixture(scope="module")
def expected(large, model, tmp_path_factory):
    """The bytes that one process writes from a single chunk."""
    prefix = tmp_path_factory.mktemp("expected") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_MIN_BYTES", 1 << 30)
        prepare_command([str(large)], model, prefix, PrepareOptions(0.1, workers=1))
    return content(prefix)


def start(command, large, model, prefix, workers=2, **limits):
    options = ("--tokenizer", model, "--output", prefix, "--validation-fraction", 0.1, "--workers", workers)
    return command("prepare", large, *options, **limits)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_the_bytes_do_not_depend_on_the_workers(command, large, model, expected, tmp_path, workers):
    finish(start(command, large, model, tmp_path / "c", workers, chunk=40_000 + workers))
    assert content(tmp_path / "c") == expected
    assert not (tmp_path / "c.prepare").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_command_resumes_where_it_stopped(command, large, model, expected, tmp_path, workers):
    draw = random.Random(workers)
    folder, kept = tmp_path / "c.prepare/shards", []
    for done in (3, 12):
        process = start(command, large, model, tmp_path / "c", workers, pause=0.1)
        wait_for(folder, f"{done}.json", process)
        time.sleep(draw.random() / 10)
        process.kill()
        process.communicate()
        assert not list(tmp_path.glob("c.*.idx"))
        kept.append({path: path.stat().st_mtime_ns for path in folder.glob("*.json")})
    finish(start(command, large, model, tmp_path / "c", workers))
    assert content(tmp_path / "c") == expected
    assert 3 <= len(kept[0]) < len(kept[1])
    assert kept[0].items() <= kept[1].items()  # not encoded again


def test_a_command_killed_while_it_merges_leaves_no_corpus_and_resumes(command, large, model, expected, tmp_path):
    process = start(command, large, model, tmp_path / "c", 1, chunk=1 << 30, pause=1)
    wait_for(tmp_path, "c.train.bin.partial", process)
    process.kill()
    process.communicate()
    assert not [path for path in tmp_path.glob("c.*") if path.suffix in (".idx", ".bin", ".json")]
    _, errors = finish(start(command, large, model, tmp_path / "c", 1, chunk=1 << 30))
    assert "resuming, 1 of 1 chunks are done" in errors
    assert content(tmp_path / "c") == expected
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("suffix", ["bin", "rows"])
def test_a_damaged_shard_is_reported_and_encoded_again(command, large, model, expected, tmp_path, suffix):
    """One bit of a complete shard is flipped, which changes neither its size nor its record."""
    shards = tmp_path / "c.prepare/shards"
    process = start(command, large, model, tmp_path / "c", 1, pause=0.1)
    wait_for(shards, "2.json", process)
    process.kill()
    process.communicate()
    raw = bytearray((shards / f"1.{suffix}").read_bytes())
    raw[len(raw) // 2] ^= 1
    (shards / f"1.{suffix}").write_bytes(raw)
    _, errors = finish(start(command, large, model, tmp_path / "c", 1))
    lines = [line for line in errors.splitlines() if "damaged" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"prepare: shard 1 is damaged and is encoded again: {large}/")
    assert content(tmp_path / "c") == expected


def test_shards_that_are_damaged_again_are_an_error(source, model, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "is_intact", lambda folder, number: False)
    with pytest.raises(MachineError) as error:
        prepare_command([source], model, tmp_path / "c", PrepareOptions(workers=1))
    assert str(error.value) == (
        "megagpt: shards are damaged, also after they were encoded again\n"
        f"  {tmp_path}/c.prepare/shards/0.bin\n  do: check the disk and memory"
    )
    assert not list(tmp_path.glob("c.*.idx"))


def test_a_worker_that_dies_ends_the_command_and_names_the_input(command, large, model, expected, tmp_path):
    folder = tmp_path / "c.prepare/shards"
    process = start(command, large, model, tmp_path / "c", pause=0.1)
    partial = wait_for(folder, "*.bin.*.partial", process)[0]
    number, _, pid, _ = partial.name.split(".")
    os.kill(int(pid), signal.SIGKILL)
    _, errors = finish(process, 1)
    what, where, do = errors.splitlines()
    assert what == "megagpt: a worker died (SIGKILL) while processing this input"
    assert where.startswith(f"  {large}/")
    assert "bytes" in where or "and the next" in where
    assert do.startswith("  do: run the command again (`prepare` resumes where it stopped), with fewer --workers if")
    assert not list(tmp_path.glob("c.*.idx"))
    assert not (folder / f"{number}.json").exists()
    finish(start(command, large, model, tmp_path / "c"))
    assert content(tmp_path / "c") == expected


def test_workers_do_not_outlive_a_killed_command(command, large, model, tmp_path):
    process = start(command, large, model, tmp_path / "c", pause=60)
    names = wait_for(tmp_path / "c.prepare/shards", "*.bin.*.partial", process)
    workers = [int(path.name.split(".")[2]) for path in names]
    process.kill()
    end = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_second_of_two_commands_is_refused(command, large, model, tmp_path):
    with WorkDirectory(work_directory(str(tmp_path / "c"))):
        _, errors = finish(start(command, large, model, tmp_path / "c"), 2)
    assert errors == (
        f"megagpt: another `megagpt prepare` (process {os.getpid()}) is writing this corpus\n"
        f"  {tmp_path}/c.prepare\n  do: wait until it has finished, or choose another --output\n"
    )
    assert not list(tmp_path.glob("c*"))


@pytest.mark.parametrize(("workers", "limit"), [(1, 500), (2, 3000), (1, 100_000)])
def test_a_full_disk_leaves_no_corpus_and_the_command_resumes_later(
    command, large, model, expected, tmp_path, workers, limit
):
    """The limit to the size of files is reached in a shard, in another one, and while shards are merged."""
    _, errors = finish(start(command, large, model, tmp_path / "c", workers, file_limit=limit), 1)
    what, _, do = errors.splitlines()
    assert what == "megagpt: cannot write: File too large"
    assert do == (
        "  do: free space or choose another --output, then run the command again: it resumes where it stopped"
    )
    assert not [path for path in tmp_path.glob("c.*") if path.suffix in (".idx", ".bin", ".json")]
    finish(start(command, large, model, tmp_path / "c", workers))
    assert content(tmp_path / "c") == expected


def test_shards_of_another_plan_are_not_used(command, large, model, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("one two three\n" * 100)
    process = start(command, large, model, tmp_path / "c", pause=0.1)
    wait_for(tmp_path / "c.prepare/shards", "2.json", process)
    process.kill()
    process.communicate()
    prepare_command([str(other)], model, tmp_path / "c", PrepareOptions(0))
    assert CorpusReader(tmp_path / "c.train").sidecar.text_bytes == 1400
    assert sorted(path.name for path in tmp_path.glob("c*")) == ["c.train.bin", "c.train.idx", "c.train.json"]


def test_the_error_names_a_folder_that_cannot_be_written(source, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        prepare_command([source], model, tmp_path / "file" / "c")
    assert str(error.value) == (
        f"megagpt: cannot write here: Not a directory\n  {tmp_path}/file/c.prepare\n"
        "  do: choose an --output in a folder to which you may write"
    )


def test_a_memmap_on_a_full_disk_raises_an_error_and_kills_no_process(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        whole = create_memmap(tmp_path / "small", np.int64, 1000)
        whole[:] = 7
        assert np.fromfile(tmp_path / "small", np.int64).tolist() == [7] * 1000
        with pytest.raises(OSError, match="No space left on device"):
            create_memmap(tmp_path / "large", np.int64, 1_000_000)
        del whole
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
