"""Starts real training processes on a tiny corpus, and ends exactly those that it started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megagpt.checkpoint import weights
from megagpt.cluster import free_port
from megagpt.config import recipe as recipes

ROOT = Path(__file__).parent.parent
WORDS = [*"abcdefgh", "the", "of", "and", "to", "in", "that", "is", "was", "for", "on", "with", "as", "his", "they"]

RECIPE = """\
run_dir: {run}
seed: 7
precision: fp32
model: {{n_layer: 2, n_head: 2, d_model: 32, vocab_size: 320, seq_len: 32, position: rope, norm: rmsnorm}}
data: {{tokenizer: {data}/text.model, train: {data}/text.train, validation: {data}/text.validation}}
batch: {{global_size: 4}}
optimizer: {{type: adamw, lr: 3.0e-3, clip: 1.0}}
schedule: {{type: warmup_decay, warmup_updates: 5}}
length: {{updates: 100}}
evaluation: {{every: 30, samples: 8}}
checkpoint: {{every: 10, keep_last: 3}}
"""


def write_text(folder: Path) -> Path:
    """Write documents of random common words, the same ones at every call."""
    rng = np.random.default_rng(5)
    for number in range(40):
        lines = [" ".join(rng.choice(WORDS, 12)) for _ in range(20)]
        (folder / f"document-{number}.txt").write_text("\n".join(lines))
    return folder


def write_recipe(run: Path, data: Path) -> Path:
    """Write a recipe that trains 100 updates in a few seconds."""
    path = run.with_suffix(".yaml")
    path.write_text(RECIPE.format(run=run, data=data))
    return path


def command(recipe: Path, *arguments: str, config: str = "zero1") -> list[str]:
    """Return the command line of one rank."""
    path = ROOT / "ds_configs" / f"{config}.json"
    return [sys.executable, str(ROOT / "launch/pretrain.py"), "--recipe", str(recipe), *(
        "--deepspeed_config", str(path)), *arguments]  # fmt: skip


@contextmanager
def ranks(
    recipe: Path, *arguments: str, world: int = 1, config: str = "zero1"
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start `world` ranks as a launcher would. Ranks that still run at the end of the `with` block are killed."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started: list[subprocess.Popen[str]] = []
    try:
        for rank in range(world):
            env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
            started.append(
                subprocess.Popen(
                    command(recipe, *arguments, config=config),
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def finish(recipe: Path, *arguments: str, world: int = 1, code: int = 0, config: str = "zero1") -> str:
    """Run to the end, check the exit code of every rank, and return what rank 0 printed."""
    with ranks(recipe, *arguments, world=world, config=config) as started:
        printed = [process.communicate(timeout=400) for process in started]
        assert [process.returncode for process in started] == [code] * world, printed
    return "".join(printed[0])


def wait_for_update(run: Path, update: int, seconds: float = 240) -> None:
    """Wait until `update` is recorded."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (run / "metrics.jsonl").exists() and curve(run)[-1:] and curve(run)[-1]["update"] >= update:
            return
        time.sleep(0.01)
    raise TimeoutError(f"{run} has not reached update {update}")


def events(run: Path) -> list[dict[str, object]]:
    """Return the events of all complete lines of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def curve(run: Path) -> list[dict[str, object]]:
    """Return all recorded updates, without durations, which may differ between two equal runs."""
    keep = ("update", "loss", "lr", "grad_norm", "tokens", "position")
    return [{key: event[key] for key in keep} for event in events(run) if event["event"] == "update"]


def named_weights(run: Path) -> dict[str, np.ndarray]:
    """Return the weights of the newest checkpoint by parameter name, independently of the layout of its files."""
    newest = sorted((run / "checkpoints").glob("update_*"))[-1]
    model = weights.load(newest, recipes.load(run / "recipe.yaml").model)
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def final_weights(run: Path) -> bytes:
    """Return the bytes of all weights of the newest checkpoint."""
    return b"".join(value.tobytes() for _, value in sorted(named_weights(run).items()))
