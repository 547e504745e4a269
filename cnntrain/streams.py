"""Standard error and log files that may fail: a full disk or a closed terminal costs messages, never a training."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from cnntrain.files import open_append_text

# Control characters but tab and line feed, and those that reverse what is shown after them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with control characters escaped: names from a stranger's files must not steer the terminal."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


class LenientStream:
    """A text stream that drops what can't be written.

    Args:
        stream: what to write to; None drops everything (Python has no `sys.stderr` where it was started without one).
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: it has been closed
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self.stream.flush()

    def isatty(self) -> bool:
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def lenient(stream: TextIO | None) -> TextIO:
    """`stream` as one that drops what can't be written."""
    return cast("TextIO", LenientStream(stream))


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append what is printed while the block runs to a file, as far as it can be written.

    Raises:
        UserError: it is a link, or no regular file.
    """
    try:
        file = open_append_text(path)
    except OSError:
        file = open(os.devnull, "a")  # noqa: SIM115
    log = lenient(file)
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        with contextlib.suppress(OSError):  # it flushes
            file.close()


def flush_or_discard(stream: TextIO | None) -> OSError | None:
    """Flush a standard stream; where that fails, discard what is left, so that Python's own flush at exit does not fail
    too (exit code 120). Returns the error."""
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()
        return error
    except ValueError:  # closed
        return None
    return None
