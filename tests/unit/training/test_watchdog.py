"""Heartbeats of the watchdog."""

import threading
from pathlib import Path

from megagpt.cluster.preflight import RankLocation
from megagpt.training.watchdog import Watch


def test_a_rank_is_seen_while_it_writes_its_heartbeat(tmp_path, monkeypatch):
    seen, written_often, real = [], threading.Event(), Path.write_text

    def write(path, text):
        path.open("w").close()  # from here until the text is written, the file is empty
        seen.append([line for line, _ in watch._beats(60)])
        if len(seen) > 3:
            written_often.set()
        return real(path, text)

    monkeypatch.setattr(Path, "write_text", write)
    watch = Watch(tmp_path, 0, [RankLocation("node1", "127.0.0.1")], 0.05, alarm=print, warn=print)
    with watch:
        assert written_often.wait(60)
    assert seen[-1] == ["  rank 0 on node1: build of update 0"]
    assert not any(tmp_path.iterdir())
