"""torchrun on two hosts, with fixed ranks and with hosts that leave and return: always the curve of one process."""

import re

from tests import training
from tests.cluster.conftest import LENGTH
from tests.cluster.faults import SlowDisk, power_on, until


class Agents:
    """torchrun's agents on the hosts, and their output."""

    def __init__(self, cluster, recipe, *options, **env):
        self._cluster, self._recipe, self._options, self._env = cluster, recipe, options, env
        self._started = []

    def start(self, host, *options):
        """Start the agent of a host."""
        command = training.command(self._recipe, *LENGTH, "log.hang_after=5", "checkpoint.every=10")[1:]
        words = ("torchrun", "--nproc_per_node=1", *self._options, *options, *command)
        self._started.append(self._cluster.start(host, *words, **self._env))
        return self._started[-1]

    def end(self, agent):
        """Wait until an agent ends by itself, check that it succeeded, and return its output."""
        printed, _ = agent.communicate(timeout=480)
        assert agent.returncode == 0, printed
        return printed

    def close(self):
        for process in self._started:
            process.kill()
            print(process.communicate()[0])  # shown if the test fails


def elastic(cluster, recipe, disk):
    """Agents that continue with one host or two, and wait 15 s for others when there is one.

    While they share a store, torch 2.13 does not tell an agent that comes later where rank 0 is.
    """
    return Agents(
        cluster, recipe, "--nnodes=1:2", "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_endpoint=node1:29400",
        "--rdzv_id=j1", "--rdzv_conf=last_call_timeout=15,join_timeout=120", **disk.env,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # fmt: skip


def resumes(recipe):
    return [event for event in training.events(recipe.with_suffix("")) if event["event"] == "resume"]


def sizes(printed):
    return re.findall(r"layout +(\d) × CPU", printed)


def test_torchrun_with_fixed_ranks(cluster, recipe, same):
    agents = Agents(cluster, recipe, "--nnodes=2", "--master_addr=node1", "--master_port=29500")
    try:
        both = [agents.start(host, f"--node_rank={host - 1}") for host in (1, 2)]
        printed = [agents.end(agent) for agent in both]
    finally:
        agents.close()
    assert sizes("".join(printed)) == ["2"]
    same()


def test_a_host_that_loses_power_is_left_out_and_rejoins_after_booting(cluster, recipe, same, tmp_path):
    run, disk = recipe.with_suffix(""), SlowDisk(tmp_path)
    agents = elastic(cluster, recipe, disk)
    try:
        first = agents.start(1)
        agents.start(2)
        training.wait_for_update(run, 11, 180)
        cluster.make("off", "2")  # the other host is not notified
        until(lambda: len(resumes(recipe)) == 1, 180)
        power_on(cluster, 2)
        second = agents.start(2)
        until(lambda: len(resumes(recipe)) == 2, 180)
        disk.quick()
        printed = agents.end(first), agents.end(second)
    finally:
        agents.close()
    assert sizes("".join(printed)) == ["2", "1", "2"]
    same()


def test_a_killed_agent_is_replaced_and_no_update_is_repeated(cluster, recipe, same, tmp_path):
    run, disk = recipe.with_suffix(""), SlowDisk(tmp_path)
    agents = elastic(cluster, recipe, disk)
    try:
        first = agents.start(1)
        agents.start(2)
        training.wait_for_update(run, 11, 180)
        cluster.run(2, "pkill", "-9", "-f", "bin/[t]orchrun")  # its rank and the run continue
        second = agents.start(2)
        until(lambda: len(resumes(recipe)) == 1, 180)
        disk.quick()
        printed = agents.end(first), agents.end(second)
    finally:
        agents.close()
    assert sizes("".join(printed)) == ["2", "2"]
    assert resumes(recipe)[0]["lost_seconds"] == 0
    same()
