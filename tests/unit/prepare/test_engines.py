"""An engine does not change what is written. One that would is detected."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from megagpt.errors import UserError
from megagpt.prepare import chunks
from megagpt.prepare.command import PrepareOptions, prepare_command
from megagpt.prepare.engines import EngineMismatch
from megagpt.prepare.input_warnings import InputLocation
from megagpt.tokenizer import gigatoken_encoder
from tests.unit.prepare.conftest import content, finish, jsonl

GIGATOKEN = PrepareOptions(0.1, workers=1, engine="gigatoken")


@pytest.fixture(scope="module")
def mixed(texts, tmp_path_factory):
    """Prose, and texts that an engine might encode differently."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    unusual = [
        "a <eod> b",
        "<eod>",
        "",
        " ",
        "\n\n",
        "ｗｉｄｅ ½ ﬁ e\u0301 👩‍👩‍👧 中文\u2028\x85",
        "\u2581 \u2581",
        "\0",
        "\ud800",
    ]
    path.write_text(jsonl([*texts, *unusual, *reversed(texts)]))
    return path


def test_the_bytes_are_the_same_as_with_sentencepiece(mixed, model, tmp_path, command):
    for engine, workers in (("sentencepiece", 1), ("gigatoken", 2)):
        line = (mixed, "--tokenizer", model, "--output", tmp_path / engine, "--engine", engine, "--workers", workers)
        finish(command("prepare", *line))
    contents = [content(tmp_path / engine) for engine in ("sentencepiece", "gigatoken")]
    made = [{ending: json.loads(one.pop(ending)) for ending in list(one) if "json" in ending} for one in contents]
    assert contents[0] == contents[1]
    for sidecars, engine in zip(made, ("sentencepiece", "gigatoken"), strict=True):
        for sidecar in sidecars.values():
            assert sidecar["made"]["options"].pop("engine") == engine
    assert made[0] == made[1]
    assert made[0][".train.json"]["made"]["odd"]["control_symbols"] == 2


class Broken:
    """gigatoken, except that it drops the last id of documents that contain a given text."""

    def __init__(self, tokenizer, trigger):
        self._engine, self._trigger, self._end = build_engine(tokenizer), trigger, tokenizer.eod

    def encode(self, texts):
        ids = self._engine.encode(texts)
        before, found, _ = texts.partition(self._trigger)
        last = np.flatnonzero(ids == self._end)[before.count(b"<eod>")] - 1 if found else []
        return np.delete(ids, last)


build_engine = gigatoken_encoder._build_engine


def test_a_mismatch_is_an_error_that_names_the_document(model, tmp_path, monkeypatch):
    monkeypatch.setattr(gigatoken_encoder, "_build_engine", lambda tokenizer: Broken(tokenizer, b"Zebra"))
    monkeypatch.setattr(chunks, "_MIN_BYTES", 60)  # at most five lines per shard
    source = tmp_path / "text.jsonl"
    source.write_text(jsonl([f"a {n}" for n in range(30)] + ["of the\nZebra"] + [f"b {n}" for n in range(9)]))
    with pytest.raises(UserError) as error:
        prepare_command([str(source)], model, tmp_path / "c", GIGATOKEN)
    what, where, ours, theirs, do = str(error.value).splitlines()
    assert what == "megagpt: gigatoken tokenizes a document differently from sentencepiece"
    assert where == f"  {source}:31"
    name, cut = ours.split(": ")
    assert name == "  sentencepiece"
    assert cut.replace("|", "").strip() == "of the⏎Zebra"
    assert theirs == f"  gigatoken:     {cut[: cut.rindex('|')]}"
    assert do == "  do: omit --engine, and report this to the developers of gigatoken; nothing was written"
    assert not list(tmp_path.glob("c.*.idx"))


def test_a_mismatch_can_be_sent_from_a_worker():
    error = pickle.loads(pickle.dumps(EngineMismatch(InputLocation(1, 5), "e", "a|b", "ab")))
    assert error.location == InputLocation(1, 5)
    assert str(error.to_user_error("here")).splitlines()[1:4] == [
        "  here",
        "  sentencepiece: ab",
        "  e:             a|b",
    ]


def test_an_unknown_engine_is_refused(mixed, model, tmp_path):
    with pytest.raises(UserError) as error:
        prepare_command([str(mixed)], model, tmp_path / "c", PrepareOptions(engine="warp"))
    assert str(error.value) == ("megagpt: there is no engine warp\n  --engine\n  do: choose sentencepiece or gigatoken")
    assert not list(Path(tmp_path).iterdir())
