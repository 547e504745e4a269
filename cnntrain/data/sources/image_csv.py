"""Images listed in a CSV file with their labels."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from cnntrain.data.csv_table import CsvTable, find_csv, read_csv, row_splits, sort_labels
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import SPLITS, is_file
from cnntrain.data.sources.image_folder import LabeledFiles
from cnntrain.errors import UserError, suggest


class Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str
    group: str


@dataclass
class ImageCsv(LabeledFiles):
    """Images listed in a CSV file with the columns `path` and `label`, and optionally `split` and `group`.

    `split` is train, val (or valid, validation) or test. The classes are the sorted labels of train.
    """

    file: str | None = None  # None: the only CSV file in `root`
    root: str | None = None  # folder that the paths are relative to; None: the folder of the CSV file

    def __post_init__(self) -> None:
        super().__post_init__()
        self.table_file, self.folder = find_csv(self.file, self.root, "a CSV file with the columns path,label")

    @cached_property
    def rows(self) -> list[Row]:
        table = read_csv(self.table_file)
        check_columns(table, required=("path", "label"), optional=("split", "group"))
        rows: list[Row] = []
        first_line: dict[str, int] = {}
        for (line, cells), split in zip(table.rows, row_splits(table), strict=True):
            path, label = cells["path"], cells["label"]
            if not label:
                table.errors.add(line, "has no label")
            if path in first_line:
                table.errors.add(line, f"duplicate path {path!r} (first on line {first_line[path]})")
            elif not path or not is_file(self.folder / path):
                table.errors.add(line, f"no file {path!r} in {self.folder}")
            first_line.setdefault(path, line)
            rows.append(Row(line, path, label, split, cells.get("group") or f"line {line}"))
        train_labels = {row.label for row in rows if row.split == "train"}
        for row in rows:
            if row.label and row.label not in train_labels:
                table.errors.add(row.line, f"label {row.label!r} is not in train")
        table.errors.raise_if_any()
        return rows

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        labels = {row.label for row in self.rows if row.split == "train"}
        if len(labels) < 2:
            raise UserError(f"data.file: {self.table_file}: train has {len(labels)} label(s); at least 2 are needed")
        return sort_labels(labels)

    def load(self) -> dict[str, Examples]:
        index = {label: i for i, label in enumerate(self.class_names)}
        splits = {}
        for split in SPLITS:
            rows = [row for row in self.rows if row.split == split]
            if rows:
                splits[split] = Examples(
                    LazyImages([str(self.folder / row.path) for row in rows], self.decoder),
                    {"label": torch.tensor([index[row.label] for row in rows], dtype=torch.int64)},
                    [row.path for row in rows],
                    [row.group for row in rows],
                )
        return splits


def check_columns(table: CsvTable, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Reject a table with a missing or an unknown column."""
    allowed = (*required, *optional)
    for name in table.columns:
        if name not in allowed:
            expected = ",".join(required) + "".join(f"[,{o}]" for o in optional)
            near = suggest(name, allowed)
            raise UserError(f"data: {table.file}:1: unknown column {name!r}{near}; expected {expected}")
    for name in required:
        if name not in table.columns:
            raise UserError(f"data: {table.file}:1: no column {name!r}; the columns are {', '.join(table.columns)}")
