"""Overlapping colored shapes with exact masks: bundled, for segmentation."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from cnntrain.data.examples import Examples
from cnntrain.data.source import Source
from cnntrain.errors import UserError
from cnntrain.randomness import hash_seed
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from PIL import Image

CLASSES = ("background", "disc", "square", "triangle", "ring")
MOST_DRAWN = 1_000_000  # images per split
SUPERSAMPLING = 3  # odd: the middle one of a pixel's samples is its center


class ToyShapes(Source):
    """Discs, squares, triangles and rings of any color, later ones over earlier ones, on a patterned ground.

    A pixel's class is that of the topmost shape at its center. Color says nothing about the class.

    Args:
        size: canvas in pixels, square.
        train_count, test_count: how many to draw; the first ones don't depend on it.
        seed: another seed draws other pictures.
    """

    def __init__(self, size: int = 64, train_count: int = 1000, test_count: int = 250, seed: int = 0) -> None:
        if not 16 <= size <= 512:
            raise UserError(f"data.size: must be from 16 to 512 px, got {size!r}")
        if train_count < 2 or test_count < 1:
            raise UserError("data.train_count, data.test_count: must be at least 2 and 1")
        if max(train_count, test_count) > MOST_DRAWN:
            raise UserError(f"data.train_count, data.test_count: must be at most {MOST_DRAWN:,}")
        self.size, self.seed = size, seed
        self.counts = {"train": train_count, "test": test_count}

    def spec(self) -> DataSpec:
        return DataSpec(3, self.size, self.size, CLASSES, per_pixel=True, ignore_index=255)

    def load(self) -> dict[str, Examples]:
        splits = {}
        for split, count in self.counts.items():
            drawn = [draw_shapes(self.size, hash_seed(self.seed, split, i)) for i in range(count)]
            images = (
                torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2).contiguous()
            )
            masks = torch.from_numpy(np.stack([mask for _, mask in drawn]))
            names = [f"toy_shapes-{self.seed}/{split}/{i:05}" for i in range(count)]
            splits[split] = Examples(images, {"mask": masks}, names)
        return splits


def draw_shapes(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One picture: uint8 (size, size, 3), and its class ids, uint8 (size, size)."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    fine = size * SUPERSAMPLING
    picture = _ground(random, size).resize((fine, fine), Image.Resampling.NEAREST)
    ids = Image.new("L", (fine, fine), 0)
    pens = (ImageDraw.Draw(picture), ImageDraw.Draw(ids))
    for _ in range(random.integers(3, 9)):
        kind = int(random.integers(1, len(CLASSES)))
        outline, hole = _outline(random, fine, kind)
        if hole is None:
            for pen, fill in zip(pens, (_color(random), kind), strict=True):
                pen.polygon(outline, fill=fill)
        else:  # what lies under a ring shows through it
            stencil = Image.new("L", (fine, fine), 0)
            pen = ImageDraw.Draw(stencil)
            pen.polygon(outline, fill=255)
            pen.polygon(hole, fill=0)
            picture.paste(_color(random), (0, 0), stencil)
            ids.paste(kind, (0, 0), stencil)
    small = np.asarray(picture.reduce(SUPERSAMPLING), dtype=np.float32)
    noise = random.standard_normal(small.shape, np.float32) * np.float32(random.uniform(2, 14))
    noisy = small * np.float32(random.uniform(0.7, 1.1)) + noise
    mask = np.asarray(ids)[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
    return np.rint(noisy).clip(0, 255).astype(np.uint8), mask.copy()


Points = list[tuple[float, float]]


def _outline(random: np.random.Generator, fine: int, kind: int) -> tuple[Points, Points | None]:
    """Corners of a shape, and of its hole where it has one, in fine pixels."""
    radius, turn = random.uniform(0.1, 0.24) * fine, random.uniform(0, 2 * np.pi)
    middle = random.uniform(0.05, 0.95, 2) * fine
    corners = {"square": 4, "triangle": 3}.get(CLASSES[kind], 48)
    angles = turn + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    around = np.stack([np.cos(angles), np.sin(angles)], -1)
    outline = [(x, y) for x, y in (around * radius + middle).tolist()]
    if CLASSES[kind] != "ring":
        return outline, None
    return outline, [(x, y) for x, y in (around * radius * random.uniform(0.45, 0.65) + middle).tolist()]


def _color(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (20 + 236 * random.random(3)).tolist()
    return int(red), int(green), int(blue)


def _ground(random: np.random.Generator, size: int) -> "Image.Image":
    """Stripes between two colors, in any direction and width."""
    from PIL import Image

    steps = np.linspace(0, 1, size, dtype=np.float32)
    turn, waves = random.uniform(0, np.pi), random.uniform(0.5, 6)
    phase = math.cos(turn) * steps[None, :] + math.sin(turn) * steps[:, None]
    weight = 0.5 + 0.5 * np.sin(2 * np.pi * waves * phase + random.uniform(0, 6))
    one, other = random.uniform(0, 200, (2, 3)).astype(np.float32)
    return Image.fromarray((weight[..., None] * one + (1 - weight[..., None]) * other).astype(np.uint8))
