"""Preflight: another number of ranks or hosts than intended is refused, with both numbers, before anything is built."""

import base64
import socket
import subprocess
import sys

import pytest

from megagpt.cluster import Rank, env_forwarding, preflight, reachability
from megagpt.errors import UserError

SAME = {"recipe": "0a1b", "torch": "2.13.0"}


def facts(*hosts, **changes):
    """Return descriptions of ranks on these hosts; the last one with changes."""
    ranks = [{"host": host, "boot": "", "address": f"10.0.0.{number}", "launcher_hosts": [], "same": dict(SAME),
             "environment": {"OMP_NUM_THREADS": "1"}} for number, host in enumerate(hosts)]  # fmt: skip
    ranks[-1].update(changes)
    return [preflight.json.dumps(one) for one in ranks]


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def test_another_world_size_than_expected_is_refused_with_both_numbers():
    preflight.check_world_size(Rank(), None)
    preflight.check_world_size(Rank(), 1)
    assert refusal(preflight.check_world_size, Rank(), 8) == (
        "megagpt: expected 8 ranks, but 1 started\n"
        "  launcher: python, --expect-world-size 8\n"
        "  do: check the hostfile's path and slots, or the launcher's number of processes"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["python", "/venv/bin/deepspeed", "--hostfile", "{}", "launch/pretrain.py"],
        ["/venv/bin/deepspeed", "-H", "{}", "train.py"],
        ["python", "-m", "deepspeed.launcher.runner", "--hostfile={}", "train.py"],
    ],
)
def test_a_mistyped_hostfile_is_refused_and_a_real_one_is_not(words, tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    for name in ("hosts", "hots"):
        line = [word.format(tmp_path / name) for word in words]
        assert preflight.hostfile_of(line) == str(tmp_path / name)
    preflight.check_world_size(Rank(), None, [["sh"], [word.format(tmp_path / "hosts") for word in words]])
    assert refusal(preflight.check_world_size, Rank(), None, [["sh"], line]) == (
        "megagpt: the hostfile does not exist, so DeepSpeed started 1 rank on this host only\n"
        f"  deepspeed --hostfile {tmp_path}/hots\n"
        "  do: correct the path of the hostfile; to train on this host only, leave out --hostfile"
    )
    preflight.check_world_size(Rank(), 1, [line])  # one rank is intended


@pytest.mark.parametrize(
    "words", [["vim", "deepspeed.txt", "--hostfile", "x"], ["deepspeed", "train.py", "--hostfile", "x"], ["deepspeed"]]
)
def test_options_of_other_programs_are_not_the_launchers(words):
    assert preflight.hostfile_of(words) is None


def test_the_command_lines_of_the_ancestors_are_found():
    program = "import json; from megagpt.cluster import preflight; print(json.dumps(preflight.ancestors()))"
    shell = f"'{sys.executable}' -c '{program}' && :"
    made = subprocess.run(["sh", "-c", shell, "(unusual) name"], capture_output=True, text=True, check=True)
    nearest = preflight.json.loads(made.stdout)[0]
    assert nearest == ["sh", "-c", shell, "(unusual) name", ""]


STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_JOB_NODELIST": "node[1-3]"}


@pytest.mark.parametrize(
    ("env", "hosts", "message"),
    [
        (STEP, ["a"],
         "SLURM allocated 2 hosts, node1, node2, but the job's only rank runs on 1: a\n  the nodes of the step"),
        ({"SLURM_JOB_NODELIST": "node[1-3]"}, ["a", "a"],
         "SLURM allocated 3 hosts, node1, node2, node3, but the job's 2 ranks run on 1: a\n  the nodes of the job"),
    ],
)  # fmt: skip
def test_hosts_that_slurm_allocated_and_no_rank_uses_are_named(env, hosts, message):
    rank = Rank(world_size=len(hosts))
    assert refusal(preflight.check_hosts, rank, facts(*hosts), env, None) == (
        f"megagpt: {message}\n  do: start one task per device with srun, or pass --expect-world-size {len(hosts)} "
        "if these ranks are intended"
    )
    assert preflight.check_hosts(rank, facts(*hosts), env, len(hosts)) == []
    assert preflight.check_hosts(rank, facts(*hosts), {**env, "TORCHELASTIC_RESTART_COUNT": "1"}, None) == []


def test_the_allocated_hosts_are_accepted():
    assert preflight.check_hosts(Rank(world_size=3), facts("a", "b", "b"), STEP, None) == []


def launched(hosts):
    """Return the command line of DeepSpeed's launcher on one of these hosts, with one rank each."""
    info = base64.urlsafe_b64encode(preflight.json.dumps({host: [0] for host in hosts}).encode()).decode()
    return ["python", "-u", "-m", "deepspeed.launcher.launch", f"--world_info={info}", "--node_rank=0", "train.py"]


def test_two_names_of_one_host_are_refused_with_both():
    env = {"MEGAGPT_HOSTS": "a/b"}
    assert preflight.hosts_of_launcher([["sh"], launched(["node1", "node2"])], env) == ["node1", "node2"]
    assert preflight.hosts_of_launcher([["sh"]], env) == ["a", "b"]
    assert preflight.hosts_of_launcher([["sh"]], {}) == []
    told = facts("node1", "node1", launcher_hosts=["node1", "node2"])
    for expected in (None, 2):
        assert refusal(preflight.check_hosts, Rank(world_size=2), told, {}, expected) == (
            "megagpt: deepspeed was given 2 hosts, node1, node2, but the job's 2 ranks run on 1: node1\n"
            "  the hostfile\n  do: check which host each name of the hostfile leads to (`ssh NAME hostname`); "
            "--launcher slurm also needs --num_nodes, --no_ssh needs one launcher on each host"
        )
    two = facts("localhost", "localhost", boot="another", launcher_hosts=["10.0.0.1", "10.0.0.2"])
    assert preflight.check_hosts(Rank(world_size=2), two, {}, None) == []  # machines of one name
    alone = facts("a", "a", launcher_hosts=["localhost"])
    assert preflight.check_hosts(Rank(world_size=2), alone, {}, None) == []


def test_the_host_of_each_rank_is_known_under_deepspeeds_launcher():
    assert preflight.host_per_rank([["sh"], launched(["a", "b"])]) == ["a", "b"]
    assert preflight.host_per_rank([["sh"]]) == []


def test_a_rank_describes_its_host_and_launcher():
    told = preflight.describe_rank(SAME, {"OMP_NUM_THREADS": "1"}, [launched(["a", "b"])])
    (host,) = preflight.locations_of_ranks([told])
    assert host.name == socket.gethostname()
    assert reachability.unreachable_addresses([host.address]) == []
    assert preflight.json.loads(told)["launcher_hosts"] == ["a", "b"]


def test_ranks_with_another_recipe_or_version_are_refused_all_at_once():
    told = facts("a", "b", same={"recipe": "ffff", "torch": "2.12.1"})
    assert refusal(preflight.check_hosts, Rank(world_size=2), told, {}, None) == (
        "megagpt: rank 0 and rank 1 have different recipe: 0a1b and ffff\n"
        "  hosts a and b\n  do: install and copy the same files to every host\n"
        "megagpt: rank 0 and rank 1 have different torch: 2.13.0 and 2.12.1\n"
        "  hosts a and b\n  do: install and copy the same files to every host"
    )


def test_environment_variables_that_differ_are_refused_by_name():
    told = facts("a", "b", environment={"NCCL_DEBUG": "INFO"})
    help_ = (
        "  do: forward it (`megagpt hosts --write-environment`, `mpirun -x`, `srun --export`), or set it on each host"
    )
    assert refusal(preflight.check_hosts, Rank(world_size=2), told, {}, None) == (
        "megagpt: 2 environment variables differ between ranks\n"
        "  NCCL_DEBUG: not set on rank 0 (a), INFO on rank 1 (b)\n"
        f"  OMP_NUM_THREADS: 1 on rank 0 (a), not set on rank 1 (b)\n{help_}"
    )
    told = facts("a", "b", environment={"OMP_NUM_THREADS": "2"})
    assert refusal(preflight.check_hosts, Rank(world_size=2), told, {}, None) == (
        "megagpt: an environment variable differs between ranks\n"
        f"  OMP_NUM_THREADS: 1 on rank 0 (a), 2 on rank 1 (b)\n{help_}"
    )


@pytest.mark.parametrize("name", ["NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "HF_HOME", "TORCH_EXTENSIONS_DIR"])
def test_a_path_or_device_that_differs_per_host_is_only_a_note(name):
    told = facts("a", "b", environment={"OMP_NUM_THREADS": "1", name: "x"})
    assert preflight.check_hosts(Rank(world_size=2), told, {}, None) == [
        f"{name}: not set on rank 0 (a), x on rank 1 (b)"
    ]


def test_the_file_for_deepspeed_has_only_what_training_depends_on():
    env = {"OMP_NUM_THREADS": "4", "HOME": "x", "NCCL_DEBUG": "INFO", "HF_HOME": "a b", "RANK": "1", "GLOO_X": ""}
    assert env_forwarding.deepspeed_env(env) == "HF_HOME=a b\nNCCL_DEBUG=INFO\nOMP_NUM_THREADS=4\n"


@pytest.mark.parametrize("value", ["$HOME/x", 'say "x"', "a\nb", "`x`", "a\\b"])
def test_a_value_that_a_shell_would_change_is_refused(value):
    assert refusal(env_forwarding.deepspeed_env, {"HF_HOME": value}) == (
        f"megagpt: HF_HOME cannot be forwarded: its value {value!r} has characters that a shell interprets\n"
        "  the environment\n  do: unset HF_HOME, or set it on each host"
    )
