"""Trains under a stream of random faults, started again after each, and compares with the uninterrupted run.

python -m tests.faults.campaign --faults N --seed S      prints what was lost, and how long it took to go on
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megagpt.prepare import Options, prepare_command, train_tokenizer_command
from tests import training

GLOBAL_BATCH, EVERY, SPACING = 4, 10, 25  # samples an update, updates between checkpoints, updates a fault on average


@dataclass(frozen=True)
class Outcome:
    """What a campaign did: `lost` updates were made twice, `wrong` lists what differs from the uninterrupted run."""

    faults: dict[str, int]
    lost: list[int]
    seconds_to_go_on: list[float]
    wrong: list[str]


def damage_newest(run: Path, chance: random.Random) -> None:
    """Flip a bit of a file of the newest checkpoint, if it is not the only one."""
    folders = sorted((run / "checkpoints").glob("update_*"))
    if len(folders) > 1:
        path = chance.choice([path for path in folders[-1].rglob("*") if path.is_file()])
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(content))


def campaign(faults: int, seed: int, data: Path, folder: Path) -> Outcome:
    """Run `faults` random faults over one training run."""
    chance, total = random.Random(seed), SPACING * (faults + 1)
    words = (f"length.updates={total}", "evaluation.every=null", f"checkpoint.every={EVERY}")
    straight, run = folder / "straight", folder / "run"
    training.finish(training.write_recipe(straight, data), *words)
    recipe = training.write_recipe(run, data)
    counted: dict[str, int] = {}
    lost, waits, seen = [], [], 0
    for _ in range(faults):
        kind = chance.choice(("kill", "kill", "term", "kill and damage", "latest gone"))
        start = time.monotonic()
        with training.ranks(recipe, *words) as (process,):
            training.wait_for_update(run, min(seen + 1, total))
            waits.append(time.monotonic() - start)
            target = min(seen + chance.randrange(1, 2 * SPACING), total)
            while process.poll() is None and training.curve(run)[-1]["update"] < target:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)
            process.communicate(timeout=60)
        counted[kind] = counted.get(kind, 0) + 1
        reached = int(training.curve(run)[-1]["update"])
        if kind == "kill and damage":
            damage_newest(run, chance)
        if kind == "latest gone":
            (run / "checkpoints/latest").unlink(missing_ok=True)
        saved = max(int(path.name[7:]) for path in (run / "checkpoints").glob("update_*"))
        lost.append(reached - saved)
        seen = saved if kind != "kill and damage" else 0
    training.finish(recipe, *words)
    return Outcome(counted, lost, waits, _differences(run, straight, total))


def _differences(run: Path, straight: Path, total: int) -> list[str]:
    """Against the uninterrupted run, bit for bit, and against the closed form of the data positions."""
    wrong = []
    if training.curve(run) != training.curve(straight):
        wrong.append("the curve")
    if training.final_weights(run) != training.final_weights(straight):
        wrong.append("the weights")
    if [update["position"] for update in training.curve(run)] != [GLOBAL_BATCH * n for n in range(1, total + 1)]:
        wrong.append("the data positions: a sample was lost or repeated")
    return wrong


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        train_tokenizer_command([str(training.write_text(_made(folder / "text")))], 320, folder / "text")
        prepare_command([str(folder / "text")], folder / "text.model", folder / "text", Options(0.2))
        outcome = campaign(options.faults, options.seed, folder, _made(folder / "runs"))
    finally:
        shutil.rmtree(folder)
    waits = sorted(outcome.seconds_to_go_on)
    print(json.dumps({
        "faults": outcome.faults, "updates made twice, most": max(outcome.lost), "in all": sum(outcome.lost),
        "seconds to the next update, median": waits[len(waits) // 2], "most": waits[-1], "wrong": outcome.wrong,
    }, indent=1))  # fmt: skip
    return 1 if outcome.wrong else 0


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
