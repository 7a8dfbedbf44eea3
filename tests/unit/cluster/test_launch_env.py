"""One pure function from the environment to this process's place, for each launcher."""

import socket
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megagpt.cluster import Rank, from_environment, launch_env, slurm_nodelist
from megagpt.errors import UserError

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29611"}
# what each launcher really sets, seen on two hosts; a rank of an allocation has all of SLURM
ALLOCATION = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "0",
}
STEP = {
    **ALLOCATION,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", **ADDRESS}
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", **ADDRESS}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "PMIX_NAMESPACE": "2931425281",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TABLE = {
    "alone": ({}, Rank()),
    "deepspeed": (DEEPSPEED, Rank(3, 1, 4, 2, "node1", 29611, "deepspeed")),
    "deepspeed, in an allocation": ({**ALLOCATION, **DEEPSPEED}, Rank(3, 1, 4, 2, "node1", 29611, "deepspeed")),
    "deepspeed --launcher mpich": (
        {**HYDRA, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", **ADDRESS},
        Rank(1, 1, 2, 2, "node1", 29611, "deepspeed"),
    ),
    "deepspeed --launcher openmpi": ({**OPENMPI, "UCX_TLS": "tcp"}, Rank(1, 0, 2, 1, "", 0, "openmpi", "2931425281")),
    "deepspeed --launcher slurm": (STEP, Rank(3, 1, 4, 2, "node1", 20017, "slurm", "17.0")),
    "torchrun": (
        {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"},
        Rank(0, 0, 2, 1, "node1", 29611, "torchrun", "none"),
    ),
    "torchrun, elastic, started by srun": (
        {**STEP, **TORCHRUN, "TORCHELASTIC_RUN_ID": "j5", "TORCHELASTIC_RESTART_COUNT": "1"},
        Rank(0, 0, 2, 1, "node1", 29611, "torchrun", "j5"),
    ),
    "mpirun, OpenMPI": ({**OPENMPI, **ADDRESS}, Rank(1, 0, 2, 1, "node1", 29611, "openmpi", "2931425281")),
    "mpirun, OpenMPI, in an allocation": (
        {**STEP, **OPENMPI},  # of the step that started its daemons
        Rank(1, 0, 2, 1, "", 0, "openmpi", "2931425281"),
    ),
    "mpirun, MPICH": ({**HYDRA, **ADDRESS}, Rank(1, 1, 2, 2, "node1", 29611, "mpich")),
    "mpirun, MPICH, nothing said of the address": (HYDRA, Rank(1, 1, 2, 2, "", 0, "mpich")),
    "mpirun, MPICH, in an allocation": ({**STEP, **HYDRA}, Rank(1, 1, 2, 2, "", 0, "mpich")),
    "srun": (STEP, Rank(3, 1, 4, 2, "node1", 20017, "slurm", "17.0")),
    "srun, address given": ({**STEP, **ADDRESS}, Rank(3, 1, 4, 2, "node1", 29611, "slurm", "17.0")),
    "srun --mpi=pmi2": ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, Rank(3, 1, 4, 2, "node1", 20017, "slurm", "17.0")),
    "srun, hosts that differ": (
        {**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"},
        Rank(3, 0, 4, 1, "node1", 20017, "slurm", "17.0"),
    ),
    "srun, one task": (
        {**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1",
         "SLURM_NODEID": "0"},
        Rank(job="17.0", launcher="slurm"),
    ),
    "in an allocation, not by srun": (ALLOCATION, Rank()),
    "in a batch script": ({**ALLOCATION, "SLURM_STEP_ID": "4294967291"}, Rank()),
    "in an interactive step": ({**ALLOCATION, "SLURM_STEP_ID": "4294967290"}, Rank()),
    "a job named by hand": ({**DEEPSPEED, "MEGAGPT_JOB": "x1"}, Rank(3, 1, 4, 2, "node1", 29611, "deepspeed", "x1")),
    "by hand, one rank": ({"RANK": "0", "WORLD_SIZE": "1"}, Rank(launcher="environment")),
}  # fmt: skip


@pytest.mark.parametrize("launcher", TABLE)
def test_the_rank_is_read_from_each_launcher(launcher):
    environment, expected = TABLE[launcher]
    assert from_environment(environment) == expected


def test_the_pods_of_the_kubernetes_example_are_its_ranks():
    file = Path(__file__).parents[3] / "launch/kubernetes.yaml"
    service, job = yaml.safe_load_all(file.read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod, count = spec["template"]["spec"], spec["completions"]
    (container,) = pod["containers"]
    # what Kubernetes itself writes on pod i of an indexed Job (kubernetes.io/docs/concepts/workloads/controllers/job)
    fields = {
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": lambda i: str(i),
        "metadata.labels['batch.kubernetes.io/controller-uid']": lambda i: "uid-1",
    }
    for i in range(count):
        env = {
            entry["name"]: entry["value"]
            if "value" in entry
            else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]](i)
            for entry in container["env"]
        }
        assert from_environment(env) == Rank(i, 0, count, 1, f"{name}-0.{name}", 29500, "environment", "uid-1")
    assert spec["parallelism"] == count
    assert container["args"][container["args"].index("--expect-world-size") + 1] == str(count)
    assert (pod["subdomain"], service["spec"]["selector"]) == (service["metadata"]["name"], {"job-name": name})


DO = "\n  do: let the launcher set its variables, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
MISTAKES = {
    "no address": (
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        "environment started 2 ranks, but the address of rank 0 is not known\n  MASTER_ADDR is not set\n"
        "  do: export MASTER_ADDR=HOST_OF_RANK_0 and MASTER_PORT=PORT before the launcher starts the ranks",
    ),
    "no world": ({"RANK": "0"}, "WORLD_SIZE is not set\n  WORLD_SIZE" + DO),
    "no rank": ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but the rank of this process is not set\n  RANK" + DO),
    "no local rank": ({**ADDRESS, "RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set\n  LOCAL_RANK" + DO),
    "no number": (
        {**DEEPSPEED, "MASTER_PORT": "auto"},
        "MASTER_PORT is 'auto', not a number\n  MASTER_PORT" + DO,
    ),
    "too large": ({**DEEPSPEED, "RANK": "4"}, "rank 4 is not below the world size 4\n  RANK, WORLD_SIZE" + DO),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_missing_or_invalid_variables_are_errors(mistake):
    environment, message = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        from_environment(environment)
    assert str(caught.value) == f"megagpt: {message}"


def test_all_five_variables_are_set_so_that_deepspeed_does_not_look_for_mpi():
    variables = Rank().env_variables()
    assert set(variables) == {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    assert int(variables["MASTER_PORT"]) > 0


# the right sides are what `scontrol show hostnames` prints
@pytest.mark.parametrize(
    ("short", "hosts"),
    [
        ("", []),
        ("login", ["login"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-10,2],gpu-a", ["node08", "node09", "node10", "node2", "gpu-a"]),
        ("r[1-2]n[1-2].x", ["r1n1.x", "r1n2.x", "r2n1.x", "r2n2.x"]),
        ("a,b[7],c", ["a", "b7", "c"]),
    ],
)
def test_host_lists_are_expanded_as_by_scontrol(short, hosts):
    assert slurm_nodelist.expand_hosts(short) == hosts


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 5)), max_size=5))
def test_task_counts_are_expanded(runs):
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert slurm_nodelist.expand_counts(text) == [count for count, times in runs for _ in range(times)]


@given(st.integers(0, 10**9))
def test_consecutive_jobs_do_not_share_a_port_and_none_is_ephemeral(job):
    ports = {launch_env.job_port(str(number)) for number in range(job, job + 100)}
    assert len(ports) == 100
    assert min(ports) > 1023
    assert max(ports) < 32768  # where Linux's ip_local_port_range begins


def test_a_free_port_is_returned_once_and_is_neither_ephemeral_nor_one_of_a_slurm_job():
    first = launch_env.free_port()
    with socket.create_server(("", first + 2)), socket.create_server(("", first + 5)):
        ports = [launch_env.free_port() for _ in range(50)]
    assert not {first, first + 2, first + 4} & {*ports}  # 2 is in use, and the one after 4
    assert len({*ports}) == 50
    assert 1023 < min(ports) < max(ports) < min(launch_env.job_port(str(number)) for number in range(20_000))
