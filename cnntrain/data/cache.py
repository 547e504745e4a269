"""Decoding whole data sets into memory, if they fit."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_reader import BadFile, refuse, upright_size
from cnntrain.data.parallel import decode_into, in_threads, shared_zeros
from cnntrain.memory import give_back_freed_memory

SHARE_OF_MEMORY = 0.5  # of what is free; the network and its activations need the rest
logger = logging.getLogger("cnntrain")


def decoded_bytes(examples: Examples) -> int:
    """Bytes that the images and masks take when all are decoded, or did take."""
    total = 0
    masks = [*examples.lazy_targets.values(), *(v for k, v in examples.targets.items() if k == "mask")]
    for images in (examples.images, *masks):
        count = 1
        for side in images.shape:
            count *= side
        total += count
    return total


def free_host_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its control group, if any."""
    give_back_freed_memory()
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    return min([*limits, *_left_to_control_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _left_to_control_groups(mine: Path, tree: Path) -> Iterator[int]:
    """Bytes that the control groups of this process, and those around them, have left (man 7 cgroups).

    Args:
        mine: tells which they are; in a container it may name one that is not in its `tree`, but those above are.
    """
    lines = mine.read_text().splitlines() if mine.exists() else []
    for _, kinds, path in (line.split(":", 2) for line in lines):
        if kinds not in ("", "memory"):
            continue
        old = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = old if kinds else ("memory.max", "memory.current")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            group = (tree / kinds).joinpath(*parts[:depth])
            try:
                values = [(group / name).read_text().strip() for name in (limit, used)]
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            # Files in the cache count as used, and make room when it is wanted.
            cached = sum(
                int(counts.get(f"{'total_' * bool(kinds)}{kind}_file", 0)) for kind in ("active", "inactive")
            )
            if values[0].isdigit() and values[1].isdigit():
                yield max(0, int(values[0]) - int(values[1]) + cached)


def fits_in_host_memory(splits: dict[str, Examples]) -> bool:
    return sum(map(decoded_bytes, splits.values())) <= SHARE_OF_MEMORY * free_host_bytes()


def decode(splits: dict[str, Examples]) -> dict[str, Examples]:
    """The same examples with every image and mask decoded, by all cores.

    Raises:
        UserError: names all the files, of all splits, that can't be used.
        MachineError: a process that decodes them died.
    """
    return read_all(splits, _decode)


Read = Callable[[LazyImages, list[BadFile]], tuple[Tensor, Tensor]]


def read_all(splits: dict[str, Examples], read: Read) -> dict[str, Examples]:
    """The same examples with `read`, which adds to a list what can't be used, of every image and mask.

    Raises:
        UserError: names all the files, of all splits, that can't be used.
    """
    bad: list[BadFile] = []
    whole = {name: _read_split(examples, read, bad) for name, examples in splits.items()}
    if bad:
        paths = {path for lazy in lazy_images(splits) for path in lazy.paths}
        refuse({problem.path: problem for problem in bad}.values(), len(paths), common_folder(splits))
    return whole


def _read_split(examples: Examples, read: Read, bad: list[BadFile]) -> Examples:
    images, source_to_image = examples.images, examples.source_to_image
    if isinstance(images, LazyImages):
        images, matrices = read(images, bad)
        source_to_image = matrices if source_to_image is None else source_to_image
    masks = {name: read(lazy, bad)[0] for name, lazy in examples.lazy_targets.items()}
    return replace(
        examples,
        images=images,
        source_to_image=source_to_image,
        targets={**examples.targets, **masks},
        lazy_targets={},
    )


def _decode(lazy: LazyImages, bad: list[BadFile]) -> tuple[Tensor, Tensor]:
    """uint8 (N, ...) and the matrices (N, 3, 3); what can't be used stays black and is added to `bad`."""
    images = shared_zeros(lazy.shape, torch.uint8)
    matrices = shared_zeros((len(lazy), 3, 3), torch.float64)
    bad += decode_into(images, matrices, lazy, f"decoding {len(lazy):,} files")
    return images, matrices


def read_sizes(paths: list[str]) -> tuple[list[tuple[int, int]], list[BadFile]]:
    """(width, height) of every image from its header, (0, 0) for those that can't be read, and these."""
    bad: list[BadFile] = []

    def one(path: str) -> tuple[int, int]:
        try:
            return upright_size(path)
        except BadFile as problem:
            bad.append(problem)
            return 0, 0

    return in_threads(one, paths, f"reading the headers of {len(paths):,} files"), bad


def lazy_images(splits: dict[str, Examples]) -> list[LazyImages]:
    """All images and masks that are still in their files."""
    everything = [i for e in splits.values() for i in (e.images, *e.lazy_targets.values())]
    return [images for images in everything if isinstance(images, LazyImages)]


def common_folder(splits: dict[str, Examples]) -> str | None:
    """The folder that all of these files lie in, None where there are none."""
    paths = {os.path.dirname(path) for lazy in lazy_images(splits) for path in lazy.paths}
    return os.path.commonpath(paths) if paths else None
