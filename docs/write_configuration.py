"""Write docs/configuration.md from the comments in conf/: `python docs/write_configuration.py`."""

import itertools
from pathlib import Path

from cnntrain.config.reference import (
    COMMAND_CONFIGS,
    KeyReference,
    common_keys,
    group_options,
    header,
    option_keys,
    option_text,
)

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """# Configuration reference

Every key with its default. `cnntrain help KEY`, `cnntrain help GROUP` and `cnntrain help GROUP=OPTION` print the same
texts, and include the options of your own config folder. This page is written by `docs/write_configuration.py` from
the comments in `conf/`.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION, "## Keys of every training command\n", *_table(common_keys())]
    for command in COMMAND_CONFIGS:
        parts += [f"## `cnntrain {command}`\n", *_table(common_keys(command))]
    for group, options in group_options().items():
        parts.append(f"## `{group}=`\n")
        for option in options:
            parts += [f"### `{group}={option}`\n", *_paragraphs(header(option_text(group, option)))]
            parts += _table(option_keys(group, option))
    return "\n".join(parts)


def _paragraphs(lines: list[str]) -> list[str]:
    """Return comment lines as paragraphs, and indented lines as code."""
    parts = []
    for (is_empty, is_code), group in itertools.groupby(lines, lambda line: (not line, line.startswith("  "))):
        text = [line.strip() for line in group]
        if not is_empty:
            parts.append("\n".join(["```", *text, "```"]) if is_code else _escape(" ".join(text)))
    return [f"{part}\n" for part in parts]


def _table(keys: list[KeyReference]) -> list[str]:
    if not keys:
        return []
    rows = [f"| `{_escape(key.key)}` | {_code(key.default)} | {_escape(key.comment)} |" for key in keys]
    return ["| key | default | meaning |", "|---|---|---|", *rows, ""]


def _code(text: str) -> str:
    return f"`{_escape(text)}`" if text else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
