"""Trains under a series of random faults, restarting after each, and compares the result with an uninterrupted run.

python -m tests.faults.campaign --faults N --seed S      prints what was lost, and how long each restart took
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.checkpoint import listing, store
from megagpt.prepare.command import PrepareOptions, prepare_command, train_tokenizer_command
from megagpt.training import time_breakdown
from tests import training
from tests.faults import drawn
from tests.faults.drawn import ENDS, INSIDE, SAVING, Plan, repeated_and_lost
from tests.faults.launches import Launch, launch

GLOBAL_BATCH, SEQ_LEN, EVERY, SPACING = 4, 32, 5, 8  # samples, tokens, updates per checkpoint, updates per launch
ROOM = 4 * EVERY  # updates after the last fault, which can happen some hundredths of a second late, or more under load
PATIENCE = 240.0  # seconds that a launch may take
LAYOUTS = (("zero1", 2), ("zero3", 1), ("zero2", 2), ("zero3", 2), ("zero1", 1))
FIRST = {"kind": "phase", "name": "first", "phase": "data", "update": 0, "nth": 2, "act": "note"}


@dataclass
class Outcome:
    """Result of a campaign.

    Attributes:
        faults: number of faults of each kind.
        launches: number of launches.
        updates: number of updates of the run.
        lost: number of updates that each fault of a kind lost, which were repeated.
        tokens_lost: number of tokens never trained on, except those of skipped updates.
        tokens_repeated: number of tokens trained on twice.
        notice: seconds from a fault to the end of all ranks, by kind.
        go_on: seconds from each start to the first update.
        seconds: duration.
        effective: time breakdown of the run.
        history: one line per launch.
        wrong: all differences from the uninterrupted run.
    """

    faults: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    updates: int = 0
    lost: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    tokens_lost: int = -1
    tokens_repeated: int = -1
    notice: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    go_on: list[float] = field(default_factory=list)
    seconds: float = 0.0
    effective: str = ""
    history: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """A run under faults, and the same run without faults, both in `folder`."""

    def __init__(self, faults: int, seed: int, data: Path, folder: Path, layouts: bool = False) -> None:
        self._chance, self._folder, self._layouts = random.Random(seed), folder, layouts
        self._kinds, self._out = drawn.kinds(faults, self._chance), Outcome()
        self._ends = sum(kind in ENDS for kind in self._kinds)
        self._total = SPACING * self._ends + 3 * EVERY + ROOM
        self._run, self._alone = folder / "run", folder / "alone"
        self._recipes = {run: training.write_recipe(run, data) for run in (self._run, self._alone)}
        bad = self._kinds.count("data that yields NaN")
        room = (self._total - 4 * EVERY) // max(
            bad, 1
        )  # one in each range of updates, none before the first checkpoint
        at = [2 * EVERY + room * number + self._chance.randrange(room) for number in range(bad)]
        self._poison = {"kind": "poison", "name": "data that yields NaN", "rank": 0,
                        "positions": [GLOBAL_BATCH * update for update in at]}  # fmt: skip

    def make(self) -> Outcome:
        """Train both runs, and compare them."""
        begun, waiting = time.monotonic(), []
        self._to_the_end(self._alone)
        for kind in self._kinds:
            if kind in INSIDE:
                waiting.append(kind)
            elif kind in ENDS:
                waiting = self._launch_until(kind, waiting)
                self._ends = max(self._ends - 1, 1)
            else:
                before = self._saved()
                self._count(drawn.damage(kind, self._run, self._chance), before - self._saved())
        for _ in range(len(self._kinds)):
            waiting = self._launch_until("a signal to one rank", waiting) if waiting else []
        self._to_the_end(self._run)
        self._compare()
        self._out.seconds = time.monotonic() - begun
        return self._out

    def _start(self, stack: ExitStack, run: Path, faults: list[dict], *overrides: str) -> Launch:
        config, world = self._layout() if run == self._run else LAYOUTS[0]
        overrides = (f"length.updates={self._total}", f"checkpoint.every={EVERY}", "evaluation.every=10",
                 "evaluation.samples=16", "log.every=100", *overrides)  # fmt: skip
        self._out.launches += run == self._run
        faults = [self._poison, FIRST, *faults]
        return stack.enter_context(
            launch(self._recipes[run], *overrides, folder=self._folder, world=world, config=config, faults=faults)
        )

    def _layout(self) -> tuple[str, int]:
        """Return the config and the number of ranks of the next launch under faults."""
        return LAYOUTS[self._out.launches % len(LAYOUTS)] if self._layouts else LAYOUTS[0]

    def _to_the_end(self, run: Path) -> None:
        with ExitStack() as stack:
            ranks = self._start(stack, run, [])
            if set(ranks.wait(20 * PATIENCE)) != {0}:
                raise RuntimeError(f"{run} ended with {ranks.codes()}:\n{ranks.printed()}")
            if run == self._run:
                self._note(ranks)

    def _launch_until(self, kind: str, inside: list[str]) -> list[str]:
        """Launch until this kind of fault has ended a launch. Returns the inner faults that have not happened yet."""
        for _ in range(20):
            was = self._saved()
            left = (self._total - ROOM - 2 * EVERY - was) / self._ends
            update = min(was + 2 + int(left * self._chance.uniform(0.3, 1.7)), self._total - ROOM)
            world = self._layout()[1]
            made = drawn.plan(kind, update, world, self._chance)
            inside = [name for name in inside if name != self._poison["name"]]
            once = dict.fromkeys(inside)  # two of a kind in one launch could not be distinguished
            happened = self._under(made, [drawn.inside(name, update, world, self._chance) for name in once])
            for name in happened & set(inside):
                inside.remove(name)
            if kind in happened:
                return inside
        self._out.wrong.append(f"{kind}: did not happen in 20 launches")
        return []

    def _under(self, made: Plan, faults: list[dict]) -> set[str]:
        """Run one launch with its faults, and check how it ends. Returns the names of the faults that happened."""
        act = "raise" if made.act == "raise" else "note"
        mark = {"kind": "phase", "name": made.kind, "phase": made.phase, "update": made.update, "act": act,
                "rank": made.ranks[0]}  # fmt: skip
        with ExitStack() as stack:
            asynchronous = self._chance.random() < 0.5
            overrides = [f"checkpoint.asynchronous={str(asynchronous).lower()}"]
            overrides += ["log.hang_after=2"] if made.act == "SIGSTOP" else []
            ranks = self._start(stack, self._run, [mark, *faults], *overrides)
            came = not made.phase or ranks.fires(made.kind, PATIENCE)
            time.sleep(made.delay)
            at = time.monotonic()
            if came and made.act != "raise":
                self._hit(ranks, made)
            codes = ranks.wait(PATIENCE, all_but=made.ranks if made.act == "SIGSTOP" else ())
            gone = time.monotonic()
            names, began = self._note(ranks), any(event["name"] == "first" for event in ranks.fired())
            self._out.history.append(
                f"{gone - ranks.started:.1f} s {made}: {codes}, inside {names}, left {self._updates()}, {self._saved()}"
            )
            self._judge(made, codes, came, "file calls that fail" in names, ranks.printed())
        if came:
            names.add(made.kind)
            self._out.notice[made.kind].append(gone - at)
        for name in names - {made.kind}:
            self._count(name, 0)
        if came:
            # A launch that ended before its first update has not yet removed the updates lost earlier from the record.
            lost = self._updates() - self._saved() if began else 0
            self._count(made.kind, lost)
            most = 0 if made.kind in SAVING else 2 * EVERY if asynchronous else EVERY
            if lost > most and "file calls that fail" not in names:
                self._out.wrong.append(f"{made}: {lost} updates lost, at most {most} may be")
        return names

    def _hit(self, ranks: Launch, made: Plan) -> None:
        """Send the signal, or the request to stop, that ends a launch."""
        if made.act == "stop":
            listing.stop(self._run)
            return
        for rank in made.ranks:
            if ranks.codes()[rank] is None:
                with suppress(ProcessLookupError):  # the rank has just ended
                    os.kill(ranks.pids()[rank], signal.Signals[made.act])

    def _judge(self, made: Plan, codes: list[int | None], came: bool, broken: bool, printed: str) -> None:
        """Check the exit codes. A launch whose file calls fail may also end by itself before."""
        if broken and set(codes) <= {0, 1, 75, -9}:
            return
        if not came and made.act == "SIGSTOP" and set(codes) == {1}:
            return  # under load, 2 s can pass without progress
        if not came or tuple(codes) not in made.codes(len(codes)):
            self._out.wrong.append(f"{made}: ended with {codes}\n{printed[-2000:]}")

    def _note(self, ranks: Launch) -> set[str]:
        """Record the time until the first update. Returns the names of the inner faults that happened."""
        events = ranks.fired()
        self._out.go_on += [event["at"] - ranks.started for event in events if event["name"] == "first"][:1]
        return {event["name"] for event in events} & set(INSIDE) - {"data that yields NaN"}

    def _count(self, kind: str, lost: int) -> None:
        self._out.faults[kind] += 1
        self._out.lost[kind].append(lost)

    def _updates(self) -> int:
        """Return the last update on record."""
        if not (self._run / "metrics.jsonl").exists():
            return 0
        return max([update["update"] for update in training.curve(self._run)], default=0)

    def _saved(self) -> int:
        """Return the update of the newest valid checkpoint."""
        found, _ = store.newest_valid(self._run)
        return found.state.update if found else 0

    def _compare(self) -> None:
        """Compare the run with the uninterrupted one bit for bit, and its data positions with their closed form."""
        out, curve, alone = self._out, training.curve(self._run), training.curve(self._alone)
        left_out = {event["position"] for event in training.events(self._run) if event["event"] in ("rollback", "skip")}
        repeated, lost = repeated_and_lost([update["position"] for update in curve], GLOBAL_BATCH, left_out)
        out.tokens_repeated, out.tokens_lost, out.updates = SEQ_LEN * repeated, SEQ_LEN * lost, len(curve)
        out.faults[self._poison["name"]] = len(left_out)
        out.effective = str(time_breakdown.add_up(training.events(self._run)))
        if repeated or lost or left_out != set(self._poison["positions"]):
            out.wrong.append("the data positions are not the closed form's")
        if [update["update"] for update in curve] != list(range(1, self._total + 1)):
            out.wrong.append("the updates' numbers have gaps")
        if _validations(self._run) != _validations(self._alone) and not self._layouts:
            out.wrong.append("the validations")
        if self._layouts:
            far = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(curve, alone, strict=True))
            out.wrong += [f"a loss differs by {far:.1e}"] if far > 1e-5 else []
            return
        if curve != alone:
            first = next((a["update"] for a, b in zip(curve, alone, strict=False) if a != b), "the end")
            out.wrong.append(f"the curve, from update {first} on")
        if training.final_weights(self._run) != training.final_weights(self._alone):
            out.wrong.append("the weights")


def _validations(run: Path) -> list[tuple[object, object]]:
    return [(event["update"], event["loss"]) for event in training.events(run) if event["event"] == "validation"]


def campaign(faults: int, seed: int, data: Path, folder: Path, layouts: bool = False) -> Outcome:
    """Train one run under random faults.

    Args:
        faults: Number of faults.
        seed: Random seed.
        data: Folder of the corpus.
        folder: Folder of the run.
        layouts: Change the layout at each start.
    """
    return Campaign(faults, seed, data, folder, layouts).make()


def table(out: Outcome) -> str:
    """Format the result of a campaign."""
    rows = [
        f"{'fault':<32}{'times':>6}{'updates lost: most':>20}{'in all':>8}{'seconds to notice: median':>27}{'most':>7}"
    ]
    for kind, count in sorted(out.faults.items()):
        lost, notice = out.lost[kind], out.notice[kind]
        seconds = f"{statistics.median(notice):>27.2f}{max(notice):>7.2f}" if notice else ""
        rows.append(f"{kind:<32}{count:>6}{max(lost, default=0):>20}{sum(lost):>8}{seconds}")
    lost = sum(sum(updates) for updates in out.lost.values())
    rows += [
        f"faults {sum(out.faults.values())}, launches {out.launches}, {out.seconds:,.0f} s",
        f"updates {out.updates}, made again {lost}",
        f"tokens lost {out.tokens_lost}, repeated {out.tokens_repeated}",
        f"seconds from start to the first update: median {statistics.median(out.go_on):.2f}, most {max(out.go_on):.2f}",
        f"effective training time: {out.effective}",
        f"wrong: {len(out.wrong)}",
        *out.wrong,
        *(out.history if out.wrong else []),
    ]
    return "\n".join(rows)


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", action="store_true", help="another layout at each start, compared within 1e-5")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "text").mkdir()
        training.write_text(folder / "text")
        train_tokenizer_command([str(folder / "text")], 320, folder / "text")
        prepare_command([str(folder / "text")], folder / "text.model", folder / "text", PrepareOptions(0.2))
        out = campaign(options.faults, options.seed, folder, folder, options.layouts)
    print(json.dumps(vars(out)) if options.json else table(out))
    return 1 if out.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
