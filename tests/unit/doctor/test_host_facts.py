"""The facts about a host are those that the system's own tools report, and are collected without torch."""

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

from megagpt.corpus.writer import CorpusWriter
from megagpt.doctor import host_facts
from megagpt.doctor.agent import Agent, ProbeProcess
from megagpt.doctor.host_facts import RunDirectoryMarker

NOTHING = {"files": [], "corpora": [], "run_dir": "", "nvme": ""}


def printed(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_facts_are_those_of_the_systems_own_tools():
    steps = []
    found = host_facts.collect(NOTHING, steps.append)
    assert list(found) == ["host", *steps]
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
    program = f"import sys; from megagpt.doctor import host_facts, agent; host_facts.collect({NOTHING}, print); " \
              f"sys.exit(any(name in sys.modules for name in {heavy}))"  # fmt: skip
    printed(sys.executable, "-c", program)


def test_the_external_interface_is_not_the_loopback():
    assert host_facts.external_interface({"lo": "127.0.0.1", "ib0": "10.1.0.1", "eth0": "10.0.0.1"}) == (
        "ib0",
        "10.1.0.1",
    )
    assert host_facts.external_interface({"lo": "127.0.0.1"}) == ("", "")


def test_a_corpus_is_identified_by_its_sizes_ends_and_sidecar(tmp_path):
    def write(name, ids):
        with CorpusWriter(tmp_path / name, 60_000) as writer:
            writer.add_document(list(ids), 1)
            writer.finish("sha", 0)
        return host_facts.corpus_identity(str(tmp_path / name), print)

    one, same = write("one", range(1000)), write("same", range(1000))
    assert one == same
    assert one["sizes"] == {".bin": 2000, ".idx": os.stat(tmp_path / "one.idx").st_size}
    assert one["missing"] == []
    other = write("other", [*range(999), 7])
    assert (other["sizes"], other["ends"] == one["ends"]) == (one["sizes"], False)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    gone = host_facts.corpus_identity(str(tmp_path / "one"), print)
    assert gone["missing"] == [f"{tmp_path}/one{suffix}: No such file or directory" for suffix in (".bin", ".idx")]


def test_files_and_code_have_checksums_that_change_with_them(tmp_path):
    (tmp_path / "a").write_text("1")
    first = host_facts.file_checksum(tmp_path / "a")
    (tmp_path / "a").write_text("2")
    assert first != host_facts.file_checksum(tmp_path / "a") != ""
    assert host_facts.file_checksum(tmp_path / "b") == ""
    assert host_facts.code_checksum() == host_facts.code_checksum()


def test_markers_in_one_folder_are_visible_to_each_other_and_leave_no_trace(tmp_path):
    run = tmp_path / "runs/one"
    first, second = RunDirectoryMarker(run, "x", 0), RunDirectoryMarker(run, "x", 1)
    assert first.write() == second.write() == {"error": "", "full": False}
    assert RunDirectoryMarker(run, "another-session", 0).visible() == []
    assert first.visible() == second.visible() == [0, 1]
    first.remove()
    assert second.visible() == [1]
    second.remove()
    for marker in (first, second):
        marker.remove_folders()
    assert list(tmp_path.iterdir()) == []


def test_a_marker_that_cannot_be_written_returns_the_reason(tmp_path):
    (tmp_path / "file").touch()
    marker = RunDirectoryMarker(tmp_path / "file/run", "x", 0)
    assert marker.write() == {"error": "Not a directory", "full": False}


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "async_io").mkdir()
    return tmp_path / "async_io/lock"


def test_a_lock_is_dead_if_no_process_has_it_open(lock):
    assert host_facts.build_locks() == []
    with lock.open("w"):
        assert host_facts.lock_holders(lock) == [os.getpid()]
        (held,) = host_facts.build_locks()
    (dead,) = host_facts.build_locks()
    assert (held["path"], held["operator"], held["building"]) == (str(lock), "async_io", True)
    assert dead["building"] is False


def probe(monkeypatch, tmp_path, program):
    """A probe process that runs this program instead."""
    package = tmp_path / "package/megagpt_probe.py"
    package.parent.mkdir()
    package.write_text(
        f"from megagpt.doctor.probes import start_probe\nimport os, sys, time\n_, output = start_probe()\n{program}"
    )
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **more: real([command[0], str(package), *command[3:]], **more)
    )
    return ProbeProcess("torch", {"limit": 60})


def gone(pid):
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_probe_that_dies_keeps_its_results_and_names_the_step(monkeypatch, tmp_path):
    program = "print('noise')\noutput({'a': 1})\noutput({'at': 'import torch'})\nraise ImportError('no libfoo')"
    assert probe(monkeypatch, tmp_path, program).result(60) == {
        "a": 1, "died": "ImportError: no libfoo", "at": "import torch"}  # fmt: skip


def test_a_probe_that_succeeds(monkeypatch, tmp_path):
    begun = time.time()
    found = probe(monkeypatch, tmp_path, "output({'time': time.time()})").result(60)
    assert begun < found["time"] < time.time()
    assert list(found) == ["time"]


def test_a_build_that_does_not_end_is_killed_and_the_next_one_does_not_wait_for_it(tmp_path, monkeypatch):
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
        found = Agent(print, {}).probe_torch(limit, operators=["async_io"], gpu_operators=[])
        assert limit < 500, found
    assert (found["hung"], found["at"], found["accelerator"]) == (limit, "building or loading async_io", "cpu")
    assert host_facts.build_locks() == []
    end = time.monotonic() + 30
    while not all(gone(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < end
        time.sleep(0.01)
