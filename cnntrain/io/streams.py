"""Output streams that tolerate write errors: a full disk or a closed terminal loses messages but never ends a run."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from cnntrain.io.safe_files import open_append_text

# Control characters except tab and line feed, and characters that reverse the text direction.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_control_characters(text: str) -> str:
    """Escape control characters: names from untrusted files must not send commands to the terminal."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


class LenientStream:
    """A text stream that discards output that cannot be written.

    Args:
        stream: the underlying stream; None discards everything (`sys.stderr` is None if Python started without one).
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
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
    """Wrap `stream` so that output that cannot be written is discarded."""
    return cast("TextIO", LenientStream(stream))


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Redirect printed output to a file (append mode) while the block runs; write errors are ignored.

    Raises:
        UserError: `path` is a link or not a regular file.
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
        with contextlib.suppress(OSError):  # close() flushes
            file.close()


def flush_or_discard(stream: TextIO | None) -> OSError | None:
    """Flush a standard stream and return the error, if any.

    After an error the buffered output is discarded. Otherwise Python's flush at exit would fail too (exit code 120).
    """
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
    except ValueError:  # the stream is closed
        return None
    return None
