"""Checks of data, run directory and disks: pure functions of what the hosts have said."""

from __future__ import annotations

from collections.abc import Iterator

from megagpt.doctor.examination import Visit
from megagpt.doctor.finding import Finding
from megagpt.doctor.judging import NO_RECIPE, bad, good, odd, size, unasked, unlike


def data(visit: Visit) -> Iterator[Finding]:
    """Every corpus is there on every host, and is the same by size, ends, and what its sidecar says."""
    hosts, wrong = visit.there, False
    if not visit.needs.recipe:
        yield unasked("data", NO_RECIPE)
        return
    for prefix in visit.needs.corpora:
        there = [host for host in hosts if not host.facts["data"][prefix]["missing"]]
        for host in hosts:
            for missing in host.facts["data"][prefix]["missing"]:
                wrong = True
                do = "put the corpus where every host sees it, or copy it to the same path; `megagpt prepare` makes one"
                yield bad("data", f"{missing}", do, host)
        for host, here, first in unlike(there, lambda host, prefix=prefix: host.facts["data"][prefix]):  # type: ignore[misc]
            wrong = True
            what = f"{prefix} is not the corpus of {there[0].name}: {_difference(here, first)}"
            yield bad("data", what, f"copy {prefix}.bin, .idx and .json from {there[0].name} again", host)
    if hosts and not wrong:
        count = len(visit.needs.corpora)
        corpora = "1 corpus" if count == 1 else f"{count} corpora"
        how = ", by size, first and last MiB, and sidecar" if len(hosts) > 1 else " (not compared: one host)"
        yield good("data", corpora + how)


def _difference(here: dict[str, object], there: dict[str, object]) -> str:
    """The first thing in which two corpora differ."""
    if here["sizes"] != there["sizes"]:
        return f"{_sizes(here)}, there {_sizes(there)}"
    if here["ends"] != there["ends"]:
        return "same size, but other bytes in the first or last MiB"
    return "its sidecar (.json) names other checksums"


def _sizes(found: dict[str, object]) -> str:
    sizes = found["sizes"]
    assert isinstance(sizes, dict)
    return " and ".join(f"{suffix} of {count:,} bytes" for suffix, count in sizes.items())


def run_directory(visit: Visit) -> Iterator[Finding]:
    """Every host can write there, and sees what the others have written."""
    hosts, wrong = visit.there, False
    path = visit.needs.run_dir
    if not path:
        yield unasked("run directory", NO_RECIPE)
        return
    for host in hosts:
        if error := host.facts["run"]["error"]:
            wrong = True
            other = "free some space" if host.facts["run"]["full"] else "give yourself the right to write there"
            do = f"{other}, or choose another run_dir"
            yield bad("run directory", f"{path} cannot be written to: {error}", do, host)
    wrote = {visit.hosts.index(host): host for host in hosts if not host.facts["run"]["error"]}
    for host in wrote.values():
        unseen = [wrote[number].name for number in wrote if number not in (host.seen or [])]
        if unseen and host is not next(iter(wrote.values())):
            wrong = True
            what = f"{path} is not shared: what {', '.join(unseen)} wrote there is not seen"
            do = "put run_dir on a disk that every host mounts: each rank writes its part of a checkpoint there"
            yield bad("run directory", what, do, host)
    if hosts and not wrong:
        shared = "shared: each host sees what the others wrote" if len(hosts) > 1 else "can be written to"
        yield good("run directory", f"{path}, {shared}")


def disks(visit: Visit) -> Iterator[Finding]:
    """There is room for checkpoints, and for what is offloaded to NVMe."""
    needs, found = visit.needs, []
    kept = (needs.keep_last or 0) + 1
    for host in visit.there:
        here = host.facts["disks"]
        if needs.run_dir:
            free, checkpoint = here[needs.run_dir]["free"], needs.checkpoint
            room = f"{size(free)} free for {needs.run_dir}, where "
            do = "free some space, or choose another run_dir"
            if free < checkpoint:
                found.append(bad("disk", f"{room}one checkpoint takes {size(checkpoint)}", do, host))
            elif free < kept * checkpoint:
                do = "free some space, or lower checkpoint.keep_last"
                what = f"{room}{kept} checkpoints take {size(kept * checkpoint)}"
                found.append(odd("disk", what, do, host))
        if needs.nvme_bytes:
            share = needs.nvme_bytes * len(host.ranks)
            free = here[needs.nvme]["free"]
            if free < share:
                what = f"{size(free)} free for {needs.nvme}, where the offloaded state takes {size(share)}"
                found.append(bad("disk", what, "free some space, or set nvme_path to a larger disk", host))
    yield from found
    if not needs.run_dir:
        yield unasked("disk", NO_RECIPE)
    elif not found and visit.there:
        least = min(host.facts["disks"][needs.run_dir]["free"] for host in visit.there)
        what = f"{size(least)} free for {needs.run_dir}, where {kept} checkpoints take {size(kept * needs.checkpoint)}"
        yield good("disk", what)
