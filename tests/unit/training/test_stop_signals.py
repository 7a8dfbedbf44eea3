"""Signals, the clock and the stop file request a stop; all ranks agree on it; a second, later signal ends at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megagpt.training.stop_signals import StopSignals


def single_rank(flag):
    return flag


@pytest.fixture
def enter():
    """Return a function that enters a StopSignals."""
    entered = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    def enter(max_minutes=None, any_rank=single_rank, stop_file=None):
        entered.append(StopSignals(max_minutes, any_rank, stop_file).__enter__())
        return entered[-1]

    yield enter
    for signals in reversed(entered):
        signals.__exit__(None, None, None)
    signal.signal(signal.SIGHUP, before)


def test_without_a_request_training_continues(enter):
    signals = enter()
    assert signals.agree() is None
    assert signals.reason is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_reason_names_the_signal(enter, number):
    signals = enter()
    signal.raise_signal(number)
    assert signals.agree() == number.name
    assert signals.reason == number.name


def test_a_closed_terminal_does_not_stop_a_run_under_nohup(enter):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = enter()
        signal.raise_signal(signal.SIGHUP)
        assert signals.agree() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_the_first_signal_is_announced():
    messages = []
    with StopSignals(None, single_rank, notify=messages.append):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert messages == [
        "\nSIGINT: finishing this update and saving. Send it again after 5 s to stop at once without saving."
    ]


def test_two_signals_in_quick_succession_are_one_request(enter):
    signals = enter()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)  # a launcher passes on what the terminal has already sent
    assert signals.agree() == "SIGINT"


def test_the_time_limit_stops_unless_it_is_ignored(enter):
    assert enter(max_minutes=1.0).agree() is None
    signals = enter(max_minutes=0.0)
    assert signals.agree(ignore_time_limit=True) is None
    assert signals.agree() == "the time limit"


def test_a_stop_file_is_seen_once_even_if_it_exists_before_the_run_is_ready(enter, tmp_path):
    stop_file = tmp_path / "STOP"
    stop_file.touch()
    signals = enter(stop_file=stop_file)
    assert signals.agree() == "megagpt stop"
    signals.__exit__(None, None, None)
    resumed = enter(stop_file=stop_file)
    assert resumed.agree() is None
    stop_file.touch()
    assert resumed.agree() == "megagpt stop"


def test_a_signal_to_another_rank_stops_this_one(enter):
    signals = enter(any_rank=lambda flag: True)
    assert signals.agree() == signals.reason == "a signal to another rank"


def test_leaving_restores_the_signal_handlers(enter):
    before = signal.getsignal(signal.SIGTERM)
    signals = enter()
    assert signal.getsignal(signal.SIGTERM) != before
    signals.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGTERM) == before


def test_construction_alone_changes_no_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    StopSignals(None, single_rank)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_later_ends_the_process():
    code = (
        "import megagpt.training.stop_signals as s, time\n"
        "s._SAME_REQUEST = 0.1\n"
        "with s.StopSignals(None, lambda flag: flag) as signals:\n"
        "    print('ready', flush=True)\n"
        "    while signals.agree() is None: time.sleep(0.01)\n"
        "    print('stopping', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "stopping\n"
        time.sleep(0.5)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()
