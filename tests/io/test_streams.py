"""A full disk or a closed terminal behind standard error, standard output or a log costs messages, no training."""

import io
import os
import sys
from pathlib import Path

import pytest

from cnntrain.cli import main
from cnntrain.io import streams
from cnntrain.io.streams import LenientStream, flush_or_discard, lenient, output_to
from cnntrain.report.console import log_to_console

QUICK = (
    "model=mlp model.values.width=8 data.limit=100 threads=1 log.figures=false log.tensorboard=false epochs=1 "
    "run_dir=run".split()
)
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to write to")


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w", buffering=1)


def test_what_can_not_be_written_is_dropped() -> None:
    stream = full()
    with pytest.raises(OSError, match="No space"):
        stream.write("x\n")
    for each in (stream, None):
        dropped = LenientStream(each)
        assert dropped.write("x\n") == 2
        dropped.flush()
        assert not dropped.isatty()
    assert isinstance(flush_or_discard(stream), OSError)
    assert flush_or_discard(stream) is None, "what was left is gone"
    stream.close()


def test_what_can_be_written_is() -> None:
    stream = io.StringIO()
    lenient(stream).write("x")
    assert stream.getvalue() == "x" and flush_or_discard(stream) is None
    with output_to(Path("log.txt")):
        print("one")
        print("two", file=sys.stderr)
    assert Path("log.txt").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("path", ["log.txt", "no/such/folder/log.txt"])
def test_a_log_that_can_not_be_written_ends_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "log.txt":  # a device is refused as a log, so its stream stands in for a full disk
        monkeypatch.setattr(streams, "open_append_text", lambda _: full())
    with output_to(Path(path)):
        print("x" * 100_000)
        print("y", file=sys.stderr)


@pytest.mark.parametrize("which", ["stderr", "stdout"])
def test_a_training_ends_well_where_its_output_can_not_be_written(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = full()
    with monkeypatch.context() as patched:
        patched.setattr(sys, which, stream)
        log_to_console().warning("is dropped too")
        assert main([*QUICK]) == 0
    assert os.stat("run/results.json").st_size
    flush_or_discard(stream)
    stream.close()


def test_results_that_can_not_be_written_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--cfg` prints is all that it does."""
    stream = full()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert main(["--cfg"]) == 4
    flush_or_discard(stream)
    stream.close()
