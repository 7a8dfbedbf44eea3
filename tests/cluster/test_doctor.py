"""The doctor on two real hosts: each common problem of a cluster is created, and must be reported with its remedy."""

import contextlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.cluster import env_forwarding
from tests import training

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.fixture(scope="module")
def place(hosts, data, tmp_path_factory):
    """A folder on both hosts with a recipe, its data (validation in a folder of its own), a hostfile and variables."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "held").mkdir()
    for file in data.iterdir():
        shutil.copy(file, folder / "held" if "validation" in file.name else folder)
    (folder / "runs").mkdir()
    recipe = training.RECIPE.format(run=folder / "runs/one", data=folder)
    (folder / "recipe.yaml").write_text(recipe.replace(f"{folder}/text.validation", f"{folder}/held/text.validation"))
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    extensions = {**hosts.env, "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    (folder / "variables").write_text(env_forwarding.deepspeed_env(extensions))
    return folder


@pytest.fixture
def examine(cluster, place):
    """Run the doctor on node1, and return its findings by status."""

    def run(*arguments, code=1, config="zero1", **env):
        env = {"DS_ENV_FILE": str(place / "variables"), "TORCH_EXTENSIONS_DIR": str(place / "extensions"),
               "PDSH_SSH_ARGS_APPEND": env_forwarding.SSH_ALIVE, **env}  # fmt: skip
        options = ("--recipe", place / "recipe.yaml", "--deepspeed_config", training.ROOT / f"ds_configs/{config}.json")
        printed = cluster.run(1, "megagpt", "doctor", "--hostfile", place / "hosts", *options, "--json", *arguments,
                              code=code, **env)  # fmt: skip
        return found(printed.splitlines()[-1], place)

    return run


def found(printed, place):
    """(check, hosts, what, do) of all findings by status; checksums and this test's folder are replaced by a word."""
    report = json.loads(printed)
    rows = {status: [] for status in ("ok", "warning", "error", "skipped")}
    for row in report["findings"]:
        texts = [re.sub(r"\b[0-9a-f]{8}\b", "SUM", row[part].replace(str(place), "HERE")) for part in ("what", "do")]
        # the uncertainty is half the round trip: some hundredths of a second on a busy machine
        texts[0] = re.sub(r"its clock is (29\.9|30\.1) s", "its clock is 30.0 s", texts[0])
        rows[row["status"]].append((row["check"], *row["hosts"], *texts))
    assert report["ok"] == (not rows["error"])
    return rows


@contextlib.contextmanager
def bound(cluster, host, **files):
    """Replace files or folders on one host only, with bind mounts."""
    with contextlib.ExitStack() as stack:
        for source, target in files.values():
            cluster.run(host, "mount", "--bind", source, target)
            stack.callback(cluster.run, host, "umount", "-l", target)
        yield


@contextlib.contextmanager
def fault(cluster, host, make, undo):
    cluster.run(host, *make)
    try:
        yield
    finally:
        cluster.run(host, *undo)


@contextlib.contextmanager
def clock_ahead(cluster, host):
    """Set the clock of new ssh sessions on a host 30 s ahead."""
    config = Path(cluster.env["CLUSTER_DIR"], f"node{host}/sshd_config")
    text = config.read_text()
    config.write_text(f"{text}SetEnv LD_PRELOAD={FAKETIME} FAKETIME=+30s\n")
    cluster.run(host, "kill", "-HUP", 1)
    try:
        wait_for_ssh(cluster, host)
        yield
    finally:
        config.write_text(text)
        cluster.run(host, "kill", "-HUP", 1)
        wait_for_ssh(cluster, host)


def wait_for_ssh(cluster, host):
    cluster.run(
        1, "sh", "-c", f"for t in $(seq 100); do ssh node{host} true 2>/dev/null && exit; sleep .1; done; exit 1"
    )


def other(file, folder, change):
    """Return a changed copy of a file."""
    copy = folder / file.name
    copy.write_bytes(change(file.read_bytes()))
    return copy


def test_two_hosts_without_problems(examine, place):
    rows = examine(code=0)
    assert rows["error"] == rows["warning"] == []
    assert [row[0] for row in rows["ok"]] == [
        "connection", "launcher", "python", "packages", "imports", "code", "recipe", "variables", "data",
        "run directory", "disk", "clock", "devices", "operators", "interface", "all-reduce", "open files",
        "locked memory", "host memory",
    ]  # fmt: skip
    passed = {check: what for check, what, _ in rows["ok"]}
    assert passed["connection"] == "2 hosts with 2 ranks answer over ssh"
    assert passed["launcher"] == "pdsh; ssh gives up a silent host after 15 s"
    assert passed["recipe"] == (
        f"HERE/recipe.yaml (SUM), {training.ROOT}/ds_configs/zero1.json (SUM), HERE/text.model (SUM); valid for 2 ranks"
    )
    assert passed["data"] == "2 corpora: the same by size, first and last MiB, and sidecar"
    assert passed["run directory"] == "HERE/runs/one, shared by all hosts"
    assert passed["operators"] == "this layout needs none"
    assert passed["interface"] == "gloo will use eth0"
    assert re.fullmatch(r"2 ranks: gloo \d+\.\d\d GB/s", passed["all-reduce"])
    assert list((place / "runs").iterdir()) == []  # nothing is left behind


def test_every_problem_of_a_host_is_reported_with_its_remedy(cluster, examine, place, tmp_path):
    if FAKETIME is None:
        pytest.skip("a host whose clock is wrong: libfaketime is not installed (tests/install.sh)")
    megagpt = training.ROOT / "megagpt"
    package = Path(next(Path(sys.prefix).glob("lib/python3*/site-packages/safetensors-*.dist-info")))
    version = importlib.metadata.version("safetensors")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    (tmp_path / "empty").mkdir()
    names = tmp_path / "names"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 node2\n10.77.0.1 node1\n")
    lock = place / "extensions/async_io/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    silent = other(
        Path(cluster.env["CLUSTER_DIR"], "ssh_config"),
        tmp_path,
        lambda text: text.replace(b"BatchMode yes", b"ServerAliveInterval 0"),
    )
    on_node2 = {
        "code": (other(megagpt / "report.py", tmp_path, lambda text: text + b"# another\n"), megagpt / "report.py"),
        "package": (
            other(package / "METADATA", tmp_path, lambda text: text.replace(f"\nVersion: {version}".encode(),
                                                                            b"\nVersion: 0.6.99")),
            package / "METADATA",
        ),
        "recipe": (other(place / "recipe.yaml", tmp_path, lambda text: text + b"# mine\n"), place / "recipe.yaml"),
        "missing": (tmp_path / "empty", place / "held"),
        "data": (other(place / "text.train.bin", tmp_path, lambda ids: ids[:-2] + b"\1\1"), place / "text.train.bin"),
        "names": (names, "/etc/hosts"),
    }  # fmt: skip
    with (
        bound(cluster, 2, **on_node2),
        bound(cluster, 1, ssh=(silent, "/etc/ssh/ssh_config")),
        fault(cluster, 2, ("mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", place / "runs"),
              ("umount", "-l", place / "runs")),
        fault(cluster, 2, ("sh", "-c", f"yes >{place}/runs/full; exit 0"), ("rm", place / "runs/full")),
        fault(cluster, 2, ("prlimit", "--pid", "1", "--nofile=70:"), ("prlimit", "--pid", "1", f"--nofile={files}:")),
        clock_ahead(cluster, 2),
    ):  # fmt: skip
        rows = examine(config="zero3-nvme", PDSH_SSH_ARGS_APPEND="")
    assert rows["error"] == [
        ("packages", "node2", f"safetensors 0.6.99; node1 has {version}",
         f'{sys.executable} -m pip install "safetensors=={version}"'),
        ("code", "node2", f"the code in {megagpt} (SUM) differs from node1's (SUM)",
         "check out or copy the same files to every host"),
        ("recipe", "node2", "HERE/recipe.yaml (SUM) differs from node1's (SUM)",
         "copy node1's to every host"),
        ("data", "node2", "HERE/text.train differs from node1's: same size, but other bytes in the first or last MiB",
         "copy HERE/text.train.bin, .idx and .json from node1 again"),
        ("data", "node2", "HERE/held/text.validation.bin: No such file or directory",
         "put the corpus on a shared disk, or copy it to the same path; `megagpt prepare` creates one"),
        ("data", "node2", "HERE/held/text.validation.idx: No such file or directory",
         "put the corpus on a shared disk, or copy it to the same path; `megagpt prepare` creates one"),
        ("run directory", "node2", "HERE/runs/one cannot be written to: No space left on device",
         "free some space, or choose another run_dir"),
        ("disk", "node2", "0 bytes free for HERE/runs/one, but one checkpoint needs 503.7 kB",
         "free some space, or choose another run_dir"),
        ("clock", "node2", "its clock is 30.0 s ahead",
         "synchronize it with chrony or systemd-timesyncd: `timedatectl set-ntp true`"),
        ("operators", "node1", "node2", "async_io is locked by a build that has died: HERE/extensions/async_io/lock",
         "rm HERE/extensions/async_io/lock"),
        ("interface", "node2", "the host's own name resolves to 127.0.1.1, where other hosts cannot reach it: "
         "lo 127.0.0.1, eth0 10.77.0.2",
         "write `10.77.0.2 node2` into /etc/hosts there instead, or export GLOO_SOCKET_IFNAME=eth0 and "
         "NCCL_SOCKET_IFNAME=eth0"),
        ("open files", "node2", "limited to 70, but each of 2 ranks needs at least 74",
         "`* - nofile 288` in /etc/security/limits.conf there, LimitNOFILE=288 for sshd or slurmd"),
    ]  # fmt: skip
    assert rows["warning"] == [
        ("launcher", "node1", "node2",
         "if the host becomes silent, the ssh of `deepspeed` waits forever (no ServerAliveInterval)",
         'export PDSH_SSH_ARGS_APPEND="-oServerAliveInterval=5 -oServerAliveCountMax=3"'),
    ]  # fmt: skip
    assert ("all-reduce", "not run: it would wait because of an error above", "") in rows["skipped"]


def test_a_host_that_denies_login_and_variables_that_are_not_forwarded(cluster, examine, place, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    with bound(cluster, 2, key=(tmp_path / "id.pub", Path(cluster.env["CLUSTER_DIR"], "id.pub"))):
        printed = cluster.run(1, "ssh", "node2", "true", code=255).strip()
        rows = examine(DS_ENV_FILE="none")
    assert "Permission denied" in printed
    assert rows["error"] == [
        ("connection", "node2", f"ssh failed: {printed}",
         "allow login without a password: `ssh-copy-id node2`"),
    ]  # fmt: skip
    kept = ", ".join(env_forwarding.forwarded_variables({**cluster.env, "TORCH_EXTENSIONS_DIR": "HERE"}))
    assert rows["warning"] == [
        ("variables", f"DeepSpeed would not forward these to the other hosts: {kept}",
         "megagpt hosts HOSTFILE --write-environment FILE, and run the `export` line that it prints"),
    ]  # fmt: skip
    assert ("python", f"{sys.version.split()[0]} at {sys.executable}", "") in rows["ok"]


def test_another_python_and_a_run_directory_of_its_own(cluster, examine, place, tmp_path):
    ours = sys.version.split()[0]
    version = f"{ours[:-1]}{(int(ours[-1]) + 1) % 10}"
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    (library,) = {path for path in mapped if "/libpython3." in path} or {str(Path(sys.executable).resolve())}
    python = other(  # this interpreter with another version number
        Path(library), tmp_path, lambda code: code.replace(f"{ours}\0".encode(), f"{version}\0".encode())
    )
    python.chmod(0o755)
    with (
        bound(cluster, 2, python=(python, library)),
        fault(cluster, 2, ("mount", "-t", "tmpfs", "tmpfs", place / "runs"), ("umount", "-l", place / "runs")),
    ):
        rows = examine()
    assert rows["error"][0] == (
        "python", "node2", f"Python {version}; node1 has {ours}",
        "install the same environment on every host",
    )  # fmt: skip
    assert (
        "run directory", "node2", "HERE/runs/one is not shared: files written by node1 are not visible",
        "put run_dir on a disk that every host mounts: each rank writes its part of a checkpoint there",
    ) in rows["error"]  # fmt: skip


def test_a_host_without_the_python(cluster, examine, tmp_path):
    with bound(cluster, 2, python=(tmp_path, Path(sys.executable).parent)):
        rows = examine()
    assert rows["error"] == [
        ("python", "node2", f"there is no Python at {sys.executable}",
         "install the same environment at the same path: DeepSpeed starts the ranks with it"),
    ]  # fmt: skip


def test_a_host_that_hangs_does_not_block_the_others(cluster, examine, place, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # like a disk that does not answer: whoever opens it waits
    with bound(cluster, 2, sidecar=(tmp_path / "pipe", place / "text.train.json")):
        rows = examine("--limit", 6)
    assert rows["error"][0] == (
        "connection", "node2", "no answer within 6 s, at step: data, reading HERE/text.train.json",
        "look on node2 for what hangs: a network disk, a driver (`dmesg`), a stuck process",
    )  # fmt: skip
    assert ("code", f"SUM in {training.ROOT}/megagpt", "") in rows["ok"]


def test_ranks_of_slurm_need_no_ssh_and_no_torch_that_works(slurm, place, tmp_path):
    torch = Path(next(Path(sys.prefix).glob("lib/python3*/site-packages/torch/__init__.py")))
    broken = tmp_path / "__init__.py"
    broken.write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    key = Path(slurm.env["CLUSTER_DIR"], "id.pub")
    with bound(slurm, 2, torch=(broken, torch), key=(broken, key)):
        # into a file: srun's own message about the exit code may appear in the middle of a long line
        slurm.run(1, "srun", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/report", "megagpt", "doctor",
                  "--as-rank", "--json", "--recipe", place / "recipe.yaml", code=1)  # fmt: skip
    printed = (tmp_path / "report").read_text()
    rows = found(next(line for line in printed.splitlines() if line.startswith("{")), place)
    assert rows["error"] == [
        ("imports", "node2", "import torch: ImportError: libcudart.so.12: cannot open shared object file",
         f"run `{sys.executable} -c 'import torch'` there by hand, and fix or reinstall what it complains about"),
    ]  # fmt: skip
    assert ("connection", "2 hosts with 2 ranks answer", "") in rows["ok"]
