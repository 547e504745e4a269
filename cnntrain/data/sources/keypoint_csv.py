"""Points in a CSV file: the image's name, then x and y of each point in pixels."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from cnntrain.data.boxes import SIDES
from cnntrain.data.csv_table import Table, find_table, is_file, read_table, splits_of
from cnntrain.data.resize import Resize
from cnntrain.data.sources.keypoint_base import KeypointAnnotation, KeypointSource
from cnntrain.errors import UserError, suggest

OTHERS = ("split", "group", *SIDES)
UNLABELLED = ("", "")


class KeypointCsv(KeypointSource):
    """A header `image_name,NAME_x,NAME_y,...`, then a line per object; both cells empty: the point isn't
    labeled.

    Optional columns: `split` (train, val or test; valid and validation mean val), `group`, and an object box
    `box_left,box_top,box_right,box_bottom` in pixels from the image's edge. An image may have several lines if
    they have boxes.

    Args:
        file: the CSV file; null: the only one in `root`.
        root: folder that image names count from; null: the CSV file's own.
        size, channels, crop, crop_margin, resize, keypoint_set, flip_pairs: as for `KeypointSource`.
    """

    def __init__(
        self,
        file: str | None = None,
        root: str | None = None,
        size: int | list[int] = 96,
        channels: int = 3,
        crop: str = "points",
        crop_margin: float = 0.2,
        resize: Resize = "letterbox",
        keypoint_set: str | None = None,
        flip_pairs: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(size, channels, crop, crop_margin, resize, keypoint_set, flip_pairs)
        self.file = find_table(file, root, "a CSV file with the columns image_name,NAME_x,NAME_y,...")
        self.root = Path(root).expanduser() if root else self.file.parent

    def read(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], tuple[tuple[int, int], ...]]:
        table = read_table(self.file)
        names = point_names(table)
        place = {name: i for i, name in enumerate(table.columns)}
        objects: list[KeypointAnnotation] = []
        seen: dict[tuple[str, ...], int] = {}
        for (line, cells), split in zip(table.rows, splits_of(table), strict=True):
            image = cells[0]
            if not image or not is_file(self.root / image):
                table.complaints.add(line, f"no file {image!r} in {self.root}")
            key = (image, *(cells[place[side]] for side in SIDES if side in place))
            if key in seen:
                table.complaints.add(line, f"{image!r} stands in line {seen[key]} already")
            seen.setdefault(key, line)
            numbers = _numbers(table, line, cells, names, place)
            if numbers is None:
                continue
            points, labeled, box = numbers
            group = cells[place["group"]] if "group" in place else None
            name = f"{image}:{line}" if box else image
            objects.append(
                KeypointAnnotation(str(self.root / image), name, points, labeled, box, split, group or None)
            )
        table.complaints.raise_if_any()
        return names, objects, ()


def point_names(table: Table) -> tuple[str, ...]:
    """Names of the points, from columns that must come as NAME_x, NAME_y.

    Raises:
        UserError: names the column that is out of place.
    """
    columns = [name for name in table.columns[1:] if name not in OTHERS]
    given = [side for side in SIDES if side in table.columns]
    if given and len(given) < 4:
        raise UserError(
            f"data: {table.file}:1: a box needs all of {', '.join(SIDES)}; there is {', '.join(given)}"
        )
    names = []
    for i in range(0, len(columns), 2):
        name = columns[i].removesuffix("_x")
        if not columns[i].endswith("_x"):
            raise UserError(f"data: {table.file}:1: column {columns[i]!r} where NAME_x was expected"
                            + suggest(columns[i], OTHERS))  # fmt: skip
        if i + 1 == len(columns) or columns[i + 1] != f"{name}_y":
            found = repr(columns[i + 1]) if i + 1 < len(columns) else "nothing"
            raise UserError(
                f"data: {table.file}:1: {found} after {columns[i]!r}, where '{name}_y' was expected"
            )
        names.append(name)
    if not names:
        raise UserError(f"data: {table.file}:1: no points; expected image_name,NAME_x,NAME_y,...")
    return tuple(names)


def _numbers(
    table: Table, line: int, cells: list[str], names: tuple[str, ...], place: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float, float, float] | None] | None:
    """Points (K, 2), labeled (K,) and the box of one line; None, and a complaint, when a cell is wrong."""
    pairs: list[tuple[float, float]] = []
    labeled: list[bool] = []
    wrong: list[str] = []

    def number(column: str) -> float:
        text = cells[place[column]]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or abs(value) > 1e6:
            wrong.append(f"{column} is {text!r}")
            return 0.0
        return value

    for name in names:
        empty = (cells[place[f"{name}_x"]], cells[place[f"{name}_y"]]) == UNLABELLED
        pairs.append((0.0, 0.0) if empty else (number(f"{name}_x"), number(f"{name}_y")))
        labeled.append(not empty)
    sides = [number(side) for side in SIDES if side in place]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        expected = "expected pixels (leave both cells of a point empty when it is not labeled)"
        table.complaints.add(line, f"{', '.join(wrong[:3])}{more}; {expected}")
        return None
    box = (sides[0], sides[1], sides[2], sides[3]) if sides else None
    return torch.tensor(pairs, dtype=torch.float64), torch.tensor(labeled), box
