"""The ways a run can end badly, each with its exit code; caught in one place, `cli.main`."""


class CnntrainError(Exception):
    """A failure whose message is meant for the user: what, where, and what to do next."""

    exit_code = 1


class UserError(CnntrainError):
    """The config, the data or the command line is wrong: refused before the first step."""

    exit_code = 2


class DivergedError(CnntrainError):
    """Training produced a loss or a gradient that is not finite."""

    exit_code = 3


class MachineError(CnntrainError):
    """The machine gave out: disk full, out of memory, a lost worker."""

    exit_code = 4


def suggest(wrong: str, known: list[str] | tuple[str, ...]) -> str:
    """`; did you mean 'lenet5'?` for the nearest of `known`, or an empty string when none is near."""
    import difflib

    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.55)
    return f"; did you mean {near[0]!r}?" if near else ""


class StoppedError(CnntrainError):
    """A signal asked the run to stop; it saved its state first. The exit code is 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
