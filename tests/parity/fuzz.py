"""Train random recipes on random layouts, and compare each with plain PyTorch.

python -m tests.parity.fuzz --cases N --seed S      prints each failure, reduced to a small case
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megagpt.cluster import free_port
from megagpt.config.recipe import Recipe
from megagpt.errors import UserError
from megagpt.parity.curve import KINDS, Curve, Tolerance, calibrated_tolerance, compare, tolerance_of, worst
from tests import forks
from tests.parity import draws, fuzz_rank, layouts, needs, reference
from tests.parity.draws import SECOND, Switches
from tests.parity.fuzz_rank import Part, Step

STILL = 20.0  # seconds in which no rank uses the processor: they wait for each other
GRACE = 1.5  # seconds that other ranks get to report why they fail, after one has
TICKS = 10  # of processor time, each a hundredth of a second, that counts as none
TRIALS = 60  # runs that making one failure smaller may take
SAME, REFUSED, WRONG, FAILED, HUNG = "same", "refused", "wrong", "failed", "hung"
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
               "TORCHDYNAMO_DISABLE": "1"}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What plain PyTorch gives: its curve, the losses at all other steps, and how far a layout may be off."""

    recipe: Recipe
    curve: Curve
    losses: dict[Step, float]
    tolerance: Tolerance


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `text` is the reason if it is not the same curve, `used` the largest part of each bound."""

    kind: str
    text: str = ""
    used: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """processor time of the ranks"""

    @property
    def good(self) -> bool:
        return self.kind in (SAME, REFUSED)


@dataclass
class Report:
    """What all cases came to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    used: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """processor time of the ranks of all cases that ended by themselves"""

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.outcomes.most_common())
        bounds = (
            f"{precision}: largest part used of the bound of "
            + ", ".join(f"{kind} {value:.0%}" for kind, value in used.items())
            for precision, used in sorted(self.used.items())
        )
        cases = sum(self.outcomes.values())
        return "\n".join([f"{cases} cases: {counts}; {self.seconds:,.0f} s of processor time on ranks", *bounds])


def fuzz(
    cases: range, seed: int, folder: Path, *, shrink_failures: bool = True, log: Callable[[str], None] = lambda _: None
) -> Report:
    """Draw and run cases by their numbers.

    Args:
        cases: numbers of the cases; a case depends on its number and the seed alone.
        seed: of the draws.
        folder: where checkpoints and logs are written.
        shrink_failures: whether each failure is reduced to a small case.
        log: is called with a line for each case, and with each failure.

    Returns:
        What the cases came to.
    """
    report = Report()
    for number in cases:
        switches, name = draws.draw(random.Random(f"{seed}-{number}")), f"fuzz-{seed}-{number}"
        begun = time.monotonic()
        outcome = run_case(switches, name, folder)
        worlds = [one["world"] for one in (switches, draws.second(switches)) if one is not None]
        log(f"{name}: {outcome.kind}, {worlds} ranks, {time.monotonic() - begun:.1f} s")
        report.outcomes[outcome.kind] += 1
        report.seconds += outcome.seconds
        kinds = report.used[switches["precision"]]
        for kind, value in outcome.used.items():
            kinds[kind] = max(kinds.get(kind, 0.0), value)
        if not outcome.good:
            if shrink_failures:
                switches, outcome = shrink(switches, outcome, lambda one, name=name: run_case(one, name, folder))
            report.failures.append(f"{outcome.kind}: {name}\n{format_case(switches, name)}\n{outcome.text}")
            log(report.failures[-1])
    return report


def run_case(switches: Switches, name: str, folder: Path, planted: str | None = None) -> Outcome:
    """Run one case, on one layout or on two, and compare it with plain PyTorch."""
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as inner:
        return _run_parts(switches, name, Path(inner), planted)


def _run_parts(switches: Switches, name: str, folder: Path, planted: str | None) -> Outcome:
    parts = _parts(switches, name, folder, planted)
    reasons = [_refusal(part) for part in parts]
    expected: Expected | None = None
    reports: list[dict[str, Any]] = []
    seconds = 0.0
    for part, reason in zip(parts, reasons, strict=True):
        if any(reasons) and not reason:
            continue  # the other layout is refused: there is nothing to compare
        with _started(part) as ranks:
            if not any(reasons) and expected is None:
                expected = _expected(parts)  # while the ranks train
            if problem := _wait(ranks, part):
                return problem
        found = [torch.load(part.folder / f"rank-{rank}.pt") for rank in range(part.case.world)]
        seconds += sum(report["seconds"] for report in found)
        refused = [_without_process(report["refused"]) for report in found]
        if any(refused) or reason:
            if len({*refused, *([reason] if reason else [])}) == 1 and "do: " in refused[0]:
                return Outcome(REFUSED, refused[0], seconds=seconds)
            return Outcome(WRONG, f"ranks do not refuse alike: {refused}, expected {reason}")
        if problem := _unlike(found):
            return problem
        reports.append(found[0])
    assert expected is not None  # no layout is refused
    return replace(_compare(reports, expected), seconds=seconds)


def _parts(switches: Switches, name: str, folder: Path, planted: str | None) -> list[Part]:
    steps = steps_of(switches)
    common = {"labels": switches["labels"], "total": switches["total"], "planted": planted}
    other = draws.second(switches)
    for inner in ("first", "second", "saved"):
        (folder / inner).mkdir()
    first = Part(draws.case_of(switches, name), steps, folder=folder / "first", **common)
    if other is None:
        return [first]
    half, saved = len(steps) // 2, folder / "saved"
    return [
        replace(first, steps=steps[:half], save=saved),
        Part(draws.case_of(other, name), steps[half:], folder=folder / "second", load=saved, **common),
    ]


def steps_of(switches: Switches) -> tuple[Step, ...]:
    """Updates, with a bad one and an evaluation among them if they are drawn, and an evaluation at both ends."""
    count = switches["updates"]
    steps: list[Step] = [("update", number) for number in range(count)]
    if switches["bad"]:
        steps.insert(2 * count // 3, (switches["bad"], 100))
    if switches["evaluate"]:
        steps.insert(2, ("evaluate", 101))
    return (("evaluate", 102), *steps, ("evaluate", 103))


def _refusal(part: Part) -> str | None:
    """Why the config refuses the case; None where it accepts it."""
    try:
        layouts.resolve(part.case, part.folder)
    except UserError as error:
        return _without_process(str(error))
    return None


def _without_process(reason: str | None) -> str | None:
    """The reason without the process id that is part of a file's name."""
    return reason and re.sub(r"-\d+(?=\.(json|yaml))", "", reason)


@contextmanager
def _started(part: Part) -> Iterator[list[Any]]:
    """Start the ranks of a part; those that still run at the end are killed."""
    world = part.case.world
    environment = {**ENVIRONMENT, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    places = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world))
    ranks = [forks.process(fuzz_rank.run, {**environment, **place}, part) for place in places]
    with forks.running(ranks):
        yield ranks


def _wait(ranks: Sequence[Any], part: Part) -> Outcome | None:
    """Wait until all ranks have ended, one has failed, or all stand still; the problem, if there is one."""
    begun = moved = time.monotonic()
    used, ends = 0, math.inf
    while any(rank.exitcode is None for rank in ranks):
        now, ticks = time.monotonic(), sum(map(_ticks, ranks))
        if ticks > used + TICKS:
            used, moved = ticks, now
        if any(rank.exitcode for rank in ranks):
            ends = min(ends, now + GRACE)
        if now - moved > STILL or now > ends or now - begun > fuzz_rank.LIMIT:
            break
        time.sleep(0.02)
    codes = [rank.exitcode for rank in ranks]
    if any(codes):
        return Outcome(FAILED, _stacks(ranks, part, 900))
    return Outcome(HUNG, _stacks(ranks, part, 4_000)) if None in codes else None


def _ticks(rank: Any) -> int:
    """Processor time that a rank has used, in hundredths of a second."""
    with suppress(OSError, ValueError):
        fields = Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def _stacks(ranks: Sequence[Any], part: Part, size: int) -> str:
    """The last characters of the ranks' logs, with the stacks of those that still run."""
    for rank in ranks:
        if rank.exitcode is None:
            os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(0.5)
    logs = [part.folder / f"rank-{rank}.log" for rank in range(len(ranks))]
    return "\n".join(f"--- {log.name}\n{log.read_text()[-size:]}" for log in logs if log.exists())


def _expected(parts: Sequence[Part]) -> Expected:
    part, steps = parts[0], [step for part in parts for step in part.steps]
    needs.provide(part.case)
    recipe = layouts.resolve(part.case, part.folder).recipe
    losses: dict[Step, float] = {}

    def batch(number: int) -> reference.Samples:
        return fuzz_rank.samples(recipe, part.labels, number)

    before: dict[int, list[Step]] = defaultdict(list)
    made = 0
    for step in steps:
        made += step[0] == "update"
        if step[0] != "update":
            before[made + 1].append(step)

    def between(number: int, loss: Callable[[reference.Samples], float]) -> None:
        losses.update({step: loss(batch(step[1])) for step in before[number]})

    updates = [batch(number) for kind, number in steps if kind == "update"]
    last = batch(steps[-1][1])
    micro: list[int] = []
    if recipe.precision != "fp32":  # where it matters which samples are summed in low precision
        for one in parts:
            size = layouts.resolve(one.case, one.folder).layout.micro_batch
            micro += [size for kind, _ in one.steps if kind == "update"]
    curve = reference.train(recipe, updates, part.total, last, between, micro=micro)
    losses[steps[-1]] = curve.held_out[1]
    curve = replace(curve, held_out=[losses[steps[0]], losses[steps[-1]]])
    tolerance = tolerance_of(recipe)
    if recipe.precision != "fp32" and recipe.optimizer.type == "muon":
        # Muon's iteration multiplies small singular values, and with them what low precision rounds, 500 times: the
        # bound is that of `megagpt parity`, from what rounding does to the reference itself
        exact = reference.train(recipe, updates, part.total, last, micro=micro, exact=True)
        tolerance = replace(
            tolerance, weights=max(tolerance.weights, calibrated_tolerance(recipe, curve, exact).weights)
        )
    return Expected(recipe, curve, losses, tolerance)


def _unlike(found: Sequence[dict[str, Any]]) -> Outcome | None:
    """A problem where ranks report different numbers, or hold different copies of a weight."""
    records = [str(report["record"]) for report in found]
    if len({*records}) > 1:
        return Outcome(WRONG, "\n".join(["ranks report different numbers", *records]))
    if found[0]["replicas differ"]:
        return Outcome(WRONG, "\n".join(["ranks hold different weights", *found[0]["replicas differ"]]))
    return None


def _compare(reports: Sequence[dict[str, Any]], expected: Expected) -> Outcome:
    record = [row for report in reports for row in report["record"]]
    made = [row[2:6] for row in record if row[0] == "update"]
    ends = [record[0][2], record[-1][2]]
    got = Curve(*map(list, zip(*made, strict=True)), ends, reports[0]["initial"], reports[-1]["weights"])
    rows = compare(expected.recipe, expected.curve, got, expected.tolerance)
    wrong = [
        *(str(row) for row in rows if row.too_far),
        *_other_steps(record, expected.losses, expected.tolerance.loss),
    ]
    used = {kind: (row := worst(rows, kind)).off / row.limit for kind in KINDS}
    return Outcome(WRONG, "\n".join(wrong[:12]), used) if wrong else Outcome(SAME, used=used)


def _other_steps(record: Sequence[tuple[Any, ...]], losses: dict[Step, float], bound: float) -> Iterator[str]:
    """What is wrong with evaluations, and with updates that were to be made or not."""
    for kind, number, *numbers in record:
        if kind == "update":
            if not numbers[-1]:
                yield f"update of batch {number} was not made: {numbers}"
            continue
        if kind != "evaluate" and numbers[-1]:
            yield f"an update with a {kind} was made: {numbers}"
        right = math.nan if kind == "loss of NaN" else losses[kind, number]
        if not (abs(numbers[0] - right) <= bound * right or math.isnan(numbers[0]) is math.isnan(right) is True):
            yield f"{kind}: the loss is {numbers[0]:.9g} for {right:.9g}"


def shrink(switches: Switches, outcome: Outcome, run: Callable[[Switches], Outcome]) -> tuple[Switches, Outcome]:
    """Make a failing case simpler, as long as it fails the same way; switch by switch, until nothing helps."""
    trials, simpler = 0, True
    while simpler and trials < TRIALS:
        simpler = False
        for one in _simpler(switches):
            if trials >= TRIALS:
                break
            trials += 1
            found = run(one)
            if found.kind == outcome.kind:
                switches, outcome, simpler = one, found, True
                break
    return switches, outcome


def _simpler(switches: Switches) -> Iterator[Switches]:
    """The switches with one made simpler: first one layout instead of two, then the values one by one."""
    if other := draws.second(switches):
        yield {name: value for name, value in switches.items() if not name.startswith(SECOND)}
        yield other
    everything: Switches = {}
    for name, value in switches.items():
        values = draws.simplest(name)
        if value != values[0] and name not in ("world", SECOND + "world"):
            everything[name] = values[0]
    names = list(everything)
    for size in (len(names) // 2, len(names) // 4, 1):  # many at once, as long as that works
        if size:
            for first in range(0, len(names), size):
                yield switches | {name: everything[name] for name in names[first : first + size]}
    for name, value in switches.items():
        values = draws.simplest(name)
        yield from (switches | {name: other} for other in values[1 : values.index(value)])


def format_case(switches: Switches, name: str) -> str:
    """A case as a row of layouts.py, with what the row does not hold."""
    parts = [draws.case_of(one, name) for one in (switches, draws.second(switches)) if one is not None]
    rows = (f"Case({case.id!r}, {case.world}, {case.config!r}, {case.recipe!r})," for case in parts)
    return "\n    then ".join(rows) + f"\n    labels {switches['labels']}, steps {steps_of(switches)}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=40, help="cases to draw")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draws")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--as-drawn", action="store_true", help="do not make failures smaller")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        cases = range(options.first, options.first + options.cases)
        log = partial(print, flush=True)
        report = fuzz(cases, options.seed, Path(name), shrink_failures=not options.as_drawn, log=log)
    print(report)
    print(f"{time.monotonic() - begun:,.0f} s")
    return 1 if report.failures else 0


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    sys.exit(main())
