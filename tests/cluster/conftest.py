"""Two hosts on one machine: network namespaces with their own names, processes, ssh and SLURM daemons (cluster.sh)."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from megagpt.cluster import Rank
from megagpt.training import status
from tests import training

SCRIPT = Path(__file__).parent / "cluster.sh"
TOOLS = ("ip", "nsenter", "unshare", "pgrep", "ssh", "/usr/sbin/sshd", "pdsh", "slurmctld", "slurmd", "sbatch",
         "mpirun", "mpirun.mpich")  # fmt: skip
OPENMPI = ("mpirun", "--allow-run-as-root", "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include",
           "eth0", "-host", "node1,node2", "-n", "2")  # fmt: skip
KEPT = ("unshare", "sshd", "slurmctld", "slurmd")  # processes of a host itself, which run as long as it does
UPDATES = 100
LENGTH = (f"length.updates={UPDATES}", "evaluation.every=1000", "checkpoint.every=50", "log.every=100")
SECONDS = 480  # per command, so that no test waits forever
REPORT = pytest.StashKey()


class Cluster:
    """Hosts node1 and node2; every command runs on one of them. They belong to the process `owner`."""

    def __init__(self, folder, owner):
        bin_ = Path(sys.executable).parent
        self.folder = folder / "c"
        self._prefix = f"m{owner}x"
        self.env = {
            **{
                name: value for name, value in os.environ.items() if name not in Rank().env_variables()
            },  # of other tests
            "CLUSTER_DIR": str(self.folder),
            "CLUSTER_OWNER": str(owner),
            "SLURM_CONF": str(self.folder / "slurm/slurm.conf"),
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "PYTHONPATH": str(training.ROOT),
        }

    def make(self, *words):
        """Change the cluster itself: up, slurm, cut, heal, off, boot, down, or sweep (remove those of dead owners)."""
        subprocess.run(["bash", SCRIPT, *words], env=self.env, check=True, timeout=180, cwd=training.ROOT)

    def start(self, host, *words, seconds=SECONDS, **env):
        """Start a command on a host, with a time limit. All processes that it starts end with its test."""
        return subprocess.Popen(
            ["bash", SCRIPT, "on", str(host), "timeout", "-k", "5", str(seconds), *map(str, words)],
            env={**self.env, **env}, cwd=training.ROOT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, host, *words, code=0, **more):
        """Run a command on a host, check its exit code, and return what it printed."""
        with self.start(host, *words, **more) as process:
            printed, _ = process.communicate()
        assert process.returncode == code, printed
        return printed

    def ranks(self, host):
        """Return the process ids of the ranks on a host, as seen on that host."""
        return self.start(host, "pgrep", "-f", "launch/[p]retrain.py", seconds=30).communicate()[0].split()

    def processes(self):
        """Return the ids of all processes on both hosts except the hosts' own, as seen by this process."""
        ids = []
        for host in (1, 2):
            listed = subprocess.run(["ip", "netns", "pids", f"{self._prefix}{host}"], capture_output=True, text=True)
            ids += [int(word) for word in listed.stdout.split() if _name(word) not in KEPT]
        return ids

    def logs(self, run):
        """Return the last lines of the logs of hosts, SLURM and the ranks of a run, by file."""
        files = sorted([*self.folder.glob("*/*log"), *run.glob("logs/*.log"), *run.parent.glob("*.log")])
        return {file.name: "\n".join(file.read_text(errors="replace").splitlines()[-40:]) for file in files}


def _name(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return KEPT[0]  # it has ended


def said(printed):
    """Return megagpt's messages in the output of a launcher, without duplicates.

    Messages of several ranks are separated by their prefix: the host name of pdsh, or the rank number of mpirun.
    """
    streams = defaultdict(list)
    for line in printed.splitlines():
        prefix, text = re.fullmatch(r"(node\d: |\[1,\d\]<\w+>:|\[\d\] )?(.*)", line).groups()
        if text.startswith("megagpt: "):
            streams[prefix].append(text)
        elif text.startswith("  ") and streams[prefix]:
            streams[prefix][-1] += f"\n{text}"
    return sorted({message for messages in streams.values() for message in messages})


def lacking():
    """Return why this machine cannot act as two hosts; "" if it can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/install.sh)"
    if os.geteuid():
        return "only root makes network namespaces"
    name = f"m{os.getpid()}y"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no network namespaces: {made.stderr.strip()}" if made.returncode else ""


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Two hosts for all tests. Clusters left by killed test runs are removed first."""
    if reason := lacking():
        pytest.skip(f"several hosts: {reason}")
    hosts = Cluster(tmp_path_factory.mktemp("cluster"), os.getpid())
    hosts.make("sweep")
    try:
        hosts.make("up", "2")
        yield hosts
    finally:
        hosts.make("down")


@pytest.fixture
def cluster(hosts, tmp_path, request):
    """The hosts. Processes that a test has started are killed at its end; if it fails, the logs are shown."""
    yield hosts
    for pid in hosts.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    report = request.node.stash.get(REPORT, None)
    if report and report.failed:
        report.sections += hosts.logs(tmp_path / "run").items()


@pytest.fixture(scope="session")
def _slurm(hosts):
    hosts.make("slurm", "2")


@pytest.fixture
def slurm(_slurm, cluster):
    """The hosts, with SLURM."""
    return cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[REPORT] = report
    return report


@pytest.fixture
def deepspeed(cluster, tmp_path):
    """Return the start of a command line of DeepSpeed's launcher for a number of ranks per host, and its environment.

    The environment is that of the `export` line that `megagpt hosts` prints.
    """

    def words(slots=1):
        hosts, environment = tmp_path / "hosts", tmp_path / "environment"
        hosts.write_text(f"node1 slots={slots}\nnode2 slots={slots}\n")
        said = cluster.run(1, "megagpt", "hosts", hosts, "--write-environment", environment)
        name, *exports = shlex.split(said.splitlines()[-1])
        assert name == "export"
        line = ("deepspeed", "--hostfile", hosts, "--no_local_rank")
        return line, dict(export.split("=", 1) for export in exports)

    return words


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    """The loss curve of one process on this machine that was never stopped."""
    recipe = training.write_recipe(tmp_path_factory.mktemp("straight") / "run", data)
    training.finish(recipe, *LENGTH)
    return training.curve(recipe.with_suffix(""))


@pytest.fixture
def same(straight, recipe):
    """Check that a run of two ranks is done, with that curve, and every update recorded once."""

    def check(recipe=recipe):
        run = recipe.with_suffix("")
        curve = training.curve(run)
        assert status.read(run).code == 0
        assert [row["update"] for row in curve] == list(range(1, UPDATES + 1))
        assert [row["position"] for row in curve] == [row["position"] for row in straight]
        # fp32 sums in another order: after 300 updates instead of 100 they would differ by more
        assert [row["loss"] for row in curve] == pytest.approx([row["loss"] for row in straight], rel=1e-3)
        assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]

    return check
