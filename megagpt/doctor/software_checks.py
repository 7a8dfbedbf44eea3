"""Checks of Python, packages, code, recipe, environment variables and operators that the hosts have reported."""

from __future__ import annotations

import re
from contextlib import suppress

from megagpt.cluster import env_forwarding, preflight
from megagpt.doctor.probes import BUILDING, PINNING
from megagpt.doctor.report import CheckResult
from megagpt.doctor.session import Host, Session
from megagpt.errors import plural

NO_RECIPE = "needs --recipe"
NO_CONFIG = "needs --recipe and --deepspeed_config"


def failure_of(probe: dict[str, object]) -> str:
    """Return the reason why a probe has ended before its result was complete, or "" if the result is complete."""
    return f"not finished after {probe['hung']:.0f} s" if "hung" in probe else str(probe.get("died", ""))


def check_python(session: Session, result: CheckResult) -> None:
    """Check that every host has the same Python version."""
    first = session.first
    for host, version, expected in session.differing("python", "version"):
        what = f"Python {version}; {first.name} has {expected}"
        result.error(what, "install the same environment on every host", host.name)
    result.passed("{version} at {executable}".format(**first.facts["python"]))


def check_packages(session: Session, result: CheckResult) -> None:
    """Check that every required package is installed, in a supported version that is the same on every host."""
    first = session.first
    requirements = {re.split(r"[^\w.-]", line)[0]: line for line in session.package_requirements}
    for host in session.reachable:
        pip = f"{host.facts['python']['executable']} -m pip install"
        for name, version in host.facts["packages"].items():
            requirement, expected = requirements.get(name, name), first.facts["packages"].get(name, "")
            if not version:
                install = "bash launch/install.sh, or `pip install -e .` in its folder"
                do = install if name == "megagpt" else f'{pip} "{requirement}"'
                result.error(f"{name} is not installed", do, host.name)
            elif not _satisfies(version, requirement):
                do = f'{pip} "{requirement}"'
                result.error(f"{name} {version} does not satisfy megagpt's requirement {requirement}", do, host.name)
            if version and expected and version != expected:
                do = f'{pip} "{name}=={expected}"'
                result.error(f"{name} {version}; {first.name} has {expected}", do, host.name)
    versions = first.facts["packages"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed") if name in versions)
    result.passed(f"{named} and {len(versions) - 2} others, as megagpt requires them")


def _satisfies(version: str, requirement: str) -> bool:
    with suppress(ImportError, ValueError):
        from packaging.requirements import Requirement

        return bool(Requirement(requirement).specifier.contains(version, prereleases=True))
    return True


def check_imports(session: Session, result: CheckResult) -> None:
    """Check that torch and DeepSpeed can be loaded."""
    for host in session.reachable:
        failure, step = failure_of(host.probe), host.probe.get("at", "")
        if failure and not step.startswith((BUILDING, PINNING)):
            python = host.facts["python"]["executable"]
            command = f"`{python} -c '{step}'`" if step.startswith("import ") else "the same"
            do = f"run {command} there by hand, and fix or reinstall what it complains about"
            result.error(f"{step}: {failure}", do, host.name)
    if all("accelerator" in host.probe for host in session.reachable):
        result.passed("torch and deepspeed load")


def check_code(session: Session, result: CheckResult) -> None:
    """Check that every host has the same source files of megagpt."""
    first = session.first
    for host, checksum, expected in session.differing("code", "checksum"):
        what = f"the code in {host.facts['code']['folder']} ({checksum}) differs from {first.name}'s ({expected})"
        result.error(what, "check out or copy the same files to every host", host.name)
    result.passed("{checksum} in {folder}".format(**first.facts["code"]))


def check_recipe(session: Session, result: CheckResult) -> None:
    """Check that recipe, config and tokenizer are the same on every host. Their content was checked before."""
    first, requirements = session.first, session.requirements
    if not requirements.files:
        result.skip(NO_CONFIG)
        return
    for path in requirements.files:
        for host in session.reachable:
            if not host.facts["files"][path]:
                result.error(f"{path} cannot be read", "copy it to the same path on every host", host.name)
        for host, checksum, expected in session.differing("files", path):
            if checksum and expected:
                what = f"{path} ({checksum}) differs from {first.name}'s ({expected})"
                result.error(what, f"copy {first.name}'s to every host", host.name)
    files = ", ".join(f"{path} ({first.facts['files'][path]})" for path in requirements.files)
    valid = f"; valid for {plural(session.world_size, 'rank')}" if requirements.complete else ""
    result.passed(files + valid)


def check_environment(session: Session, result: CheckResult) -> None:
    """Check that environment variables that affect training are the same on every host, and that they are forwarded."""
    if session.single_host:
        return
    for name in sorted({name for host in session.reachable for name in host.facts["environment"]}):
        for host, value, expected in session.differing("environment", name):
            if not env_forwarding.may_differ_per_host(name):
                result.error(
                    f"{name}: {value}, on {session.first.name} {expected}", preflight.HOW_TO_FORWARD, host.name
                )
    if session.launcher and session.launcher.not_forwarded:
        what = f"DeepSpeed would not forward these to the other hosts: {', '.join(session.launcher.not_forwarded)}"
        result.warn(what, "megagpt hosts HOSTFILE --write-environment FILE, and run the `export` line that it prints")
    result.passed("all that training depends on are the same on every host")


def check_operators(session: Session, result: CheckResult) -> None:
    """Check that the compiled operators that the layout needs can be loaded, and are not locked by a dead build."""
    requirements = session.requirements
    dead_locks = session.dead_locks()
    for host, lock in dead_locks:
        what = f"{lock['operator']} is locked by a build that has died: {lock['path']}"
        if lock["operator"] in (*requirements.operators, *requirements.gpu_operators):
            result.error(what, f"rm {lock['path']}", host.name)
        else:
            effect = "this layout does not need it" if requirements.config else "a job that needs it would wait forever"
            result.warn(f"{what}; {effect}", f"rm {lock['path']}", host.name)
    for host in session.reachable:
        _check_loading(host, session, result)
    if not requirements.config:
        result.skip("needs --deepspeed_config")
        return
    if dead_locks or any(finding.status == "error" for finding in result.findings):
        return
    loaded: dict[str, float] = {}
    for host in session.reachable:
        for name, one in host.probe.get("operators", {}).items():
            if not one["error"]:
                loaded[name] = max(loaded.get(name, 0.0), one["seconds"])
    if loaded or not requirements.operators:
        text = ", ".join(f"{name} loads ({seconds:.1f} s)" for name, seconds in loaded.items())
        result.passed(text or "this layout needs none")


def _check_loading(host: Host, session: Session, result: CheckResult) -> None:
    for name, one in host.probe.get("operators", {}).items():
        if not one["error"]:
            continue
        what = f"{name} cannot be built: {one['error']}"
        do = "install a C++ compiler, ninja and libaio's headers (Debian: g++ ninja-build libaio-dev)"
        if name in session.requirements.gpu_operators:
            do = "install nvcc of the CUDA that torch is built for, and a C++ compiler, and export CUDA_HOME"
        if name == "fused_adam":
            result.warn(f"{what}; torch's own is used instead", do, host.name)
        else:
            result.error(what, do, host.name)
    step, failure = host.probe.get("at", ""), failure_of(host.probe)
    if failure and step.startswith(BUILDING):
        name, python = step.removeprefix(BUILDING), host.facts["python"]["executable"]
        command = f"{python} -c 'from megagpt.engine import deepspeed_ops; deepspeed_ops.load(\"{name}\")'"
        do = f"allow more time (--limit), or build it before: `{command}`"
        result.error(f"{name} cannot be built: {failure}", do, host.name)
