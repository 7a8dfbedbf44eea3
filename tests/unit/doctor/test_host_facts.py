"""What a host says of itself is what the system's own tools say, and it is said without torch."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from megagpt.doctor.children import Child
from megagpt.doctor.token import Token

from megagpt.data.indexed_writer import CorpusWriter
from megagpt.doctor import facts, network
from megagpt.doctor.agent import Agent

NOTHING = {"files": [], "corpora": [], "run_dir": "", "nvme": ""}


def printed(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_facts_are_those_of_the_systems_own_tools():
    said = []
    found = facts.gather(NOTHING, said.append)
    assert list(found) == ["host", *said]
    assert json.loads(json.dumps(found)) == found
    assert found["host"] == socket.gethostname()
    assert found["python"]["version"] == printed(sys.executable, "-V").split()[1]
    assert found["packages"]["torch"] == version("torch")
    limits = [found["limits"]["open_files"][0], printed("sh", "-c", "ulimit -n").strip()]
    assert str(limits[0]) == limits[1] or limits == [None, "unlimited"]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < found["memory"]["available"] <= found["memory"]["total"] <= total
    assert found["cores"] == int(printed("nproc", "--ignore=0")) or "OMP_NUM_THREADS" in os.environ
    for name, address in found["network"]["interfaces"].items():
        assert Path("/sys/class/net", name).exists()
        assert socket.inet_aton(address)
    assert found["network"]["interfaces"]["lo"] == "127.0.0.1"


def test_facts_need_no_torch():
    heavy = ("torch", "deepspeed", "numpy", "pydantic", "rich")
    program = f"import sys; from megagpt.doctor import facts, agent; facts.gather({NOTHING}, print); " \
              f"sys.exit(any(name in sys.modules for name in {heavy}))"  # fmt: skip
    printed(sys.executable, "-c", program)


def test_the_address_that_others_reach_is_not_the_loopback():
    assert network.outside({"lo": "127.0.0.1", "ib0": "10.1.0.1", "eth0": "10.0.0.1"}) == ("ib0", "10.1.0.1")
    assert network.outside({"lo": "127.0.0.1"}) == ("", "")


def test_a_corpus_is_told_by_its_sizes_ends_and_sidecar(tmp_path):
    def write(name, ids):
        with CorpusWriter(tmp_path / name, 60_000) as writer:
            writer.add_document(list(ids), 1)
            writer.finish("sha", 0)
        return facts.corpus(str(tmp_path / name), print)

    one, same = write("one", range(1000)), write("same", range(1000))
    assert one == same
    assert one["sizes"] == {".bin": 2000, ".idx": os.stat(tmp_path / "one.idx").st_size}
    assert one["missing"] == []
    other = write("other", [*range(999), 7])
    assert (other["sizes"], other["ends"] == one["ends"]) == (one["sizes"], False)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    gone = facts.corpus(str(tmp_path / "one"), print)
    assert gone["missing"] == [f"{tmp_path}/one{suffix}: No such file or directory" for suffix in (".bin", ".idx")]


def test_files_and_code_have_checksums_that_change_with_them(tmp_path):
    (tmp_path / "a").write_text("1")
    first = facts.checksum(tmp_path / "a")
    (tmp_path / "a").write_text("2")
    assert first != facts.checksum(tmp_path / "a") != ""
    assert facts.checksum(tmp_path / "b") == ""
    assert facts.code() == facts.code()


def test_tokens_in_one_folder_see_each_other_and_leave_no_trace(tmp_path):
    run = tmp_path / "runs/one"
    first, second = Token(run, "x", 0), Token(run, "x", 1)
    assert first.write() == second.write() == {"error": "", "full": False}
    assert Token(run, "another-visit", 0).seen() == []
    assert first.seen() == second.seen() == [0, 1]
    first.remove()
    assert second.seen() == [1]
    second.remove()
    for token in (first, second):
        token.remove_folders()
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").touch()
    assert Token(tmp_path / "file/run", "x", 0).write() == {"error": "Not a directory", "full": False}


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "async_io").mkdir()
    return tmp_path / "async_io/lock"


def test_a_lock_is_dead_when_nobody_has_it_open(lock):
    assert facts.locks() == []
    with lock.open("w"):
        assert facts.holders(lock) == [os.getpid()]
        (held,) = facts.locks()
    (dead,) = facts.locks()
    assert (held["path"], held["operator"], held["building"]) == (str(lock), "async_io", True)
    assert dead["building"] is False


def child(monkeypatch, tmp_path, program):
    """A process of the doctor's that does this, in the place of the probe."""
    package = tmp_path / "package/megagpt_probe.py"
    package.parent.mkdir()
    package.write_text(
        f"from megagpt.doctor.children import begin\nimport os, sys, time\nwords, say = begin()\n{program}"
    )
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: real([words[0], str(package), *words[3:]], **more))
    return Child("probe", {"limit": 60})


def gone(pid):
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_child_that_dies_says_at_what_and_what_it_said_is_kept(monkeypatch, tmp_path):
    program = "print('noise')\nsay({'a': 1})\nsay({'doing': 'import torch'})\nraise ImportError('no libfoo')"
    assert child(monkeypatch, tmp_path, program).answers(60, lambda _: None) == {
        "a": 1, "died": "ImportError: no libfoo", "at": "import torch"}  # fmt: skip


def test_a_child_that_ends_well(monkeypatch, tmp_path):
    begun = time.time()
    found = child(monkeypatch, tmp_path, "say({'time': time.time()})").answers(60, lambda _: None)
    assert begun < found["time"] < time.time()
    assert list(found) == ["time"]


def test_a_build_that_does_not_end_is_cut_short_and_the_next_one_does_not_wait_for_it(tmp_path, monkeypatch):
    if not shutil.which("c++") or not Path("/usr/include/libaio.h").exists():
        pytest.skip("a build of async_io: it needs a C++ compiler and libaio's headers (tests/install.sh)")
    compiler, pids = tmp_path / "compiler", tmp_path / "pids"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-c*.cpp*) echo $$ >>{pids}; exec sleep 600;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    limit = 4.0
    while not pids.exists():  # on a busy machine torch alone may take as long
        limit *= 2
        found = Agent(print, {}).probe(limit, operators=["async_io"], gpu_operators=[])
        assert limit < 500, found
    assert (found["hung"], found["at"], found["accelerator"]) == (limit, "building or loading async_io", "cpu")
    assert facts.locks() == []
    end = time.monotonic() + 30
    while not all(gone(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < end
        time.sleep(0.01)
