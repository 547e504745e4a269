"""Tar shards of the webdataset library, read in place: a thousand large files instead of millions of small ones."""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import (
    IMAGE_EXTENSIONS,
    SPLIT_NAMES,
    BadFile,
    find_split_folders,
    is_ignored,
    member_path,
    raise_if_bad,
    reject_other_folders,
    require_root,
    unique_split_names,
)
from cnntrain.data.image_reader import DECODE_ERRORS
from cnntrain.data.parallel import thread_map
from cnntrain.data.sources.image_folder import LabeledFiles
from cnntrain.errors import UserError

LAYOUT = (
    "train-000.tar and so on (or train/000.tar), and optionally val (or valid, validation) and test with the same "
    "layout; each shard contains KEY.jpg with KEY.cls or KEY.json"
)
MAX_LABEL_BYTES = 65_536  # of a .cls or .json file


class Item(NamedTuple):
    """One example."""

    name: str
    path: str
    label: str


@dataclass
class TarShards(LabeledFiles):
    """Images in tar shards `root/train-000.tar` (or `root/train/000.tar`) and so on.

    Members with the same key (their path up to the first dot) form one example. The other splits are `val` (or `valid`,
    `validation`) and `test`.

    The label is the text of KEY.cls; without that file, `label` (or `cls`) in KEY.json. Labels are class indices if all
    are integers below a million, otherwise class names. Nothing is unpacked: images are read from the archive.
    """

    root: str | None
    classes: Sequence[str] | None = None  # names by index; None: the indices, or the sorted class names of train

    def __post_init__(self) -> None:
        super().__post_init__()
        self.folder = require_root(self.root, LAYOUT)

    @cached_property
    def shards(self) -> dict[str, list[Path]]:
        """The shards of each split: files whose names begin with the split, or files in a folder of that name."""
        by_prefix: dict[str, list[Path]] = {}
        for path in sorted(self.folder.glob("*.tar")):
            if not is_ignored(path.name):
                by_prefix.setdefault(re.findall("^[A-Za-z]*", path.name)[0], []).append(path)
        names = unique_split_names(by_prefix, f"data.root: {self.folder}")
        found = {split: by_prefix[name] for split, name in names.items()}
        for split, folder in find_split_folders(self.folder).items():
            inside = sorted(path for path in folder.glob("*.tar") if not is_ignored(path.name))
            if inside and split in found:
                raise UserError(
                    f"data.root: {self.folder} has shards for {split} both in {folder.name}/ and outside it "
                    f"({found[split][0].name}); keep one of the two"
                )
            if inside:
                found[split] = inside
        if "train" not in found:
            packed = [path.name for path in sorted(self.folder.glob("train*.tar.*"))][:3]
            hint = f"; {', '.join(packed)} must be unpacked to .tar first, to be read in place" if packed else ""
            raise UserError(f"data.root: {self.folder} has no train*.tar; it must have {LAYOUT}{hint}")
        reject_other_folders(self.folder, {"tar"})
        if others := [paths[0].name for prefix, paths in by_prefix.items() if prefix not in SPLIT_NAMES]:
            raise UserError(
                f"data.root: {self.folder / others[0]} belongs to no split; names of shards must begin with train, "
                "val (or valid, validation) or test; rename it, or move it elsewhere"
            )
        return found

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """Return the examples of each split in the order of the shards; headers are read once."""
        bad: list[BadFile] = []
        found: dict[str, list[Item]] = {}
        count = 0
        read = partial(_read_shard, self.folder)
        for split, shards in self.shards.items():
            count += len(shards)
            parts = thread_map(read, shards, f"reading the headers of {len(shards):,} shards")
            bad += [problem for _, problems in parts for problem in problems]
            found[split] = [item for items, _ in parts for item in items]
        raise_if_bad(bad, count + sum(map(len, found.values())), self.folder)
        return found

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        chosen = tuple(map(str, self.classes or ()))
        labels = {item.label for item in self.items["train"]}
        all_labels = labels | {item.label for items in self.items.values() for item in items}
        if self._labels_are_indices:
            largest = max(map(int, all_labels), default=0)
            names = chosen or tuple(map(str, range(largest + 1)))
            if largest >= len(names):
                raise UserError(f"data.classes: has {len(names)} names, but there are labels up to {largest}")
        else:
            names = chosen or tuple(sorted(labels))
            if unknown := sorted(all_labels - set(names)):
                where = "data.classes" if chosen else "train"
                raise UserError(f"data: {where} has no class {', '.join(map(repr, unknown[:5]))}")
        if len(names) < 2:
            raise UserError(f"data: {self.folder} has {len(names)} class; at least 2 are needed")
        return names

    @cached_property
    def _labels_are_indices(self) -> bool:
        return all(i.label.isdecimal() and len(i.label) < 7 for items in self.items.values() for i in items)

    def load(self) -> dict[str, Examples]:
        index = {name: i for i, name in enumerate(self.class_names)}
        if self._labels_are_indices:
            index = {item.label: int(item.label) for items in self.items.values() for item in items}
        return {
            split: Examples(
                LazyImages([item.path for item in items], self.decoder),
                {"label": torch.tensor([index[item.label] for item in items], dtype=torch.int64)},
                [item.name for item in items],
            )
            for split, items in self.items.items()
        }


def _read_shard(root: Path, shard: Path) -> tuple[list[Item], list[BadFile]]:
    """Return the examples of a shard, and its bad files."""
    bad: list[BadFile] = []
    images: dict[str, str] = {}
    labels: dict[str, dict[str, str | BadFile]] = {"cls": {}, "json": {}}
    if not shard.is_file():  # opening a FIFO would block forever
        return [], [BadFile(shard, "is not a regular file")]
    try:
        with tarfile.open(shard, "r:") as archive, shard.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for member, key, extension in _members(archive):
                path = member_path(shard, member.name, member.offset_data, member.size)
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if extension in IMAGE_EXTENSIONS:
                    if key in images:
                        bad.append(BadFile(path, f"is a second image of {key}"))
                    images.setdefault(key, path)
                elif extension in labels:
                    content = os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES + 1), member.offset_data)
                    labels[extension][key] = _parse_label(content, extension, path)
            # Python ignores a truncated archive, and stops at a damaged header.
            rest = os.pread(file.fileno(), 2 * tarfile.RECORDSIZE, archive.offset)
            if len(rest) < tarfile.BLOCKSIZE or any(rest):
                raise tarfile.ReadError("data after the last member: truncated, damaged, or several archives in one")
    except (tarfile.TarError, RecursionError, *DECODE_ERRORS) as error:
        return [], [BadFile(shard, f"is not a complete tar archive ({error})")]
    items = []
    for key, path in images.items():
        label = labels["cls"].get(key) or labels["json"].get(key) or BadFile(path, "has no .cls and no .json file")
        if isinstance(label, BadFile):
            bad.append(label)
        else:
            items.append(Item(f"{shard.relative_to(root)}/{key}", path, label))
    without_image = dict.fromkeys(key for kind in labels.values() for key in kind if key not in images)
    bad += [BadFile(f"{shard}/{key}", "has a label but no image") for key in without_image]
    if not images and not bad:
        bad.append(BadFile(shard, "has no images"))
    return items, bad


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield regular members with their key and their lowercase extension; skip hidden members."""
    for member in archive:
        if member.size < 0:  # older versions of Python loop forever
            raise tarfile.ReadError("a member's size is below 0")
        parts = [part for part in member.name.split("/") if part != "."]
        stem, _, extension = parts[-1].partition(".") if parts else ("", "", "")
        if member.isreg() and not member.issparse() and not any(map(is_ignored, parts)):
            yield member, "/".join([*parts[:-1], stem]), extension.lower()


def _parse_label(content: bytes, extension: str, path: str) -> str | BadFile:
    """Return the label as text, or the problem."""
    if len(content) > MAX_LABEL_BYTES:
        return BadFile(path, "is too long for a label")
    try:
        text = content.decode().strip()
        if extension == "json":
            metadata: Any = json.loads(text)
            value = metadata["label"] if "label" in metadata else metadata["cls"]
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise TypeError(value)
            text = str(value).strip()
        text = str(int(text)) if text.isdecimal() else text
        text.encode()  # JSON may contain lone surrogates, which cannot be encoded
    except (ValueError, LookupError, TypeError, RecursionError):
        text = ""
    return text or BadFile(path, "contains no label")
