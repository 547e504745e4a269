"""Which signals ask a run to stop, and which stay ignored."""

import os
import signal

import pytest

from cnntrain.errors import StoppedError
from cnntrain.train.signals import stop_flag


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_asks_to_stop_with_its_own_exit_code(number: signal.Signals) -> None:
    found = signal.signal(number, signal.SIG_DFL)  # under nohup, or behind `&`, it is ignored
    try:
        with stop_flag() as stop:
            os.kill(os.getpid(), number)
            with pytest.raises(StoppedError) as raised:
                stop.check()
        assert raised.value.exit_code == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """SIGHUP is ignored under nohup, and SIGINT in commands that a script starts with `&`."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_flag() as stop:
            os.kill(os.getpid(), number)
            stop.check()
            assert signal.getsignal(number) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
