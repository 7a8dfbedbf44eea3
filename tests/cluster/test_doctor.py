"""The doctor on two real hosts: each thing that goes wrong on a cluster is really made, and told with its remedy."""

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

from megagpt.distributed import passing
from tests import training

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.fixture(scope="module")
def place(hosts, data, tmp_path_factory):
    """A recipe with its validation in a folder of its own, hostfile, variables: as they are on both hosts."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "held").mkdir()
    for file in data.iterdir():
        shutil.copy(file, folder / "held" if "validation" in file.name else folder)
    (folder / "runs").mkdir()
    recipe = training.RECIPE.format(run=folder / "runs/one", data=folder)
    (folder / "recipe.yaml").write_text(recipe.replace(f"{folder}/text.validation", f"{folder}/held/text.validation"))
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    extensions = {**hosts.env, "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    (folder / "variables").write_text(passing.deepspeed_env(extensions))
    return folder


@pytest.fixture
def examine(cluster, place):
    """Runs the doctor on node1, and gives what it found by the kind of its finding."""

    def run(*words, code=1, config="zero1", **env):
        env = {"DS_ENV_FILE": str(place / "variables"), "TORCH_EXTENSIONS_DIR": str(place / "extensions"),
               "PDSH_SSH_ARGS_APPEND": passing.SSH_ALIVE, **env}  # fmt: skip
        asked = ("--recipe", place / "recipe.yaml", "--deepspeed_config", training.ROOT / f"ds_configs/{config}.json")
        printed = cluster.run(1, "megagpt", "doctor", "--hostfile", place / "hosts", *asked, "--json", *words,
                              code=code, **env)  # fmt: skip
        return found(printed.splitlines()[-1], place)

    return run


def found(printed, place):
    """(check, hosts, what, do) of all findings by their marks; checksums and this test's folder by a word."""
    report = json.loads(printed)
    rows = {mark: [] for mark in ("good", "odd", "bad", "unasked")}
    for row in report["findings"]:
        texts = [re.sub(r"\b[0-9a-f]{8}\b", "SUM", row[part].replace(str(place), "HERE")) for part in ("what", "do")]
        # by half of the time that asking took: on a busy machine some hundredths
        texts[0] = re.sub(r"its clock is (29\.9|30\.1) s", "its clock is 30.0 s", texts[0])
        rows[row["mark"]].append((row["check"], *row["hosts"], *texts))
    assert report["ok"] == (not rows["bad"])
    return rows


@contextlib.contextmanager
def bound(cluster, host, **files):
    """On one host alone, another file or folder in the place of each of `files`."""
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
    """Sessions of a host's ssh server have another time of day."""
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
    """A changed copy of a file."""
    copy = folder / file.name
    copy.write_bytes(change(file.read_bytes()))
    return copy


def test_two_sound_hosts(examine, place):
    rows = examine(code=0)
    assert rows["bad"] == rows["odd"] == []
    assert [row[0] for row in rows["good"]] == [
        "reach", "launcher", "python", "packages", "imports", "code", "recipe", "variables", "data", "run directory",
        "disk", "clock", "devices", "operators", "interface", "all-reduce", "open files", "locked memory",
        "host memory",
    ]  # fmt: skip
    said = {check: what for check, what, _ in rows["good"]}
    assert said["reach"] == "2 hosts with 2 ranks answer over ssh"
    assert said["launcher"] == "pdsh; ssh gives up a silent host after 15 s"
    assert said["recipe"] == (
        f"HERE/recipe.yaml (SUM), {training.ROOT}/ds_configs/zero1.json (SUM), HERE/text.model (SUM); they fit 2 ranks"
    )
    assert said["data"] == "2 corpora, by size, first and last MiB, and sidecar"
    assert said["run directory"] == "HERE/runs/one, shared: each host sees what the others wrote"
    assert said["operators"] == "this layout needs none"
    assert said["interface"] == "eth0 will carry the traffic"
    assert re.fullmatch(r"2 ranks: gloo \d+\.\d\d GB/s", said["all-reduce"])
    assert list((place / "runs").iterdir()) == []  # nothing is left behind


def test_whatever_is_wrong_on_a_host_is_told_with_its_remedy(cluster, examine, place, tmp_path):
    if FAKETIME is None:
        pytest.skip("a host whose clock is wrong: not installed: libfaketime (tests/install.sh)")
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
    assert rows["bad"] == [
        ("packages", "node2", f"safetensors 0.6.99; node1 has {version}",
         f'{sys.executable} -m pip install "safetensors=={version}"'),
        ("code", "node2", f"other code in {megagpt} (SUM) than on node1 (SUM)",
         "check out or copy the same files to every host"),
        ("recipe", "node2", "HERE/recipe.yaml is another file (SUM) than on node1 (SUM)",
         "copy node1's to every host"),
        ("data", "node2", "HERE/text.train is not the corpus of node1: same size, but other bytes in the first or last "
         "MiB", "copy HERE/text.train.bin, .idx and .json from node1 again"),
        ("data", "node2", "HERE/held/text.validation.bin: No such file or directory",
         "put the corpus where every host sees it, or copy it to the same path; `megagpt prepare` makes one"),
        ("data", "node2", "HERE/held/text.validation.idx: No such file or directory",
         "put the corpus where every host sees it, or copy it to the same path; `megagpt prepare` makes one"),
        ("run directory", "node2", "HERE/runs/one cannot be written to: No space left on device",
         "free some space, or choose another run_dir"),
        ("disk", "node2", "0 bytes free for HERE/runs/one, where one checkpoint takes 503.7 kB",
         "free some space, or choose another run_dir"),
        ("clock", "node2", "its clock is 30.0 s ahead",
         "let chrony or systemd-timesyncd set it: `timedatectl set-ntp true`"),
        ("operators", "node1", "node2", "async_io is locked by a build that has died: HERE/extensions/async_io/lock",
         "rm HERE/extensions/async_io/lock"),
        ("interface", "node2", "the host's own name is 127.0.1.1 to itself, where no other host reaches it: "
         "lo 127.0.0.1, eth0 10.77.0.2",
         "write `10.77.0.2 node2` into /etc/hosts there in its place, or export GLOO_SOCKET_IFNAME=eth0 and "
         "NCCL_SOCKET_IFNAME=eth0"),
        ("open files", "node2", "70 may be open, and with 2 ranks each takes at least 74",
         "`* - nofile 288` into /etc/security/limits.conf there, or LimitNOFILE=288 for sshd or slurmd"),
    ]  # fmt: skip
    assert rows["odd"] == [
        ("launcher", "node1", "node2",
         "if the host falls silent, `deepspeed`'s ssh waits for ever (no ServerAliveInterval)",
         'export PDSH_SSH_ARGS_APPEND="-oServerAliveInterval=5 -oServerAliveCountMax=3"'),
    ]  # fmt: skip
    assert ("all-reduce", "not made: it would wait for what is wrong above", "") in rows["unasked"]


def test_a_host_that_lets_nobody_in_and_variables_that_stay_here(cluster, examine, place, tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "id"], check=True)
    with bound(cluster, 2, key=(tmp_path / "id.pub", Path(cluster.env["CLUSTER_DIR"], "id.pub"))):
        said = cluster.run(1, "ssh", "node2", "true", code=255).strip()
        rows = examine(DS_ENV_FILE="none")
    assert "Permission denied" in said
    assert rows["bad"] == [
        ("reach", "node2", f"ssh does not come through: {said}",
         "let ssh log in without a question: `ssh-copy-id node2`"),
    ]  # fmt: skip
    kept = ", ".join(passing.forwarded_variables({**cluster.env, "TORCH_EXTENSIONS_DIR": "HERE"}))
    assert rows["odd"] == [
        ("variables", f"DeepSpeed would not hand these on to the other hosts: {kept}",
         "megagpt hosts HOSTFILE --write-environment FILE, and type what it says"),
    ]  # fmt: skip
    assert ("python", f"{sys.version.split()[0]} at {sys.executable}", "") in rows["good"]


def test_another_python_and_a_run_directory_of_its_own(cluster, examine, place, tmp_path):
    ours = sys.version.split()[0]
    version = f"{ours[:-1]}{(int(ours[-1]) + 1) % 10}"
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    (library,) = {path for path in mapped if "/libpython3." in path} or {str(Path(sys.executable).resolve())}
    python = other(  # this interpreter, that calls itself another one
        Path(library), tmp_path, lambda code: code.replace(f"{ours}\0".encode(), f"{version}\0".encode())
    )
    python.chmod(0o755)
    with (
        bound(cluster, 2, python=(python, library)),
        fault(cluster, 2, ("mount", "-t", "tmpfs", "tmpfs", place / "runs"), ("umount", "-l", place / "runs")),
    ):
        rows = examine()
    assert rows["bad"][0] == (
        "python", "node2", f"Python {version}; node1 has {ours}",
        "install the same environment on every host",
    )  # fmt: skip
    assert (
        "run directory", "node2", "HERE/runs/one is not shared: what node1 wrote there is not seen",
        "put run_dir on a disk that every host mounts: each rank writes its part of a checkpoint there",
    ) in rows["bad"]  # fmt: skip


def test_a_host_without_the_python(cluster, examine, tmp_path):
    with bound(cluster, 2, python=(tmp_path, Path(sys.executable).parent)):
        rows = examine()
    assert rows["bad"] == [
        ("python", "node2", f"there is no Python at {sys.executable}",
         "install the same environment at the same path: DeepSpeed starts the ranks with it"),
    ]  # fmt: skip


def test_a_host_that_hangs_hangs_nobody_else(cluster, examine, place, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # a disk that does not answer: whoever opens it waits
    with bound(cluster, 2, sidecar=(tmp_path / "pipe", place / "text.train.json")):
        rows = examine("--limit", 6)
    assert rows["bad"][0] == (
        "reach", "node2", "no answer in 6 s, at: data, reading HERE/text.train.json",
        "look on node2 at what hangs there: a network disk, a driver (`dmesg`), a process that is stuck",
    )  # fmt: skip
    assert ("code", f"SUM in {training.ROOT}/megagpt", "") in rows["good"]


def test_ranks_of_slurm_need_no_ssh_and_no_torch_that_works(slurm, place, tmp_path):
    torch = Path(next(Path(sys.prefix).glob("lib/python3*/site-packages/torch/__init__.py")))
    broken = tmp_path / "__init__.py"
    broken.write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    key = Path(slurm.env["CLUSTER_DIR"], "id.pub")
    with bound(slurm, 2, torch=(broken, torch), key=(broken, key)):
        # into a file: what srun itself says of the exit code may come in the middle of a long line
        slurm.run(1, "srun", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/report", "megagpt", "doctor",
                  "--as-rank", "--json", "--recipe", place / "recipe.yaml", code=1)  # fmt: skip
    printed = (tmp_path / "report").read_text()
    rows = found(next(line for line in printed.splitlines() if line.startswith("{")), place)
    assert rows["bad"] == [
        ("imports", "node2", "import torch: ImportError: libcudart.so.12: cannot open shared object file",
         f"run `{sys.executable} -c 'import torch'` there, and mend or install anew what it complains about"),
    ]  # fmt: skip
    assert ("reach", "2 hosts with 2 ranks answer", "") in rows["good"]
