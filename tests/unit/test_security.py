"""Hostile input of every kind that SECURITY.md lists is refused with a message and has no other effect."""

import ast
import json
import lzma
import os
import pickle
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree
import zlib

import pytest

from megagpt import files, report
from megagpt.checkpoint import store
from megagpt.checkpoint.tensor_files import TensorFiles
from megagpt.config import recipe as megagpt_recipe
from megagpt.config.syntax import yaml_reader
from megagpt.corpus.inspect import DocumentExcerpt
from megagpt.corpus.metadata import read_sidecar
from megagpt.corpus.reader import CorpusReader
from megagpt.doctor import agent
from megagpt.errors import Problem, UserError, without_controls
from megagpt.prepare import plain_data
from megagpt.prepare.chunks import split_into_chunks
from megagpt.prepare.command import PrepareOptions, prepare_command
from megagpt.prepare.input_warnings import InputWarnings
from megagpt.prepare.process_group import _CommunicatingGroup
from megagpt.prepare.readers import decompress
from megagpt.prepare.readers.inputs import find_input_files
from megagpt.prepare.readers.manifest import ManifestReader
from megagpt.prepare.readers.reader import read_fragments
from megagpt.prepare.train_tokenizer import TokenizedText
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.training import metrics, setup, status
from megagpt.training.console import Console
from tests import training

PACKAGE = training.ROOT / "megagpt"
DEEP = "[" * 100_000 + "]" * 100_000
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\u202emit"


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def bomb(tmp_path):
    """A pickle that would create a file if it were loaded. The file must not exist after the test."""
    yield pickle.dumps(Bomb(tmp_path / "owned"))
    assert not (tmp_path / "owned").exists()


# ---- calls that the source never makes

_NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "tarfile", "zipfile", "xmlrpc"}
_NEVER_CALLED = {"eval", "exec", "__import__", "unpack_archive", "unsafe_load", "full_load", "system", "popen"}


def calls():
    """Yield (file:line, name called, keywords, first argument) of every call in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {one.arg: ast.unparse(one.value) for one in node.keywords}
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", name, keywords, [ast.unparse(a) for a in node.args]


def test_nothing_is_unpickled_evaluated_unpacked_or_run_by_a_shell():
    wrong = []
    for where, name, keywords, _ in calls():
        last = name.rpartition(".")[2]
        if last in _NEVER_CALLED and name not in ("model.eval",):
            wrong.append(f"{where} {name}")
        if name in ("torch.load", "yaml.load", "np.load", "numpy.load") or "shell" in keywords:
            wrong.append(f"{where} {name}")
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.name} imports {name}" for name in names if name.split(".")[0] in _NEVER_IMPORTED]
    assert [one for one in wrong if not re.search(r"\.eval$| model\.eval", one)] == []


def test_no_foreign_model_code_runs_and_nothing_is_downloaded_implicitly():
    for path in PACKAGE.rglob("*.py"):
        assert "trust_remote_code" not in path.read_text(), path
    loads = [(where, keywords) for where, name, keywords, _ in calls() if name.endswith("from_pretrained")]
    assert loads
    assert all(keywords.get("local_files_only") == "True" for _, keywords in loads)


def test_untrusted_json_is_parsed_by_the_function_that_handles_its_depth():
    parsers = {where.partition(":")[0] for where, name, _, _ in calls() if name in ("json.loads", "json.load")}
    assert parsers == {"files.py", "prepare/readers/reader.py", "prepare/readers/long_json_line.py"}


def test_our_own_sockets_listen_at_an_address_of_the_job():
    servers = [args[0] for _, name, _, args in calls() if name.endswith("create_server")]
    assert servers
    assert set(servers) == {"(address, port)"}


# ---- pickles


def test_a_pickle_in_place_of_weights(bomb, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state/rank-00000-000.safetensors").write_bytes(bomb)
    with pytest.raises(UserError, match="this file holds no tensors of a checkpoint"):
        TensorFiles(tmp_path).read("weight", "head", 0, 1)


@pytest.mark.parametrize("name", ["t.model", "tokenizer.json"])
def test_a_pickle_in_place_of_a_tokenizer(bomb, tmp_path, name):
    (tmp_path / name).write_bytes(bomb)
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer(tmp_path / name)


def test_a_pickle_in_place_of_a_corpus(bomb, tmp_path):
    for suffix in (".idx", ".bin"):
        (tmp_path / f"c{suffix}").write_bytes(bomb)
    with pytest.raises(UserError):
        CorpusReader(str(tmp_path / "c"))


@pytest.mark.parametrize(
    "message",
    [
        b"", b"X", b"J", b"J{", b"J{}", b'J["no such type"]', b'J["system", "touch owned"]', b'J["Source"]', b'J[1]',
        b'J["list", ["Path", 1]]', b"J[]", b'J["UserError"]', b"J" + DEEP.encode(), b'J["list",' * 50_000,
    ],
)  # fmt: skip
def test_a_message_that_is_not_plain_data_of_the_listed_types(message):
    with pytest.raises(plain_data.BadMessage):
        plain_data.loads(message)


def test_a_pickle_in_place_of_a_message(bomb):
    with pytest.raises(plain_data.BadMessage):
        plain_data.loads(bomb)
    assert plain_data.loads(b"B" + bomb) == bomb  # bytes are bytes


def test_only_listed_types_are_sent():
    for value in (object(), Bomb("x"), lambda: None, {1: Bomb("x")}):
        with pytest.raises(TypeError, match="cannot be sent"):
            plain_data.dumps(value)


# ---- paths


def write_manifest(folder, content):
    body = json.dumps(content)[1:]
    (folder / store.MANIFEST).write_text(f'{{"checksum": {zlib.crc32(body.encode())},{body}')


@pytest.fixture
def state():
    from dataclasses import asdict

    from megagpt.state import TrainState

    return asdict(TrainState())


@pytest.mark.parametrize("name", ["../outer", "../../run/outer", "{absolute}", "state/../../outer", "link"])
def test_a_checkpoint_manifest_that_names_files_outside(tmp_path, state, name):
    folder = tmp_path / "run" / "update_000001"
    folder.mkdir(parents=True)
    outer = tmp_path / "run" / "outer"
    outer.write_bytes(b"outer")
    (folder / "link").symlink_to(outer)
    name = name.format(absolute=outer)
    write_manifest(folder, {"state": state, "files": {name: {"bytes": 5, "crc32": zlib.crc32(b"outer")}}})
    assert store.verify(folder) == (None, f"{name} leads out of the checkpoint")
    assert outer.read_bytes() == b"outer"


@pytest.mark.parametrize("listed", [[], 5, {"x": 5}, {"x": {"bytes": "5", "crc32": 0}}, {"x": {"bytes": 5}}, None])
def test_a_checkpoint_manifest_of_another_form(tmp_path, state, listed):
    write_manifest(tmp_path, {"state": state, "files": listed})
    found, wrong = store.verify(tmp_path)
    assert found is None
    assert "cannot be read" in wrong


@pytest.mark.parametrize("corpus", ["../x", "/x", "a/b", "..", ".", "a\0b"])
def test_an_input_manifest_that_names_a_corpus_outside_the_output(tmp_path, corpus):
    (tmp_path / "list").write_text(f"a.txt\t{corpus}\n")
    with pytest.raises(UserError, match="cannot be the name of a corpus"):
        list(ManifestReader().read(tmp_path / "list"))


def test_another_rank_that_names_files_outside_the_folder_of_shards(tmp_path):
    class World:
        rank, size = 0, 2

        def bcast(self, value):
            return value

        def allgather(self, value):
            return [value, ["../../.bashrc"]]

    with pytest.raises(UserError, match="a rank names files outside the folder of shards"):
        _CommunicatingGroup(World()).gather_files(tmp_path, [])


# ---- symbolic links out of a run directory


def test_links_out_of_a_run_directory_are_not_written_through(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "logs").mkdir(parents=True)
    outside.mkdir()
    for inside in ("metrics.jsonl", "logs/rank-0.log", "checkpoints"):
        target = outside if inside == "checkpoints" else outside / "file"
        (run / inside).symlink_to(target)
        with pytest.raises(UserError, match="leads out of the run directory") as caught:
            Console(run, 0).__enter__()
        assert f"{run / inside} -> {target}" in str(caught.value)
        (run / inside).unlink()
    (run / "metrics.jsonl").symlink_to(outside / "file")
    for write in (files.open_to_append, lambda path: files.write(path, b"x")):
        with pytest.raises(OSError, match="symbolic link"):
            write(run / "metrics.jsonl")
    files.replace_text(run / "metrics.jsonl", "mine\n")  # replaces the link, and leaves its target unchanged
    assert not (run / "metrics.jsonl").is_symlink()
    assert list(outside.iterdir()) == []


def test_a_run_directory_that_is_a_link_itself_is_used(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    files.refuse_links_out(tmp_path / "run")
    (tmp_path / "run" / "inner").symlink_to(tmp_path / "disk" / "file")
    files.refuse_links_out(tmp_path / "run")


@pytest.mark.parametrize("name", ["update_000001", ".removed_update_000001", ".partial_update_000001"])
def test_removing_a_checkpoint_that_is_a_link_keeps_its_target(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    root = tmp_path / "run"
    root.mkdir()
    (root / name).symlink_to(outside)
    if name == "update_000001":
        files.remove_folder(root / name)
    else:
        files.remove_tree(root / name)
    assert list(root.iterdir()) == []
    assert [path.name for path in outside.iterdir()] == ["precious"]


# ---- bombs


def test_an_xz_file_that_asks_for_four_gigabytes_of_memory(tmp_path):
    """The size of the dictionary is a byte of the block's header, 40 for 4 GiB."""
    content = bytearray(lzma.compress(b"text\n" * 1000))
    size = (content[12] + 1) * 4
    place = content.index(b"\x21\x01", 12) + 2
    content[place] = 40
    content[12 + size - 4 : 12 + size] = struct.pack("<I", zlib.crc32(content[12 : 12 + size - 4]))
    path = tmp_path / "a.txt.xz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="takes more than 256 MiB of memory"):
        find_input_files([str(path)], tmp_path / "spool")


def test_xz_files_of_several_streams_and_padding_are_read_whole(tmp_path):
    path = tmp_path / "a.xz"
    for ending in (b"", b"\0" * 8, b"\0" * 100_000, b"not xz"):
        path.write_bytes(lzma.compress(b"one\n" * 100_000) + lzma.compress(b"two\n" * 100_000) + ending)
        with decompress.open_decompressed(str(path), decompress.Compression.XZ) as file:
            assert file.read() == b"one\n" * 100_000 + b"two\n" * 100_000


BOMB = """\
import resource, sys
from megagpt.prepare.input_warnings import InputWarnings
from megagpt.prepare.chunks import split_into_chunks
from megagpt.prepare.readers.reader import read_fragments
from megagpt.prepare.readers.inputs import find_input_files
from pathlib import Path
count = 0
for chunk in split_into_chunks(find_input_files([sys.argv[1]], Path(sys.argv[1] + ".spool"))):
    for part in chunk.ranges:
        for fragment in read_fragments(part, ("text",), InputWarnings()):
            count += len(fragment.text)
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_small_compressed_file_with_a_large_line_is_never_in_memory_as_a_whole(tmp_path, ending):
    import bz2
    import gzip

    import zstandard

    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
                ".zst": zstandard.ZstdCompressor().compress}[ending]  # fmt: skip
    length = 100_000_000
    large, small = tmp_path / f"large.jsonl{ending}", tmp_path / f"small.jsonl{ending}"
    large.write_bytes(compress(b'{"text": "' + b"a" * length + b'"}\n'))
    small.write_bytes(compress(b'{"text": "a"}\n'))
    assert large.stat().st_size < length / 500
    found = []
    for path in (large, small):
        printed = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True, check=True).stdout
        found.append([int(number) for number in printed.split()])
    (count, memory), (_, control) = found
    assert count == length
    assert (memory - control) * 1024 < length / 2


# ---- SVG


def test_html_in_the_name_of_a_run_is_plain_text_in_its_plot(tmp_path):
    name = "<script>alert(1)<b>&quot;--><img src=x onerror=y>$\\frac{"
    run = tmp_path / name
    run.mkdir()
    event = {"event": "update", "update": 1, "tokens": 10, "loss": 1.0}
    (run / metrics.NAME).write_text(json.dumps(event) + "\n")
    text = report.draw_as_svg(run).read_text()
    kinds = {element.tag.rpartition("}")[2] for element in xml.etree.ElementTree.fromstring(text).iter()}
    assert kinds.isdisjoint({"script", "img", "b", "foreignObject", "a"})
    assert "<script" not in text
    assert "<img" not in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


# ---- terminals


def shown(text):
    """Return the characters of a text that a terminal would interpret."""
    return [letter for letter in text if not letter.isprintable() and letter not in "\n\t"]


def test_escapes_in_texts_names_and_messages_do_not_reach_the_terminal(tmp_path):
    assert shown(without_controls(ESCAPES)) == []
    assert without_controls("a\tb\nc é 漢 😀") == "a\tb\nc é 漢 😀"
    assert without_controls(f"\x1b[31mred\x1b[0m{ESCAPES}", colours=True).startswith("\x1b[31mred\x1b[0m\ufffd]0;owned")
    assert shown(str(Problem(ESCAPES, ESCAPES, ESCAPES))) == []
    assert shown(str(UserError(ESCAPES, f"{ESCAPES}.txt"))) == []
    assert shown(str(DocumentExcerpt(1, 2, (1, 2), ESCAPES))) == []
    tokens = TokenizedText(((1, ESCAPES),), 1)
    assert shown(str(tokens)) == []
    assert shown(tokens.colored().plain) == []


def test_escapes_in_a_corpus_do_not_reach_the_terminal(data, tmp_path):
    (tmp_path / f"a{ESCAPES.replace('/', '')}.txt").write_text(f"the {ESCAPES} of the\n")
    made = prepare_command([str(tmp_path)], data / "text.model", tmp_path / "c", PrepareOptions(0.0, workers=1))
    assert made.train.documents == 1
    program = "import sys; from megagpt.cli import main; sys.exit(main())"
    for arguments in (
        ["data", "inspect", tmp_path / "c.train", "--document", "0", "--tokenizer", data / "text.model"],
        ["prepare", tmp_path, "--tokenizer", data / "text.model", "--output", tmp_path / "d"],  # no validation part
        ["tokenizer", "inspect", data / "text.model", ESCAPES],
        ["generate", tmp_path / f"none{ESCAPES}", "x"],
    ):
        done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
        assert done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert shown(done.stdout) == []
        assert shown(done.stderr) == []


# ---- JSON that nests 100,000 deep


def test_deep_json_in_the_files_of_a_run(tmp_path, state):
    with pytest.raises(ValueError, match="nested too deeply"):
        files.parse_json(DEEP)
    (tmp_path / metrics.NAME).write_text(f'{{"event": "update", "x": {DEEP}}}\n')
    with pytest.raises(UserError, match=r"this line is not JSON: nested too deeply.*"):
        list(metrics.read(tmp_path))
    for text in (DEEP, "[1]", "5", '"x"', "[[1, 2, 3]]", '{"at": {}}'):
        (tmp_path / status.DONE).write_text(text)
        assert setup.update_of_done(tmp_path) == 0
        (tmp_path / status.FILE).write_text(text)
        assert isinstance(status._read_json(tmp_path / status.FILE), dict)
    body = f'"state": {DEEP}}}'
    (tmp_path / store.MANIFEST).write_text(f'{{"checksum": {zlib.crc32(body.encode())},{body}')
    found, wrong = store.verify(tmp_path)
    assert found is None
    assert "nested too deeply" in wrong


def test_deep_json_in_a_corpus_and_its_sidecar(tmp_path):
    (tmp_path / "c.json").write_text(DEEP)
    with pytest.raises(UserError, match="nested too deeply"):
        read_sidecar(tmp_path / "c.json")
    text = tmp_path / "a.jsonl"
    text.write_text(f'{{"text": "a"}}\n{{"text": "b", "x": {DEEP}}}\n{{"text": "c"}}\n')
    warnings = InputWarnings()
    (chunk,) = split_into_chunks(find_input_files([str(text)], tmp_path / "spool"))
    assert [one.text for one in read_fragments(chunk.ranges[0], ("text",), warnings)] == ["a", "c"]
    assert warnings.counts == {"broken_json": 1}


@pytest.mark.parametrize("name", ["t.model", "tokenizer.json"])
def test_deep_json_in_place_of_a_tokenizer(tmp_path, name):
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer(tmp_path / name)


def test_deep_json_in_a_config_a_recipe_and_on_the_command_line(tmp_path, recipe):
    deep = "[" * 5_000 + "]" * 5_000
    path = tmp_path / "deep.json"
    path.write_text(f'{{"zero_optimization": {deep}}}')
    with pytest.raises(UserError, match="nested too deeply"):
        yaml_reader.read_yaml(path)
    with pytest.raises(UserError, match="nested too deeply"):
        megagpt_recipe.load(recipe, [f"data.train={deep}"])


def test_deep_json_in_messages_of_the_doctor():
    with pytest.raises(ValueError, match="nested too deeply"):
        agent.serve([f"{agent.PREFIX}{DEEP}\n"], print)
