"""Console output: results on standard output, log messages on standard error."""

import logging
import sys
import warnings

from rich.console import Console

from cnntrain.io.streams import lenient, printable

console = Console()


class _StderrHandler(logging.Handler):
    """Write to the current `sys.stderr`, so that redirection and capturing work."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        print(printable(f"{prefix}{self.format(record)}"), file=lenient(sys.stderr))


def silence_log() -> None:
    """Silence this process: rank 0 alone logs."""
    log_to_console().setLevel(logging.CRITICAL + 1)


def explain_warning(warning: str) -> str:
    """Rephrase a warning of PyTorch in terms of the settings if its own advice does not apply here."""
    operation, found, _ = warning.partition(" does not have a deterministic implementation")
    if not found:
        return warning
    return (
        f"deterministic=true: {operation} has no deterministic kernel on this device; runs with the same seed may "
        "differ in the last bits"
    )


def log_to_console() -> logging.Logger:
    """Set up and return the logger; Python warnings are logged too, without their source line."""
    log = logging.getLogger("cnntrain")
    warnings.showwarning = lambda message, *where: log.warning("%s", explain_warning(str(message)))
    if not log.handlers:
        log.addHandler(_StderrHandler())
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
