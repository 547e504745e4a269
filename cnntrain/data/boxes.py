"""Boxes around objects: read from a CSV file, widened as a training did."""

import math
from pathlib import Path

from cnntrain.data.csv_table import read_table
from cnntrain.data.resize import Box, widen
from cnntrain.errors import UserError

SIDES = ("box_left", "box_top", "box_right", "box_bottom")


def frame(box: Box, margin: float, canvas: tuple[int, int]) -> Box:
    """What is cut out around `box`: larger on each side by `margin` times its longer side, of the canvas's aspect."""
    left, top, right, bottom = box
    more = margin * max(right - left, bottom - top)
    return widen((left - more, top - more, right + more, bottom + more), canvas)


def read_boxes(file: Path, names: list[str]) -> list[tuple[str, Box]]:
    """(image name, box) of every line: `image_name,box_left,box_top,box_right,box_bottom`, pixels from the image's
    edge; an image may have several.

    Args:
        names: the images that there are.

    Raises:
        UserError: every line that can't be used, with its number; or a missing column.
    """
    table = read_table(file)
    if missing := [name for name in ("image_name", *SIDES) if name not in table.columns]:
        raise UserError(f"boxes: {file}:1: has no column {', '.join(missing)}")
    place = {name: table.columns.index(name) for name in ("image_name", *SIDES)}
    known = set(names)
    found: list[tuple[str, Box]] = []
    for line, cells in table.rows:
        name, sides = cells[place["image_name"]], [_number(cells[place[side]]) for side in SIDES]
        left, top, right, bottom = sides
        if name not in known:
            table.complaints.add(line, f"{name!r} is none of the images")
        elif not all(math.isfinite(side) and abs(side) <= 1e6 for side in sides):
            table.complaints.add(line, "expected four sides in pixels")
        elif right <= left or bottom <= top:
            table.complaints.add(line, f"the box is empty: {left:g} to {right:g}, {top:g} to {bottom:g}")
        else:
            found.append((name, (left, top, right, bottom)))
    table.complaints.raise_if_any()
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
