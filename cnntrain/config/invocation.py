"""The parsed command line, as passed to the command that it names."""

from dataclasses import dataclass, field
from pathlib import Path

from cnntrain.config.command_text import command_text, override

DEFAULT_COMMAND = "train"


@dataclass(frozen=True)
class Invocation:
    """A parsed command line.

    Attributes:
        command: the command word.
        words: arguments after the command word that are not overrides, for example folders to compare.
        overrides: `KEY=VALUE` arguments in Hydra's grammar.
        config_dir: the user's folder of config groups.
        multirun: -m: run every combination of the listed values.
        print_config: --cfg: print the composed config instead of running the command.
        argv: all arguments as typed.
    """

    command: str = DEFAULT_COMMAND
    words: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None
    multirun: bool = False
    help: bool = False
    print_config: bool = False
    argv: tuple[str, ...] = field(default=(), compare=False)

    @property
    def line(self) -> str:
        """Return the command line for pasting into a shell, with passwords masked."""
        return command_text(["cnntrain", *self.argv])

    def line_with(self, **values: object) -> str:
        """Return the command line with the given keys replaced."""
        kept = [word for word in self.argv if word.lstrip("+").partition("=")[0] not in values]
        return command_text(["cnntrain", *kept, *(override(key, value) for key, value in values.items())])
