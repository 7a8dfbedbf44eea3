"""Files of a web server, a real one: some give parts of a file, some the whole only, some do not say how long it is."""

import gzip
import os
import re
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow
import pytest
from pyarrow import parquet

from megagpt.data.oddities import InputWarnings
from megagpt.data.pieces import split_into_chunks
from megagpt.data.reading import read_fragments
from megagpt.data.sources import find_input_files
from megagpt.errors import UserError

LINES = [f"line {number} " + "word " * 200 for number in range(6_000)]  # 7 MB: more than is asked for at a time


class Whole(SimpleHTTPRequestHandler):
    """What `python -m http.server` does: it sends whole files."""

    def log_message(self, *_):
        """Say nothing."""


class Parts(Whole):
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


class Broken(Parts):
    """It stops in the middle."""

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


@pytest.fixture(params=[Parts, Whole, NoLength, Broken])
def server(request, folder):
    def handler(*given):
        return request.param(*given, directory=str(folder))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield request.param, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def texts(address):
    pieces = split_into_chunks(find_input_files([address], None))
    found = [
        fragment.text
        for piece in pieces
        for stretch in piece.stretches
        for fragment in read_fragments(stretch, ("text",), InputWarnings())
    ]
    return found, len(pieces)


def test_files_of_a_web_server_are_read(server):
    kind, address = server
    if kind is Broken:
        with pytest.raises(UserError) as error:
            texts(f"{address}/a.jsonl")
        assert str(error.value).startswith("megagpt: cannot read the file: ClientResponseError: 500")
        assert str(error.value).endswith(
            f"\n  {address}/a.jsonl\n  do: check that it is there and that you may read it"
        )
        return
    assert texts(f"{address}/a.jsonl") == (LINES, 2 if kind is Parts else 1)
    assert texts(f"{address}/a.jsonl?download=true")[0] == LINES
    assert texts(f"{address}/a.jsonl.gz") == (LINES, 1)
    assert "".join(texts(f"{address}/a.txt")[0]) == "\n".join(LINES)
    if kind is Parts:
        assert texts(f"{address}/a.parquet") == (LINES, 2)
        assert len(texts(address)[0]) == len(texts(f"{address}/")[0]) > 3 * len(LINES)
    else:
        with pytest.raises(UserError, match="the parquet file cannot be read: ") as error:
            texts(f"{address}/a.parquet")
        assert str(error.value).endswith(f"\n  {address}/a.parquet\n  do: copy or make it again")
    with pytest.raises(UserError, match="no text file is there"):
        texts(f"{address}/none.jsonl")


def test_a_web_file_that_changes_is_another_one(folder, server):
    _, address = server
    (folder / "b.txt").write_text("one")
    (before,) = find_input_files([f"{address}/b.txt"], None)
    assert find_input_files([f"{address}/b.txt"], None) == [before]
    (folder / "b.txt").write_text("two")
    os.utime(folder / "b.txt", (1e9, 1e9))
    (after,) = find_input_files([f"{address}/b.txt"], None)
    (folder / "b.txt").unlink()
    assert (after.size, after.state == before.state) == (before.size, False)
