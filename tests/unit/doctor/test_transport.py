"""What an end of ssh means, and what is asked for: by the file, as DeepSpeed's launcher does it."""

import os
import socket
import sys
import time
from contextlib import closing

import pytest
from megagpt.doctor.links import Lost

from megagpt import plan
from megagpt.distributed.handshake import Channel
from megagpt.doctor import links, needs
from megagpt.errors import UserError
from tests import training

CONFIGS = training.ROOT / "ds_configs"
UP = "see whether n is up, runs sshd, and is let through by firewalls: `ssh n true` must work"


@pytest.mark.parametrize(
    ("code", "error", "check", "what", "do"),
    [
        (255, "ssh: Could not resolve hostname n: Name or service not known", "reach",
         "ssh does not come through: ssh: Could not resolve hostname n: Name or service not known",
         "mend the name in the hostfile, or give it an address in DNS or /etc/hosts"),
        (255, "Host key verification failed.", "reach", "ssh does not come through: Host key verification failed.",
         "make the host known: `ssh-keyscan n >> ~/.ssh/known_hosts`"),
        (255, "ssh: connect to host n port 22: Connection refused", "reach",
         "ssh does not come through: ssh: connect to host n port 22: Connection refused", UP),
        (255, "", "reach", "ssh does not come through: no reason given", UP),
        (101, "", "code", f"there is no folder {os.getcwd()}",
         "mount or copy it to the same path: DeepSpeed starts the ranks there"),
        (102, "", "python", f"there is no Python at {sys.executable}",
         "install the same environment at the same path: DeepSpeed starts the ranks with it"),
        (1, "/env/bin/python: No module named megagpt", "code",
         "megagpt cannot be imported: /env/bin/python: No module named megagpt",
         f"install megagpt there, or copy it to {os.getcwd()}"),
        (134, "Fatal Python error", "reach",
         "the doctor's part of this host ended with exit code 134: Fatal Python error",
         "run `python -m megagpt host-agent` there by hand, and fix what it reports"),
    ],
)  # fmt: skip
def test_how_a_host_is_lost(code, error, check, what, do):
    found = links._ended_there("n", code, error)
    assert (found.check, found.mark, found.hosts, found.what, found.do) == (check, "bad", ("n",), what, do)


def test_variables_are_those_that_deepspeed_hands_on(tmp_path, monkeypatch):
    (tmp_path / "variables").write_text("OMP_NUM_THREADS=1\nHF_HOME=/a=b\n")
    monkeypatch.chdir(tmp_path)
    env = {"PYTHONPATH": "/p", "PYTHONHASHSEED": "0", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "8", "HOME": "/h",
           "DS_ENV_FILE": "variables"}  # fmt: skip
    assert links.exports(env) == {
        "PYTHONPATH": f"{tmp_path}:/p", "PYTHONHASHSEED": "0", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1",
        "HF_HOME": "/a=b",
    }  # fmt: skip


def until_lost(link):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        link.ask("clock", 60)
        time.sleep(0.1)


def test_an_answer_that_does_not_come_names_what_was_being_done():
    ours, theirs = (
        Channel(end, *keys) for end, keys in zip(socket.socketpair(), ((b"a", b"b"), (b"b", b"a")), strict=True)
    )
    link = links.over_channel(ours, "n")
    with closing(theirs):
        theirs.send(b"a shell that greets\n")
        theirs.send(b'megagpt-doctor {"doing": "data"}\n')
        with pytest.raises(Lost) as caught:
            link.ask("facts", 2)
    assert caught.value.finding.what == "no answer in 2 s, at: data"
    with pytest.raises(Lost) as caught:
        until_lost(link)
    assert caught.value.finding.what == "the rank has ended"
    link.close()


def test_a_part_of_the_doctor_that_dies_is_told_with_its_last_words(monkeypatch):
    monkeypatch.setenv("PYTHONSTARTUP", "")
    link = links._process([sys.executable, "-c", "import sys; sys.exit('no such thing')"], "n", links._ended_here)
    with pytest.raises(Lost) as caught:
        link.ask("hello", 60)
    link.close()
    assert caught.value.finding.what == "the doctor's part of this host ended with exit code 1: no such thing"


def test_the_doctors_part_ends_by_itself():
    link = links.local()
    link.ask("hello", 60, limit=1)
    with pytest.raises(Lost):
        until_lost(link)
    link.close()


def test_needs_of_a_recipe_and_of_each_kind_of_config(recipe):
    asked = needs.of(recipe, CONFIGS / "zero3-nvme.json", ["data.validation=v"], 2)
    text = recipe.read_text()
    assert asked.corpora == (text.split("train: ")[1].split(",")[0], "v")
    assert asked.files == (str(recipe), str(CONFIGS / "zero3-nvme.json"), text.split("tokenizer: ")[1].split(",")[0])
    assert (asked.operators, asked.gpu_operators, asked.nvme, asked.offloads) == (("async_io",), (), "runs/nvme", True)
    # two blocks of 4 x 32 x 32 + 2 x 128 x 32 and two norms of 32; 320 x 32 tied, a last norm
    assert asked.checkpoint == int(1.2 * 12 * (2 * (4 * 1024 + 8192 + 64) + 10240 + 32))
    kinds = [needs.of(None, CONFIGS / f"{name}.json", (), 1) for name in ("zero1", "zeropp", "zero2-offload")]
    assert [(one.operators, one.gpu_operators, one.offloads) for one in kinds] == [
        ((), ("fused_adam",), False), ((), ("fused_adam", "quantizer"), False), ((), (), True)]  # fmt: skip
    changed = needs.of(recipe, CONFIGS / "zero2.json", ["ds.zero_optimization.offload_optimizer={device: cpu}"], 1)
    assert (changed.offloads, changed.gpu_operators) == (True, ())
    assert needs.of(None, None, (), 1) == needs.Needs()


def test_bytes_are_those_of_the_plan(recipe):
    found = [needs.of(recipe, CONFIGS / "zero3-offload.json", (), world) for world in (1, 2)]
    for asked, world in zip(found, (1, 2), strict=True):
        planned = plan.plan(plan.Options(recipe, CONFIGS / "zero3-offload.json", world_size=world)).memory
        assert (asked.host, asked.device, asked.nvme_bytes) == (planned.host, planned.device, planned.nvme)
    assert 0 < found[1].host < found[0].host
    assert found[0].host_alone > 0


def test_files_that_do_not_fit_together_are_a_users_mistake(recipe):
    with pytest.raises(UserError) as caught:
        needs.of(recipe, CONFIGS / "pipeline2.json", (), 3)
    assert str(caught.value).startswith(
        "megagpt: the world size 3 is not a multiple of 2, the ranks of one model replica"
    )


def test_words_without_a_recipe_are_a_mistake():
    with pytest.raises(UserError) as caught:
        needs.of(None, None, ["model.n_layer=4"], 1)
    assert str(caught.value) == (
        "megagpt: these words change a recipe, but none is given\n  model.n_layer=4\n  do: give --recipe"
    )
