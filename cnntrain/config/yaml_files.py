"""Reject config files that would take very long to load, before Hydra opens them.

OmegaConf copies the value of each alias, so a file of a few lines can expand to billions of values. Hydra would also
wait forever for a FIFO.
"""

import stat
from itertools import chain
from pathlib import Path

import yaml

from cnntrain.errors import UserError

MAX_BYTES = 2**20
MAX_VALUES = 100_000  # with all aliases expanded
MAX_DEPTH = 50
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast, if it is installed


def yaml_files(folder: Path) -> list[Path]:
    """Return the YAML files in a folder of config groups."""
    return sorted(chain(folder.glob("*.yaml"), folder.glob("*/*.yaml"), folder.glob("*/*/*.yaml")))


def check_yaml_files(folder: Path) -> None:
    """Check the YAML files in a folder of config groups. Raises `UserError` with the file and the line."""
    for file in yaml_files(folder):
        if not file.exists():
            raise UserError(f"{file}: is a broken link")
        if not stat.S_ISREG(file.stat().st_mode):  # opening a FIFO would wait forever
            raise UserError(f"{file}: is not a regular file")
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file}: is larger than {MAX_BYTES:,} bytes")
        try:
            check_yaml_text(file, file.read_text("utf-8"))
        except UnicodeDecodeError as error:
            line = file.read_bytes()[: error.start].count(b"\n") + 1
            raise UserError(f"{file}:{line}: is not UTF-8 text") from error
        except yaml.YAMLError as error:
            if "nesting depth" in str(error):  # libyaml's own limit, raised before the first event
                line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
                raise UserError(f"{file}:{line}: is nested more than {MAX_DEPTH} deep") from error
            continue  # reported with its line when the file is used


def check_yaml_text(file: Path, text: str) -> None:
    """Reject a YAML text that expands to too many values (a "YAML bomb"), without constructing them.

    The function iterates over the parser's events and counts each alias as many times as the values it refers to. It
    also refuses deep nesting and an alias inside its own anchor. Invalid YAML raises `yaml.YAMLError`.
    """
    anchors: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, number of values so far
    for event in yaml.parse(text, Loader=LOADER):
        line, size = event.start_mark.line + 1, 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MAX_DEPTH:
                raise UserError(f"{file}:{line}: is nested more than {MAX_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == name for name, _ in open_nodes):
                raise UserError(f"{file}:{line}: *{event.anchor} refers to itself")
            anchor, size = None, anchors.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            anchor = event.anchor
        else:
            continue
        if anchor:
            anchors[anchor] = size
        if open_nodes:
            name, count = open_nodes[-1]
            size += count
            open_nodes[-1] = (name, size)
        if size > MAX_VALUES:
            raise UserError(f"{file}:{line}: has more than {MAX_VALUES:,} values with its aliases expanded")
