"""The test hosts themselves: two clusters are isolated, and only what a killed test run has left is removed."""

import os
import subprocess

from tests.cluster.conftest import Cluster


def spaces(cluster, host, other):
    """The network namespaces of a host and, by ssh from there, of another."""
    look = ("readlink", "/proc/self/ns/net")
    return [cluster.run(host, *look).strip(), cluster.run(host, "ssh", f"node{other}", *look).strip()]


def test_two_clusters_are_isolated_and_one_is_removed_when_its_owner_is_dead(cluster, tmp_path):
    with subprocess.Popen(["sleep", "600"]) as owner:
        second = Cluster(tmp_path, owner.pid)
        try:
            second.make("up", "2")
            ours, theirs = ([*spaces(one, 1, 2), *spaces(one, 2, 1)] for one in (cluster, second))
            assert ours == [*ours[:2], *ours[1::-1]]
            assert theirs == [*theirs[:2], *theirs[1::-1]]
            assert len({*ours, *theirs}) == 4
            left = second.start(2, "sleep", "600")
            while not second.processes():
                assert left.poll() is None
            cluster.make("sweep")
            assert spaces(second, 1, 2) == theirs[:2]
        finally:
            owner.kill()
    assert left.poll() is None
    cluster.make("sweep")
    assert left.wait(timeout=30) == -9
    left.stdout.close()
    assert spaces(cluster, 1, 2) == ours[:2]
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"m{os.getpid()}x2" in names
    assert f"m{owner.pid}x" not in names + " ".join(os.listdir("/etc/netns"))
