"""The reference of config keys, read from the comments in the YAML files of conf/ and of the user's config folder."""

import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cnntrain.config.renamed_keys import renamed
from cnntrain.config.schema import conf_folder
from cnntrain.errors import UserError, suggest

WIDTH = 110
COMMAND_CONFIGS = ("evaluate", "predict", "compare")  # commands with their own config file


@dataclass(frozen=True)
class KeyReference:
    """A config key.

    Attributes:
        key: dotted name, for example optimizer.lr.
        default: its default as YAML; empty for a mapping whose keys have their own references.
        comment: what the key means, and its allowed values.
    """

    key: str
    default: str
    comment: str


def group_options(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Return the options of each config group, read from the folders without Hydra."""
    options: dict[str, set[str]] = {}
    for folder in filter(None, (conf_folder(), config_dir)):
        for group in sorted(path for path in folder.iterdir() if path.is_dir()):
            names = {path.stem for path in group.glob("*.yaml") if not path.name.startswith("_")}
            if names and not group.name.startswith((".", "_")):
                options.setdefault(group.name, set()).update(names)
    return {group: sorted(names) for group, names in options.items()}


def suggest_setting(word: str, following: Sequence[str] = ()) -> str | None:
    """Suggest `optimizer.lr=0.1` for the words `optimizer.lr 0.1`; return None if `word` is not a config key."""
    top = re.findall(r"^(\w+):", (conf_folder() / "config.yaml").read_text(), re.MULTILINE)
    if word.partition(".")[0] not in {*top, *group_options()}:
        return None
    return f"{word}={following[0] if following else '...'}"


def header(text: str) -> list[str]:
    """Return the comment lines at the top of a config file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def read_keys(text: str, prefix: str = "") -> list[KeyReference]:
    """Return the keys of a config file in order, without `defaults` and `_target_`."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return list(_walk(root, text.splitlines(), prefix)) if isinstance(root, yaml.MappingNode) else []


def _walk(node: yaml.MappingNode, lines: list[str], prefix: str) -> Iterator[KeyReference]:
    for key, value in node.value:
        if key.value in ("defaults", "_target_"):
            continue
        is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        end = key.end_mark if is_block else value.end_mark
        comment = [lines[end.line][end.column + is_block :].strip()]
        for line in lines[end.line + 1 :]:
            if not re.match(r"\s+#", line):
                break
            comment.append(line.strip())
        words = " ".join(line.removeprefix("#").strip() for line in comment if line.startswith("#"))
        if is_block:
            default = "" if isinstance(value, yaml.MappingNode) else "[...]"
        elif value.start_mark.line == value.end_mark.line:
            default = lines[end.line][value.start_mark.column : end.column]
        else:
            default = "..."
        if default or words:
            yield KeyReference(f"{prefix}{key.value}", default, words)
        if is_block and isinstance(value, yaml.MappingNode):
            yield from _walk(value, lines, f"{prefix}{key.value}.")


def option_text(group: str, option: str, config_dir: Path | None = None) -> str:
    """Return the text of an option's file, the user's file first. Raises `UserError` if there is no such option."""
    for folder in filter(None, (config_dir, conf_folder())):
        if (file := folder / group / f"{option}.yaml").is_file():
            return file.read_text("utf-8")
    raise UserError(no_such_option(group, option, config_dir))


def no_such_option(group: str, option: str, config_dir: Path | None = None) -> str:
    """Return the message about an unknown option of a group."""
    options = group_options(config_dir).get(group, [])
    hint = renamed(group, option) or suggest(option, options)
    return f"{group}: no such option {option!r}{hint} (available: {', '.join(options)})"


def option_keys(group: str, option: str, config_dir: Path | None = None) -> list[KeyReference]:
    try:
        text = option_text(group, option, config_dir)
        return read_keys(text, "" if "@package _global_" in text else f"{group}.")
    except (yaml.YAMLError, UnicodeDecodeError):  # reported with its line when the option is chosen
        return []


def common_keys(name: str = "config") -> list[KeyReference]:
    """Return the keys of conf/`name`.yaml; those of config.yaml apply to all training commands and all options."""
    return read_keys((conf_folder() / f"{name}.yaml").read_text("utf-8"))


def describe(word: str, config_dir: Path | None = None) -> str:
    """Return the reference of an option (`data=image_folder`), a group (`data`) or a key (`optimizer.lr`)."""
    group, _, option = word.partition("=")
    options = group_options(config_dir)
    if option and group in options:
        names = option.strip("[]").split(",")
        return "\n\n".join(_describe_option(group, name.strip(), config_dir) for name in names)
    word = group
    if group in options:
        return _describe_group(group, options[group], config_dir)
    lines = _table([each for each in common_keys() if _is_at(each.key, word)])
    group = word.partition(".")[0]
    owners: dict[KeyReference, list[str]] = {}
    for name in options.get(group, []):
        for key in option_keys(group, name, config_dir):
            if _is_at(key.key, word):
                owners.setdefault(key, []).append(name)
    for key, names in owners.items():
        lines += [*_wrap(f"{group}=", ", ".join(names)), *_table([key], "  ")]
    for command in COMMAND_CONFIGS:
        if found := [key for key in common_keys(command) if _is_at(key.key, word)]:
            lines += [f"cnntrain {command}", *_table(found, "  ")]
    if not lines:
        raise UserError(f"{word}: no such key{renamed(word) or suggest_key(word, config_dir)}")
    return "\n".join(lines)


def suggest_key(word: str, config_dir: Path | None = None, name: str = "config") -> str:
    """Return `; did you mean 'optimizer.lr'?` for the most similar key of a config, or an empty string."""
    keys = [each.key for each in common_keys(name)]
    if name == "config":
        for group, options in group_options(config_dir).items():
            keys += [group, *(key.key for option in options for key in option_keys(group, option, config_dir))]
    ends = [key for key in keys if key.endswith(f".{word}")]
    return f"; did you mean {ends[0]!r}?" if ends else suggest(word, keys)


def _is_at(key: str, word: str) -> bool:
    return key == word or key.startswith(f"{word}.")


def _describe_group(group: str, options: list[str], config_dir: Path | None) -> str:
    lines = [f"options of {group}:"]
    for option in options:
        text = " ".join(itertools.takewhile(bool, header(option_text(group, option, config_dir))))
        lines += _wrap(f"  {option:<14} ", re.split(r"(?<=\.)\s", text)[0])  # the first sentence
    lines += _keys_of_group(group, "keys of every option:")
    return "\n".join([*lines, "", f"`cnntrain help {group}=OPTION` shows the keys of an option."])


def _describe_option(group: str, option: str, config_dir: Path | None) -> str:
    lines = [f"{group}={option}"]
    lines += [f"  {line}".rstrip() for line in header(option_text(group, option, config_dir))]
    if keys := option_keys(group, option, config_dir):
        lines += ["", "keys:", *_table(keys, "  ")]
    return "\n".join(lines + _keys_of_group(group, f"keys of every {group} option:"))


def _keys_of_group(group: str, title: str) -> list[str]:
    keys = [key for key in common_keys() if key.key.startswith(f"{group}.")]
    return ["", title, *_table(keys, "  ")] if keys else []


def _table(keys: list[KeyReference], indent: str = "") -> list[str]:
    heads = [f"{indent}{each.key}: {each.default}".rstrip() for each in keys]
    width = min(max(map(len, heads), default=0), 36)
    lines = []
    for head, each in zip(heads, keys, strict=True):
        lines += _wrap(f"{head:<{width}}  ", each.comment)
    return lines


def _wrap(head: str, text: str) -> list[str]:
    indent = " " * min(len(head), 40)
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=indent) or [head.rstrip()]
