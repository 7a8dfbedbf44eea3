"""A signal or the clock asks to stop; the verdict is that of any rank; a second, later signal ends at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megagpt.training.stop_signals import Stopping


def alone(*flags):
    return [*flags]


@pytest.fixture
def stopping():
    made = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    def make(max_minutes=None, any_rank=alone, request=None):
        made.append(Stopping(max_minutes, any_rank, request))
        return made[-1]

    yield make
    for one in reversed(made):
        one.close()
    signal.signal(signal.SIGHUP, before)


def test_nothing_asked_nothing_done(stopping):
    assert stopping().verdict().stop is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_each_signal_is_named(stopping, number):
    one = stopping()
    signal.raise_signal(number)
    assert one.verdict().stop == f"signal {number.name}"


def test_a_terminal_that_was_closed_under_nohup_stops_nothing(stopping):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        one = stopping()
        signal.raise_signal(signal.SIGHUP)
        assert one.verdict().stop is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_answered_at_once_and_once():
    said = []
    one = Stopping(None, alone, tell=said.append)
    try:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    finally:
        one.close()
    assert said == ["\nSIGINT: this update is finished and saved first; once more, after 5 s, ends at once"]


def test_one_request_that_comes_twice_in_a_row_is_one(stopping):
    one = stopping()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)  # a launcher passes on what the terminal has already sent
    assert one.verdict().stop == "signal SIGINT"


def test_the_time_limit_stops(stopping):
    assert stopping(max_minutes=0.0).verdict().stop == "the time limit"
    assert stopping(max_minutes=1.0).verdict().stop is None


def test_a_request_is_heard_once_and_also_where_it_was_made_before_the_run_was_ready(stopping, tmp_path):
    request = tmp_path / "STOP"
    request.touch()
    one = stopping(request=request)
    assert one.verdict().stop == "megagpt stop"
    one.close()
    other = stopping(request=request)  # the run that goes on
    assert other.verdict().stop is None
    request.touch()
    assert other.verdict().stop == "megagpt stop"


def test_a_signal_to_another_rank_stops_this_one(stopping):
    assert stopping(any_rank=lambda stop, writing: [True, writing]).verdict().stop == "a signal to another rank"


def test_the_same_exchange_tells_whether_any_rank_still_writes(stopping):
    assert not stopping().verdict().writing
    assert stopping().verdict(writing=True).writing
    assert stopping(any_rank=lambda stop, writing: [stop, True]).verdict().writing


def test_close_gives_the_signals_back(stopping):
    before = signal.getsignal(signal.SIGTERM)
    one = stopping()
    assert signal.getsignal(signal.SIGTERM) != before
    one.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_later_ends_the_process():
    code = (
        "import megagpt.training.stop_signals as s, time\n"
        "s._SAME = 0.1\n"
        "one = s.Stopping(None, lambda *flags: [*flags])\n"
        "print('ready', flush=True)\n"
        "while one.verdict().stop is None: time.sleep(0.01)\n"
        "print('asked', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        time.sleep(0.5)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()
