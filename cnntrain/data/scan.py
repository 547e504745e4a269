"""Check image files before the first step. Each file is opened once, and remembered by its size and mtime."""

import hashlib
import json
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal

from cnntrain.data.examples import Examples, LazyImages, lazy_images
from cnntrain.data.files import BadFile, byte_range, common_folder, default_root, raise_if_bad
from cnntrain.data.image_reader import read_size
from cnntrain.data.parallel import thread_map

ScanMode = Literal["full", "headers", "off"]
Stamp = list[int]  # size in bytes, mtime in ns


def scan_files(splits: dict[str, Examples], mode: ScanMode) -> None:
    """Read the header of every file that stays on disk, or decode it if `mode` is full.

    Files that passed a previous scan of the same mode, and have not changed since, are skipped.

    Raises:
        UserError: lists all bad files.
    """
    entries = [(images, row) for images in lazy_images(splits) for row in range(len(images))]
    if mode == "off" or not entries:
        return
    paths = sorted({images.paths[row] for images, row in entries})
    root = common_folder(paths)
    record = default_root() / "scans" / f"{hashlib.sha256(str(root).encode()).hexdigest()[:16]}-{mode}.json"
    passed = _read_record(record)
    stamp = lru_cache(4096)(_stamp)  # one call per archive
    stamps = {path: stamp(byte_range(path).file) for path in paths}
    pending = [(images, row) for images, row in entries if not _has_passed(images.paths[row], passed, stamps)]
    if mode == "headers":  # one entry per file, even if it contains several objects
        pending = list({images.paths[row]: (images, row) for images, row in pending}.values())

    def check(entry: tuple[LazyImages, int]) -> BadFile | None:
        images, row = entry
        try:
            if mode == "full":
                images.read(row)
            else:
                read_size(images.paths[row])
        except BadFile as problem:
            return problem
        return None

    results = thread_map(check, pending, f"scanning {len(paths):,} files")
    bad = {problem.path: problem for problem in results if problem}
    if pending:
        good = {path: stamp for path, stamp in stamps.items() if stamp and path not in bad}
        _write_record(record, {**passed, **good})
    raise_if_bad(bad.values(), len(paths), root)


def _has_passed(path: str, passed: dict[str, Stamp], stamps: dict[str, Stamp | None]) -> bool:
    return path in passed and passed[path] == stamps[path]


def _stamp(path: str) -> Stamp | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _read_record(record: Path) -> dict[str, Stamp]:
    try:
        passed = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return passed if isinstance(passed, dict) else {}


def _write_record(record: Path, passed: dict[str, Stamp]) -> None:
    with suppress(OSError):  # the next run scans again
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_name(f"{record.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps(passed))
        os.replace(temporary, record)
