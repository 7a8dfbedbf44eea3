"""Texts with empty documents among them, a tokenizer trained on them, and commands that can be killed."""

import json
import os
import subprocess
import sys
import time

import pytest

from megagpt.prepare.command import train_tokenizer_command
from megagpt.prepare.readers.default_corpus import default_corpus


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def content(prefix):
    """Return the bytes of all files of the two parts, by suffix."""
    endings = [f".{part}{suffix}" for part in ("train", "validation") for suffix in (".bin", ".idx", ".json")]
    return {ending: prefix.with_name(prefix.name + ending).read_bytes() for ending in endings}


@pytest.fixture(scope="session")
def texts():
    paragraphs = default_corpus().documents[0].text.splitlines()
    texts = [text for paragraph in paragraphs for text in (paragraph, f"{paragraph}\n\n  {paragraph[::-1]}\n")]
    return texts[:10] + [""] * 2 + texts[10:] + [""]


@pytest.fixture(scope="session")
def source(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(jsonl(texts))
    return str(path)


@pytest.fixture(scope="session")
def model(source, tmp_path_factory):
    return train_tokenizer_command([source], 400, tmp_path_factory.mktemp("model") / "small").path


# The command with chunks of a given size, so that a small input has many, and with pauses: before each shard is
# finished, while shards are merged, and before samples are packed. If OFFSETS is set, each rank appends the offset at
# which it writes to a .bin file, and the number of bytes, to this file. A tokenizer is trained on SAMPLE bytes.
PROGRAM = """\
import os, resource, sys, time
from megagpt.corpus import bin_writer as id_file
from megagpt.prepare import chunks as pieces, shards

chunk, pause, limit, *arguments = sys.argv[1:]
finish = shards.ShardWriter.finish
shards.ShardWriter.finish = lambda *given: time.sleep(float(pause)) or finish(*given)  # in the workers too
write = id_file.BinWriter.finish
id_file.BinWriter.finish = lambda *given: time.sleep(float(pause)) or write(*given)


class Recorded(id_file.BinWriter):
    def __init__(self, path, start=None):
        super().__init__(path, start)
        self._start = start or 0

    def finish(self):
        written = super().finish()
        with open(os.environ["OFFSETS"], "a") as file:
            print(self._start, sum(size for size, _ in written), file=file)
        return written


if "SAMPLE" in os.environ:
    from megagpt.prepare import sample_lines as sampling
    sampling.SAMPLE_BYTES = int(os.environ["SAMPLE"])
if "OFFSETS" in os.environ:
    id_file.BinWriter = Recorded
from megagpt.prepare import pack as packing  # imported after the changes above, which it would not see otherwise

fill_samples = packing._fill_samples
packing._fill_samples = lambda *given: time.sleep(float(pause)) or fill_samples(*given)
if __name__ == "__main__":
    pieces._MIN_BYTES = int(chunk)
    if limit != "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    from megagpt.cli import main
    sys.exit(main(arguments))
"""


@pytest.fixture
def command(tmp_path):
    """Start `megagpt` with small chunks in its own session, with files limited to `file_limit` bytes."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    started = []

    def start(*arguments, chunk=30_000, pause=0.0, file_limit=0, stdin=None, launcher=()):
        line = [*launcher, sys.executable, program, chunk, pause, file_limit, *arguments]
        pipe = subprocess.PIPE
        line = list(map(str, line))
        process = subprocess.Popen(line, stdin=stdin, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process, code=0):
    """Wait for the command, check its exit code, and return its standard output and error."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    return output, errors


def wait_for(folder, pattern, process):
    """Wait until files match the pattern, and return them."""
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        if found := sorted(folder.glob(pattern)):
            return found
        time.sleep(0.002)
    raise AssertionError(process.communicate())


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
