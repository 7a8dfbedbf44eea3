"""Progress of `prepare`: a live line on a terminal, plain lines elsewhere; standard output has only the result."""

import io
import json
import os
import pty
import re
import subprocess
import sys

from megagpt.prepare import progress
from megagpt.prepare.chunks import split_into_chunks
from megagpt.prepare.encode import ChunkEncoder, EncodeJob
from megagpt.prepare.readers.inputs import find_input_files
from megagpt.tokenizer.tokenizer import Tokenizer
from tests.unit.prepare.conftest import PROGRAM, finish, jsonl


def test_plain_lines_show_the_progress(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress.show_progress(40_000_000, out) as shown:
        for second in (4, 8, 12, 16, 23):
            now[0] = second
            shown.add(documents=1000, tokens=2_000_000, text_bytes=6_000_000, input_bytes=4_000_000)
    assert out.getvalue().splitlines() == [
        "prepare: 18 MB, 1.5 MB/s, 250 documents/s, 6,000,000 tokens, 30%, 0:28 remaining",
        "prepare: 30 MB, 1.3 MB/s, 217 documents/s, 10,000,000 tokens, 50%, 0:23 remaining",
    ]


def test_nothing_is_shown_for_a_quick_command(command, source, model, tmp_path):
    printed, errors = finish(command("prepare", source, "--tokenizer", model, "--output", tmp_path / "c", "--json"))
    assert json.loads(printed)["train"]["documents"] > 0
    assert errors == ""


def test_a_terminal_shows_one_live_line_and_standard_output_has_none(texts, model, tmp_path):
    path, program = tmp_path / "text.jsonl", tmp_path / "program.py"
    path.write_text(jsonl(texts * 3))
    program.write_text(PROGRAM)
    line = [program, 3000, 0.1, 0, "prepare", path, "--tokenizer", model, "--output", tmp_path / "c", "--json"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, *map(str, line)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 1 << 16):
                shown += block
        except OSError:  # the terminal's other end is closed
            pass
        printed = process.stdout.read()
    os.close(ours)
    assert json.loads(printed)["train"]["documents"] > 0
    states = re.findall(r"[\d,]+ MB, [\d.]+ MB/s, [\d,]+ documents/s, ([\d,]+) tokens", shown.decode())
    assert len(set(states)) > 2
    assert re.search(r"\d+%, \d+:\d\d remaining", shown.decode())


def test_a_long_document_is_counted_while_it_is_encoded(texts, model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(texts * 120))
    (chunk,) = split_into_chunks(find_input_files([str(path)], None))
    reports = []
    job = EncodeJob(tmp_path, Tokenizer(model), 0.0, ("text",), strict=False, engine="sentencepiece")
    record = ChunkEncoder(job).encode(chunk, lambda *counts: reports.append(counts))
    assert path.stat().st_size > 2 << 20
    assert len([text for _, _, text, _ in reports if text]) > 2
    assert [sum(column) for column in zip(*reports, strict=True)] == [
        1, record.tokens, record.text_bytes, path.stat().st_size
    ]  # fmt: skip
