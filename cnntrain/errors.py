"""Exceptions with a message for the user, each with its exit code. `cli.main` catches them."""

import difflib
import errno
import os
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path


class CnntrainError(Exception):
    """An error whose message is for the user: what happened, where, and what to do next."""

    exit_code = 1


class CheckFailedError(CnntrainError):
    """A check before the training failed, so the training was not started."""


class UserError(CnntrainError):
    """The config, the data or the command line is invalid."""

    exit_code = 2


class DivergedError(CnntrainError):
    """Training produced a loss or a gradient that is not finite."""

    exit_code = 3


class MachineError(CnntrainError):
    """The machine failed: disk full, out of memory, a worker process died."""

    exit_code = 4


class StoppedError(CnntrainError):
    """A signal stopped the run after its state was saved. The exit code is 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class PrunedError(CnntrainError):
    """A sweep stopped a trial that was worse than others on validation data. Its state has been saved."""


class PeerFailedError(CnntrainError):
    """Another rank failed and reported the error; this rank ends silently with its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this training failed")
        self.exit_code = exit_code


def explain_machine(error: BaseException) -> str | None:
    """Return a message for an error of Python or torch that means a machine failure; None for other errors."""
    text = str(error).strip() or type(error).__name__
    if is_out_of_memory(error):
        return (
            f"out of memory ({text.splitlines()[0]}); lower batch_size, choose a smaller model, or set data.cache=none"
        )
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror or error}"
    return f"data: a worker process died ({text.splitlines()[0]})" if "DataLoader worker" in text else None


def is_from_user_code(error: BaseException) -> bool:
    """Return True if user code (outside cnntrain, the standard library and installed packages) is in the traceback.

    For example, an `OSError` in a user's dataset class is a bug to show with its traceback. Failures of the machine
    (out of memory, disk full, input/output error) never count as errors of user code.
    """
    machine = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM)
    if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in machine):
        return False
    libraries = {str(Path(path)) for path in sysconfig.get_paths().values()} | {str(Path(__file__).parent)}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not file.startswith("<") and not any(file.startswith(library + os.sep) for library in libraries):
            return True
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocation of host or GPU memory failed.

    `torch.OutOfMemoryError` covers only PyTorch's CUDA allocator. CUDA, cuDNN and cuBLAS allocate memory themselves and
    raise RuntimeError with their own messages; cuBLAS fails to create its handle.
    """
    words = "out of memory", "can't allocate memory", "not enough memory", "_ALLOC_FAILED", "`cublasCreate(handle)`"
    failed = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    return failed or isinstance(error, MemoryError)


def suggest(wrong: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'lenet5'?` for the nearest of `known`, or an empty string when none is near."""
    near = difflib.get_close_matches(str(wrong), known, n=1, cutoff=0.55)
    return f"; did you mean {near[0]!r}?" if near else ""
