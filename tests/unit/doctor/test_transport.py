"""What the end of ssh means, which variables DeepSpeed's launcher forwards, and what a job requires of its hosts."""

import os
import socket
import sys
import time
from contextlib import closing

import pytest

from megagpt import plan
from megagpt.cluster.handshake import Channel
from megagpt.doctor import transport
from megagpt.doctor.job_requirements import JobRequirements, read_requirements
from megagpt.doctor.transport import HostLost
from megagpt.errors import UserError
from tests import training

CONFIGS = training.ROOT / "ds_configs"
UP = "check that n is up, runs sshd, and is not behind a firewall: `ssh n true` must work"


@pytest.mark.parametrize(
    ("code", "error", "check", "what", "do"),
    [
        (255, "ssh: Could not resolve hostname n: Name or service not known", "connection",
         "ssh failed: ssh: Could not resolve hostname n: Name or service not known",
         "correct the name in the hostfile, or add it to DNS or /etc/hosts"),
        (255, "Host key verification failed.", "connection", "ssh failed: Host key verification failed.",
         "add the host's key: `ssh-keyscan n >> ~/.ssh/known_hosts`"),
        (255, "ssh: connect to host n port 22: Connection refused", "connection",
         "ssh failed: ssh: connect to host n port 22: Connection refused", UP),
        (255, "", "connection", "ssh failed: no reason given", UP),
        (101, "", "code", f"the folder {os.getcwd()} does not exist",
         "mount it or copy it to the same path: DeepSpeed starts the ranks there"),
        (102, "", "python", f"there is no Python at {sys.executable}",
         "install the same environment at the same path: DeepSpeed starts the ranks with it"),
        (1, "/env/bin/python: No module named megagpt", "code",
         "megagpt cannot be imported: /env/bin/python: No module named megagpt",
         f"install megagpt there, or copy it to {os.getcwd()}"),
        (134, "Fatal Python error", "connection",
         "the doctor's agent exited with code 134: Fatal Python error",
         "run `python -m megagpt host-agent` there by hand, and fix what it reports"),
    ],
)  # fmt: skip
def test_why_a_host_is_lost(code, error, check, what, do):
    found = transport.explain_exit("n", code, error)
    assert (found.check, found.status, found.hosts, found.what, found.do) == (check, "error", ("n",), what, do)


def test_variables_are_those_that_deepspeed_forwards(tmp_path, monkeypatch):
    (tmp_path / "variables").write_text("OMP_NUM_THREADS=1\nHF_HOME=/a=b\n")
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": "/p", "PYTHONHASHSEED": "0", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "8", "HOME": "/h",
           "DS_ENV_FILE": "variables"}  # fmt: skip
    assert transport.variables_forwarded_by_deepspeed(env) == {
        "PYTHONPATH": f"{tmp_path}:/p", "PYTHONHASHSEED": "0", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1",
        "HF_HOME": "/a=b",
    }  # fmt: skip


def request_until_lost(connection):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        connection.request("clock", 60)
        time.sleep(0.1)


def test_a_result_that_does_not_arrive_names_the_step():
    ours, theirs = (
        Channel(end, *keys) for end, keys in zip(socket.socketpair(), ((b"a", b"b"), (b"b", b"a")), strict=True)
    )
    connection = transport.connection_to_rank(ours, "n")
    with closing(theirs):
        theirs.send(b"a shell that greets\n")
        theirs.send(b'megagpt-doctor {"doing": "data"}\n')
        with pytest.raises(HostLost) as caught:
            connection.request("facts", 2)
    assert caught.value.finding.what == "no answer within 2 s, at step: data"
    with pytest.raises(HostLost) as caught:
        request_until_lost(connection)
    assert caught.value.finding.what == "the rank has ended"
    connection.close()


def test_an_agent_that_dies_is_reported_with_its_last_error(monkeypatch):
    monkeypatch.setenv("PYTHONSTARTUP", "")
    connection = transport._start([sys.executable, "-c", "import sys; sys.exit('no such thing')"], "n")
    with pytest.raises(HostLost) as caught:
        connection.request("hello", 60)
    connection.close()
    assert caught.value.finding.what == "the doctor's agent exited with code 1: no such thing"


def test_an_agent_exits_by_itself():
    connection = transport.start_local_agent()
    connection.request("hello", 60, limit=1)
    with pytest.raises(HostLost):
        request_until_lost(connection)
    connection.close()


def test_requirements_of_a_recipe_and_of_each_kind_of_config(recipe):
    found = read_requirements(recipe, CONFIGS / "zero3-nvme.json", ["data.validation=v"], 2)
    text = recipe.read_text()
    assert found.corpora == (text.split("train: ")[1].split(",")[0], "v")
    assert found.files == (str(recipe), str(CONFIGS / "zero3-nvme.json"), text.split("tokenizer: ")[1].split(",")[0])
    assert (found.operators, found.gpu_operators, found.nvme, found.offloads) == (("async_io",), (), "runs/nvme", True)
    # two blocks of 4 x 32 x 32 + 2 x 128 x 32 and two norms of 32; 320 x 32 tied, a last norm
    assert found.checkpoint == int(1.2 * 12 * (2 * (4 * 1024 + 8192 + 64) + 10240 + 32))
    kinds = [read_requirements(None, CONFIGS / f"{name}.json", (), 1) for name in ("zero1", "zeropp", "zero2-offload")]
    assert [(one.operators, one.gpu_operators, one.offloads) for one in kinds] == [
        ((), ("fused_adam",), False), ((), ("fused_adam", "quantizer"), False), ((), (), True)]  # fmt: skip
    changed = read_requirements(
        recipe, CONFIGS / "zero2.json", ["ds.zero_optimization.offload_optimizer={device: cpu}"], 1
    )
    assert (changed.offloads, changed.gpu_operators) == (True, ())
    assert read_requirements(None, None, (), 1) == JobRequirements()


def test_memory_sizes_are_those_of_the_plan(recipe):
    by_world = [read_requirements(recipe, CONFIGS / "zero3-offload.json", (), world) for world in (1, 2)]
    for found, world in zip(by_world, (1, 2), strict=True):
        planned = plan.plan(plan.PlanOptions(recipe, CONFIGS / "zero3-offload.json", world_size=world)).memory
        assert (found.host, found.device, found.nvme_bytes) == (planned.host, planned.device, planned.nvme)
    assert 0 < by_world[1].host < by_world[0].host
    assert by_world[0].host_alone > 0


def test_files_that_do_not_fit_together_are_a_users_mistake(recipe):
    with pytest.raises(UserError) as caught:
        read_requirements(recipe, CONFIGS / "pipeline2.json", (), 3)
    assert str(caught.value).startswith(
        "megagpt: the world size 3 is not a multiple of 2, the ranks of one model replica"
    )


def test_overrides_without_a_recipe_are_a_mistake():
    with pytest.raises(UserError) as caught:
        read_requirements(None, None, ["model.n_layer=4"], 1)
    assert str(caught.value) == (
        "megagpt: overrides need a recipe, but none is given\n  model.n_layer=4\n  do: pass --recipe"
    )
