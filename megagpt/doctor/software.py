"""Checks of Python, packages, code, recipe, variables and operators: pure functions of what the hosts have said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

from megagpt.cluster import env_forwarding, preflight
from megagpt.doctor import examination
from megagpt.doctor.examination import Host, Visit
from megagpt.doctor.finding import BAD, Finding
from megagpt.doctor.judging import NO_CONFIG, bad, good, number, odd, stopped, unasked, unlike
from megagpt.doctor.probe import BUILDING, PINNING

_SAME = "install the same environment on every host"


def python(visit: Visit) -> Iterator[Finding]:
    """The same version at the same path."""
    hosts, wrong = visit.there, False
    for host, here, there in unlike(hosts, lambda host: host.facts["python"]["version"]):
        wrong = True
        yield bad("python", f"Python {here}; {hosts[0].name} has {there}", _SAME, host)
    if hosts and not wrong:
        yield good("python", f"{hosts[0].facts['python']['version']} at {hosts[0].facts['python']['executable']}")


def packages(visit: Visit) -> Iterator[Finding]:
    """What megagpt needs is installed, in versions that it knows, the same everywhere."""
    hosts, found = visit.there, []
    for host in hosts:
        for name, version in host.facts["packages"].items():
            wanted = next((line for line in visit.requirements if re.split(r"[^\w.-]", line)[0] == name), name)
            install = f'{host.facts["python"]["executable"]} -m pip install "{wanted}"'
            if not version:
                do = install if name != "megagpt" else "bash launch/install.sh, or `pip install -e .` in its folder"
                found.append(bad("packages", f"{name} is not installed", do, host))
            elif not _fits(version, wanted):
                found.append(bad("packages", f"{name} {version} is not what megagpt knows: {wanted}", install, host))
    for host in hosts[1:]:
        for name, there in hosts[0].facts["packages"].items():
            here = host.facts["packages"].get(name, "")
            if here and there and here != there:
                do = f'{host.facts["python"]["executable"]} -m pip install "{name}=={there}"'
                found.append(bad("packages", f"{name} {here}; {hosts[0].name} has {there}", do, host))
    yield from found
    if hosts and not found:
        versions = hosts[0].facts["packages"]
        named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed") if name in versions)
        yield good("packages", f"{named} and {len(versions) - 2} others, as megagpt needs them")


def code(visit: Visit) -> Iterator[Finding]:
    """The same megagpt, file by file."""
    hosts, wrong = visit.there, False
    for host, here, there in unlike(hosts, lambda host: host.facts["code"]["checksum"]):
        wrong = True
        what = f"other code in {host.facts['code']['folder']} ({here}) than on {hosts[0].name} ({there})"
        yield bad("code", what, "check out or copy the same files to every host", host)
    if hosts and not wrong:
        yield good("code", f"{hosts[0].facts['code']['checksum']} in {hosts[0].facts['code']['folder']}")


def recipe(visit: Visit) -> Iterator[Finding]:
    """The files of the command line are the same on every host, and fit together on so many ranks."""
    hosts, wrong = visit.there, False
    if not visit.needs.files:
        yield unasked("recipe", NO_CONFIG)
        return
    for path in visit.needs.files:
        for host in hosts:
            if not host.facts["files"][path]:
                wrong = True
                yield bad("recipe", f"{path} cannot be read", "copy it to the same path on every host", host)
        for host, here, there in unlike(hosts, lambda host, path=path: host.facts["files"][path]):  # type: ignore[misc]
            if here and there:
                wrong = True
                what = f"{path} is another file ({here}) than on {hosts[0].name} ({there})"
                yield bad("recipe", what, f"copy {hosts[0].name}'s to every host", host)
    if hosts and not wrong:
        sums = ", ".join(f"{path} ({hosts[0].facts['files'][path]})" for path in visit.needs.files)
        fit = f"; they fit {number(visit.world, 'rank')}" if visit.needs.whole else ""
        yield good("recipe", sums + fit)


def environment(visit: Visit) -> Iterator[Finding]:
    """Variables that training depends on are alike, and reach the other hosts."""
    hosts, wrong = visit.there, False
    if visit.alone:
        return
    for name in sorted({name for host in hosts for name in host.facts["environment"]}):
        for host, here, there in unlike(hosts, lambda host, name=name: host.facts["environment"].get(name, "not set")):  # type: ignore[misc]
            if not env_forwarding.of_a_host(name):
                wrong = True
                yield bad("variables", f"{name}: {here}, on {hosts[0].name} {there}", preflight.HAND_ON, host)
    if visit.launch and visit.launch.kept_back:
        wrong = True
        what = f"DeepSpeed would not hand these on to the other hosts: {', '.join(visit.launch.kept_back)}"
        yield odd("variables", what, "megagpt hosts HOSTFILE --write-environment FILE, and type what it says")
    if hosts and not wrong:
        yield good("variables", "what training depends on is alike on every host")


def imports(visit: Visit) -> Iterator[Finding]:
    """Torch and DeepSpeed load."""
    wrong = False
    for host in visit.there:
        if not (stopped(host.probe)) or host.probe["at"].startswith((BUILDING, PINNING)):
            continue
        wrong, at, python = True, host.probe["at"], host.facts["python"]["executable"]
        do = "run the same there by hand, and mend or install anew what it complains about"
        if at.startswith("import "):
            do = f"run `{python} -c '{at}'` there, and mend or install anew what it complains about"
        yield bad("imports", f"{at}: {stopped(host.probe)}", do, host)
    if not wrong and visit.there and all("accelerator" in host.probe for host in visit.there):
        yield good("imports", "torch and deepspeed load")


def operators(visit: Visit) -> Iterator[Finding]:
    """The compiled operators of DeepSpeed that this layout needs load, and no dead build locks them."""
    needs, found = visit.needs, []
    dead = examination.dead_locks(visit)
    for lock in dead:
        host = next(host for host in visit.hosts if host.name == lock["host"])
        what = f"{lock['operator']} is locked by a build that has died: {lock['path']}"
        if lock["operator"] in (*needs.operators, *needs.gpu_operators):
            found.append(bad("operators", what, f"rm {lock['path']}", host))
        else:
            where = "this layout does without it" if needs.config else "what needs it would wait for ever"
            found.append(odd("operators", f"{what}; {where}", f"rm {lock['path']}", host))
    for host in visit.there:
        found += _tried(host, visit)
    yield from found
    if not needs.config:
        yield unasked("operators", "not asked: no --deepspeed_config")
    elif not any(row.mark == BAD for row in found) and not dead:
        loaded = {name: one for host in visit.there for name, one in host.probe.get("operators", {}).items()}
        slowest = {name: max(host.probe["operators"][name]["seconds"] for host in visit.there
                             if name in host.probe.get("operators", {})) for name in loaded}  # fmt: skip
        well = [f"{name} loads ({slowest[name]:.1f} s)" for name in loaded if not loaded[name]["error"]]
        if well or not needs.operators:
            yield good("operators", ", ".join(well) or "this layout needs none")


def _tried(host: Host, visit: Visit) -> Iterator[Finding]:
    """How loading went on a host."""
    for name, tried in host.probe.get("operators", {}).items():
        if not tried["error"]:
            continue
        what = f"{name} cannot be built: {tried['error']}"
        do = "install a C++ compiler, ninja and libaio's headers (Debian: g++ ninja-build libaio-dev)"
        if name in visit.needs.gpu_operators:
            do = "install nvcc of the CUDA that torch is built for, and a C++ compiler, and export CUDA_HOME"
        if name == "fused_adam":
            yield odd("operators", f"{what}; torch's own takes its place", do, host)
        else:
            yield bad("operators", what, do, host)
    at, python = host.probe.get("at", ""), host.facts["python"]["executable"]
    if at.startswith(BUILDING) and (why := stopped(host.probe)):
        name = at.removeprefix(BUILDING)
        by_hand = f"{python} -c 'from megagpt.engine import deepspeed_ops; deepspeed_ops.load(\"{name}\")'"
        do = f"give it longer (--limit), or build it once before: `{by_hand}`"
        yield bad("operators", f"{name} cannot be built: {why}", do, host)


def _fits(version: str, wanted: str) -> bool:
    """Whether a version is one that a requirement names."""
    with suppress(ImportError, ValueError):
        from packaging.requirements import Requirement

        return bool(Requirement(wanted).specifier.contains(version, prereleases=True))
    return True
