"""Config files that would take for ever to read: refused before Hydra opens them."""

import stat
from itertools import chain
from pathlib import Path

import yaml

from cnntrain.errors import UserError

LARGEST_BYTES = 2**20
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast, where libyaml is there
MOST_VALUES = 100_000  # with every alias written out
DEEPEST = 50


def yaml_files(folder: Path) -> list[Path]:
    """The YAML files of a folder of config groups."""
    return sorted(chain(folder.glob("*.yaml"), folder.glob("*/*.yaml"), folder.glob("*/*/*.yaml")))


def check_yaml_files(folder: Path) -> None:
    """Look through a folder of config groups.

    Raises:
        UserError: a file is no text or none at all (a FIFO), or unfolds to too much; names file and line.
    """
    for file in yaml_files(folder):
        if not file.exists():
            raise UserError(f"{file}: is a link to nothing, or to itself")
        if not stat.S_ISREG(file.stat().st_mode):  # opening a FIFO would wait for ever
            raise UserError(f"{file}: is no regular file")
        if file.stat().st_size > LARGEST_BYTES:
            raise UserError(f"{file}: is larger than {LARGEST_BYTES:,} bytes, which no config file is")
        try:
            check_yaml_text(file, file.read_text("utf-8"))
        except UnicodeDecodeError as error:
            line = file.read_bytes()[: error.start].count(b"\n") + 1
            raise UserError(f"{file}:{line}: is no UTF-8 text") from error
        except yaml.YAMLError as error:
            if "nesting depth" in str(error):  # libyaml's own limit, raised before the first event
                line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
                raise UserError(f"{file}:{line}: is nested more than {DEEPEST} deep") from error
            continue  # told with its line when the file is used


def check_yaml_text(file: Path, text: str) -> None:
    """Reject a YAML text that expands to too many values (a "YAML bomb"), without constructing them.

    The function iterates over the parser's events and counts each alias as many times as the values it refers to.

    Raises:
        UserError: too many values, too deep nesting, or an alias inside its own anchor; names file and line.
        yaml.YAMLError: the text is not valid YAML.
    """
    anchors: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, values so far
    for event in yaml.parse(text, Loader=LOADER):
        line, size = event.start_mark.line + 1, 1
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > DEEPEST:
                raise UserError(f"{file}:{line}: is nested more than {DEEPEST} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == name for name, _ in open_nodes):
                raise UserError(f"{file}:{line}: *{event.anchor} stands inside itself")
            anchor, size = None, anchors.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            anchor = event.anchor
        else:
            continue
        if anchor:
            anchors[anchor] = size
        if open_nodes:
            name, so_far = open_nodes[-1]
            size += so_far
            open_nodes[-1] = (name, size)
        if size > MOST_VALUES:
            raise UserError(f"{file}:{line}: holds more than {MOST_VALUES:,} values, its aliases written out")
