"""What the doctor reports for each fact that is wrong: the whole message, and no other error."""

from dataclasses import replace

import pytest

from megagpt.doctor import command
from megagpt.doctor.job_requirements import JobRequirements
from megagpt.doctor.report import Finding
from megagpt.doctor.session import HostAgent
from tests import training

SAME = "install the same environment on every host"
NVME = {"operators": ("async_io",), "gpu_operators": (), "nvme": "nvme", "nvme_bytes": 9 * 10**9}
PLAN = "see what would fit: `megagpt plan` with the same recipe and config"
NO_LIMIT = (
    "`ulimit -l unlimited`: memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity for slurmd, "
    "`docker run --ulimit memlock=-1`"
)
CLOCK = "synchronize it with chrony or systemd-timesyncd: `timedatectl set-ntp true`"
LOCK = {"path": "/ext/async_io/lock", "operator": "async_io", "building": False}


def findings(session, *statuses):
    """(check, hosts, what, do) of the findings with one of these statuses."""
    report = command.check(session)
    return [(row.check, *row.hosts, row.what, row.do) for row in report.findings if row.status in statuses]


def test_hosts_without_problems(session):
    assert findings(session, "warning", "error", "skipped") == []
    assert findings(session, "ok") == [
        ("connection", "2 hosts with 2 ranks answer over ssh", ""),
        ("launcher", "pdsh; ssh gives up a silent host after 15 s", ""),
        ("python", "3.11.7 at /env/bin/python", ""),
        ("packages", "torch 2.13.0, deepspeed 0.19.8 and 2 others, as megagpt requires them", ""),
        ("imports", "torch and deepspeed load", ""),
        ("code", "aaaa in /src/megagpt", ""),
        ("recipe", "r.yaml (1111), d.json (2222); valid for 2 ranks", ""),
        ("variables", "all that training depends on are the same on every host", ""),
        ("data", "1 corpus: the same by size, first and last MiB, and sidecar", ""),
        ("run directory", "runs/r, shared by all hosts", ""),
        ("disk", "900.0 GB free for runs/r, 4 checkpoints need 57.6 GB", ""),
        ("clock", "within 1 ms of this host's", ""),
        ("devices", "1 × H100, driver 550.54 on node1", ""),
        ("operators", "quantizer loads (0.3 s)", ""),
        ("interface", "gloo will use eth0", ""),
        ("all-reduce", "2 ranks: gloo 1.50 GB/s, nccl 98.76 GB/s", ""),
        ("open files", "limited to 65,536, up to 288 are needed", ""),
        ("locked memory", "unlimited", ""),
        ("pinned memory", "1.1 GB can be pinned", ""),
        ("device memory", "80.0 GB per device, a rank needs about 30.0 GB", ""),
        ("host memory", "200.0 GB available, the ranks of a host need about 8.0 GB", ""),
    ]


def second(change):
    """Return a change of the second host."""
    return lambda session: change(session.hosts[1])


def facts(name, **values):
    return second(lambda host: host.facts[name].update(values))


def probe(**values):
    return second(lambda host: host.probe.update(values))


def probe_ends(*left, **values):
    """Return a change: the second host's probe ended early, with only these parts of its result."""

    def change(host):
        host.probe = {**{part: host.probe[part] for part in left}, **values}

    return second(change)


ERRORS = {
    "an operator of GPUs": (
        probe(operators={"quantizer": {"seconds": 1.0, "error": "no nvcc"}}),
        ("operators", "quantizer cannot be built: no nvcc",
         "install nvcc of the CUDA that torch is built for, and a C++ compiler, and export CUDA_HOME"),
    ),
    "another Python": (facts("python", version="3.12.1"), ("python", "Python 3.12.1; node1 has 3.11.7", SAME)),
    "a package is missing": (
        facts("packages", numpy=""),
        ("packages", "numpy is not installed", '/env/bin/python -m pip install "numpy<3,>=2"'),
    ),
    "megagpt itself is not installed": (
        facts("packages", megagpt=""),
        ("packages", "megagpt is not installed", "bash launch/install.sh, or `pip install -e .` in its folder"),
    ),
    "another version of a package": (
        facts("packages", numpy="2.3.1"),
        ("packages", "numpy 2.3.1; node1 has 2.2.0", '/env/bin/python -m pip install "numpy==2.2.0"'),
    ),
    "other code": (
        facts("code", checksum="bbbb"),
        ("code", "the code in /src/megagpt (bbbb) differs from node1's (aaaa)",
         "check out or copy the same files to every host"),
    ),
    "another recipe": (
        second(lambda host: host.facts["files"].update({"r.yaml": "3333"})),
        ("recipe", "r.yaml (3333) differs from node1's (1111)", "copy node1's to every host"),
    ),
    "no config": (
        second(lambda host: host.facts["files"].update({"d.json": ""})),
        ("recipe", "d.json cannot be read", "copy it to the same path on every host"),
    ),
    "another value of a variable": (
        facts("environment", OMP_NUM_THREADS="64"),
        ("variables", "OMP_NUM_THREADS: 64, on node1 not set",
         "forward it (`megagpt hosts --write-environment`, `mpirun -x`, `srun --export`), or set it on each host"),
    ),
    "torch does not load": (
        probe_ends(died="ImportError: libcudnn.so.9: no such file", at="import torch"),
        ("imports", "import torch: ImportError: libcudnn.so.9: no such file",
         "run `/env/bin/python -c 'import torch'` there by hand, and fix or reinstall what it complains about"),
    ),
    "importing DeepSpeed hangs": (
        probe_ends("torch", "pinned", hung=60.0, at="import deepspeed"),
        ("imports", "import deepspeed: not finished after 60 s",
         "run `/env/bin/python -c 'import deepspeed'` there by hand, and fix or reinstall what it complains about"),
    ),
    "other data": (
        second(lambda host: host.facts["data"]["web"].update(sizes={".bin": 1_234_567, ".idx": 20})),
        ("data", "web differs from node1's: .bin of 1,234,567 bytes and .idx of 20 bytes, instead of .bin of 10 bytes "
         "and .idx of 20 bytes", "copy web.bin, .idx and .json from node1 again"),
    ),
    "data that differ at an end": (
        second(lambda host: host.facts["data"]["web"].update(ends=4)),
        ("data", "web differs from node1's: same size, but other bytes in the first or last MiB",
         "copy web.bin, .idx and .json from node1 again"),
    ),
    "data of another making": (
        second(lambda host: host.facts["data"]["web"].update(sidecar=[1, 9])),
        ("data", "web differs from node1's: its sidecar (.json) has other checksums",
         "copy web.bin, .idx and .json from node1 again"),
    ),
    "no data": (
        second(lambda host: host.facts["data"]["web"].update(missing=["web.bin: No such file or directory"])),
        ("data", "web.bin: No such file or directory",
         "put the corpus on a shared disk, or copy it to the same path; `megagpt prepare` creates one"),
    ),
    "no right to write": (
        facts("run", error="Permission denied"),
        ("run directory", "runs/r cannot be written to: Permission denied",
         "get write permission there, or choose another run_dir"),
    ),
    "a run directory of its own": (
        second(lambda host: setattr(host, "visible_markers", [1])),
        ("run directory", "runs/r is not shared: files written by node1 are not visible",
         "put run_dir on a disk that every host mounts: each rank writes its part of a checkpoint there"),
    ),
    "no room for a checkpoint": (
        second(lambda host: host.facts["disks"].update({"runs/r": 14 * 10**9})),
        ("disk", "14.0 GB free for runs/r, but one checkpoint needs 14.4 GB",
         "free some space, or choose another run_dir"),
    ),
    "a clock behind": (
        second(lambda host: setattr(host, "clock", (-3.0, 0.5))),
        ("clock", "its clock is 3.0 s behind", CLOCK),
    ),
    "torch for CPUs beside a GPU": (
        probe(torch={"version": "2.13.0+cpu", "cuda": None, "devices": [], "error": "no CUDA"}),
        ("devices", "torch 2.13.0+cpu, built for CPUs, sees none of 1 × NVIDIA (driver 550.54): no CUDA",
         "install torch's build for CUDA, and a driver that is recent enough for it"),
    ),
    "fewer devices than ranks": (
        second(lambda host: setattr(host, "agents", [HostAgent(None, [[1, 0], [2, 1]])])),
        ("devices", "1 device for 2 ranks", "give the host as many slots as it has devices (CUDA_VISIBLE_DEVICES?)"),
    ),
    "a name that is the loopback": (
        facts("network", resolved=["127.0.1.1"]),
        ("interface",
         "the host's own name resolves to 127.0.1.1, where other hosts cannot reach it: lo 127.0.0.1, eth0 10.0.0.2",
         "write `10.0.0.2 node2` into /etc/hosts there instead, or export GLOO_SOCKET_IFNAME=eth0 and "
         "NCCL_SOCKET_IFNAME=eth0"),
    ),
    "a name without an address": (
        facts("network", resolved=[]),
        ("interface", "the host's own name does not resolve, so ranks would offer the loopback address",
         "write `10.0.0.2 node2` into /etc/hosts there instead, or export GLOO_SOCKET_IFNAME=eth0 and "
         "NCCL_SOCKET_IFNAME=eth0"),
    ),
    "an interface that is not there": (
        facts("environment", GLOO_SOCKET_IFNAME="ib0"),
        ("interface", "GLOO_SOCKET_IFNAME is ib0, which does not lead to other hosts: lo 127.0.0.1, eth0 10.0.0.2",
         "export GLOO_SOCKET_IFNAME=eth0"),
    ),
    "no interface but the loopback": (
        facts("network", interfaces={"lo": "127.0.0.1"}),
        ("interface", "the host has no address that others could reach: lo 127.0.0.1",
         "see `ip address` there: no interface except the loopback has an IPv4 address"),
    ),
    "a firewall": (
        second(lambda host: setattr(host, "all_reduce", [
            {"rank": 1, "hung": 60.0, "at": "joining the other ranks at 10.0.0.1:20001"}])),
        ("all-reduce", "joining the other ranks at 10.0.0.1:20001: not finished after 60 s",
         "let the hosts reach each other on all ports (firewalls), and set the interface that connects them: "
         "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"),
    ),
    "few open files": (
        facts("limits", open_files=[70, 65536]),
        ("open files", "limited to 70, but each of 2 ranks needs at least 74",
         "`* - nofile 288` in /etc/security/limits.conf there, LimitNOFILE=288 for sshd or slurmd"),
    ),
    "InfiniBand without locked memory": (
        facts("limits", locked_memory=65536),
        ("locked memory", "limited to 65.5 kB, but InfiniBand (mlx5_0) locks all memory that it transfers", NO_LIMIT),
    ),
    "nothing can be pinned": (
        probe(pinned={"bytes": 1 << 30, "error": "CUDA error: out of memory"}),
        ("pinned memory", "host memory cannot be pinned: CUDA error: out of memory",
         f'{NO_LIMIT}; or "pin_memory": false in the config'),
    ),
    "too little memory for the offloaded state": (
        facts("memory", available=5 * 10**9),
        ("host memory", "5.0 GB available, but 1 rank needs about 8.0 GB", PLAN),
    ),
    "a device that is too small": (
        second(lambda host: host.probe["torch"].update(memory=[24 * 10**9])),
        ("device memory", "24.0 GB available, but a rank needs about 30.0 GB", PLAN),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ERRORS)
def test_errors_name_the_host_and_a_remedy(session, fault):
    change, (check, what, do) = ERRORS[fault]
    change(session)
    found = findings(session, "error")
    assert found == [(check, "node2", what, do)]


def test_a_package_version_that_megagpt_does_not_support(session):
    for host in session.hosts:
        host.facts["packages"]["torch"] = "2.12.0"
    do = '/env/bin/python -m pip install "torch<2.14,>=2.13"'
    assert findings(session, "error") == [
        ("packages", "node1", "node2", "torch 2.12.0 does not satisfy megagpt's requirement torch<2.14,>=2.13", do)
    ]


def test_operators_for_nvme(session):
    session = replace(session, requirements=replace(session.requirements, **NVME))
    for host in session.hosts:
        host.probe["operators"] = {"async_io": {"seconds": 1.0, "error": "cannot find -laio"}}
    session.hosts[1].facts["locks"] = [LOCK]
    session.hosts[1].facts["disks"]["nvme"] = 8 * 10**9
    session.hosts[1].facts["limits"]["locked_memory"] = 8 << 20
    session.hosts[1].facts["infiniband"] = []
    compiler = "install a C++ compiler, ninja and libaio's headers (Debian: g++ ninja-build libaio-dev)"
    assert findings(session, "error") == [
        ("disk", "node2", "8.0 GB free for nvme, but the offloaded state needs 9.0 GB",
         "free some space, or set nvme_path to a larger disk"),
        ("operators", "node2", "async_io is locked by a build that has died: /ext/async_io/lock",
         "rm /ext/async_io/lock"),
        ("operators", "node1", "node2", "async_io cannot be built: cannot find -laio", compiler),
    ]  # fmt: skip
    assert findings(session, "warning") == [
        ("locked memory", "node2", "limited to 8.4 MB, but buffers for NVMe are locked", NO_LIMIT)
    ]


def test_a_lock_of_a_build_that_is_running_on_another_host_is_no_problem(session):
    session = replace(session, requirements=replace(session.requirements, **NVME))
    for host in session.hosts:
        host.probe["operators"] = {"async_io": {"seconds": 80.0, "error": ""}}
        host.facts["locks"] = [{**LOCK, "building": host.name == "node1"}]  # one folder, shared
    assert findings(session, "error", "warning") == []
    assert ("operators", "async_io loads (80.0 s)", "") in findings(session, "ok")


def test_an_operator_whose_build_does_not_end(session):
    session = replace(session, requirements=replace(session.requirements, **NVME))
    for host in session.hosts:
        del host.probe["operators"]
    session.hosts[0].probe |= {"hung": 600.0, "at": "building or loading async_io"}
    session.hosts[1].probe |= {"died": "g++: fatal error: Killed signal", "at": "building or loading async_io"}
    found = findings(session, "error")
    assert [row[:3] for row in found] == [
        ("operators", "node1", "async_io cannot be built: not finished after 600 s"),
        ("operators", "node2", "async_io cannot be built: g++: fatal error: Killed signal"),
    ]
    assert found[0][3] == (
        "allow more time (--limit), or build it before: "
        "`/env/bin/python -c 'from megagpt.engine import deepspeed_ops; deepspeed_ops.load(\"async_io\")'`"
    )
    assert (training.ROOT / "megagpt/engine/deepspeed_ops.py").exists()


WARNINGS = {
    "an operator that there is a substitute for": (
        probe(operators={"fused_adam": {"seconds": 1.0, "error": "no nvcc"}}),
        ("operators", "fused_adam cannot be built: no nvcc; torch's own is used instead",
         "install nvcc of the CUDA that torch is built for, and a C++ compiler, and export CUDA_HOME"),
    ),
    "a lock that nothing waits for": (
        second(lambda host: host.facts["locks"].append(LOCK)),
        ("operators", "async_io is locked by a build that has died: /ext/async_io/lock; this layout does not need it",
         "rm /ext/async_io/lock"),
    ),
    "no room for all checkpoints": (
        second(lambda host: host.facts["disks"].update({"runs/r": 50 * 10**9})),
        ("disk", "50.0 GB free for runs/r, but 4 checkpoints need 57.6 GB",
         "free some space, or lower checkpoint.keep_last"),
    ),
    "a clock a little ahead": (
        second(lambda host: setattr(host, "clock", (0.9, 0.1))),
        ("clock", "its clock is 0.9 s ahead", CLOCK),
    ),
    "hardly enough open files": (
        facts("limits", open_files=[200, 65536]),
        ("open files", "limited to 200, but each of 2 ranks needs up to 288",
         "`* - nofile 288` in /etc/security/limits.conf there, LimitNOFILE=288 for sshd or slurmd"),
    ),
    "hardly enough memory": (
        facts("memory", available=9 * 10**9),
        ("host memory", "9.0 GB available, but 1 rank needs about 8.0 GB", PLAN),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WARNINGS)
def test_warnings_do_not_fail_the_report(session, fault):
    change, (check, what, do) = WARNINGS[fault]
    change(session)
    found = findings(session, "warning")
    assert found == [(check, "node2", what, do)]
    assert command.check(session).code == 0


def test_ssh_that_waits_too_long(session):
    timeouts = {"node1": 0, "node2": 900}
    launcher = replace(session.launcher, pdsh=False, keep_alive=timeouts, not_forwarded=("OMP_NUM_THREADS",))
    session = replace(session, launcher=launcher)
    do = 'export PDSH_SSH_ARGS_APPEND="-oServerAliveInterval=5 -oServerAliveCountMax=3"'
    assert findings(session, "warning") == [
        ("launcher", "node1",
         "if the host becomes silent, the ssh of `deepspeed` waits forever (no ServerAliveInterval)", do),
        ("launcher", "node2", "if the host becomes silent, the ssh of `deepspeed` waits 900 s", do),
        ("variables", "DeepSpeed would not forward these to the other hosts: OMP_NUM_THREADS",
         "megagpt hosts HOSTFILE --write-environment FILE, and run the `export` line that it prints"),
    ]  # fmt: skip
    assert findings(session, "error") == [
        ("launcher", "pdsh is not installed on this host",
         "install pdsh (Debian: pdsh), or start with `deepspeed --launcher openmpi`"),
    ]  # fmt: skip


def test_gpus_that_are_not_used(session):
    for host in session.hosts:
        host.facts["environment"]["DS_ACCELERATOR"] = "cpu"
    assert findings(session, "error") == []
    assert findings(session, "warning") == [
        ("devices", "node1", "node2", "DS_ACCELERATOR selects the CPU, but there are 1 × H100", "unset DS_ACCELERATOR")
    ]


def test_other_devices_on_the_second_host(session):
    session.hosts[1].probe["torch"]["devices"] = ["A100"]
    assert findings(session, "warning") == [
        ("devices", "node1", "node2", "the hosts have different devices: A100; H100",
         "use hosts of one kind: all wait for the slowest"),
    ]  # fmt: skip


def test_on_hosts_without_gpu_the_whole_state_is_in_host_memory(session):
    for host in session.hosts:
        host.probe |= {"accelerator": "cpu", "torch": {**host.probe["torch"], "devices": []}, "operators": {}}
        host.facts["nvidia"] = {"devices": 0, "driver": ""}
        del host.probe["pinned"]
    session.hosts[1].facts["cores"] = 0
    assert findings(session, "warning") == [
        ("devices", "node2", "0 cores for 1 rank", "start fewer ranks: they take turns on the cores")
    ]
    assert findings(session, "error") == []
    good = {check: what for check, what, _ in findings(session, "ok")}
    assert good["operators"] == "this layout needs none"
    assert good["host memory"] == "200.0 GB available, the ranks of a host need about 20.0 GB"
    assert findings(session, "skipped") == [
        ("pinned memory", "no GPU to transfer to", ""),
        ("device memory", "no GPU", ""),
    ]


def test_a_lost_host_is_left_out_of_all_other_checks(session):
    session.hosts[1].lost = Finding("connection", "error", "gone", "look", ("node2",))
    for host in session.hosts:
        host.all_reduce = []
    session.hosts[1].facts = {}
    assert findings(session, "error") == [("connection", "node2", "gone", "look")]
    assert findings(session, "skipped") == [("all-reduce", "not run: it would wait because of an error above", "")]


def test_skipped_checks_say_why(session):
    session = replace(session, hosts=session.hosts[:1], requirements=JobRequirements(), single_host=True, launcher=None)
    assert findings(session, "skipped") == [
        ("connection", "no other hosts: no --hostfile", ""),
        ("recipe", "needs --recipe and --deepspeed_config", ""),
        ("data", "needs --recipe", ""),
        ("run directory", "needs --recipe", ""),
        ("disk", "needs --recipe", ""),
        ("operators", "needs --deepspeed_config", ""),
        ("all-reduce", "only one rank", ""),
        ("device memory", "needs --recipe and --deepspeed_config", ""),
        ("host memory", "needs --recipe and --deepspeed_config", ""),
    ]
