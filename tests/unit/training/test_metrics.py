"""metrics.jsonl is the record: exact numbers, strictly increasing updates also after a resume."""

import math

from megagpt.training import metrics
from megagpt.training.metrics import Metrics


def write(run, updates, resumed_at=0, main=True):
    record = Metrics(run, main, window=2)
    record.truncate(resumed_at)
    for update in updates:
        record.write("update", update=update, loss=math.pi / update)
    record.close()


def test_losses_come_back_bit_for_bit(tmp_path):
    write(tmp_path, [1, 2, 3])
    assert [r["loss"] for r in metrics.read(tmp_path, "update")] == [math.pi, math.pi / 2, math.pi / 3]


def test_what_came_after_the_resumed_update_is_dropped(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], resumed_at=3)
    assert [r["update"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_was_published_late_goes_with_the_update_that_it_holds(tmp_path):
    for resumed_at, kept in ((10, True), (9, False)):
        write(tmp_path, range(1, 14))
        record = Metrics(tmp_path, True, window=2)
        record.truncate(13)
        record.write("checkpoint", update=10)  # saved beside training, and published after update 13
        record.close()
        write(tmp_path, range(resumed_at + 1, 15), resumed_at=resumed_at)
        assert [r["update"] for r in metrics.read(tmp_path, "update")] == list(range(1, 15))
        assert bool([*metrics.read(tmp_path, "checkpoint")]) == kept
        (tmp_path / "metrics.jsonl").unlink()


def test_a_line_cut_short_by_a_crash_is_left_out_and_mended(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "update", "upd')
    assert [r["update"] for r in metrics.read(tmp_path)] == [1, 2]
    write(tmp_path, [3], resumed_at=2)
    assert [r["update"] for r in metrics.read(tmp_path)] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path):
    write(tmp_path, [1], main=False)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_decisions_depend_on_is_found_at_a_resume_and_after_going_back(tmp_path):
    write(tmp_path, [1, 2, 3])
    record = Metrics(tmp_path, True, window=2)
    record.truncate(3)
    for event in ("skip", "checkpoint", "validation_left", "validation_left"):
        record.write(event, update=3, seconds=1.0)
    record.write("update", update=4, loss=1.0, lr=0.1)
    record.truncate(2)
    assert [(found["event"], found["update"]) for found in record.replayable] == [
        ("update", 1),
        ("update", 2),
        ("skip", 3),
    ]
    record.close()
    write(tmp_path, [3])
    again = Metrics(tmp_path, True, window=2)
    again.truncate(3)
    again.close()
    assert again.replayable[-1] == {"event": "update", "update": 3, "loss": math.pi / 3}
    assert again.events_at_resume == {"skip": 1, "update": 1}
    other = Metrics(tmp_path, False, window=2)
    other.truncate(3)
    assert other.replayable == []
