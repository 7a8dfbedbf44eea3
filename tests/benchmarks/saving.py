"""Benchmark of how long a save blocks training, synchronous and asynchronous alternately in the same processes.

python tests/benchmarks/saving.py [--saves 10] [--config zero0] [key=value …]      never collected by pytest

Two CPU ranks train the quickstart's model on random tokens. The slowest rank of each save counts. The total cost of a
save is also shown, since updates that are made while it is written may be slower than others.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INTERVAL = 60.0  # assumed seconds between saves, for the fraction of time that a save blocks
WARM_UP, BETWEEN = 3, 4  # updates before the first save, and after each save for comparison


def main() -> None:
    """Start this file on two ranks, or run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=10, help="number of saves of each kind")
    parser.add_argument("--config", default="zero0")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options.saves, options.config, options.overrides)
        return
    sys.path.insert(0, str(ROOT))
    from megagpt.cluster import free_port

    folder = tempfile.mkdtemp()
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": threads}
    job |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "MEGAGPT_BENCHMARK": folder}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **job, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    codes = [rank.wait() for rank in ranks]
    shutil.rmtree(folder)
    sys.exit(max(codes))


def measure(saves: int, config: str, overrides: list[str]) -> None:
    """Measure all saves on one rank."""
    import torch

    from megagpt.checkpoint.async_saver import Saver
    from megagpt.checkpoint.store import Store
    from megagpt.cluster import Collectives, from_environment
    from megagpt.config import deepspeed as ds_config
    from megagpt.config import recipe
    from megagpt.data.loader import Batch
    from megagpt.engine import build, deepspeed_keys, init_deepspeed
    from megagpt.state import TrainState

    rank = from_environment(os.environ)
    loaded = recipe.load(ROOT / "launch/recipes/quickstart.yaml", overrides)
    resolved = ds_config.load(
        ROOT / f"ds_configs/{config}.json", loaded, rank.world_size, deepspeed_keys.known_keys(), overrides
    )
    init_deepspeed.start(rank)
    collectives = Collectives(rank.world_size)
    engine = build.build(resolved, 1000, rank, collectives)
    generator = torch.Generator().manual_seed(rank.rank)
    ids = torch.randint(300, (resolved.layout.micro_batch, resolved.recipe.model.seq_len), generator=generator)

    def update() -> float:
        """Return the seconds of one update, with the collective after it."""
        begin = time.perf_counter()
        engine.train_update([Batch(ids, ids)] * resolved.layout.accumulation)
        collectives.any(False)
        return time.perf_counter() - begin

    def save(way: str, number: int) -> dict[str, float]:
        """Save once. Returns the seconds that it blocks, its total cost in seconds, and those of writing."""
        saver = savers[way]
        begin, made = time.perf_counter(), 0
        ended = saver.save(TrainState(number))
        while ended is None:
            engine.train_update([Batch(ids, ids)] * resolved.layout.accumulation)
            made += 1
            ended = saver.advance()
        whole = time.perf_counter() - begin
        plain = statistics.median(update() for _ in range(BETWEEN))
        assert ended.published, ended.problem
        return {"stall": ended.blocking_seconds, "cost": whole - made * plain, "write": ended.write_seconds}

    store = Store(Path(os.environ["MEGAGPT_BENCHMARK"]), rank, collectives, keep_last=2)
    savers = {
        way: Saver(store, engine.save_state, {}, way == "asynchronous") for way in ("synchronous", "asynchronous")
    }
    for _ in range(WARM_UP):
        update()
    results: dict[str, list[dict[str, float]]] = {way: [] for way in savers}
    for number in range(1, saves + 1):
        for turn, way in enumerate(savers):
            mine = save(way, 2 * number + turn)
            everyone = collectives.all_gather_object(mine)
            results[way].append({key: max(one[key] for one in everyone) for key in mine})
    found, _ = store.newest_valid()
    if rank.main and found is not None:
        show(results, found.bytes, config)
    engine.close()


def show(results: dict[str, list[dict[str, float]]], size: int, config: str) -> None:
    """Print the table, and where it was measured."""
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch {version('torch')}, "
          f"deepspeed {version('deepspeed')}; 2 ranks, {config}, a checkpoint of {size / 1e6:.1f} MB, "
          f"{len(results['synchronous'])} saves each")  # fmt: skip
    print(f"{'':14}{'stall, median':>15}{'most':>10}{'of 60 s':>10}{'cost in all':>13}{'writing':>10}")
    for way, rows in results.items():
        column: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
        stall = statistics.median(column["stall"])
        print(f"{way:14}{stall:>13.4f} s{max(column['stall']):>8.4f} s{stall / INTERVAL:>10.3%}"
              f"{statistics.median(column['cost']):>11.4f} s{statistics.median(column['write']):>8.4f} s")  # fmt: skip


if __name__ == "__main__":
    main()
