"""The faults of a campaign: their kinds, how often each is drawn, and what it does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ANYWHERE = ("data", "forward/backward", "step", "save", "evaluate")  # phases, all drawn equally often
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
FOR_GOOD = 10**9

ENDS = {  # faults that end a launch, with the relative frequency of each kind
    "kill -9 of one rank": 6,
    "kill -9 of all ranks": 3,
    "kill -9 in a save": 4,
    "kill -9 while starting": 1,
    "a signal to one rank": 6,
    "megagpt stop": 1,
    "SIGSTOP of one rank": 1,
    "an exception on one rank": 2,
}
INSIDE = {"file calls that fail": 4, "data that yields NaN": 2, "the clock set back": 1}  # the launch continues
BETWEEN = {"the newest checkpoint damaged": 4, "latest gone or wrong": 2}  # faults between two launches
SAVING = ("a signal to one rank", "megagpt stop")  # nothing may be lost


@dataclass(frozen=True)
class Plan:
    """How a launch ends: `act` happens to `ranks`, `delay` seconds after a rank has entered `phase` of `update`."""

    kind: str
    phase: str
    update: int
    act: str  # a signal's name, "stop" or "raise"
    ranks: tuple[int, ...]
    delay: float

    def codes(self, world: int) -> set[tuple[int | None, ...]]:
        """Return all combinations of exit codes with which the ranks may end."""
        if self.act in (*SIGNALS, "stop"):
            return {(75,) * world}
        if self.act == "SIGKILL":
            return {tuple(-9 if rank in self.ranks else 1 for rank in range(world))}
        return {tuple(None if self.act == "SIGSTOP" and rank in self.ranks else 1 for rank in range(world))}


def kinds(faults: int, chance: random.Random) -> list[str]:
    """Draw the kinds of a number of faults. The last one ends a launch."""
    weights = {**ENDS, **INSIDE, **BETWEEN}
    return [
        *chance.choices(list(weights), list(weights.values()), k=faults - 1),
        *chance.choices(list(ENDS), list(ENDS.values())),
    ]


def plan(kind: str, update: int, world: int, chance: random.Random) -> Plan:
    """Draw how a launch ends at about `update` by a fault of this kind."""
    one, every, delay = (chance.randrange(world),), tuple(range(world)), chance.uniform(0, 0.05)
    phase = chance.choice(ANYWHERE)
    return {
        "kill -9 of one rank": Plan(kind, phase, update, "SIGKILL", one, delay),
        "kill -9 of all ranks": Plan(kind, phase, update, "SIGKILL", every, delay),
        "kill -9 in a save": Plan(kind, "save", update, "SIGKILL", chance.choice((one, every)), delay / 5),
        "kill -9 while starting": Plan(kind, "", 0, "SIGKILL", every, chance.uniform(0, 0.8)),
        "a signal to one rank": Plan(kind, phase, update, chance.choice(SIGNALS), one, delay / 5),
        "megagpt stop": Plan(kind, phase, update, "stop", (0,), delay),
        "SIGSTOP of one rank": Plan(kind, chance.choice(ANYWHERE[:3]), update, "SIGSTOP", one, delay),
        "an exception on one rank": Plan(kind, phase, update, "raise", one, 0.0),
    }[kind]


def inside(kind: str, update: int, world: int, chance: random.Random) -> dict:
    """Draw a fault inside a rank, for `hooks`. `update` is the update at which the launch will end."""
    rank = chance.randrange(world)
    if kind == "the clock set back":
        return {"name": kind, "kind": "clock back", "rank": rank, "update": update - 1, "seconds": 7200}
    return {
        "name": kind, "kind": "file call", "rank": rank, "at": chance.randrange(1, 60),
        "times": chance.choice((1, 1, 4, FOR_GOOD)), "errno": chance.choice(("ENOSPC", "EIO", "EACCES")),
    }  # fmt: skip


def damage(kind: str, run: Path, chance: random.Random) -> str:
    """Damage the files of a run between two launches. Returns the kind of the fault.

    If there is only one checkpoint, it is not damaged, since a run that has lost all checkpoints stops, as it should.
    """
    folders = sorted((run / "checkpoints").glob("update_*"))
    if kind == "the newest checkpoint damaged" and len(folders) > 1:
        _damage(chance.choice([path for path in sorted(folders[-1].rglob("*")) if path.is_file()]), chance)
        return kind
    latest = run / "checkpoints/latest"
    latest.unlink(missing_ok=True)
    if chance.random() < 0.5 and latest.parent.exists():
        latest.write_text("update_99999999\n")
    return "latest gone or wrong"


def _damage(path: Path, chance: random.Random) -> None:
    """Flip one bit of a file, truncate it, or remove it."""
    content, way = bytearray(path.read_bytes()), chance.choice(("flip", "flip", "cut", "remove"))
    if way == "remove" or not content:
        path.unlink()
        return
    at = chance.randrange(len(content))
    content[at] ^= 1 << chance.randrange(8)
    path.write_bytes(content if way == "flip" else content[:at])


def repeated_and_lost(positions: Sequence[int], samples: int, left_out: set[int]) -> tuple[int, int]:
    """Count the samples that were trained on twice, and those that were never trained on.

    Args:
        positions: Data position after each update.
        samples: Samples per update. Each update uses those that follow the previous update's.
        left_out: Data positions at which skipped updates begin.
    """
    used = [position - samples for position in positions]
    due = [start for start in range(0, max(positions), samples) if start not in left_out]
    return samples * (len(used) - len(set(used))), samples * len(set(due) - set(used))
