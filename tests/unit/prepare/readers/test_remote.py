"""Files of a real web server: with ranges, without ranges, without a content length, and with errors."""

import gzip
import os
import re
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow
import pytest
from pyarrow import parquet

from megagpt.errors import UserError
from megagpt.prepare.chunks import split_into_chunks
from megagpt.prepare.input_warnings import InputWarnings
from megagpt.prepare.readers.inputs import find_input_files
from megagpt.prepare.readers.reader import read_fragments

LINES = [f"line {number} " + "word " * 200 for number in range(6_000)]  # 7 MB: more than one request reads


class Whole(SimpleHTTPRequestHandler):
    """The server of `python -m http.server`, which sends only whole files."""

    def log_message(self, *_):
        """Log nothing."""


class Ranges(Whole):
    def do_GET(self):
        path = self.translate_path(self.path)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted:
            super().do_GET()
            return
        content = Path(path).read_bytes()
        begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        self.wfile.write(content[begin:end])


class NoLength(Whole):
    def send_header(self, name, value):
        if name != "Content-Length":
            super().send_header(name, value)


class Broken(Ranges):
    """A server that fails in the middle of a file."""

    def do_GET(self):
        if int(re.search(r"=(\d+)", self.headers.get("Range", "=0"))[1]) > 1 << 20:
            self.send_error(500)
        else:
            super().do_GET()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    content = "".join(f'{{"text": "{line}"}}\n' for line in LINES).encode()
    (folder / "a.jsonl").write_bytes(content)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "a.txt").write_text("\n".join(LINES))
    parquet.write_table(pyarrow.table({"text": LINES}), folder / "a.parquet", compression="none", row_group_size=4000)
    return folder


@pytest.fixture(params=[Ranges, Whole, NoLength, Broken])
def server(request, folder):
    def handler(*given):
        return request.param(*given, directory=str(folder))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield request.param, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def texts(address):
    chunks = split_into_chunks(find_input_files([address], None))
    found = [
        fragment.text
        for chunk in chunks
        for part in chunk.ranges
        for fragment in read_fragments(part, ("text",), InputWarnings())
    ]
    return found, len(chunks)


def test_files_of_a_web_server_are_read(server):
    kind, address = server
    if kind is Broken:
        with pytest.raises(UserError) as error:
            texts(f"{address}/a.jsonl")
        assert str(error.value).startswith("megagpt: cannot read the file: ClientResponseError: 500")
        assert str(error.value).endswith(
            f"\n  {address}/a.jsonl\n  do: check that it exists and that you have permission to read it"
        )
        return
    assert texts(f"{address}/a.jsonl") == (LINES, 2 if kind is Ranges else 1)
    assert texts(f"{address}/a.jsonl?download=true")[0] == LINES
    assert texts(f"{address}/a.jsonl.gz") == (LINES, 1)
    assert "".join(texts(f"{address}/a.txt")[0]) == "\n".join(LINES)
    if kind is Ranges:
        assert texts(f"{address}/a.parquet") == (LINES, 2)
        assert len(texts(address)[0]) == len(texts(f"{address}/")[0]) > 3 * len(LINES)
    else:
        with pytest.raises(UserError, match="cannot read the parquet file: ") as error:
            texts(f"{address}/a.parquet")
        assert str(error.value).endswith(f"\n  {address}/a.parquet\n  do: copy or create it again")
    with pytest.raises(UserError, match="no text file was found there"):
        texts(f"{address}/none.jsonl")


def test_a_changed_web_file_has_another_fingerprint(folder, server):
    _, address = server
    (folder / "b.txt").write_text("one")
    (before,) = find_input_files([f"{address}/b.txt"], None)
    assert find_input_files([f"{address}/b.txt"], None) == [before]
    (folder / "b.txt").write_text("two")
    os.utime(folder / "b.txt", (1e9, 1e9))
    (after,) = find_input_files([f"{address}/b.txt"], None)
    (folder / "b.txt").unlink()
    assert (after.size, after.fingerprint == before.fingerprint) == (before.size, False)
