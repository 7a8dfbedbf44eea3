"""Two hosts on this machine: network namespaces with own names, processes, ssh servers, SLURM daemons (cluster.sh)."""

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests import training

SCRIPT = Path(__file__).parent / "cluster.sh"
TOOLS = ("ip", "nsenter", "unshare", "ssh", "/usr/sbin/sshd", "pdsh", "slurmctld", "slurmd", "sbatch", "mpirun")
UPDATES = 100
LENGTH = (f"length.updates={UPDATES}", "evaluation.every=1000", "checkpoint.every=50", "log.every=100")


class Cluster:
    """Hosts node1 and node2; every command runs on one of them."""

    def __init__(self, folder):
        bin_ = Path(sys.executable).parent
        self.env = {
            **os.environ,
            "CLUSTER_DIR": str(folder / "c"),
            "CLUSTER_PREFIX": f"m{uuid.uuid4().hex[:4]}",
            "SLURM_CONF": str(folder / "c/slurm/slurm.conf"),
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "PYTHONPATH": str(training.ROOT),
        }

    def make(self, *words):
        """Change the cluster itself: up, slurm, cut, heal, off, boot, down."""
        subprocess.run(["bash", SCRIPT, *words], env=self.env, check=True, timeout=60, cwd=training.ROOT)

    def start(self, host, *words, **env):
        """Start a command on a host."""
        return subprocess.Popen(
            ["bash", SCRIPT, "on", str(host), *map(str, words)], env={**self.env, **env}, cwd=training.ROOT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, host, *words, code=0, seconds=240, **env):
        """Run a command on a host to its end, and insist on its exit code; what it printed."""
        process = self.start(host, *words, **env)
        try:
            printed, _ = process.communicate(timeout=seconds)
        finally:
            process.kill()
        assert process.returncode == code, printed
        return printed

    def ranks(self, host):
        """The ids of the ranks that live on a host, as the host counts them."""
        return self.start(host, "pgrep", "-f", "launch/[p]retrain.py").communicate(timeout=30)[0].split()


def lacking():
    """Why this machine cannot be two hosts; "" where it can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/cluster/install.sh)"
    if os.geteuid():
        return "only root makes network namespaces"
    name = f"m{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no network namespaces: {made.stderr.strip()}" if made.returncode else ""


@pytest.fixture(scope="session")
def cluster(request, tmp_path_factory):
    if not request.config.getoption("--full"):
        pytest.skip("NOT PROVEN, several hosts: they take minutes, --full has them")
    if reason := lacking():
        message = f"NOT PROVEN, several hosts: {reason}"
        (pytest.skip if request.config.getoption("--allow-missing") else pytest.fail)(message)
    hosts = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        hosts.make("up", "2")
        yield hosts
    finally:
        hosts.make("down")


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    """The curve of one process on this machine, never stopped."""
    recipe = training.write_recipe(tmp_path_factory.mktemp("straight") / "run", data)
    training.finish(recipe, *LENGTH)
    return training.curve(recipe.with_suffix(""))


@pytest.fixture
def same(straight, recipe):
    """Whether a run of two ranks has come to its end with that curve, each update made once."""

    def check():
        run = recipe.with_suffix("")
        curve = training.curve(run)
        assert (run / "DONE").exists()
        assert [row["update"] for row in curve] == list(range(1, UPDATES + 1))
        assert [row["position"] for row in curve] == [row["position"] for row in straight]
        # fp32, summed in another order: after 300 updates, not 100, they would have drifted apart
        assert [row["loss"] for row in curve] == pytest.approx([row["loss"] for row in straight], rel=1e-3)
        assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]

    return check
