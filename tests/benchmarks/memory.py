"""Benchmark of the peak memory of a process of `prepare` and `tokenizer train`, for several kinds of large input.

usage: python tests/benchmarks/memory.py [--workers 2] [--megabytes 1000] [--documents 10000000] [--long 500] [CASE…]
Cases: large (one file of lines), tiny (documents of a few bytes), tokenizer (trained on large), and a single document
as a text file (long), as a line (line), as a compressed line (gzip) and as a row of a table (row: not bounded, since
a value is read as a whole).
This file imports little, since the memory of this process would be counted for its children.
"""

import argparse
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

OURS = "import sys; from megagpt.cli import main; sys.exit(main())"


def paragraphs(megabytes):
    """Yield `megabytes` of paragraphs of Python's standard library, repeatedly and shuffled each time."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    draw, size = random.Random(1), 0
    while size < megabytes * 1e6:
        draw.shuffle(files)
        for file in files:
            for paragraph in file.read_text(errors="replace").split("\n\n"):
                text = f"{paragraph} {draw.random()}"
                size += len(text)
                yield text
            if size >= megabytes * 1e6:
                return


def write_large(path, args):
    """Write one file of JSON lines, one paragraph each."""
    with path.open("w") as file:
        for text in paragraphs(args.megabytes):
            file.write(json.dumps({"text": text}) + "\n")


def write_tiny(path, args):
    """Write many documents of a few bytes each."""
    with path.open("w") as file:
        file.writelines(f'{{"text": "line {number}"}}\n' for number in range(args.documents))


def write_long(path, args):
    """Write one document."""
    with path.open("w") as file:
        file.writelines(f"{text}\n\n" for text in paragraphs(args.long))


def write_line(path, args):
    """Write one document as a JSON line."""
    with gzip.open(path, "wt", 1) if path.suffix == ".gz" else path.open("w") as file:
        file.write('{"text": "')
        file.writelines(json.dumps(f"{text}\n\n")[1:-1] for text in paragraphs(args.long))
        file.write('"}\n')


def write_row(path, args):
    """Write one document as a table row, in another process, whose memory is not counted."""
    program = (
        "import sys, pyarrow; from pyarrow import parquet; from tests.benchmarks.memory import paragraphs\n"
        "text = '\\n\\n'.join(paragraphs(float(sys.argv[2])))\n"
        "parquet.write_table(pyarrow.table({'text': [text]}), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, path, str(args.long)], check=True)


def peak_memory(*line):
    """Run a command. Returns the peak memory of any of its processes, in MB, and its seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", OURS, *map(str, line)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, line
    return usage.ru_maxrss / 1024 * 1.048576, time.perf_counter() - begin


CASES = {
    "large": ("jsonl", write_large),
    "tiny": ("jsonl", write_tiny),
    "long": ("txt", write_long),
    "line": ("jsonl", write_line),
    "gzip": ("jsonl.gz", write_line),
    "row": ("parquet", write_row),
    "tokenizer": ("jsonl", write_large),
}


def main():
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", default=list(CASES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--long", type=float, default=500)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
          f"{platform.python_version()}, {args.workers} workers", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_large(folder / "small.jsonl", argparse.Namespace(megabytes=5))
        peak_memory("tokenizer", "train", folder / "small.jsonl", "--vocab-size", 8000, "--output", folder / "t")
        for case in args.cases:
            ending, write = CASES[case]
            path = folder / f"text.{ending}"
            write(path, args)
            size = path.stat().st_size / 1e6
            if case == "tokenizer":
                line = ("tokenizer", "train", path, "--vocab-size", 8000, "--output", folder / "u")
            else:
                line = ("prepare", path, "--tokenizer", folder / "t.model", "--output", folder / "c",
                        "--validation-fraction", 0)  # fmt: skip
            memory, seconds = peak_memory(*line, "--workers", args.workers)
            print(
                f"{case:10} {size:8,.0f} MB of input: peak {memory:5.0f} MB in one process, {seconds:6.0f} s",
                flush=True,
            )
            path.unlink()


if __name__ == "__main__":
    main()
