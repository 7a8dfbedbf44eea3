"""Faults of hosts during training: a disk that is temporarily slow, a host that loses power and boots again."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

from tests import training

SLOW_DISK = """
import os, time
if "launch/pretrain.py" in " ".join(sys.orig_argv):
    quick = os.pread
    def pread(*arguments):
        if os.path.exists({file!r}):
            time.sleep({seconds})
        return quick(*arguments)
    os.pread = pread
"""


class SlowDisk:
    """Make reading a sample take 0.1 s on all hosts until `quick` is called, so that a fault hits during training."""

    def __init__(self, folder, seconds=0.1):
        site, self._file = folder / "site", folder / "slow"
        site.mkdir()
        self._file.touch()
        (site / "sitecustomize.py").write_text("import sys" + SLOW_DISK.format(file=str(self._file), seconds=seconds))
        self.env = {"PYTHONPATH": f"{site}{os.pathsep}{training.ROOT}"}

    def quick(self):
        self._file.unlink()


def power_on(cluster, host):
    """Boot a host, and start its SLURM daemon if there is one."""
    cluster.make("boot", str(host))
    until(lambda: answers(cluster, host, "true"), 30)
    if Path(cluster.env["SLURM_CONF"]).exists():
        cluster.run(host, "slurmd", "-N", f"node{host}")


@contextmanager
def without_controller(cluster):
    """Stop SLURM's controller temporarily; jobs keep running."""
    cluster.run(1, "pkill", "-x", "slurmctld")
    # its state is saved at once; after that SLURM 22.05 sometimes deadlocks
    gone = "for t in $(seq 100); do pgrep -x slurmctld || exit 0; sleep .1; done; pkill -9 -x slurmctld; exit 0"
    cluster.run(1, "sh", "-c", gone)
    try:
        until(lambda: not answers(cluster, 1, "pgrep", "-x", "slurmctld"), 60)
        yield
    finally:
        cluster.run(1, "slurmctld")
        until(lambda: answers(cluster, 1, "scontrol", "ping"), 60)


def answers(cluster, host, *words):
    """Return True if a command on a host succeeds."""
    with cluster.start(host, *words, seconds=30) as process:
        process.communicate()
    return process.returncode == 0


def until(holds, seconds):
    """Wait until `holds` returns True."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"{seconds} s are over")
        time.sleep(0.2)
