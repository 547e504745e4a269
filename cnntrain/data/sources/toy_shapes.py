"""Drawn images of overlapping shapes with exact masks, and the base class of drawn data sets."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.examples import Examples, Source
from cnntrain.errors import UserError
from cnntrain.randomness import hash_seed
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from PIL import Image

CLASSES = ("background", "disc", "square", "triangle", "ring")
MAX_COUNT = 1_000_000  # images per split
SUPERSAMPLING = 3  # odd, so that the middle sample of a pixel is at its center


@dataclass
class ToySource(Source):
    """Base class of data sets whose images are drawn by the program; another seed draws other images."""

    name: ClassVar[str]
    size: int = 64  # px, square
    train_count: int = 1000  # the first images do not depend on it
    test_count: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 512:
            raise UserError(f"data.size: must be from 16 to 512 px, got {self.size!r}")
        if self.train_count < 2 or self.test_count < 1:
            raise UserError("data.train_count, data.test_count: must be at least 2 and 1")
        if max(self.train_count, self.test_count) > MAX_COUNT:
            raise UserError(f"data.train_count, data.test_count: must be at most {MAX_COUNT:,}")

    @abstractmethod
    def draw(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image, uint8 (size, size, 3), and its target."""

    @abstractmethod
    def make_targets(self, drawn: Tensor) -> dict[str, Tensor]:
        """Return the targets of a split from the stacked targets of `draw`."""

    def load(self) -> dict[str, Examples]:
        splits = {}
        for split, count in (("train", self.train_count), ("test", self.test_count)):
            drawn = [self.draw(hash_seed(self.seed, split, i)) for i in range(count)]
            images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
            targets = self.make_targets(torch.from_numpy(np.stack([target for _, target in drawn])))
            names = [f"{self.name}-{self.seed}/{split}/{i:05}" for i in range(count)]
            splits[split] = Examples(images.contiguous(), targets, names)
        return splits


@dataclass
class ToyShapes(ToySource):
    """Discs, squares, triangles and rings of any color on a striped background, for segmentation.

    The class of a pixel is that of the topmost shape at its center. The color is independent of the class.
    """

    name = "toy_shapes"

    def spec(self) -> DataSpec:
        return DataSpec(3, self.size, self.size, CLASSES, per_pixel=True, ignore_index=255)

    def draw(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return draw_shapes(self.size, seed)

    def make_targets(self, drawn: Tensor) -> dict[str, Tensor]:
        return {"mask": drawn}


def draw_shapes(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image, uint8 (size, size, 3), and its class ids, uint8 (size, size)."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    fine_size = size * SUPERSAMPLING
    image = _background(random, size).resize((fine_size, fine_size), Image.Resampling.NEAREST)
    ids = Image.new("L", (fine_size, fine_size), 0)
    draws = (ImageDraw.Draw(image), ImageDraw.Draw(ids))
    for _ in range(random.integers(3, 9)):
        class_id = int(random.integers(1, len(CLASSES)))
        outline, hole = _outline(random, fine_size, class_id)
        if hole is None:
            for draw, fill in zip(draws, (_color(random), class_id), strict=True):
                draw.polygon(outline, fill=fill)
        else:  # shapes below a ring are visible through its hole
            stencil = Image.new("L", (fine_size, fine_size), 0)
            draw = ImageDraw.Draw(stencil)
            draw.polygon(outline, fill=255)
            draw.polygon(hole, fill=0)
            image.paste(_color(random), (0, 0), stencil)
            ids.paste(class_id, (0, 0), stencil)
    small = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32)
    noise = random.standard_normal(small.shape, np.float32) * np.float32(random.uniform(2, 14))
    noisy = small * np.float32(random.uniform(0.7, 1.1)) + noise
    mask = np.asarray(ids)[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
    return np.rint(noisy).clip(0, 255).astype(np.uint8), mask.copy()


Points = list[tuple[float, float]]


def _outline(random: np.random.Generator, fine_size: int, class_id: int) -> tuple[Points, Points | None]:
    """Return the corners of a shape, and of its hole if it is a ring, in supersampled pixels."""
    radius, rotation = random.uniform(0.1, 0.24) * fine_size, random.uniform(0, 2 * np.pi)
    center = random.uniform(0.05, 0.95, 2) * fine_size
    corners = {"square": 4, "triangle": 3}.get(CLASSES[class_id], 48)
    angles = rotation + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], -1)
    outline = [(x, y) for x, y in (circle * radius + center).tolist()]
    if CLASSES[class_id] != "ring":
        return outline, None
    return outline, [(x, y) for x, y in (circle * radius * random.uniform(0.45, 0.65) + center).tolist()]


def _color(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (20 + 236 * random.random(3)).tolist()
    return int(red), int(green), int(blue)


def _background(random: np.random.Generator, size: int) -> "Image.Image":
    """Return stripes of two colors, of random direction and width."""
    from PIL import Image

    steps = np.linspace(0, 1, size, dtype=np.float32)
    direction, waves = random.uniform(0, np.pi), random.uniform(0.5, 6)
    phase = math.cos(direction) * steps[None, :] + math.sin(direction) * steps[:, None]
    weight = 0.5 + 0.5 * np.sin(2 * np.pi * waves * phase + random.uniform(0, 6))
    first, second = random.uniform(0, 200, (2, 3)).astype(np.float32)
    return Image.fromarray((weight[..., None] * first + (1 - weight[..., None]) * second).astype(np.uint8))
