"""Keypoints in a CSV file: the image name, then x and y of each point in pixels."""

import math
from dataclasses import dataclass
from itertools import zip_longest

import torch

from cnntrain.data.csv_table import BOX_COLUMNS, CsvTable, find_csv, parse_number, read_csv, row_splits
from cnntrain.data.decoder import Box
from cnntrain.data.files import is_file
from cnntrain.data.sources.keypoint_base import KeypointAnnotation, KeypointSource, Skeleton
from cnntrain.errors import UserError, suggest

OTHER_COLUMNS = ("split", "group", *BOX_COLUMNS)


@dataclass
class KeypointCsv(KeypointSource):
    """A header `image_name,NAME_x,NAME_y,...` and one line per object. A point with empty cells is not labeled.

    Optional columns: `split` (train, val or test; valid and validation mean val), `group`, and a box
    `box_left,box_top,box_right,box_bottom` in pixels from the image's edge. An image may have several lines if they
    have boxes.
    """

    file: str | None = None  # None: the only CSV file in `root`
    root: str | None = None  # folder that the image names are relative to; None: the folder of the CSV file

    def __post_init__(self) -> None:
        super().__post_init__()
        self.table_file, self.folder = find_csv(
            self.file, self.root, "a CSV file with the columns image_name,NAME_x,NAME_y,..."
        )

    def read(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], Skeleton]:
        table = read_csv(self.table_file)
        names = point_names(table)
        objects: list[KeypointAnnotation] = []
        first_line: dict[tuple[str, ...], int] = {}
        for (line, cells), split in zip(table.rows, row_splits(table), strict=True):
            image = cells[table.columns[0]]
            if not image or not is_file(self.folder / image):
                table.errors.add(line, f"no file {image!r} in {self.folder}")
            key = (image, *(cells[side] for side in BOX_COLUMNS if side in cells))
            if key in first_line:
                table.errors.add(line, f"duplicate image {image!r} (first on line {first_line[key]})")
            first_line.setdefault(key, line)
            numbers = _parse_row(table, line, cells, names)
            if numbers is not None:
                points, labeled, box = numbers
                name = f"{image}:{line}" if box else image
                path = str(self.folder / image)
                objects.append(KeypointAnnotation(path, name, points, labeled, box, split, cells.get("group") or None))
        table.errors.raise_if_any()
        return names, objects, ()


def point_names(table: CsvTable) -> tuple[str, ...]:
    """Return the names of the points from the columns NAME_x, NAME_y, ..."""
    columns = [name for name in table.columns[1:] if name not in OTHER_COLUMNS]
    where = f"data: {table.file}:1"
    sides = [side for side in BOX_COLUMNS if side in table.columns]
    if sides and len(sides) < 4:
        raise UserError(f"{where}: a box needs the columns {', '.join(BOX_COLUMNS)}; found {', '.join(sides)}")
    for x, y in zip_longest(columns[::2], columns[1::2]):
        name = x.removesuffix("_x")
        if name == x:
            raise UserError(f"{where}: expected a column NAME_x, found {x!r}{suggest(x, OTHER_COLUMNS)}")
        if y != f"{name}_y":
            raise UserError(f"{where}: expected '{name}_y' after {x!r}, found {'nothing' if y is None else repr(y)}")
    if not columns:
        raise UserError(f"{where}: no points; expected image_name,NAME_x,NAME_y,...")
    return tuple(x.removesuffix("_x") for x in columns[::2])


def _parse_row(
    table: CsvTable, line: int, cells: dict[str, str], names: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor, Box | None] | None:
    """Return points (K, 2), labeled (K,) and the box of a line; None (and an error in the table) for invalid cells."""
    labeled = [bool(cells[f"{name}_x"] or cells[f"{name}_y"]) for name in names]
    used = [f"{name}_{axis}" for name, is_labeled in zip(names, labeled, strict=True) if is_labeled for axis in "xy"]
    used += [side for side in BOX_COLUMNS if side in cells]
    number = {column: parse_number(cells[column]) for column in used}
    invalid = [f"{column} is {cells[column]!r}" for column in used if math.isnan(number[column])]
    if invalid:
        more = f" and {len(invalid) - 3} more" if len(invalid) > 3 else ""
        expected = "expected pixels (leave both cells of a point empty if it is not labeled)"
        table.errors.add(line, f"{', '.join(invalid[:3])}{more}; {expected}")
        return None
    points = [[number.get(f"{name}_{axis}", 0.0) for axis in "xy"] for name in names]
    sides = [number[side] for side in BOX_COLUMNS if side in cells]
    box = (sides[0], sides[1], sides[2], sides[3]) if sides else None
    return torch.tensor(points, dtype=torch.float64), torch.tensor(labeled), box
