"""Tar shards as the webdataset library writes them, read where they lie: a thousand large files instead of millions."""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import (
    IMAGE_ENDINGS,
    SPLIT_NAMES,
    is_ignored,
    one_name_each,
    refuse_other_folders,
    split_folders,
)
from cnntrain.data.image_reader import DAMAGE, BadFile, refuse
from cnntrain.data.parallel import in_threads
from cnntrain.data.resize import Resize
from cnntrain.data.source import given_folder
from cnntrain.data.sources.image_folder import ClassifiedFiles
from cnntrain.data.spans import path_within
from cnntrain.errors import UserError

LAYOUT = (
    "train-000.tar and so on (or train/000.tar), and optionally val (or valid, validation) and test with the same "
    "layout; each shard contains KEY.jpg with KEY.cls or KEY.json"
)
LARGEST_LABEL = 65_536  # bytes of a .cls or .json


class Item(NamedTuple):
    """One example: its name, where its image is, and its label as it is written."""

    name: str
    path: str
    label: str


class TarShards(ClassifiedFiles):
    """Images in tar shards `root/train-000.tar` (or `root/train/000.tar`) and so on.

    Members with the same key (their path up to the first dot) form one example. The other splits are `val` (or `valid`,
    `validation`) and `test`.

    A label is the text of KEY.cls, and where there is none `label` (else `cls`) in KEY.json: a class's number where all
    labels are whole numbers below a million, else its name. Nothing is unpacked: an image is read from its place.

    Args:
        root: the folder of the shards.
        classes: names by number; null: the numbers, or train's names, sorted.
        size, channels, resize: as for `ImageFolder`.
    """

    def __init__(
        self,
        root: str | None,
        classes: Sequence[str] | None = None,
        size: int | list[int] = 64,
        channels: int = 3,
        resize: Resize = "short_side",
        hflip_ok: bool = True,
    ) -> None:
        self.root = given_folder(root, LAYOUT)
        self.chosen = None if classes is None else tuple(map(str, classes))
        super().__init__(size, channels, resize, hflip_ok)

    @cached_property
    def shards(self) -> dict[str, list[Path]]:
        """Return the shards of each split: files whose names begin with the split, or files in a folder of that name.

        Raises:
            UserError: train has no shards, or a tar file belongs to no split.
        """
        beside: dict[str, list[Path]] = {}
        for path in sorted(self.root.glob("*.tar")):
            if not is_ignored(path.name):
                beside.setdefault(_first_word(path.name), []).append(path)
        names = one_name_each(beside, f"data.root: {self.root}")
        found = {split: beside[name] for split, name in names.items()}
        for split, folder in split_folders(self.root).items():
            inside = sorted(path for path in folder.glob("*.tar") if not is_ignored(path.name))
            if inside and split in found:
                raise UserError(
                    f"data.root: {self.root} has shards for {split} both in {folder.name}/ and outside it "
                    f"({found[split][0].name}); keep one of the two"
                )
            if inside:
                found[split] = inside
        if "train" not in found:
            packed = [path.name for path in sorted(self.root.glob("train*.tar.*"))][:3]
            hint = (
                f"; {', '.join(packed)} must be unpacked to .tar first, to be read in place" if packed else ""
            )
            raise UserError(f"data.root: {self.root} has no train*.tar; it must have {LAYOUT}{hint}")
        refuse_other_folders(self.root, {"tar"})
        if strangers := [paths[0].name for word, paths in beside.items() if word not in SPLIT_NAMES]:
            raise UserError(
                f"data.root: {self.root / strangers[0]} belongs to no split: names of shards must begin with train, "
                "val (or valid, validation) or test; rename it, or move it elsewhere"
            )
        return found

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """Return the examples of each split in the order of the shards; headers are read once."""
        bad: list[BadFile] = []
        found: dict[str, list[Item]] = {}
        count = 0
        read = partial(_read_shard, self.root)
        for split, shards in self.shards.items():
            count += len(shards)
            parts = in_threads(read, shards, f"reading the headers of {len(shards):,} shards")
            bad += [problem for _, problems in parts for problem in problems]
            found[split] = [item for items, _ in parts for item in items]
        refuse(bad, count + sum(map(len, found.values())), self.root)
        return found

    @cached_property
    def classes(self) -> tuple[str, ...]:
        labels = {item.label for item in self.items["train"]}
        everywhere = labels | {item.label for items in self.items.values() for item in items}
        if self._numbered:
            largest = max(map(int, everywhere), default=0)
            names = self.chosen or tuple(map(str, range(largest + 1)))
            if largest >= len(names):
                raise UserError(f"data.classes: has {len(names)} names, but there are labels up to {largest}")
        else:
            names = self.chosen or tuple(sorted(labels))
            if foreign := sorted(everywhere - set(names)):
                where = "data.classes" if self.chosen else "train"
                raise UserError(f"data: {where} has no class {', '.join(map(repr, foreign[:5]))}")
        if len(names) < 2:
            raise UserError(
                f"data: the labels of {self.root} are of {len(names)} class; at least 2 are needed"
            )
        return names

    @property
    def _numbered(self) -> bool:
        return all(i.label.isdecimal() and len(i.label) < 7 for items in self.items.values() for i in items)

    def load(self) -> dict[str, Examples]:
        numbers = {name: number for number, name in enumerate(self.classes)}
        if self._numbered:
            numbers = {item.label: int(item.label) for items in self.items.values() for item in items}
        return {
            split: Examples(
                LazyImages([item.path for item in items], self.decoder),
                {"label": torch.tensor([numbers[item.label] for item in items], dtype=torch.int64)},
                [item.name for item in items],
            )
            for split, items in self.items.items()
        }


def _first_word(name: str) -> str:
    """Return the leading letters of a file name."""
    return re.match(r"[A-Za-z]*", name)[0]  # pyright: ignore[reportOptionalSubscript]


def _read_shard(root: Path, shard: Path) -> tuple[list[Item], list[BadFile]]:
    """What a shard has, and what in it can't be used."""
    bad: list[BadFile] = []
    images: dict[str, str] = {}
    labels: dict[str, dict[str, str | BadFile]] = {"cls": {}, "json": {}}
    if not shard.is_file():  # opening a FIFO would wait for ever
        return [], [BadFile(shard, "is no regular file")]
    try:
        with tarfile.open(shard, "r:") as archive, shard.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for member, key, ending in _members(archive):
                within = path_within(shard, member.name, member.offset_data, member.size)
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if ending in IMAGE_ENDINGS:
                    if key in images:
                        bad.append(BadFile(within, f"is a second image of {key}"))
                    images.setdefault(key, within)
                elif ending in labels:
                    content = os.pread(file.fileno(), min(member.size, LARGEST_LABEL + 1), member.offset_data)
                    labels[ending][key] = _label(content, ending, within)
            _check_end(os.pread(file.fileno(), 2 * tarfile.RECORDSIZE, archive.offset))
    except (tarfile.TarError, RecursionError, *DAMAGE) as error:
        return [], [BadFile(shard, f"is no whole tar archive ({error})")]
    items = []
    for key, path in images.items():
        label = (
            labels["cls"].get(key)
            or labels["json"].get(key)
            or BadFile(path, "has no .cls and no .json beside it")
        )
        if isinstance(label, BadFile):
            bad.append(label)
        else:
            items.append(Item(f"{shard.relative_to(root)}/{key}", path, label))
    alone = dict.fromkeys(key for kind in labels.values() for key in kind if key not in images)
    bad += [BadFile(f"{shard}/{key}", "has a label and no image") for key in alone]
    if not images and not bad:
        bad.append(BadFile(shard, "has no images"))
    return items, bad


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Regular members with their key and their ending in small letters; hidden ones are passed over.

    Raises:
        tarfile.ReadError: a size that leads backwards, where older Pythons would go round for ever.
    """
    for member in archive:
        if member.size < 0:
            raise tarfile.ReadError("a member's size is below 0")
        parts = [part for part in member.name.split("/") if part != "."]
        stem, _, ending = parts[-1].partition(".") if parts else ("", "", "")
        if member.isreg() and not member.issparse() and not any(map(is_ignored, parts)):
            yield member, "/".join([*parts[:-1], stem]), ending.lower()


def _check_end(rest: bytes) -> None:
    """`rest`: what follows the last member. Python takes a damaged header for the end, and what is cut off for nothing.

    Raises:
        tarfile.ReadError: it is not an archive's end.
    """
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise tarfile.ReadError("it does not end after its last member: cut off, damaged, or several in one")


def _label(content: bytes, ending: str, path: str) -> str | BadFile:
    """The label as text, or why there is none."""
    if len(content) > LARGEST_LABEL:
        return BadFile(path, "is too long for a label")
    try:
        text = content.decode().strip()
        if ending == "json":
            told: Any = json.loads(text)
            value = told["label"] if "label" in told else told["cls"]
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise TypeError(value)
            text = str(value).strip()
        text = str(int(text)) if text.isdecimal() else text
        text.encode()  # JSON may contain lone surrogates, which cannot be encoded
    except (ValueError, LookupError, TypeError, RecursionError):
        text = ""
    return text or BadFile(path, "holds no label")
