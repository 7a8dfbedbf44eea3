"""Benchmark of `megagpt prepare --pack`: time and memory compared with a plain copy, split documents and padding.

usage: python tests/benchmarks/packing.py [--documents 1000000] [--median 160] [--sigma 1.2] [--seq-len 1024]
Document lengths are drawn from a log-normal distribution, which approximates web pages and docstrings.
"""

import argparse
import os
import platform
import re
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from megagpt.corpus import merge
from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.writer import CorpusWriter
from megagpt.prepare.pack import _measure, best_fit, pack

EOD = 1


def write(prefix, documents, median, sigma):
    """Write a corpus of random ids whose documents end with the end-of-document symbol."""
    draw = np.random.default_rng(1)
    with CorpusWriter(prefix, 50_000) as writer:
        for at in range(0, documents, 1 << 14):
            lengths = np.exp(draw.normal(np.log(median), sigma, min(1 << 14, documents - at))).astype(np.int64) + 2
            ids = draw.integers(2, 50_000, lengths.sum(), np.uint16)
            ids[np.cumsum(lengths) - 1] = EOD
            writer.write_ids(ids.tobytes())
            writer.end_documents(lengths, 0)
        writer.finish_without_sidecar()
    return CorpusReader(prefix)


class Memory:
    """Measures the peak anonymous memory of this process within the `with` block, in MB above the start."""

    def __enter__(self):
        self._start = self.peak = self._now()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()
        self.peak -= self._start

    def _watch(self):
        while not self._stopped.wait(0.01):
            self.peak = max(self.peak, self._now())

    def _now(self):
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def timed(work):
    """Return the result of `work`, its CPU seconds and its wall-clock seconds."""
    cpu, begin = time.process_time(), time.perf_counter()
    made = work()
    return made, time.process_time() - cpu, time.perf_counter() - begin


def copy(reader, prefix):
    """Copy a corpus, document by document."""
    with CorpusWriter(prefix, 50_000) as writer:
        merge._copy(reader, writer)
        writer.finish_without_sidecar()


def packed(reader, prefix, seq_len):
    """Write a packed copy of a corpus."""
    with CorpusWriter(prefix, 50_000) as writer:
        summary = pack(reader, writer, seq_len, EOD, prefix.parent)
        writer.finish_without_sidecar()
    return summary


def main():
    """Pack one corpus, and print the time and memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--median", type=float, default=160)
    parser.add_argument("--sigma", type=float, default=1.2)
    parser.add_argument("--seq-len", type=int, default=1024)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reader = write(folder / "c", args.documents, args.median, args.sigma)
        print(f"{args.documents:,} documents, {len(reader.tokens):,} tokens")
        counts = _measure(reader, args.seq_len + 1)[-1].tolist()
        groups, cpu, _ = timed(lambda: best_fit(counts))
        print(f"plan: {cpu:.3f} cpu-s, {len(groups):,} groups")
        _, copied, wall = timed(lambda: copy(reader, folder / "copy"))
        print(f"plain copy: {copied:.2f} cpu-s, {wall:.2f} s")
        with Memory() as memory:
            summary, cpu, wall = timed(lambda: packed(reader, folder / "packed", args.seq_len))
        print(
            f"packed copy: {cpu:.2f} cpu-s, {wall:.2f} s, {cpu / copied:.1f} times the plain copy; {memory.peak:.0f} MB"
        )
        print(
            f"{len(reader.tokens) / cpu / 1e6:.0f} M tokens/cpu-s, {args.documents / cpu / 1e6:.2f} M documents/cpu-s"
        )
        print(summary)


if __name__ == "__main__":
    main()
