"""Images listed in a CSV file with their labels."""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from cnntrain.data.csv_table import Table, find_table, in_order, is_file, read_table, splits_of
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import SPLITS
from cnntrain.data.resize import Resize
from cnntrain.data.sources.image_folder import ClassifiedFiles
from cnntrain.errors import UserError, suggest


class Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str
    group: str


class ImageCsv(ClassifiedFiles):
    """Images listed in a CSV file with the columns `path` and `label`, and optionally `split` and `group`.

    `split` is train, val (or valid, validation) or test.

    The classes are train's labels, sorted (as numbers when all of them are).

    Args:
        file: the CSV file; null: the only one in `root`.
        root: folder that paths count from; null: the CSV file's own.
        size, channels, resize: as for `ImageFolder`.
    """

    def __init__(
        self,
        file: str | None = None,
        root: str | None = None,
        size: int | list[int] = 64,
        channels: int = 3,
        resize: Resize = "short_side",
        hflip_ok: bool = True,
    ) -> None:
        self.file = find_table(file, root, "a CSV file with the columns path,label")
        self.root = Path(root).expanduser() if root else self.file.parent
        super().__init__(size, channels, resize, hflip_ok)

    @cached_property
    def rows(self) -> list[Row]:
        table = read_table(self.file)
        check_columns(table, required=("path", "label"), optional=("split", "group"))
        place = {name: i for i, name in enumerate(table.columns)}
        rows: list[Row] = []
        seen: dict[str, int] = {}
        for (line, cells), split in zip(table.rows, splits_of(table), strict=True):
            path, label = cells[place["path"]], cells[place["label"]]
            group = cells[place["group"]] if "group" in place else ""
            if not label:
                table.complaints.add(line, "has no label")
            if path in seen:
                table.complaints.add(line, f"{path!r} stands in line {seen[path]} already")
            elif not path or not is_file(self.root / path):
                table.complaints.add(line, f"no file {path!r} in {self.root}")
            seen.setdefault(path, line)
            rows.append(Row(line, path, label, split, group or f"line {line}"))
        known = {row.label for row in rows if row.split == "train"}
        for row in rows:
            if row.label and row.label not in known:
                table.complaints.add(row.line, f"label {row.label!r} is a class that train lacks")
        table.complaints.raise_if_any()
        return rows

    @cached_property
    def classes(self) -> tuple[str, ...]:
        labels = {row.label for row in self.rows if row.split == "train"}
        if len(labels) < 2:
            raise UserError(
                f"data.file: {self.file}: train has {len(labels)} label(s); at least 2 are needed"
            )
        return in_order(labels)

    def load(self) -> dict[str, Examples]:
        index = {label: i for i, label in enumerate(self.classes)}
        splits = {}
        for split in SPLITS:
            rows = [row for row in self.rows if row.split == split]
            if not rows:
                continue
            images = LazyImages([str(self.root / row.path) for row in rows], self.decoder)
            labels = torch.tensor([index[row.label] for row in rows], dtype=torch.int64)
            splits[split] = Examples(
                images, {"label": labels}, [r.path for r in rows], [r.group for r in rows]
            )
        return splits


def check_columns(table: Table, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Refuse a table that lacks a required column or has one that nobody knows.

    Raises:
        UserError: names file, line and column.
    """
    known = (*required, *optional)
    for name in table.columns:
        if name not in known:
            expected = ",".join(required) + "".join(f"[,{o}]" for o in optional)
            raise UserError(
                f"data: {table.file}:1: unknown column {name!r}{suggest(name, known)}; expected {expected}"
            )
    for name in required:
        if name not in table.columns:
            raise UserError(f"data: {table.file}:1: no column {name!r}; there is {', '.join(table.columns)}")
