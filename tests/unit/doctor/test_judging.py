"""What the doctor says of each fact that is wrong: the whole message, and nothing else that is bad."""

from dataclasses import replace

import pytest

from megagpt import doctor
from megagpt.doctor.finding import Finding, Report
from megagpt.doctor.needs import Needs

SAME = "install the same environment on every host"
NVME = {"operators": ("async_io",), "gpu_operators": (), "nvme": "nvme", "nvme_bytes": 9 * 10**9}
PLAN = "see what would fit: `megagpt plan` with the same recipe and config"
NO_LIMIT = (
    "`ulimit -l unlimited`: memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity for slurmd, "
    "`docker run --ulimit memlock=-1`"
)
LOCK = {"path": "/ext/async_io/lock", "operator": "async_io", "seconds": 9, "building": False}


def judged(visit, *marks):
    """(check, hosts, what, do) of the findings with one of these marks."""
    report = Report.of(list(doctor.judge(visit)))
    return [(row.check, *row.hosts, row.what, row.do) for row in report.findings if row.mark in marks]


def test_sound_hosts(visit):
    assert judged(visit, "odd", "bad", "unasked") == []
    assert judged(visit, "good") == [
        ("reach", "2 hosts with 2 ranks answer over ssh", ""),
        ("launcher", "pdsh; ssh gives up a silent host after 15 s", ""),
        ("python", "3.11.7 at /env/bin/python", ""),
        ("packages", "torch 2.13.0, deepspeed 0.19.8 and 2 others, as megagpt needs them", ""),
        ("imports", "torch and deepspeed load", ""),
        ("code", "aaaa in /src/megagpt", ""),
        ("recipe", "r.yaml (1111), d.json (2222); they fit 2 ranks", ""),
        ("variables", "what training depends on is alike on every host", ""),
        ("data", "1 corpus, by size, first and last MiB, and sidecar", ""),
        ("run directory", "runs/r, shared: each host sees what the others wrote", ""),
        ("disk", "900.0 GB free for runs/r, where 4 checkpoints take 57.6 GB", ""),
        ("clock", "within 1 ms of this host's", ""),
        ("devices", "1 × H100, driver 550.54 on node1", ""),
        ("operators", "quantizer loads (0.3 s)", ""),
        ("interface", "eth0 will carry the traffic", ""),
        ("all-reduce", "2 ranks: gloo 1.50 GB/s, nccl 98.76 GB/s", ""),
        ("open files", "65,536 may be open, up to 288 are needed", ""),
        ("locked memory", "no limit", ""),
        ("pinned memory", "1.1 GB can be pinned", ""),
        ("device memory", "80.0 GB on each, where a rank takes about 30.0 GB", ""),
        ("host memory", "200.0 GB available, where the ranks of a host take about 8.0 GB", ""),
    ]


def second(change):
    """A change of the second host."""
    return lambda visit: change(visit.hosts[1])


def facts(name, **values):
    return second(lambda host: host.facts[name].update(values))


def probe(**values):
    return second(lambda host: host.probe.update(values))


def probe_ends(*left, **values):
    """The second host's probe ended early, with only these parts of its answer."""

    def change(host):
        host.probe = {**{part: host.probe[part] for part in left}, **values}

    return second(change)


BAD = {
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
        ("code", "other code in /src/megagpt (bbbb) than on node1 (aaaa)",
         "check out or copy the same files to every host"),
    ),
    "another recipe": (
        second(lambda host: host.facts["files"].update({"r.yaml": "3333"})),
        ("recipe", "r.yaml is another file (3333) than on node1 (1111)", "copy node1's to every host"),
    ),
    "no config": (
        second(lambda host: host.facts["files"].update({"d.json": ""})),
        ("recipe", "d.json cannot be read", "copy it to the same path on every host"),
    ),
    "another value of a variable": (
        facts("environment", OMP_NUM_THREADS="64"),
        ("variables", "OMP_NUM_THREADS: 64, on node1 not set",
         "hand it on (`megagpt hosts --write-environment`, `mpirun -x`, `srun --export`), or set it on each host"),
    ),
    "torch does not load": (
        probe_ends(died="ImportError: libcudnn.so.9: no such file", at="import torch"),
        ("imports", "import torch: ImportError: libcudnn.so.9: no such file",
         "run `/env/bin/python -c 'import torch'` there, and mend or install anew what it complains about"),
    ),
    "importing DeepSpeed hangs": (
        probe_ends("torch", "pinned", hung=60.0, at="import deepspeed"),
        ("imports", "import deepspeed: no end in 60 s",
         "run `/env/bin/python -c 'import deepspeed'` there, and mend or install anew what it complains about"),
    ),
    "other data": (
        second(lambda host: host.facts["data"]["web"].update(sizes={".bin": 1_234_567, ".idx": 20})),
        ("data", "web is not the corpus of node1: .bin of 1,234,567 bytes and .idx of 20 bytes, there .bin of 10 bytes "
         "and .idx of 20 bytes", "copy web.bin, .idx and .json from node1 again"),
    ),
    "data that differ at an end": (
        second(lambda host: host.facts["data"]["web"].update(ends=4)),
        ("data", "web is not the corpus of node1: same size, but other bytes in the first or last MiB",
         "copy web.bin, .idx and .json from node1 again"),
    ),
    "data of another making": (
        second(lambda host: host.facts["data"]["web"].update(sidecar=[1, 9])),
        ("data", "web is not the corpus of node1: its sidecar (.json) names other checksums",
         "copy web.bin, .idx and .json from node1 again"),
    ),
    "no data": (
        second(lambda host: host.facts["data"]["web"].update(missing=["web.bin: No such file or directory"])),
        ("data", "web.bin: No such file or directory",
         "put the corpus where every host sees it, or copy it to the same path; `megagpt prepare` makes one"),
    ),
    "no right to write": (
        facts("run", error="Permission denied"),
        ("run directory", "runs/r cannot be written to: Permission denied",
         "give yourself the right to write there, or choose another run_dir"),
    ),
    "a run directory of its own": (
        second(lambda host: setattr(host, "seen", [1])),
        ("run directory", "runs/r is not shared: what node1 wrote there is not seen",
         "put run_dir on a disk that every host mounts: each rank writes its part of a checkpoint there"),
    ),
    "no room for a checkpoint": (
        second(lambda host: host.facts["disks"]["runs/r"].update(free=14 * 10**9)),
        ("disk", "14.0 GB free for runs/r, where one checkpoint takes 14.4 GB",
         "free some space, or choose another run_dir"),
    ),
    "a clock behind": (
        second(lambda host: setattr(host, "clock", (-3.0, 0.5))),
        ("clock", "its clock is 3.0 s behind", "let chrony or systemd-timesyncd set it: `timedatectl set-ntp true`"),
    ),
    "torch for CPUs beside a GPU": (
        probe(torch={"version": "2.13.0+cpu", "cuda": None, "devices": [], "error": "no CUDA"}),
        ("devices", "1 × NVIDIA (driver 550.54), but torch 2.13.0+cpu, a build for CPUs, sees none: no CUDA",
         "install torch's build for CUDA, and a driver as new as it asks for"),
    ),
    "fewer devices than ranks": (
        second(lambda host: setattr(host, "workers", [(None, [[1, 0], [2, 1]])])),
        ("devices", "1 device for 2 ranks", "give the host as many slots as it has devices (CUDA_VISIBLE_DEVICES?)"),
    ),
    "a name that is the loopback": (
        facts("network", resolved=["127.0.1.1"]),
        ("interface",
         "the host's own name is 127.0.1.1 to itself, where no other host reaches it: lo 127.0.0.1, eth0 10.0.0.2",
         "write `10.0.0.2 node2` into /etc/hosts there in its place, or export GLOO_SOCKET_IFNAME=eth0 and "
         "NCCL_SOCKET_IFNAME=eth0"),
    ),
    "a name without an address": (
        facts("network", resolved=[]),
        ("interface", "the host's own name has no address, so ranks would offer the loopback",
         "write `10.0.0.2 node2` into /etc/hosts there in its place, or export GLOO_SOCKET_IFNAME=eth0 and "
         "NCCL_SOCKET_IFNAME=eth0"),
    ),
    "an interface that is not there": (
        facts("environment", GLOO_SOCKET_IFNAME="ib0"),
        ("interface", "GLOO_SOCKET_IFNAME is ib0, which leads to no other host: lo 127.0.0.1, eth0 10.0.0.2",
         "export GLOO_SOCKET_IFNAME=eth0"),
    ),
    "no interface but the loopback": (
        facts("network", interfaces={"lo": "127.0.0.1"}),
        ("interface", "the host has no address that others could reach: lo 127.0.0.1",
         "see `ip address` there: no interface but the loopback has an IPv4 address"),
    ),
    "a firewall": (
        second(lambda host: setattr(host, "reduce", [
            {"rank": 1, "hung": 60.0, "at": "joining the other ranks at 10.0.0.1:20001"}])),
        ("all-reduce", "joining the other ranks at 10.0.0.1:20001: no end in 60 s",
         "let the hosts reach each other on all ports (firewalls), and name the interface that does: "
         "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"),
    ),
    "few open files": (
        facts("limits", open_files=[70, 65536]),
        ("open files", "70 may be open, and with 2 ranks each takes at least 74",
         "`* - nofile 288` into /etc/security/limits.conf there, or LimitNOFILE=288 for sshd or slurmd"),
    ),
    "InfiniBand without locked memory": (
        facts("limits", locked_memory=65536),
        ("locked memory", "only 65.5 kB may be locked, and InfiniBand (mlx5_0) locks all that it transfers", NO_LIMIT),
    ),
    "nothing can be pinned": (
        probe(pinned={"bytes": 1 << 30, "error": "CUDA error: out of memory"}),
        ("pinned memory", "host memory cannot be pinned: CUDA error: out of memory",
         f'{NO_LIMIT}; or "pin_memory": false in the config'),
    ),
    "too little memory for the offloaded state": (
        facts("memory", available=5 * 10**9),
        ("host memory", "5.0 GB there, where 1 rank takes about 8.0 GB", PLAN),
    ),
    "a device that is too small": (
        second(lambda host: host.probe["torch"].update(memory=[24 * 10**9])),
        ("device memory", "24.0 GB there, where a rank takes about 30.0 GB", PLAN),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_stops_training_is_told_with_its_host_and_its_remedy(visit, fault):
    spoil, (check, what, do) = BAD[fault]
    spoil(visit)
    found = judged(visit, "bad")
    assert found == [(check, "node2", what, do)]


def test_a_package_that_megagpt_does_not_know(visit):
    for host in visit.hosts:
        host.facts["packages"]["torch"] = "2.12.0"
    do = '/env/bin/python -m pip install "torch<2.14,>=2.13"'
    assert judged(visit, "bad") == [
        ("packages", "node1", "node2", "torch 2.12.0 is not what megagpt knows: torch<2.14,>=2.13", do)
    ]


def test_operators_for_nvme(visit):
    visit = replace(visit, needs=replace(visit.needs, **NVME))
    for host in visit.hosts:
        host.probe["operators"] = {"async_io": {"seconds": 1.0, "error": "cannot find -laio"}}
    visit.hosts[1].facts["locks"] = [LOCK]
    visit.hosts[1].facts["disks"]["nvme"]["free"] = 8 * 10**9
    visit.hosts[1].facts["limits"]["locked_memory"] = 8 << 20
    visit.hosts[1].facts["infiniband"] = []
    compiler = "install a C++ compiler, ninja and libaio's headers (Debian: g++ ninja-build libaio-dev)"
    assert judged(visit, "bad") == [
        ("disk", "node2", "8.0 GB free for nvme, where the offloaded state takes 9.0 GB",
         "free some space, or set nvme_path to a larger disk"),
        ("operators", "node2", "async_io is locked by a build that has died: /ext/async_io/lock",
         "rm /ext/async_io/lock"),
        ("operators", "node1", "node2", "async_io cannot be built: cannot find -laio", compiler),
    ]  # fmt: skip
    assert judged(visit, "odd") == [
        ("locked memory", "node2", "only 8.4 MB may be locked, and NVMe's buffers are", NO_LIMIT)
    ]


def test_a_lock_of_a_build_that_goes_on_elsewhere_is_none_to_remove(visit):
    visit = replace(visit, needs=replace(visit.needs, **NVME))
    for host in visit.hosts:
        host.probe["operators"] = {"async_io": {"seconds": 80.0, "error": ""}}
        host.facts["locks"] = [{**LOCK, "building": host.name == "node1"}]  # one folder, shared
    assert judged(visit, "bad", "odd") == []
    assert ("operators", "async_io loads (80.0 s)", "") in judged(visit, "good")


def test_an_operator_whose_build_does_not_end(visit):
    visit = replace(visit, needs=replace(visit.needs, **NVME))
    for host in visit.hosts:
        del host.probe["operators"]
    visit.hosts[0].probe |= {"hung": 600.0, "at": "building or loading async_io"}
    visit.hosts[1].probe |= {"died": "g++: fatal error: Killed signal", "at": "building or loading async_io"}
    found = judged(visit, "bad")
    assert [row[:3] for row in found] == [
        ("operators", "node1", "async_io cannot be built: no end in 600 s"),
        ("operators", "node2", "async_io cannot be built: g++: fatal error: Killed signal"),
    ]
    assert found[0][3] == (
        "give it longer (--limit), or build it once before: "
        "`/env/bin/python -c 'from megagpt.engine import deepspeed_ops; deepspeed_ops.load(\"async_io\")'`"
    )


ODD = {
    "an operator that there is a substitute for": (
        probe(operators={"fused_adam": {"seconds": 1.0, "error": "no nvcc"}}),
        ("operators", "fused_adam cannot be built: no nvcc; torch's own takes its place",
         "install nvcc of the CUDA that torch is built for, and a C++ compiler, and export CUDA_HOME"),
    ),
    "a lock that nothing waits for": (
        second(lambda host: host.facts["locks"].append(LOCK)),
        ("operators", "async_io is locked by a build that has died: /ext/async_io/lock; this layout does without it",
         "rm /ext/async_io/lock"),
    ),
    "no room for all checkpoints": (
        second(lambda host: host.facts["disks"]["runs/r"].update(free=50 * 10**9)),
        ("disk", "50.0 GB free for runs/r, where 4 checkpoints take 57.6 GB",
         "free some space, or lower checkpoint.keep_last"),
    ),
    "a clock a little ahead": (
        second(lambda host: setattr(host, "clock", (0.9, 0.1))),
        ("clock", "its clock is 0.9 s ahead", "let chrony or systemd-timesyncd set it: `timedatectl set-ntp true`"),
    ),
    "hardly enough open files": (
        facts("limits", open_files=[200, 65536]),
        ("open files", "200 may be open, and with 2 ranks each takes up to 288",
         "`* - nofile 288` into /etc/security/limits.conf there, or LimitNOFILE=288 for sshd or slurmd"),
    ),
    "hardly enough memory": (
        facts("memory", available=9 * 10**9),
        ("host memory", "9.0 GB there, where 1 rank takes about 8.0 GB", PLAN),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ODD)
def test_what_is_only_odd_stops_nothing(visit, fault):
    spoil, (check, what, do) = ODD[fault]
    spoil(visit)
    found = judged(visit, "odd")
    assert found == [(check, "node2", what, do)]
    assert Report.of(list(doctor.judge(visit))).code == 0


def test_ssh_that_waits_too_long(visit):
    launch = replace(visit.launch, pdsh=False, keep_alive={"node1": 0, "node2": 900}, kept_back=("OMP_NUM_THREADS",))
    visit = replace(visit, launch=launch)
    do = 'export PDSH_SSH_ARGS_APPEND="-oServerAliveInterval=5 -oServerAliveCountMax=3"'
    assert judged(visit, "odd") == [
        ("launcher", "node1", "if the host falls silent, `deepspeed`'s ssh waits for ever (no ServerAliveInterval)",
         do),
        ("launcher", "node2", "if the host falls silent, `deepspeed`'s ssh waits 900 s", do),
        ("variables", "DeepSpeed would not hand these on to the other hosts: OMP_NUM_THREADS",
         "megagpt hosts HOSTFILE --write-environment FILE, and type what it says"),
    ]  # fmt: skip
    assert judged(visit, "bad") == [
        ("launcher", "there is no pdsh on this host",
         "install pdsh (Debian: pdsh), or start with `deepspeed --launcher openmpi`"),
    ]  # fmt: skip


def test_gpus_that_are_not_used(visit):
    for host in visit.hosts:
        host.facts["environment"]["DS_ACCELERATOR"] = "cpu"
    assert judged(visit, "bad") == []
    assert judged(visit, "odd") == [
        ("devices", "node1", "node2", "DeepSpeed is told to run on the CPU, beside 1 × H100", "unset DS_ACCELERATOR")
    ]


def test_other_devices_on_the_second_host(visit):
    visit.hosts[1].probe["torch"]["devices"] = ["A100"]
    assert judged(visit, "odd") == [
        ("devices", "node1", "node2", "not the same devices: A100; H100",
         "take hosts of one kind: all wait for the slowest"),
    ]  # fmt: skip


def test_cpus_take_turns_and_hold_all_of_the_state(visit):
    for host in visit.hosts:
        host.probe |= {"accelerator": "cpu", "torch": {**host.probe["torch"], "devices": []}, "operators": {}}
        host.facts["nvidia"] = {"devices": 0, "driver": ""}
        del host.probe["pinned"]
    visit.hosts[1].facts["cores"] = 0
    assert judged(visit, "odd") == [
        ("devices", "node2", "0 cores for 1 rank", "start fewer ranks: they take turns on the cores")
    ]
    assert judged(visit, "bad") == []
    good = {check: what for check, what, _ in judged(visit, "good")}
    assert good["operators"] == "this layout needs none"
    assert good["host memory"] == "200.0 GB available, where the ranks of a host take about 20.0 GB"
    assert judged(visit, "unasked") == [
        ("pinned memory", "not asked: no GPU to transfer to", ""),
        ("device memory", "not asked: no GPU", ""),
    ]


def test_a_host_that_is_lost_is_in_no_other_check(visit):
    visit.hosts[1].lost = Finding("reach", "bad", "gone", "look", ("node2",))
    for host in visit.hosts:
        host.reduce = []
    visit.hosts[1].facts = {}
    assert judged(visit, "bad") == [("reach", "node2", "gone", "look")]
    assert judged(visit, "unasked") == [("all-reduce", "not made: it would wait for what is wrong above", "")]


def test_what_was_not_asked_is_said(visit):
    visit = replace(visit, hosts=visit.hosts[:1], needs=Needs(), alone=True, launch=None)
    assert judged(visit, "unasked") == [
        ("reach", "this host alone: no --hostfile", ""),
        ("recipe", "not asked: no --recipe and --deepspeed_config", ""),
        ("data", "not asked: no --recipe", ""),
        ("run directory", "not asked: no --recipe", ""),
        ("disk", "not asked: no --recipe", ""),
        ("operators", "not asked: no --deepspeed_config", ""),
        ("all-reduce", "not asked: one rank alone", ""),
        ("device memory", "not asked: no --recipe and --deepspeed_config", ""),
        ("host memory", "not asked: no --recipe and --deepspeed_config", ""),
    ]
