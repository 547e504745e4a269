"""Files that lie inside of others, as the members of a tar archive do: where to look for one, by its path alone."""

import re
from pathlib import Path
from typing import NamedTuple

_WITHIN = re.compile(r"(.+?\.tar)//(.+)::(\d+)\+(\d+)", re.DOTALL)  # no Path has // in it


class ByteRange(NamedTuple):
    """Where the bytes of a file are: `size` of them from `offset` on; None for a file of its own, all of it."""

    file: str
    offset: int | None = None
    size: int | None = None


def path_within(archive: str | Path, name: str, offset: int, size: int) -> str:
    """What a member is called wherever a path is wanted: ARCHIVE//NAME::OFFSET+SIZE."""
    return f"{archive}//{name}::{offset}+{size}"


def span_of(path: str) -> ByteRange:
    """Where the bytes of `path` are, be it a file or what `path_within` made."""
    found = _WITHIN.fullmatch(path) if "//" in path else None
    return ByteRange(found[1], int(found[3]), int(found[4])) if found else ByteRange(path)
