"""Errors in hostfiles have line numbers, and a valid file is read as DeepSpeed reads it."""

import os
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.cli import main
from megagpt.cluster import hostfile
from megagpt.errors import UserError

ROOT = Path(__file__).parents[3]
FORM = "\n  do: write `HOST slots=NUMBER`, one host per line; `#` starts a comment line"


def test_a_valid_file_and_the_example_are_read(tmp_path):
    (tmp_path / "h").write_text("# two\nnode1 slots=4\n\n  10.0.0.2\tslots=8  \n")
    assert hostfile.read(tmp_path / "h") == {"node1": 4, "10.0.0.2": 8}
    assert hostfile.read(ROOT / "launch/hosts.example") == {"node1": 8, "node2": 8}


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9.-]{0,9}", fullmatch=True), st.integers(1, 64), min_size=1))
def test_deepspeed_reads_the_same(tmp_path_factory, slots):
    path = tmp_path_factory.mktemp("hosts") / "h"
    path.write_text("#\n\n" + "".join(f"{host}  slots={count}\n" for host, count in slots.items()))
    assert hostfile.read(path) == dict(fetch_hostfile(str(path))) == slots


def test_all_mistakes_are_reported_with_their_lines(tmp_path):
    path = tmp_path / "h"
    path.write_text("node1 slots=4\nnode2 lots=4\nnode1 slots=2\nnode3\nnode4 slots=0\nnode5 slots=2 gpus=1\n")
    with pytest.raises(UserError) as caught:
        hostfile.read(path)
    assert str(caught.value) == (
        f"megagpt: not a line of a hostfile\n  {path}:2: node2 lots=4{FORM}\n"
        f"megagpt: node1 is listed twice, first in line 1\n  {path}:3: node1 slots=2\n"
        "  do: give each host one line, with all its slots\n"
        f"megagpt: not a line of a hostfile\n  {path}:4: node3{FORM}\n"
        f"megagpt: node4 has no slots\n  {path}:5: node4 slots=0\n  do: remove the host, or give it slots\n"
        f"megagpt: not a line of a hostfile\n  {path}:6: node5 slots=2 gpus=1{FORM}"
    )


def test_a_file_without_hosts_and_a_missing_file_are_mistakes(tmp_path):
    (tmp_path / "h").write_text("# empty\n")
    with pytest.raises(UserError, match="the hostfile has no hosts"):
        hostfile.read(tmp_path / "h")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        hostfile.read(tmp_path / "hots")


def test_the_command_checks_and_writes_the_variables_that_deepspeed_reads(tmp_path, monkeypatch, capsys):
    (tmp_path / "h").write_text("localhost slots=2\n127.0.0.2 slots=1\n")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert main(["hosts", str(tmp_path / "h"), "--write-environment", str(tmp_path / "e")]) == 0
    assert capsys.readouterr().out == (
        f"localhost  2 ranks\n127.0.0.2  1 rank\n2 hosts, 3 ranks\n"
        f"wrote {tmp_path}/e; before `deepspeed --hostfile`, run:\n"
        f'export DS_ENV_FILE={tmp_path}/e PDSH_SSH_ARGS_APPEND="-oServerAliveInterval=5 -oServerAliveCountMax=3"\n'
    )
    lines = (tmp_path / "e").read_text().splitlines()
    assert {"NCCL_DEBUG=INFO", "MEGAGPT_HOSTS=localhost/127.0.0.2"} <= {*lines}
    assert all(len(line.split("=", 1)) == 2 for line in lines)  # DeepSpeed's launcher crashes on other lines
    assert main(["hosts", str(tmp_path / "none")]) == 2


def test_names_that_do_not_resolve_are_mistakes_of_the_hostfile(tmp_path, capsys):
    (tmp_path / "h").write_text("localhost slots=1\nnodee2.invalid slots=1\nnode..3 slots=1\n")
    assert main(["hosts", str(tmp_path / "h"), "--write-environment", str(tmp_path / "e")]) == 2
    do = "  do: correct the name, or add it to DNS, /etc/hosts or ~/.ssh/config\n"
    assert capsys.readouterr().err == (
        f"megagpt: the name nodee2.invalid does not resolve\n  {tmp_path}/h\n{do}"
        f"megagpt: the name node..3 does not resolve\n  {tmp_path}/h\n{do}"
    )
    assert not (tmp_path / "e").exists()


def test_an_alias_of_sshs_configuration_resolves(tmp_path, monkeypatch):
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\n[ $2 = alias.invalid ] && echo hostname 127.0.0.1 || echo hostname $2\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "h").write_text("alias.invalid slots=1\n")
    assert main(["hosts", str(tmp_path / "h")]) == 0
    (tmp_path / "h").write_text("other.invalid slots=1\n")
    assert main(["hosts", str(tmp_path / "h")]) == 2
