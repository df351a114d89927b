"""Being told to end."""

import os
import signal

import pytest

from instavm.cli.signals import Ended, held, raised


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_block_with_its_number(number, monkeypatch):
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(Ended) as told, raised():
            os.kill(os.getpid(), number)
        assert told.value.exit_status == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_what_was_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_waits_for_what_is_being_made():
    made = []
    with pytest.raises(Ended), raised(), held():
        os.kill(os.getpid(), signal.SIGTERM)
        made.append("id")
    assert made == ["id"]


def test_a_second_signal_does_not_disturb_the_end():
    ended = []
    with pytest.raises(Ended), raised():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("sandbox")
    assert ended == ["sandbox"]
