"""Where the program speaks: results on standard output, its log on standard error."""

import logging
import sys
import warnings

from rich.console import Console

from cnntrain.io.streams import lenient, printable

console = Console()


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at the time, so that redirections and captures hold."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        print(printable(f"{prefix}{self.format(record)}"), file=lenient(sys.stderr))


def silence_log() -> None:
    """Of several processes that train together one speaks for all."""
    log_to_console().setLevel(logging.CRITICAL + 1)


def in_plain_words(warning: str) -> str:
    """A warning of PyTorch's in terms of the settings, where it advises what a user can't do."""
    operation, found, _ = warning.partition(" does not have a deterministic implementation")
    if not found:
        return warning
    return (
        f"deterministic=true: {operation} has no deterministic kernel on this device, so that runs of one seed may "
        "differ in their last bits"
    )


def log_to_console() -> logging.Logger:
    """The program's logger, set up once; warnings come through it too, without the line of code that gave them."""
    log = logging.getLogger("cnntrain")
    warnings.showwarning = lambda message, *where: log.warning("%s", in_plain_words(str(message)))
    if not log.handlers:
        log.addHandler(_StderrHandler())
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
