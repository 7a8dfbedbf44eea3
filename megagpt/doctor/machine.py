"""Checks of devices, memory, limits and clocks: pure functions of what the hosts have said."""

from __future__ import annotations

from collections.abc import Iterator

from megagpt.doctor.examination import Host, Visit
from megagpt.doctor.finding import Finding
from megagpt.doctor.judging import NO_CONFIG, bad, good, number, odd, size, stopped, unasked
from megagpt.doctor.probe import PINNING
from megagpt.plan.machine import SAFE_FRACTION

_SKEW, _SMALL_SKEW = 2.0, 0.5  # seconds
_FEWEST_FILES = (64, 5)  # open in a rank, and more for each rank of the world: counted at ZeRO 1 and 3 over gloo
_FILES = (256, 16)  # the same with more groups, NCCL's connections, and many corpora
_UNLIMITED = "`ulimit -l unlimited`: memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity for slurmd, " \
             "`docker run --ulimit memlock=-1`"  # fmt: skip


def clock(visit: Visit) -> Iterator[Finding]:
    """The clocks agree: whether a run lives is read from the times of its files."""
    hosts, found = visit.there, []
    if visit.alone:
        return
    for host in hosts:
        ahead, error = host.clock
        beyond = abs(ahead) - error
        what = f"its clock is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}"
        do = "let chrony or systemd-timesyncd set it: `timedatectl set-ntp true`"
        if beyond > _SMALL_SKEW:
            found.append((bad if beyond > _SKEW else odd)("clock", what, do, host))
    yield from found
    if hosts and not found:
        most = max(abs(ahead) + error for ahead, error in (host.clock for host in hosts))
        yield good("clock", f"within {max(1, round(1000 * most))} ms of this host's")


def devices(visit: Visit) -> Iterator[Finding]:
    """As many devices as ranks, which torch can use, and the same ones everywhere."""
    hosts = [host for host in visit.there if "torch" in host.probe]
    found: list[Finding] = []
    for host in hosts:
        found += _devices(host)
    kinds = {tuple(sorted(set(host.probe["torch"]["devices"]))) for host in hosts}
    if len(kinds) > 1:
        what = f"not the same devices: {'; '.join(sorted(', '.join(kind) or 'none' for kind in kinds))}"
        found.append(odd("devices", what, "take hosts of one kind: all wait for the slowest", *hosts))
    yield from found
    if hosts and not found:
        names = hosts[0].probe["torch"]["devices"]
        driver = hosts[0].facts["nvidia"]["driver"]
        gpus = f"{len(names)} × {names[0]}, driver {driver}" if names else ""
        cpus = f"CPU, {number(hosts[0].facts['cores'], 'core')} for {number(len(hosts[0].ranks), 'rank')}"
        where = f" on {hosts[0].name}" if len(hosts) > 1 else ""
        yield good("devices", (gpus or cpus) + where)


def _devices(host: Host) -> Iterator[Finding]:
    torch, driver, ranks = host.probe["torch"], host.facts["nvidia"], len(host.ranks)
    beside = torch["devices"] or driver["devices"] * ["NVIDIA"]
    if beside and host.facts["environment"].get("DS_ACCELERATOR") == "cpu":
        what = f"DeepSpeed is told to run on the CPU, beside {len(beside)} × {beside[0]}"
        yield odd("devices", what, "unset DS_ACCELERATOR", host)
    elif driver["devices"] and not torch["devices"]:
        build = "a build for CPUs" if torch["cuda"] is None else f"built for CUDA {torch['cuda']}"
        what = f"{driver['devices']} × NVIDIA (driver {driver['driver']}), but torch {torch['version']}, {build}, "
        do = "install torch's build for CUDA, and a driver as new as it asks for"
        yield bad("devices", f"{what}sees none: {torch['error']}", do, host)
    elif torch["devices"] and len(torch["devices"]) < ranks:
        what = f"{number(len(torch['devices']), 'device')} for {number(ranks, 'rank')}"
        yield bad("devices", what, "give the host as many slots as it has devices (CUDA_VISIBLE_DEVICES?)", host)
    elif not torch["devices"] and host.facts["cores"] < ranks:
        what = f"{number(host.facts['cores'], 'core')} for {number(ranks, 'rank')}"
        yield odd("devices", what, "start fewer ranks: they take turns on the cores", host)


def open_files(visit: Visit) -> Iterator[Finding]:
    """As many files may be open as connections to all ranks take."""
    hosts, found = visit.there, []
    fewest, need = (own + each * visit.world for own, each in (_FEWEST_FILES, _FILES))
    for host in hosts:
        soft, hard = host.facts["limits"]["open_files"]
        if soft is None or soft >= need:
            continue
        do = f"`ulimit -n {need}` before the start"
        if visit.launch or (hard is not None and hard < need):
            do = f"`* - nofile {need}` into /etc/security/limits.conf there, or LimitNOFILE={need} for sshd or slurmd"
        report, how_many = (bad, f"at least {fewest:,}") if soft < fewest else (odd, f"up to {need:,}")
        what = f"{soft:,} may be open, and with {number(visit.world, 'rank')} each takes {how_many}"
        found.append(report("open files", what, do, host))
    yield from found
    if hosts and not found:
        least = min((soft for host in hosts if (soft := host.facts["limits"]["open_files"][0]) is not None), default=0)
        yield good("open files", f"{least:,} may be open, up to {need:,} are needed" if least else "no limit")


def locked_memory(visit: Visit) -> Iterator[Finding]:
    """What InfiniBand and NVMe transfer from must be locked into memory."""
    hosts, found = visit.there, []
    for host in hosts:
        limit = host.facts["limits"]["locked_memory"]
        if limit is None:
            continue
        if host.facts["infiniband"]:
            what = f"only {size(limit)} may be locked, and InfiniBand ({', '.join(host.facts['infiniband'])}) locks all"
            found.append(bad("locked memory", f"{what} that it transfers", _UNLIMITED, host))
        elif visit.needs.nvme:
            what = f"only {size(limit)} may be locked, and NVMe's buffers are"
            found.append(odd("locked memory", what, _UNLIMITED, host))
    yield from found
    if hosts and not found:
        limits = [host.facts["limits"]["locked_memory"] for host in hosts]
        least = min((limit for limit in limits if limit is not None), default=None)
        yield good("locked memory", "no limit" if least is None else f"{size(least)}; nothing here locks more")


def pinned_memory(visit: Visit) -> Iterator[Finding]:
    """Host memory can be pinned for transfers to a GPU."""
    asked = [host for host in visit.there if "pinned" in host.probe or host.probe.get("at", "").startswith(PINNING)]
    wrong = False
    for host in asked:
        pinned = host.probe.get("pinned", {"bytes": 0, "error": stopped(host.probe)})
        if pinned["error"]:
            wrong = True
            report = bad if visit.needs.offloads else odd
            do = f'{_UNLIMITED}; or "pin_memory": false in the config'
            yield report("pinned memory", f"host memory cannot be pinned: {pinned['error']}", do, host)
    if not asked:
        yield unasked("pinned memory", "not asked: no GPU to transfer to")
    elif not wrong:
        yield good("pinned memory", f"{size(asked[0].probe['pinned']['bytes'])} can be pinned")


def host_memory(visit: Visit) -> Iterator[Finding]:
    """Memory for what is offloaded to the host, and for the ranks themselves; without a GPU, for everything."""
    if not visit.needs.whole:
        yield unasked("host memory", NO_CONFIG)
        return
    hosts = [host for host in visit.there if "accelerator" in host.probe]
    shares = {}
    found: list[Finding] = []
    for host in hosts:
        ranks = len(host.ranks)
        shares[host.name] = ranks * (visit.needs.host if _on_gpu(host) else visit.needs.host_alone)
        who = f"{number(ranks, 'rank')} {'takes' if ranks == 1 else 'take'}"
        found += _room("host memory", host, shares[host.name], host.facts["memory"]["available"], who)
    yield from found
    if hosts and not found:
        least = min(host.facts["memory"]["available"] for host in hosts)
        yield good("host memory", f"{size(least)} available, where the ranks of a host take about "
                                  f"{size(max(shares.values()))}")  # fmt: skip


def device_memory(visit: Visit) -> Iterator[Finding]:
    """Memory of the devices, for the fullest rank."""
    asked = [host for host in visit.there if _on_gpu(host)]
    if not asked or not visit.needs.whole:
        yield unasked("device memory", NO_CONFIG if asked else "not asked: no GPU")
        return
    least = {id(host): min(host.probe["torch"]["memory"]) for host in asked}
    found = [
        row
        for host in asked
        for row in _room("device memory", host, visit.needs.device, least[id(host)], "a rank takes")
    ]
    yield from found
    if not found:
        room = f"{size(min(least.values()))} on each, where a rank takes about {size(visit.needs.device)}"
        yield good("device memory", room)


def _on_gpu(host: Host) -> bool:
    return bool(host.probe.get("accelerator", "cpu") != "cpu" and host.probe["torch"]["devices"])


def _room(check: str, host: Host, wanted: float, there: float, who: str) -> Iterator[Finding]:
    """Whether what is wanted is there, with room for what no estimate has."""
    what = f"{size(there)} there, where {who} about {size(wanted)}"
    do = "see what would fit: `megagpt plan` with the same recipe and config"
    if wanted > there:
        yield bad(check, what, do, host)
    elif wanted > SAFE_FRACTION * there:
        yield odd(check, what, do, host)
