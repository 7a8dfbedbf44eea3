"""`megagpt checkpoints`: lists the checkpoints of a run and what is wrong with damaged ones."""

import json

import pytest

from megagpt import cli
from megagpt.checkpoint.async_saver import Saver
from megagpt.checkpoint.store import PINNED, Store
from megagpt.state import TrainState

FACTS = {"layout": {"world_size": 4, "zero_stage": 1, "pipeline_stages": 2, "tensor_parallel": 1}}


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 10 (pinned), 20 (one bit flipped), 30 (a file truncated) and 40 (manifest missing)."""
    for update in (10, 20, 30, 40):
        saver = Saver(Store(tmp_path), lambda sink: sink("state/weights", bytes(1_000_000)), FACTS, asynchronous=False)
        assert saver.save(TrainState(update, 8 * update, 1000 * update)).published
    folders = [tmp_path / f"checkpoints/update_{update:08d}" for update in (10, 20, 30, 40)]
    (folders[0] / PINNED).touch()
    content = bytearray(1_000_000)
    content[500_000] ^= 1
    (folders[1] / "state/weights").write_bytes(bytes(content))
    (folders[2] / "state/weights").write_bytes(bytes(999_999))
    (folders[3] / "manifest.json").unlink()
    return tmp_path


def rows(printed):
    return [" ".join(line.split()) for line in printed.splitlines()]


def test_sizes_are_checked_and_with_verify_every_byte(run, capsys):
    assert cli.main(["checkpoints", str(run)]) == 0
    head, *quick = rows(capsys.readouterr().out)
    assert head == "update tokens size layout state"
    first = "10 10,000 1.0 MB 4 ranks, 2 pipeline stages, ZeRO stage 1"
    truncated = "30 30,000 1.0 MB 4 ranks, 2 pipeline stages, ZeRO stage 1 state/weights has 999999 bytes, not 1000000"
    assert quick[0] == f"{first} complete, pinned"
    assert quick[1] == "20 20,000 1.0 MB 4 ranks, 2 pipeline stages, ZeRO stage 1 complete"
    assert quick[2] == truncated
    assert quick[3].startswith("update_00000040: manifest.json cannot be read")

    assert cli.main(["checkpoints", str(run), "--verify"]) == 0
    _, *verified = rows(capsys.readouterr().out)
    assert verified[0] == f"{first} verified, pinned"
    assert verified[1].endswith("state/weights is damaged: its checksum differs")
    assert verified[2:] == quick[2:]


def test_list_as_json(run, capsys):
    assert cli.main(["checkpoints", str(run), "--verify", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verified"]
    assert [line["update"] for line in answer["checkpoints"]] == [10, 20, 30, None]
    assert [bool(line["wrong"]) for line in answer["checkpoints"]] == [False, True, True, True]


def test_folder_without_checkpoints_is_an_error(tmp_path, capsys):
    assert cli.main(["checkpoints", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"megagpt: there is no checkpoint here\n  {tmp_path}/checkpoints\n"
        "  do: give a run directory that has checkpoints\n"
    )
