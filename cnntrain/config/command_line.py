"""Parsed command lines, and their formatting for Hydra and the shell, with passwords masked."""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_COMMAND = "train"
MASK = "***"
# A value that Hydra's grammar parses as the same string: not a number or null, and without characters to quote.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)(?:[A-Za-z_]|\.{0,2}/)[\w./:@%-]*", re.IGNORECASE | re.ASCII)
_URL_PASSWORD = re.compile(r"(://[^:/?#@\s]*:)[^@\s]+(?=@)")
_QUERY_PASSWORD = re.compile(r"([?&](?:ssl)?(?:password|passwd|pwd)=)[^&#\s'\"]+", re.IGNORECASE)


@dataclass(frozen=True)
class Invocation:
    """A parsed command line."""

    command: str = DEFAULT_COMMAND
    words: tuple[str, ...] = ()  # arguments that are not overrides, for example folders to compare
    overrides: tuple[str, ...] = ()  # `KEY=VALUE` arguments in Hydra's grammar
    config_dir: Path | None = None  # the user's folder of config groups
    multirun: bool = False  # -m: run every combination of the listed values
    help: bool = False
    print_config: bool = False  # --cfg: print the composed config instead of running the command
    argv: tuple[str, ...] = field(default=(), compare=False)  # all arguments as typed

    @property
    def command_line(self) -> str:
        """Return the command line for pasting into a shell, with passwords masked."""
        return format_command(["cnntrain", *self.argv])

    def command_line_with(self, **values: object) -> str:
        """Return the command line with the given keys replaced."""
        kept = [word for word in self.argv if word.lstrip("+").partition("=")[0] not in values]
        return format_command(["cnntrain", *kept, *(format_override(key, value) for key, value in values.items())])


def format_override(key: str, value: object) -> str:
    """Format `key=value` for Hydra, quoting the value if needed; for the shell, see `format_command`."""
    text = str(value)
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    # In Hydra's quoted strings a backslash is literal unless a quote follows. OmegaConf interpolates ${...} in them.
    text = re.sub(r"(\\*)(?='|$)", lambda run: 2 * run[1], text).replace("'", "\\'").replace("${", "\\${")
    return f"{key}='{text}'"


def format_overrides(**values: object) -> str:
    """Format `key=value key=value` as typed into a shell."""
    return format_command(format_override(key, value) for key, value in values.items())


def format_command(words: Iterable[object]) -> str:
    """Format a command for pasting into a shell, with passwords masked."""
    return shlex.join(mask_passwords(str(word), word=True) for word in words)


def mask_passwords(text: str, word: bool = False) -> str:
    """Replace passwords in URLs by ***, as in scheme://user:password@host and ?password=.

    Args:
        word: treat the text as a single word, so that the password before the last @ may contain spaces.
    """
    if word and re.search(r"\bsweep\.storage=", text):
        text = re.sub(r"(://[^:/?#@]*:).*(?=@)", rf"\g<1>{MASK}", text, flags=re.DOTALL)
    text = _URL_PASSWORD.sub(rf"\g<1>{MASK}", text)
    return _QUERY_PASSWORD.sub(rf"\g<1>{MASK}", text)


def without_passwords(settings: Any) -> Any:
    """Return the settings with the password in `sweep.storage` masked."""
    sweep = settings.get("sweep") if isinstance(settings, dict) else None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("storage"), str):
        return settings
    storage = mask_passwords(f"sweep.storage={sweep['storage']}", word=True).partition("=")[2]
    return {**settings, "sweep": {**sweep, "storage": storage}}


def chosen_options(command: str, names: Iterable[str]) -> list[str]:
    """Return the words of a command line that set one of `names`: `--config-dir DIR`, `trusted_packages=[...]`."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    found, wanted = [], tuple(names)
    for place, word in enumerate(words):
        name, equals, _ = word.lstrip("+").partition("=")
        if name in wanted:
            found += [word] if equals else words[place : place + 2]
    return found
