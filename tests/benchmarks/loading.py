"""Compares megagpt's loader with Megatron's GPTDataset and DataLoader: batches per second, and start-up time.

Both run alternately in this process. The best round of each counts, in CPU seconds; wall-clock time is also printed.
Needs megatron-core from the package index. Writes about 2 GB into FOLDER and removes them at the end.

    python tests/benchmarks/loading.py FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megagpt.corpus.reader import HEADER, MAGIC
from megagpt.corpus.writer import CorpusWriter
from megagpt.data.loader import Loader

warnings.simplefilter("ignore")  # Megatron warns about each GPU package that is missing
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402

SEQ_LEN, MICRO, VOCABULARY = 1024, 8, 50_000
BATCHES, ROUNDS = 500, 6  # per round, rounds
Next = Callable[[], object]


def main() -> None:
    """Run all comparisons and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = Path(tempfile.mkdtemp(dir=parser.parse_args().folder))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    names = ("megatron-core", "torch", "numpy")
    print(f"{platform.processor() or platform.machine()}, {', '.join(f'{name} {version(name)}' for name in names)}")
    try:
        prefixes = [_corpus(folder / f"c{number}", number) for number in range(3)]
        print(f"batches of {MICRO} × {SEQ_LEN}, from a warm page cache, including the data order:")
        for blend in ([(prefixes[0], 1.0)], list(zip(prefixes, (0.5, 0.3, 0.2), strict=True))):
            _batches(blend, folder / "cache")
        print("start-up, 1e7 documents of 1,000 tokens (a sparse file):")
        _start_up(_sparse(folder / "sparse", 10_000_000, 1_000), folder / "cache")
    finally:
        shutil.rmtree(folder)


def _batches(blend: list[tuple[str, float]], cache: Path) -> None:
    ours = Loader(blend, seq_len=SEQ_LEN, seed=1, vocab_size=VOCABULARY, micro_batch=MICRO)
    positions = itertools.count(0, MICRO)
    samples = MICRO * BATCHES * (ROUNDS + 1)
    sides: dict[str, Next] = {"megagpt": lambda: ours.batches(next(positions))}
    for name, masks in (("Megatron, as it comes", True), ("Megatron, no masks", False)):
        theirs = _endless(_megatron(blend, samples, cache, masks), MICRO)
        sides[name] = lambda theirs=theirs: next(theirs)
    best = {name: (float("inf"), float("inf")) for name in sides}
    for round_number in range(ROUNDS + 1):  # the first round warms up
        for name, batch in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(BATCHES):
                batch()
            spent = (time.process_time() - cpu, time.perf_counter() - wall)
            if round_number:
                best[name] = (min(best[name][0], spent[0]), min(best[name][1], spent[1]))
    for name, (cpu, wall) in best.items():
        speeds = [BATCHES * MICRO * SEQ_LEN / seconds / 1e6 for seconds in (cpu, wall)]
        print(f"  {len(blend)} source(s)  {name:22} {speeds[0]:7.1f} M tokens/cpu-s {speeds[1]:7.1f} M tokens/s"
              f"  {cpu / BATCHES * 1e6:7.1f} µs per batch")  # fmt: skip
    for name in list(sides)[1:]:
        _verdict(best[name][0] / best["megagpt"][0], 30)


def _start_up(prefix: str, cache: Path) -> None:
    """Measure the time until the first batch can be loaded. Megatron also writes files, which a restart reads."""
    epoch = 10_000_000 * 1_000 // SEQ_LEN
    best = {}
    for epochs in (1.0, 3.5):
        for name, start in {
            "megagpt": lambda: Loader(
                [(prefix, 1.0)], seq_len=SEQ_LEN, seed=1, vocab_size=VOCABULARY, micro_batch=MICRO
            ),
            "Megatron": lambda epochs=epochs: _megatron([(prefix, 1.0)], int(epochs * epoch), cache),
            "Megatron again": lambda epochs=epochs: _megatron([(prefix, 1.0)], int(epochs * epoch), cache),
        }.items():
            cpu, wall = time.process_time(), time.perf_counter()
            start()
            best[name] = time.process_time() - cpu
            written = sum(file.stat().st_size for file in cache.rglob("*") if name == "Megatron") / 1e6
            print(f"  {epochs} epochs  {name:15} {best[name] * 1e3:10.1f} cpu-ms "
                  f"{(time.perf_counter() - wall) * 1e3:10.1f} ms wall  {written:6.0f} MB of files")  # fmt: skip
        shutil.rmtree(cache)
        _verdict(0.010 / best["megagpt"], 1)


def _verdict(ratio: float, goal: float) -> None:
    what = f"{ratio:.1f} times as fast" if goal > 1 else f"10 ms is {ratio:.1f} times as long"
    print(f"    {what}, the goal is {goal}: {'reached' if ratio >= goal else 'MISSED'}")


def _megatron(blend: list[tuple[str, float]], samples: int, cache: Path, masks: bool = False) -> Any:
    prefixes, weights = map(list, zip(*blend, strict=True))
    tokenizer = SimpleNamespace(eod=0, pad=0, vocab_size=VOCABULARY, unique_identifiers={"class": "none"})
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ_LEN, blend=(prefixes, weights if blend[1:] else None), split="1,0,0",
        path_to_cache=str(cache), tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=masks,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def _endless(dataset: Any, micro: int) -> Iterator[object]:
    while True:
        yield from torch.utils.data.DataLoader(dataset, batch_size=micro, num_workers=0)


def _corpus(path: Path, seed: int) -> str:
    """Write 1e8 random tokens in documents of 1,000 tokens on average."""
    numbers = np.random.default_rng(seed)
    with CorpusWriter(path, VOCABULARY) as writer:
        for length in numbers.integers(1, 2000, 100_000).tolist():
            writer.add_document(numbers.integers(0, VOCABULARY, length, dtype=np.uint16), 0)
        writer.finish("0" * 64, 0)
    return str(path)


def _sparse(path: Path, documents: int, tokens: int) -> str:
    """Write a corpus of zeros as a sparse file, of which only the index takes space."""
    with path.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * documents * tokens)
    with path.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        np.full(documents, tokens, np.int32).tofile(file)
        (np.arange(documents, dtype=np.int64) * 2 * tokens).tofile(file)
        np.arange(documents + 1, dtype=np.int64).tofile(file)
    return str(path)


if __name__ == "__main__":
    main()
