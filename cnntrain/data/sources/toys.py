"""Drawn datasets with exact targets: overlapping shapes with masks, and cat faces with keypoints."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.examples import Examples, Source
from cnntrain.data.sources.keypoint_base import CAT9
from cnntrain.errors import UserError
from cnntrain.randomness import hash_seed
from cnntrain.types import DataSpec, flip_permutation

if TYPE_CHECKING:
    from PIL import Image

Color = tuple[int, int, int]

# Left side (the cat's own) of a head of width 2, seen from the front: x to the right of the image, y down, z toward the
# viewer. The points of the left ear start at the inside, as in the CAT dataset.
LEFT_SIDE = {"eye": (0.42, -0.10), "ear": ((0.36, -0.80, 0.1), (0.76, -1.40, 0.0), (0.92, -0.34, 0.0))}
HEAD = (1.0, 0.88, 0.75)  # half axes
MOUTH = (0.0, 0.46)
CLASSES = ("background", "disc", "square", "triangle", "ring")
MAX_COUNT = 1_000_000  # images per split
SUPERSAMPLING = 3  # odd, so that the middle sample of a pixel is at its center


@dataclass
class ToySource(Source):
    """Base class of datasets whose images are drawn by the program; another seed draws other images."""

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
            for draw, fill in zip(draws, (_color(random, 20, 256), class_id), strict=True):
                draw.polygon(outline, fill=fill)
        else:  # shapes below a ring are visible through its hole
            stencil = Image.new("L", (fine_size, fine_size), 0)
            draw = ImageDraw.Draw(stencil)
            draw.polygon(outline, fill=255)
            draw.polygon(hole, fill=0)
            image.paste(_color(random, 20, 256), (0, 0), stencil)
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


def _background(random: np.random.Generator, size: int) -> "Image.Image":
    """Return stripes of two colors, of random direction and width."""
    from PIL import Image

    steps = np.linspace(0, 1, size, dtype=np.float32)
    direction, waves = random.uniform(0, np.pi), random.uniform(0.5, 6)
    phase = math.cos(direction) * steps[None, :] + math.sin(direction) * steps[:, None]
    weight = 0.5 + 0.5 * np.sin(2 * np.pi * waves * phase + random.uniform(0, 6))
    first, second = random.uniform(0, 200, (2, 3)).astype(np.float32)
    return Image.fromarray((weight[..., None] * first + (1 - weight[..., None]) * second).astype(np.uint8))


@dataclass(frozen=True)
class Pose:
    """Orthographic projection from a head of half width 1 to image pixels."""

    rotation: np.ndarray  # (3, 3)
    scale: float
    center: np.ndarray  # (2,)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Project points (M, 3) on the head to (M, 2) image pixels."""
        return (points @ self.rotation.T)[:, :2] * self.scale + self.center


@dataclass
class ToyFaces(ToySource):
    """Cat faces with varied pose, scale, lighting and fur, some partly occluded; occluded points stay labeled.

    Left and right are the cat's own: its left eye is on the right of the image. Each cat has an eye patch on one side
    and a notch in one ear, so that a flipped image differs visibly from the original. The sides are drawn at random, so
    that a flipped image is as likely as the original.
    """

    name = "toy_faces"
    train_count: int = 800
    test_count: int = 400

    def spec(self) -> DataSpec:
        pairs = flip_permutation(CAT9.names, CAT9.flip_pairs or {})
        return DataSpec(3, self.size, self.size, keypoints=CAT9.names, flip_pairs=pairs, skeleton=CAT9.skeleton)

    def draw(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return draw_face(self.size, seed)

    def make_targets(self, drawn: Tensor) -> dict[str, Tensor]:
        valid = ((drawn >= -0.5) & (drawn <= self.size - 0.5)).all(-1)
        return {"points": torch.where(valid[..., None], drawn, 0.0).float(), "valid": valid}


def draw_face(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image, uint8 (size, size, 3), and its points, float64 (9, 2) image pixels in the order of CAT9."""
    random = np.random.default_rng(seed)
    pose = _draw_pose(random, size)
    drawing = _Drawing(size, _color(random, 30, 225))
    _draw_background(drawing, random, size)
    fur, dark = _color(random, 70, 235), _color(random, 0, 60)
    patch_side, notch_side = random.choice((-1, 1), 2)
    for side in (-1, 1):
        _draw_ear(drawing, pose, side, fur, notched=side == notch_side)
    _draw_head(drawing, pose, random, fur, dark, patch_side)
    _draw_occluder(drawing, random, size)
    image = drawing.image.reduce(SUPERSAMPLING)
    return _light(np.asarray(image, dtype=np.float32), random), pose(_landmarks())


@cache
def _landmarks() -> np.ndarray:
    """Return the points of CAT9 on the head, (9, 3)."""
    right, left = _parts(-1), _parts(1)
    return np.vstack([right["eye"], left["eye"], _on_front(MOUTH), right["ear"][::-1], left["ear"]])


@cache
def _ring(count: int = 24) -> np.ndarray:
    """Return (count, 2) points on the unit circle."""
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], -1)


def _on_front(*flat: np.ndarray | tuple[float, float]) -> np.ndarray:
    """Project points (x, y) of the front view onto the head; return (M, 3)."""
    points = np.vstack(flat)
    depth = np.sqrt((1 - np.square(points / HEAD[:2]).sum(1)).clip(0)) * HEAD[2]
    return np.column_stack([points, depth])


_NOSE = _on_front((-0.10, 0.16), (0.10, 0.16), (0.0, 0.28))


@cache
def _parts(side: int) -> dict[str, np.ndarray]:
    """Return the fixed 3D points, (M, 3) each, of one side of the head (1: the cat's left, -1: its right)."""
    middle = np.array(LEFT_SIDE["eye"]) * (side, 1)
    start = _on_front((side * 0.3, 0.36))
    return {
        "eye": _on_front(middle),
        "patch": _on_front(middle + _ring() * (0.30, 0.34)),
        "mouth": _on_front((0.0, 0.28), MOUTH, (side * 0.12, 0.52), (side * 0.24, 0.44)),
        "upper whisker": np.vstack([start, start + np.array([side * 0.75, -0.18, 0.1])]),
        "lower whisker": np.vstack([start, start + np.array([side * 0.75, 0.18, 0.1])]),
        "ear": np.array(LEFT_SIDE["ear"]) * (side, 1, 1),
    }


def _draw_pose(random: np.random.Generator, size: int) -> Pose:
    yaw, pitch, roll = np.radians(random.uniform(-1, 1, 3) * (38, 20, 30))
    about_y = [[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]]
    about_x = [[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]]
    about_z = [[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]]
    scale = size * random.uniform(0.2, 0.34)
    center = (size - 1) / 2 + random.uniform(-1, 1, 2) * size * 0.12 + (0, 0.12 * size)
    return Pose(np.array(about_z) @ np.array(about_x) @ np.array(about_y), scale, center)


class _Drawing:
    """Draw in image pixels (pixel centers at integers) on a supersampled image."""

    def __init__(self, size: int, background: Color) -> None:
        from PIL import Image, ImageDraw

        fine_size = size * SUPERSAMPLING
        self.image = Image.new("RGB", (fine_size, fine_size), background)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points: np.ndarray, color: Color) -> None:
        self.draw.polygon(self._supersampled(points), fill=color)

    def line(self, points: np.ndarray, color: Color, width: float) -> None:
        fine_width = max(1, round(width * SUPERSAMPLING))
        self.draw.line(self._supersampled(points), fill=color, width=fine_width, joint="curve")

    def _supersampled(self, points: np.ndarray) -> list[float]:
        """Return x, y, x, y, ... on the supersampled image, measured from its edge as Pillow's polygons are."""
        return ((points + 0.5) * SUPERSAMPLING).ravel().tolist()


def _color(random: np.random.Generator, low: int, high: int) -> Color:
    red, green, blue = (low + (high - low) * random.random(3)).tolist()
    return int(red), int(green), int(blue)


def _shade(color: Color, factor: float) -> Color:
    red, green, blue = (min(255, int(part * factor)) for part in color)
    return red, green, blue


def _draw_background(drawing: _Drawing, random: np.random.Generator, size: int) -> None:
    for _ in range(random.integers(3, 8)):
        middle, radius = random.uniform(0, size, 2), random.uniform(0.05, 0.35) * size
        corners = _ring(int(random.integers(3, 7))) * radius * random.uniform(0.4, 1, 2) + middle
        drawing.polygon(corners, _color(random, 10, 245))


def _draw_ear(drawing: _Drawing, pose: Pose, side: int, fur: Color, notched: bool) -> None:
    inner, tip, outer = corners = _parts(side)["ear"]
    bite = (tip + 0.35 * (outer - tip), tip + 0.45 * (inner - tip), tip + 0.62 * (outer - tip))
    outline = np.stack([inner, tip, *bite, outer]) if notched else corners
    drawing.polygon(pose(outline), _shade(fur, 0.8))
    middle = corners.mean(0)
    drawing.polygon(pose(middle + 0.5 * (corners - middle)), (205, 140, 150))


def _draw_head(
    drawing: _Drawing, pose: Pose, random: np.random.Generator, fur: Color, dark: Color, patch_side: int
) -> None:
    rotated = pose.rotation * np.array(HEAD)  # the outline of a rotated ellipsoid is an ellipse
    shape = np.linalg.cholesky((rotated @ rotated.T)[:2, :2])
    drawing.polygon(_ring(36) @ shape.T * pose.scale + pose.center, fur)
    patch_color = _shade(fur, 0.45) if sum(fur) > 330 else _shade(fur, 1.8)
    drawing.polygon(pose(_parts(patch_side)["patch"]), patch_color)
    iris, openness = _color(random, 60, 255), random.uniform(0.5, 1.0)
    for side in (-1, 1):
        middle = np.array(LEFT_SIDE["eye"]) * (side, 1)
        drawing.polygon(pose(_on_front(middle + _ring(16) * (0.17, 0.17 * openness))), iris)
        drawing.polygon(pose(_on_front(middle + _ring(8) * (0.05, 0.09 * openness))), dark)
    drawing.polygon(pose(_NOSE), (215, 120, 130))
    width = max(0.6, 0.06 * pose.scale)
    for side in (-1, 1):
        drawing.line(pose(_parts(side)["mouth"]), dark, width)
        for whisker in ("upper whisker", "lower whisker"):
            drawing.line(pose(_parts(side)[whisker]), (235, 235, 235), width / 2)


def _draw_occluder(drawing: _Drawing, random: np.random.Generator, size: int) -> None:
    """Draw a bar or a blob in front of 40 % of the faces."""
    kind, color = random.uniform(), _color(random, 10, 245)
    center, direction = random.uniform(0.2, 0.8, 2) * size, random.uniform(0, np.pi)
    if kind < 0.2:
        along = np.array([np.cos(direction), np.sin(direction)]) * size
        drawing.line(np.stack([center - along, center + along]), color, random.uniform(0.04, 0.1) * size)
    elif kind < 0.4:
        drawing.polygon(_ring(7) * random.uniform(0.08, 0.16) * size + center, color)


def _light(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Apply a brightness gradient, a tint and noise; return uint8 (H, W, 3)."""
    direction = random.uniform(0, 2 * np.pi)
    steps = np.linspace(-1, 1, len(image), dtype=np.float32)
    ramp = math.cos(direction) * steps[None, :] + math.sin(direction) * steps[:, None]
    strength, brightness = random.uniform(0, 0.45), random.uniform(0.6, 1.15)
    tint = (brightness * random.uniform(0.88, 1.12, 3)).astype(np.float32)
    lit = image * ((1 + strength * ramp)[..., None] * tint)
    lit += random.standard_normal(image.shape, np.float32) * np.float32(random.uniform(1, 9))
    return np.rint(lit).clip(0, 255).astype(np.uint8)
