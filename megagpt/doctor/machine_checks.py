"""Checks of the clocks, devices, memory, limits, data and disks that the hosts have reported."""

from __future__ import annotations

from megagpt.doctor.probes import PINNING
from megagpt.doctor.report import CheckResult, format_bytes
from megagpt.doctor.session import Host, Session
from megagpt.doctor.software_checks import NO_CONFIG, NO_RECIPE, failure_of
from megagpt.errors import plural
from megagpt.plan.machine import SAFE_FRACTION

# Clock differences, in seconds, from which an error or a warning is reported.
_CLOCK_ERROR, _CLOCK_WARNING = 2.0, 0.5
# Open files that a rank needs at least: a constant, and a number that is multiplied by the world size. Both were
# counted at ZeRO stages 1 and 3 with gloo.
_MIN_FILES = (64, 5)
# Open files that a rank may need with more process groups, with NCCL's connections, and with many corpora.
_MAX_FILES = (256, 16)
_UNLIMITED = "`ulimit -l unlimited`: memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity for slurmd, " \
             "`docker run --ulimit memlock=-1`"  # fmt: skip


def check_data(session: Session, result: CheckResult) -> None:
    """Check that every host has the same corpora. Compares sizes, first and last MiB, and checksums in the sidecar."""
    if not session.requirements.recipe:
        result.skip(NO_RECIPE)
        return
    for prefix in session.requirements.corpora:
        complete = [host for host in session.reachable if not host.facts["data"][prefix]["missing"]]
        for host in session.reachable:
            corpus = host.facts["data"][prefix]
            for missing in corpus["missing"]:
                do = "put the corpus on a shared disk, or copy it to the same path; `megagpt prepare` creates one"
                result.error(missing, do, host.name)
            if host in complete and (difference := _difference(corpus, complete[0].facts["data"][prefix])):
                first = complete[0].name
                do = f"copy {prefix}.bin, .idx and .json from {first} again"
                result.error(f"{prefix} differs from {first}'s: {difference}", do, host.name)
    count = len(session.requirements.corpora)
    compared = "the same by size, first and last MiB, and sidecar" if len(session.reachable) > 1 else "one host only"
    result.passed(f"{'1 corpus' if count == 1 else f'{count} corpora'}: {compared}")


def _difference(corpus: dict[str, dict[str, int]], expected: dict[str, dict[str, int]]) -> str:
    if corpus["sizes"] != expected["sizes"]:
        here, there = (
            " and ".join(f"{suffix} of {count:,} bytes" for suffix, count in one["sizes"].items())
            for one in (corpus, expected)
        )
        return f"{here}, instead of {there}"
    if corpus["ends"] != expected["ends"]:
        return "same size, but other bytes in the first or last MiB"
    return "" if corpus["sidecar"] == expected["sidecar"] else "its sidecar (.json) has other checksums"


def check_run_directory(session: Session, result: CheckResult) -> None:
    """Check that every host can write into the run directory, and sees the files that other hosts have written."""
    path, hosts = session.requirements.run_dir, session.reachable
    if not path:
        result.skip(NO_RECIPE)
        return
    for host in hosts:
        if error := host.facts["run"]["error"]:
            fix = "free some space" if host.facts["run"]["full"] else "get write permission there"
            result.error(f"{path} cannot be written to: {error}", f"{fix}, or choose another run_dir", host.name)
    writers = [host for host in hosts if not host.facts["run"]["error"]]
    for host in writers[1:]:
        unseen = [one.name for one in writers if session.hosts.index(one) not in (host.visible_markers or [])]
        if unseen:
            what = f"{path} is not shared: files written by {', '.join(unseen)} are not visible"
            do = "put run_dir on a disk that every host mounts: each rank writes its part of a checkpoint there"
            result.error(what, do, host.name)
    result.passed(f"{path}, " + ("shared by all hosts" if len(hosts) > 1 else "writable"))


def check_disk(session: Session, result: CheckResult) -> None:
    """Check that there is enough disk space for checkpoints, and for state that is offloaded to NVMe."""
    needed, run_dir = session.requirements, session.requirements.run_dir
    if not run_dir:
        result.skip(NO_RECIPE)
    checkpoints = (needed.keep_last or 0) + 1
    for host in session.reachable:
        free = host.facts["disks"]
        if run_dir and free[run_dir] < checkpoints * needed.checkpoint:
            if free[run_dir] < needed.checkpoint:
                report, need = result.error, f"one checkpoint needs {format_bytes(needed.checkpoint)}"
                do = "free some space, or choose another run_dir"
            else:
                report, need = (
                    result.warn,
                    f"{checkpoints} checkpoints need {format_bytes(checkpoints * needed.checkpoint)}",
                )
                do = "free some space, or lower checkpoint.keep_last"
            report(f"{format_bytes(free[run_dir])} free for {run_dir}, but {need}", do, host.name)
        offloaded = needed.nvme_bytes * len(host.ranks)
        if offloaded and free[needed.nvme] < offloaded:
            what = f"{format_bytes(free[needed.nvme])} free for {needed.nvme}, but the offloaded state needs "
            do = "free some space, or set nvme_path to a larger disk"
            result.error(what + format_bytes(offloaded), do, host.name)
    if run_dir:
        least = format_bytes(min(host.facts["disks"][run_dir] for host in session.reachable))
        need = format_bytes(checkpoints * needed.checkpoint)
        result.passed(f"{least} free for {run_dir}, {checkpoints} checkpoints need {need}")


def check_clock(session: Session, result: CheckResult) -> None:
    """Check that the clocks agree, because modification times of files show whether a run is alive."""
    if session.single_host:
        return
    for host in session.reachable:
        ahead, uncertainty = host.clock
        if abs(ahead) - uncertainty > _CLOCK_WARNING:
            report = result.error if abs(ahead) - uncertainty > _CLOCK_ERROR else result.warn
            what = f"its clock is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}"
            report(what, "synchronize it with chrony or systemd-timesyncd: `timedatectl set-ntp true`", host.name)
    largest = max(abs(ahead) + uncertainty for ahead, uncertainty in (host.clock for host in session.reachable))
    result.passed(f"within {max(1, round(1000 * largest))} ms of this host's")


def check_devices(session: Session, result: CheckResult) -> None:
    """Check that each rank has a device, that torch can use it, and that all hosts have the same model of device."""
    hosts = [host for host in session.reachable if "torch" in host.probe]
    for host in hosts:
        _check_devices_of(host, result)
    models = {", ".join(sorted(set(host.probe["torch"]["devices"]))) or "none" for host in hosts}
    if len(models) > 1:
        what = f"the hosts have different devices: {'; '.join(sorted(models))}"
        result.warn(what, "use hosts of one kind: all wait for the slowest", *(host.name for host in hosts))
    if hosts:
        host, names = hosts[0], hosts[0].probe["torch"]["devices"]
        gpus = f"{len(names)} × {names[0]}, driver {host.facts['nvidia']['driver']}" if names else ""
        cpus = f"CPU, {plural(host.facts['cores'], 'core')} for {plural(len(host.ranks), 'rank')}"
        result.passed((gpus or cpus) + (f" on {host.name}" if len(hosts) > 1 else ""))


def _check_devices_of(host: Host, result: CheckResult) -> None:
    torch, driver, ranks, cores = host.probe["torch"], host.facts["nvidia"], len(host.ranks), host.facts["cores"]
    present = torch["devices"] or driver["devices"] * ["NVIDIA"]
    if present and host.facts["environment"].get("DS_ACCELERATOR") == "cpu":
        what = f"DS_ACCELERATOR selects the CPU, but there are {len(present)} × {present[0]}"
        result.warn(what, "unset DS_ACCELERATOR", host.name)
    elif driver["devices"] and not torch["devices"]:
        build = "built for CPUs" if torch["cuda"] is None else f"built for CUDA {torch['cuda']}"
        what = (
            f"torch {torch['version']}, {build}, sees none of {driver['devices']} × NVIDIA (driver {driver['driver']})"
        )
        do = "install torch's build for CUDA, and a driver that is recent enough for it"
        result.error(f"{what}: {torch['error']}", do, host.name)
    elif torch["devices"] and len(torch["devices"]) < ranks:
        what = f"{plural(len(torch['devices']), 'device')} for {plural(ranks, 'rank')}"
        result.error(what, "give the host as many slots as it has devices (CUDA_VISIBLE_DEVICES?)", host.name)
    elif not torch["devices"] and cores < ranks:
        what = f"{plural(cores, 'core')} for {plural(ranks, 'rank')}"
        result.warn(what, "start fewer ranks: they take turns on the cores", host.name)


def check_open_files(session: Session, result: CheckResult) -> None:
    """Check that the limit on open files allows a connection to every rank."""
    minimum, maximum = (constant + per_rank * session.world_size for constant, per_rank in (_MIN_FILES, _MAX_FILES))
    limits = {host.name: host.facts["limits"]["open_files"] for host in session.reachable}
    for host, (soft, hard) in limits.items():
        if soft is None or soft >= maximum:
            continue
        do = f"`ulimit -n {maximum}` before the start"
        if session.launcher or (hard is not None and hard < maximum):
            do = f"`* - nofile {maximum}` in /etc/security/limits.conf there, LimitNOFILE={maximum} for sshd or slurmd"
        report, need = (
            (result.error, f"at least {minimum:,}") if soft < minimum else (result.warn, f"up to {maximum:,}")
        )
        report(f"limited to {soft:,}, but each of {plural(session.world_size, 'rank')} needs {need}", do, host)
    least = min((soft for soft, _ in limits.values() if soft is not None), default=0)
    result.passed(f"limited to {least:,}, up to {maximum:,} are needed" if least else "unlimited")


def check_locked_memory(session: Session, result: CheckResult) -> None:
    """Check that enough memory may be locked for transfers by InfiniBand and NVMe."""
    limits = {host.name: host.facts["limits"]["locked_memory"] for host in session.reachable}
    for host in session.reachable:
        limit, adapters = limits[host.name], ", ".join(host.facts["infiniband"])
        if limit is not None and adapters:
            what = f"limited to {format_bytes(limit)}, but InfiniBand ({adapters}) locks all memory that it transfers"
            result.error(what, _UNLIMITED, host.name)
        elif limit is not None and session.requirements.nvme:
            result.warn(f"limited to {format_bytes(limit)}, but buffers for NVMe are locked", _UNLIMITED, host.name)
    least = min((limit for limit in limits.values() if limit is not None), default=None)
    result.passed("unlimited" if least is None else f"limited to {format_bytes(least)}; nothing here needs more")


def check_pinned_memory(session: Session, result: CheckResult) -> None:
    """Check that host memory can be pinned for transfers to a GPU."""
    hosts = [host for host in session.reachable
             if "pinned" in host.probe or host.probe.get("at", "").startswith(PINNING)]  # fmt: skip
    if not hosts:
        result.skip("no GPU to transfer to")
        return
    for host in hosts:
        error = host.probe["pinned"]["error"] if "pinned" in host.probe else failure_of(host.probe)
        if error:
            report = result.error if session.requirements.offloads else result.warn
            do = f'{_UNLIMITED}; or "pin_memory": false in the config'
            report(f"host memory cannot be pinned: {error}", do, host.name)
    result.passed(f"{format_bytes(hosts[0].probe.get('pinned', {}).get('bytes', 0))} can be pinned")


def check_device_memory(session: Session, result: CheckResult) -> None:
    """Check that the rank that needs the most memory fits into device memory."""
    hosts, needed = [host for host in session.reachable if _uses_gpu(host)], session.requirements.device
    if not hosts or not session.requirements.complete:
        result.skip(NO_CONFIG if hosts else "no GPU")
        return
    for host in hosts:
        _check_room(result, host, needed, min(host.probe["torch"]["memory"]), "a rank needs")
    least = min(min(host.probe["torch"]["memory"]) for host in hosts)
    result.passed(f"{format_bytes(least)} per device, a rank needs about {format_bytes(needed)}")


def check_host_memory(session: Session, result: CheckResult) -> None:
    """Check that the ranks of each host and the state that they offload fit into its memory.

    On a host without GPUs, all state must fit into host memory.
    """
    needs = session.requirements
    if not needs.complete:
        result.skip(NO_CONFIG)
        return
    hosts = [host for host in session.reachable if "accelerator" in host.probe]
    needed = {host.name: len(host.ranks) * (needs.host if _uses_gpu(host) else needs.host_alone) for host in hosts}
    for host in hosts:
        who = f"{plural(len(host.ranks), 'rank')} {'needs' if len(host.ranks) == 1 else 'need'}"
        _check_room(result, host, needed[host.name], host.facts["memory"]["available"], who)
    if hosts:
        least = format_bytes(min(host.facts["memory"]["available"] for host in hosts))
        result.passed(f"{least} available, the ranks of a host need about {format_bytes(max(needed.values()))}")


def _uses_gpu(host: Host) -> bool:
    return bool(host.probe.get("accelerator", "cpu") != "cpu" and host.probe["torch"]["devices"])


def _check_room(result: CheckResult, host: Host, needed: float, available: float, who: str) -> None:
    """Report an error or a warning if an estimate exceeds the available memory, or comes too close to it."""
    if needed > SAFE_FRACTION * available:
        report = result.error if needed > available else result.warn
        what = f"{format_bytes(available)} available, but {who} about {format_bytes(needed)}"
        report(what, "see what would fit: `megagpt plan` with the same recipe and config", host.name)
