"""Command lines that are printed or stored: values quoted for Hydra and the shell, passwords masked."""

import re
import shlex
from collections.abc import Iterable
from typing import Any

MASK = "***"
# A value that Hydra's grammar reads as this very text: no number, no null, nothing to be quoted.
_PLAIN = re.compile(
    r"(?!(?:null|true|false|nan|inf)$)(?:[A-Za-z_]|\.{0,2}/)[\w./:@%-]*", re.IGNORECASE | re.ASCII
)
_URL_PASSWORD = re.compile(r"(://[^:/?#@\s]*:)[^@\s]+(?=@)")
_QUERY_PASSWORD = re.compile(r"([?&](?:ssl)?(?:password|passwd|pwd)=)[^&#\s'\"]+", re.IGNORECASE)


def override(key: str, value: object) -> str:
    """`key=value` as Hydra reads it, with quotes where the value needs them; for the shell, see `command_text`."""
    text = str(value)
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    # In Hydra's quoted strings a backslash counts as one unless quotes follow; OmegaConf reads ${ in them.
    text = re.sub(r"(\\*)(?='|$)", lambda run: 2 * run[1], text).replace("'", "\\'").replace("${", "\\${")
    return f"{key}='{text}'"


def typed(**values: object) -> str:
    """`key=value key=value` as typed into a shell."""
    return command_text(override(key, value) for key, value in values.items())


def command_text(words: Iterable[object]) -> str:
    """A command as it can be pasted into a shell, without passwords."""
    return shlex.join(mask_passwords(str(word), word=True) for word in words)


def mask_passwords(text: str, word: bool = False) -> str:
    """The text with *** in place of passwords in URLs, as in scheme://user:password@host and ?password=.

    Args:
        word: the text is a single word, so that what stands before its last @ may hold spaces.
    """
    if word and re.search(r"\bsweep\.storage=", text):
        text = re.sub(r"(://[^:/?#@]*:).*(?=@)", rf"\g<1>{MASK}", text, flags=re.DOTALL)
    text = _URL_PASSWORD.sub(rf"\g<1>{MASK}", text)
    return _QUERY_PASSWORD.sub(rf"\g<1>{MASK}", text)


def without_passwords(settings: Any) -> Any:
    """Settings as plain values, for a file: passwords of `sweep.storage` masked."""
    sweep = settings.get("sweep") if isinstance(settings, dict) else None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("storage"), str):
        return settings
    storage = mask_passwords(f"sweep.storage={sweep['storage']}", word=True).partition("=")[2]
    return {**settings, "sweep": {**sweep, "storage": storage}}


def chosen_options(command: str, names: Iterable[str]) -> list[str]:
    """The words of a command line that give one of `names`: `--config-dir DIR`, `trusted_packages=[...]`."""
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
