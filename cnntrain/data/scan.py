"""Looking at image files before the first step: each is opened once, and remembered by its size and time of change."""

import hashlib
import json
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

from cnntrain.data.cache import common_folder, lazy_images
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_reader import BadFile, refuse, upright_size
from cnntrain.data.parallel import in_threads
from cnntrain.data.source import default_root
from cnntrain.data.spans import span_of

Scan = Literal["full", "headers", "off"]
Stamp = list[int]  # bytes, time of the last change in ns


def scan(splits: dict[str, Examples], how: Scan) -> None:
    """Open every file that stays on disk: as far as its header, or decode it whole.

    Files that a scan of the same kind found sound, and that have not changed since, are passed over.

    Raises:
        UserError: names all the files that can't be used.
    """
    entries = [(images, row) for images in lazy_images(splits) for row in range(len(images.paths))]
    if how == "off" or not entries:
        return
    root = common_folder(splits)
    memory = default_root() / "scans" / f"{hashlib.sha256(str(root).encode()).hexdigest()[:16]}-{how}.json"
    known = _read(memory)
    about = lru_cache(4096)(_stamp)  # of a shard once
    paths = sorted({images.paths[row] for images, row in entries})
    stamps = {path: about(span_of(path).file) for path in paths}
    unknown = [e for e in entries if (path := e[0].paths[e[1]]) not in known or known[path] != stamps[path]]

    def one(entry: tuple[LazyImages, int]) -> BadFile | None:
        images, row = entry
        try:
            if how == "full":
                images.read(row)
            else:
                upright_size(images.paths[row])
        except BadFile as problem:
            return problem
        return None

    if how == "headers":  # of a file once, however many objects lie in it
        unknown = list({images.paths[row]: (images, row) for images, row in unknown}.values())
    bad = [problem for problem in in_threads(one, unknown, f"scanning {len(paths):,} files") if problem]
    spoilt = {problem.path for problem in bad}
    if unknown:
        _write(
            memory,
            {**known, **{path: stamp for path, stamp in stamps.items() if stamp and path not in spoilt}},
        )
    refuse({problem.path: problem for problem in bad}.values(), len(paths), root)


def _stamp(path: str) -> Stamp | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return [about.st_size, about.st_mtime_ns]


def _read(memory: Path) -> dict[str, Stamp]:
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(memory: Path, known: dict[str, Stamp]) -> None:
    with suppress(OSError):  # the next run scans again
        memory.parent.mkdir(parents=True, exist_ok=True)
        aside = memory.with_name(f"{memory.name}.{os.getpid()}.part")
        aside.write_text(json.dumps(known))
        os.replace(aside, memory)
