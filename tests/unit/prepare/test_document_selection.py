"""Deduplication and shuffling while shards are merged."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.reader import CorpusReader
from megagpt.prepare import chunks, merge_shards
from megagpt.prepare import deduplicate as duplicates
from megagpt.prepare.command import PrepareOptions, prepare_command
from megagpt.prepare.readers.documents import is_validation, text_digest
from megagpt.tokenizer.tokenizer import Tokenizer
from tests.unit.prepare.conftest import content, finish, jsonl


def documents(prefix, model):
    reader, tokenizer = CorpusReader(prefix), Tokenizer(model)
    return [tokenizer.decode(reader.document(n)) for n in range(len(reader.documents) - 1)]


def prepared(texts, model, folder, **options):
    path = folder / "text.jsonl"
    path.write_text(jsonl(texts))
    with pytest.MonkeyPatch.context() as patch:  # several shards, blocks and files of hashes for few documents
        for module, name, value in (
            (chunks, "_MIN_BYTES", 700),
            (merge_shards, "BLOCK_DOCUMENTS", 7),
            (duplicates, "_ENTRIES_PER_FILE", 10),
        ):
            patch.setattr(module, name, value)
        summary = prepare_command([str(path)], model, folder / "c", PrepareOptions(0.3, workers=1, **options))
    return [documents(folder / f"c.{part}", model) for part in ("train", "validation")], summary


SOME = st.lists(st.integers(0, 60), min_size=80, max_size=160)


@given(numbers=SOME)
@settings(max_examples=15, deadline=None)
def test_deduplication_keeps_the_first_copy_of_each_text(model, tmp_path_factory, numbers):
    texts = [f"text {number}" for number in [*range(40), *numbers]]
    (train, validation), summary = prepared(texts, model, tmp_path_factory.mktemp("c"), deduplicate=True)
    once = list(dict.fromkeys(texts))
    assert train == [text for text in once if not is_validation(text_digest(text), 0.3)]
    assert validation == [text for text in once if is_validation(text_digest(text), 0.3)]
    assert summary.copies == len(texts) - len(once)
    assert summary.train.text_bytes == sum(map(len, train))


@given(numbers=SOME, deduplicate=st.booleans())
@settings(max_examples=15, deadline=None)
def test_shuffling_moves_documents_and_keeps_all_of_them(model, tmp_path_factory, numbers, deduplicate):
    texts = [f"text {number}" for number in [*range(40), *numbers]]
    plain, _ = prepared(texts, model, tmp_path_factory.mktemp("c"), deduplicate=deduplicate)
    mixed, _ = prepared(texts, model, tmp_path_factory.mktemp("c"), deduplicate=deduplicate, shuffle=True)
    again, _ = prepared(texts, model, tmp_path_factory.mktemp("c"), deduplicate=deduplicate, shuffle=True)
    assert mixed == again
    for before, after in zip(plain, mixed, strict=True):
        assert sorted(before) == sorted(after)
    assert plain[0] != mixed[0]


def test_a_shuffle_spreads_the_documents_of_each_shard(model, tmp_path):
    (train, _), _ = prepared([f"text {n:04d}" for n in range(700)], model, tmp_path, shuffle=True)
    places = [int(text.split()[1]) / 700 for text in train]
    quarter = len(places) // 4
    assert all(0.35 < sum(places[at : at + quarter]) / quarter < 0.65 for at in range(0, 3 * quarter, quarter))
    assert sum(after == before + 1 / 700 for before, after in itertools.pairwise(places)) < len(places) / 7


def test_the_selection_does_not_depend_on_the_workers_and_is_recorded(command, texts, model, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(jsonl([*texts, *texts[::-1]]))
    options = ("--tokenizer", model, "--validation-fraction", 0.2, "--shuffle", "--deduplicate")
    for workers in (1, 3):
        prefix = tmp_path / f"c{workers}"
        printed, _ = finish(
            command("prepare", path, "--output", prefix, "--workers", workers, *options, "--json", chunk=2000)
        )
    assert content(tmp_path / "c1") == content(tmp_path / "c3")
    assert json.loads(printed)["copies"] == len(texts) + 2  # two of three empty documents are copies too
    made = json.loads((tmp_path / "c1.train.json").read_text())["made"]
    assert made["options"] == {
        "validation_fraction": 0.2, "text_key": "text", "strict": False, "deduplicate": True, "shuffle": True,
        "engine": "sentencepiece", "pack": None,
    }  # fmt: skip
    assert made["by"].startswith("megagpt ")
    assert made["odd"] == {"empty": 6}
    assert (made["copies_left_out"], made["unknown"]) == (len(texts) + 2, 0)


def test_unknown_tokens_are_counted(tmp_path):
    from tests.unit.tokenizer.test_tokenizer import foreign_model

    path = tmp_path / "a.txt"
    path.write_text("the quick 中 brown")
    summary = prepare_command([str(path)], foreign_model(tmp_path / "foreign.model"), tmp_path / "c", PrepareOptions(0))
    assert summary.unknown == 1
    assert f"unknown: {1 / summary.train.tokens:.3%} of tokens" in str(summary)
