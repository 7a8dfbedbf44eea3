"""`megagpt prepare --pack` writes the same packed training part with any workers, and after any interruption."""

import json
import time

import numpy as np
import pytest

from megagpt.corpus.reader import CorpusReader
from megagpt.corpus.verify import verify
from megagpt.prepare.command import PrepareOptions, prepare_command
from tests.unit.prepare.conftest import content, finish, jsonl

SEQ_LEN = 100


@pytest.fixture(scope="module")
def lines(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "text.jsonl"
    path.write_text(jsonl([text[:size] for size in (40, 90, 200, 400, 900) for text in texts]))
    return path


@pytest.fixture(scope="module")
def unpacked(lines, model, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("unpacked") / "c"
    return prepare_command([str(lines)], model, prefix, PrepareOptions(0.2))


@pytest.fixture(scope="module")
def packed(lines, model, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("packed") / "c"
    return prepare_command([str(lines)], model, prefix, PrepareOptions(0.2, workers=1, pack=SEQ_LEN)), content(prefix)


def start(command, lines, model, prefix, workers=1, **limits):
    options = ("--tokenizer", model, "--output", prefix, "--validation-fraction", 0.2, "--workers", workers)
    return command("prepare", lines, *options, "--pack", SEQ_LEN, **limits)


def test_the_training_part_is_packed_and_the_validation_part_is_not(unpacked, packed):
    summary, _ = packed
    plain, train = CorpusReader(unpacked.train.prefix), CorpusReader(summary.train.prefix)
    assert train.packed == train.sidecar.packed == SEQ_LEN
    assert set(train.lengths.tolist()) == {SEQ_LEN + 1}
    more = np.bincount(train.tokens, minlength=400) - np.bincount(plain.tokens, minlength=400)
    assert more[train.sidecar.eod] == more.sum() == train.sidecar.padding == summary.packing.padding > 0
    assert train.sidecar.text_bytes == plain.sidecar.text_bytes
    for ending in (".bin", ".idx"):
        one, other = (f"{part.validation.prefix}{ending}" for part in (summary, unpacked))
        with open(one, "rb") as ours, open(other, "rb") as theirs:
            assert ours.read() == theirs.read()
    assert CorpusReader(summary.validation.prefix).packed is None
    assert (summary.train.documents, summary.train.tokens) == (unpacked.train.documents, len(plain.tokens))
    assert verify(summary.train.prefix).wrong == ()


def test_the_split_documents_are_those_counted_over_all_offsets(unpacked, packed):
    """Without packing, samples overlap by one token, and the first may begin at each of seq_len tokens."""
    plain = CorpusReader(unpacked.train.prefix)
    begins = plain.document_starts(np.arange(len(plain.documents)))
    lengths, cut = np.diff(begins), 0
    for first in range(SEQ_LEN):
        into = (begins[:-1] - first) % SEQ_LEN  # the sample that has the document's first token as an input
        cut += int((into + lengths > SEQ_LEN + 1).sum())
    facts = packed[0].packing
    assert facts.cut_before == pytest.approx(cut / SEQ_LEN)
    assert facts.cut_after == int((lengths > SEQ_LEN + 1).sum())
    assert 0 < facts.cut_after < 0.8 * facts.cut_before


def test_the_result_of_packing_is_reported(packed, tmp_path, model, command, lines):
    summary, _ = packed
    facts, padding = summary.packing, summary.packing.padding
    samples = len(CorpusReader(summary.train.prefix))
    line = (
        f"packed for seq_len 100: {samples:,} samples, {padding / samples / 101:.2%} padding; documents split: "
        f"{facts.cut_before / facts.documents:.1%} unpacked, {facts.cut_after / facts.documents:.1%} packed (longer "
        "than a sample)"
    )
    assert line in str(summary).splitlines()
    made = CorpusReader(summary.train.prefix).sidecar.made
    assert made["options"]["pack"] == 100
    assert made["packing"] == {
        "documents": facts.documents,
        "cut_before": facts.cut_before,
        "cut_after": facts.cut_after,
    }
    options = ("--tokenizer", model, "--output", tmp_path / "c", "--pack", 100, "--validation-fraction", 0.2, "--json")
    printed, _ = finish(command("prepare", lines, *options))
    assert json.loads(printed)["packing"]["samples"] == samples


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_workers(command, lines, model, packed, tmp_path, workers):
    finish(start(command, lines, model, tmp_path / "c", workers, chunk=20_000 + workers))
    assert content(tmp_path / "c") == packed[1]
    assert not (tmp_path / "c.prepare").exists()


def test_a_command_killed_while_it_packs_resumes(command, lines, model, packed, tmp_path):
    process = start(command, lines, model, tmp_path / "c", pause=2, chunk=10_000_000)
    end = time.monotonic() + 60
    while not (tmp_path / "c.prepare/shards/segments").exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert (tmp_path / "c.train.bin.partial").exists()
    assert not list(tmp_path.glob("c.*.idx"))
    finish(start(command, lines, model, tmp_path / "c", chunk=10_000_000))
    assert content(tmp_path / "c") == packed[1]
    assert len(list(tmp_path.glob("c.*"))) == 6


@pytest.mark.parametrize("where", ["unpacked", "packed"])
def test_a_disk_that_is_full_while_packing_leaves_no_corpus(command, lines, model, unpacked, packed, tmp_path, where):
    """The limit to the size of files is reached by the packed corpus, or by the unpacked one."""
    limit = 2 * unpacked.train.tokens + (100 if where == "packed" else -100)
    assert limit < len(packed[1][".train.bin"])
    _, errors = finish(start(command, lines, model, tmp_path / "c", chunk=20_000, file_limit=limit), 1)
    assert errors.splitlines()[0] == "megagpt: cannot write: File too large"
    assert not [path for path in tmp_path.glob("c.*") if path.suffix in (".idx", ".bin", ".json")]
    finish(start(command, lines, model, tmp_path / "c", chunk=20_000))
    assert content(tmp_path / "c") == packed[1]
