"""Changes and damage to the data of a run give clear errors, and excluded ranges of data are not trained on."""

import itertools
import json
import os
import re
import shutil

import pytest

from megagpt.config import recipe as recipes
from megagpt.corpus.merge import merge
from megagpt.corpus.reader import CorpusReader
from megagpt.data.sampler import Sampler
from megagpt.inference.evaluate import evaluate
from megagpt.prepare.command import PrepareOptions, prepare_command
from tests import training
from tests.faults.launches import SLOW_DATA, launch


@pytest.fixture
def own(data, tmp_path):
    """Recipe with its own copy of the corpora, which a test may damage."""
    shutil.copytree(data, tmp_path / "data")
    return training.write_recipe(tmp_path / "run", tmp_path / "data")


def test_skipped_positions_are_not_trained_on_and_changed_data_is_refused(own, tmp_path):
    printed = training.finish(
        own, "length.updates=6", "evaluation.every=null", "data.skip=[[9, 10], [12, 15]]", world=2
    )
    assert [row["position"] for row in training.curve(tmp_path / "run")] == [4, 8, 18, 22, 26, 30]
    then = re.search(r"fingerprint (\w{8})", printed)[1]

    corpus = tmp_path / "data/text.train.bin"
    ids = bytearray(corpus.read_bytes())
    ids[:2] = b"\1\0"
    corpus.write_bytes(ids)
    with training.ranks(own, "length.updates=9", "data.skip=[[9, 10], [12, 15]]") as (process,):
        said = process.communicate(timeout=240)[1]
    assert process.returncode == 2
    assert re.search(
        "the training data is not what this run was trained on: update_00000006 "
        rf"\(fingerprint {then} then, \w{{8}} now\)"
        r"\n  sources.0.probe_crc32  \d+ then, \d+ now\n",
        said,
    )


def test_a_blend_is_shown_before_training_and_validated_by_source_on_two_layouts(own, tmp_path):
    prefix = tmp_path / "data/text"
    blend = [
        f"data.train=[{{path: {prefix}.train, weight: 3}}, {{path: {prefix}.validation, max_epochs: 9}}]",
        f"data.validation=[{prefix}.other, {prefix}.more]",
        "length.updates=10",
        "evaluation.samples=null",
    ]
    for part, name in (("validation", "other"), ("train", "more")):  # twice: a copy would be a training corpus
        merge([f"{prefix}.{part}"] * 2, f"{prefix}.{name}")
    printed = training.finish(own, *blend)
    assert re.search(
        rf"\nblend +source +tokens +fraction +samples +epochs\n +{prefix}.train +[\d,]+ +75.00% +30 +", printed
    )
    (event,) = (event for event in training.events(tmp_path / "run") if event["event"] == "validation")
    assert list(event["sources"]) == [f"{prefix}.other", f"{prefix}.more"]
    assert min(event["sources"].values()) < event["loss"] < max(event["sources"].values())

    again = training.write_recipe(tmp_path / "again", tmp_path / "data")
    training.finish(again, *blend, config="pipeline2", world=2)
    (other,) = (event for event in training.events(tmp_path / "again") if event["event"] == "validation")
    assert other["sources"] == pytest.approx(event["sources"], rel=1e-5)

    with training.ranks(own, *blend, "length.updates=3000", "--allow-change", "data") as (process,):
        said = process.communicate(timeout=240)[1]
    assert process.returncode == 2
    assert re.search(
        rf"{prefix}.validation would be read [\d.]+ times \(3,000 samples\), but its max_epochs is 9", said
    )


def test_a_corpus_truncated_during_a_run_ends_all_ranks_and_the_run_resumes_once_it_is_restored(own, tmp_path):
    corpus = tmp_path / "data/text.train.bin"
    content = corpus.read_bytes()
    with launch(own, folder=tmp_path, faults=[SLOW_DATA]) as both:
        training.wait_for_update(tmp_path / "run", 12)
        os.truncate(corpus, 100)
        assert not {0, 2, None} & {*both.wait(180)}
        said = both.printed(0) + both.printed(1)
    assert f"{corpus} has changed while it was in use: it had {len(content):,} bytes, now has 100" in said
    corpus.write_bytes(content)
    training.finish(own, world=2)
    assert training.curve(tmp_path / "run")[-1]["update"] == 100


def test_document_masking_takes_the_end_token_from_the_corpus_and_applies_to_evaluation(own, tmp_path):
    overrides = ["data.document_mask=true", "length.updates=12", "evaluation.samples=null"]
    training.finish(own, *overrides, config="pipeline2", world=2)
    run = tmp_path / "run"
    assert recipes.load(run / "recipe.yaml").document_end == 1
    (event,) = (event for event in training.events(run) if event["event"] == "validation")
    assert evaluate(run).loss == pytest.approx(event["loss"], rel=1e-5)


def test_a_packed_corpus_is_trained_on_sample_by_sample_without_its_padding(own, tmp_path):
    (tmp_path / "text").mkdir()
    lines = [
        line for path in training.write_text(tmp_path / "text").iterdir() for line in path.read_text().splitlines()
    ]
    text, packed = tmp_path / "short.jsonl", tmp_path / "short"
    documents = [{"text": line[: 5 + number % 60]} for number, line in enumerate(sorted(lines))]
    text.write_text("".join(json.dumps(document) + "\n" for document in documents))
    prepare_command([str(text)], tmp_path / "data/text.model", packed, PrepareOptions(0.05, pack=32))
    changes = (f"data.train={packed}.train", "data.document_mask=true", "length.updates=6", "evaluation.every=null")
    training.finish(own, *changes, world=2)
    corpus = CorpusReader(f"{packed}.train")
    starts = Sampler([len(corpus.tokens)], [1], 32, 7, [0]).locate(range(24)).start.tolist()
    samples = [corpus.sequence(start // 33).tolist() for start in starts]
    labels = [sum((a, b) != (1, 1) for a, b in itertools.pairwise(sample)) for sample in samples]
    assert len(set(labels)) > 1
    total = list(itertools.accumulate(labels))
    assert [row["tokens"] for row in training.curve(tmp_path / "run")] == total[3::4]
