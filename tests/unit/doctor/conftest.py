"""Two hosts without problems, with one GPU each, as plain values. Each test changes what it is about."""

import copy

import pytest

from megagpt.doctor.job_requirements import JobRequirements
from megagpt.doctor.session import Host, HostAgent, LauncherFacts, Session

GB = 10**9
FACTS = {
    "host": "",
    "python": {"version": "3.11.7", "executable": "/env/bin/python"},
    "packages": {"megagpt": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "numpy": "2.2.0"},
    "code": {"folder": "/src/megagpt", "checksum": "aaaa"},
    "files": {"r.yaml": "1111", "d.json": "2222"},
    "data": {"web": {"missing": [], "sizes": {".bin": 10, ".idx": 20}, "sidecar": [1, 2], "ends": 3}},
    "run": {"error": "", "full": False},
    "disks": {"runs/r": 900 * GB, "nvme": 900 * GB},
    "limits": {"open_files": [65536, 65536], "locked_memory": None},
    "memory": {"total": 256 * GB, "available": 200 * GB},
    "cores": 16,
    "nvidia": {"devices": 1, "driver": "550.54"},
    "infiniband": ["mlx5_0"],
    "network": {"interfaces": {"lo": "127.0.0.1", "eth0": ""}, "resolved": []},
    "environment": {},
    "locks": [],
    "port": 20001,
}
PROBE = {
    "torch": {"version": "2.13.0", "cuda": "12.6", "devices": ["H100"], "memory": [80 * GB], "error": ""},
    "pinned": {"bytes": 1 << 30, "error": ""},
    "accelerator": "cuda",
    "operators": {"quantizer": {"seconds": 0.31, "error": ""}},
    "at": "building or loading quantizer",
}


def host(number):
    """A host with one rank and the address 10.0.0.NUMBER."""
    facts, probe = copy.deepcopy(FACTS), copy.deepcopy(PROBE)
    del probe["at"]
    facts["host"] = f"node{number}"
    facts["network"]["interfaces"]["eth0"] = f"10.0.0.{number}"
    facts["network"]["resolved"] = [f"10.0.0.{number}"]
    all_reduce = [{"speeds": {"gloo": 1.5e9, "nccl": 98.76e9}, "rank": number - 1, "at": "all-reduce over nccl"}]
    agents = [HostAgent(None, [[number - 1, 0]])]
    return Host(f"node{number}", agents, None, facts, (0.0001, 0.0002), [0, 1], probe, all_reduce)


@pytest.fixture
def session():
    requirements = JobRequirements(
        "r.yaml", "d.json", ("r.yaml", "d.json"), ("web",), "runs/r", 3, int(14.4 * GB),
        gpu_operators=("fused_adam", "quantizer"), offloads=True, host=8 * GB, host_alone=20 * GB, device=30 * GB,
    )  # fmt: skip
    launcher = LauncherFacts(True, {"node1": 15, "node2": 15}, ())
    packages = ("torch<2.14,>=2.13", "deepspeed<0.20,>=0.19.8", "numpy<3,>=2")
    return Session([host(1), host(2)], requirements, 60.0, False, launcher, packages)
