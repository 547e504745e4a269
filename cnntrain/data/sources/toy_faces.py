"""Drawn cat faces with nine keypoints, varied enough to reveal a wrong horizontal flip."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.sources.keypoint_base import CAT9
from cnntrain.data.sources.toy_shapes import SUPERSAMPLING, ToySource
from cnntrain.types import DataSpec, flip_permutation

Color = tuple[int, int, int]

# Left side (the cat's own) of a head of width 2, seen from the front: x to the right of the image, y down, z toward the
# viewer. The points of the left ear start at the inside, as in the CAT data set.
LEFT_SIDE = {"eye": (0.42, -0.10), "ear": ((0.36, -0.80, 0.1), (0.76, -1.40, 0.0), (0.92, -0.34, 0.0))}
HEAD = (1.0, 0.88, 0.75)  # half axes
MOUTH = (0.0, 0.46)


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
