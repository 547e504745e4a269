"""Drawn cat faces with nine named points: bundled, exact, and hard enough to show a wrong flip."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from cnntrain.data.examples import Examples
from cnntrain.data.source import Source
from cnntrain.data.sources.schemes import CAT9
from cnntrain.errors import UserError
from cnntrain.randomness import hash_seed
from cnntrain.types import DataSpec, flip_permutation

MOST_DRAWN = 1_000_000  # images per split
SUPERSAMPLING = 3
Color = tuple[int, int, int]

# The left side (the cat's own) of a head of width 2, seen from the front: x to the right of the picture, y down, z
# toward the viewer. The points of the left ear start at the inside, as in the CAT data set.
LEFT_SIDE = {"eye": (0.42, -0.10), "ear": ((0.36, -0.80, 0.1), (0.76, -1.40, 0.0), (0.92, -0.34, 0.0))}
HEAD = (1.0, 0.88, 0.75)  # half axes
MOUTH = (0.0, 0.46)


@dataclass(frozen=True)
class Pose:
    """How a head of half width 1 comes onto the canvas, in canvas pixels (orthographic)."""

    rotation: np.ndarray  # (3, 3)
    scale: float
    center: np.ndarray  # (2,)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """(M, 3) on the head -> (M, 2) canvas pixels."""
        return (points @ self.rotation.T)[:, :2] * self.scale + self.center


class ToyFaces(Source):
    """Cat faces of varied pose, scale, lighting and fur, some half hidden; points stay labeled behind
    things. Left and right are the cat's own: its left eye appears on the right of the picture.

    Each cat has an eye patch on one side and a notch in one ear, so that a mirrored picture differs at sight
    from its original; which side is drawn at random, so that the mirrored picture is as likely a cat as its
    original.

    Args:
        size: canvas in pixels, square.
        train_count, test_count: how many to draw; the first ones don't depend on it.
        seed: another seed draws other cats.
    """

    def __init__(self, size: int = 64, train_count: int = 800, test_count: int = 400, seed: int = 0) -> None:
        if not 16 <= size <= 512:
            raise UserError(f"data.size: must be from 16 to 512 px, got {size!r}")
        if train_count < 2 or test_count < 1:
            raise UserError("data.train_count, data.test_count: must be at least 2 and 1")
        if max(train_count, test_count) > MOST_DRAWN:
            raise UserError(f"data.train_count, data.test_count: must be at most {MOST_DRAWN:,}")
        self.size, self.seed = size, seed
        self.counts = {"train": train_count, "test": test_count}

    def spec(self) -> DataSpec:
        mirror = flip_permutation(CAT9.names, CAT9.flip_pairs or {})
        return DataSpec(
            3, self.size, self.size, keypoints=CAT9.names, flip_pairs=mirror, skeleton=CAT9.skeleton
        )

    def load(self) -> dict[str, Examples]:
        splits = {}
        for split, count in self.counts.items():
            drawn = [draw_face(self.size, hash_seed(self.seed, split, i)) for i in range(count)]
            images = torch.from_numpy(np.stack([image for image, _ in drawn]))  # (N, H, W, C)
            points = torch.from_numpy(np.stack([points for _, points in drawn]))
            valid = ((points >= -0.5) & (points <= self.size - 0.5)).all(-1)
            points = torch.where(valid[..., None], points, 0.0).float()
            names = [f"toy_faces-{self.seed}/{split}/{i:05}" for i in range(count)]
            targets = {"points": points, "valid": valid}
            splits[split] = Examples(images.permute(0, 3, 1, 2).contiguous(), targets, names)
        return splits


def draw_face(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One cat: uint8 (size, size, 3), and its points, float64 (9, 2) canvas pixels in the order of CAT9."""
    random = np.random.default_rng(seed)
    pose = _draw_pose(random, size)
    canvas = _Canvas(size, _color(random, 30, 225))
    _draw_background(canvas, random, size)
    fur, dark = _color(random, 70, 235), _color(random, 0, 60)
    patch_side, notch_side = random.choice((-1, 1), 2)
    for side in (-1, 1):
        _draw_ear(canvas, pose, side, fur, notched=side == notch_side)
    _draw_head(canvas, pose, random, fur, dark, patch_side)
    _draw_occluder(canvas, random, size)
    image = canvas.image.reduce(SUPERSAMPLING)
    return _light(np.asarray(image, dtype=np.float32), random), pose(_landmarks())


@cache
def _landmarks() -> np.ndarray:
    """(9, 3): the points of CAT9 on the head."""
    right, left = _parts(-1), _parts(1)
    return np.vstack([right["eye"], left["eye"], _on_front(MOUTH), right["ear"][::-1], left["ear"]])


@cache
def _ring(count: int = 24) -> np.ndarray:
    """(count, 2) on the unit circle."""
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], -1)


def _on_front(*flat: np.ndarray | tuple[float, float]) -> np.ndarray:
    """(M, 3): where the lines of sight through (x, y) meet the head seen from the front."""
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


class _Canvas:
    """Draws in canvas pixels (centers at whole numbers) on a picture several times as fine."""

    def __init__(self, size: int, background: Color) -> None:
        from PIL import Image, ImageDraw

        fine = size * SUPERSAMPLING
        self.image = Image.new("RGB", (fine, fine), background)
        self.pen = ImageDraw.Draw(self.image)

    def polygon(self, points: np.ndarray, color: Color) -> None:
        self.pen.polygon(self._fine(points), fill=color)

    def line(self, points: np.ndarray, color: Color, width: float) -> None:
        self.pen.line(
            self._fine(points), fill=color, width=max(1, round(width * SUPERSAMPLING)), joint="curve"
        )

    def _fine(self, points: np.ndarray) -> list[float]:
        """x, y, x, y, ... on the fine picture; Pillow's polygons count from its edge."""
        return ((points + 0.5) * SUPERSAMPLING).ravel().tolist()


def _color(random: np.random.Generator, low: int, high: int) -> Color:
    red, green, blue = (low + (high - low) * random.random(3)).tolist()
    return int(red), int(green), int(blue)


def _shade(color: Color, factor: float) -> Color:
    red, green, blue = (min(255, int(part * factor)) for part in color)
    return red, green, blue


def _draw_background(canvas: _Canvas, random: np.random.Generator, size: int) -> None:
    for _ in range(random.integers(3, 8)):
        middle, radius = random.uniform(0, size, 2), random.uniform(0.05, 0.35) * size
        corners = _ring(int(random.integers(3, 7))) * radius * random.uniform(0.4, 1, 2) + middle
        canvas.polygon(corners, _color(random, 10, 245))


def _draw_ear(canvas: _Canvas, pose: Pose, side: int, fur: Color, notched: bool) -> None:
    inner, tip, outer = corners = _parts(side)["ear"]
    bite = (tip + 0.35 * (outer - tip), tip + 0.45 * (inner - tip), tip + 0.62 * (outer - tip))
    outline = np.stack([inner, tip, *bite, outer]) if notched else corners
    canvas.polygon(pose(outline), _shade(fur, 0.8))
    middle = corners.mean(0)
    canvas.polygon(pose(middle + 0.5 * (corners - middle)), (205, 140, 150))


def _draw_head(
    canvas: _Canvas, pose: Pose, random: np.random.Generator, fur: Color, dark: Color, patch_side: int
) -> None:
    turned = pose.rotation * np.array(HEAD)  # the outline of a turned ellipsoid is an ellipse
    shape = np.linalg.cholesky((turned @ turned.T)[:2, :2])
    canvas.polygon(_ring(36) @ shape.T * pose.scale + pose.center, fur)
    patch_color = _shade(fur, 0.45) if sum(fur) > 330 else _shade(fur, 1.8)
    canvas.polygon(pose(_parts(patch_side)["patch"]), patch_color)
    iris, openness = _color(random, 60, 255), random.uniform(0.5, 1.0)
    for side in (-1, 1):
        middle = np.array(LEFT_SIDE["eye"]) * (side, 1)
        canvas.polygon(pose(_on_front(middle + _ring(16) * (0.17, 0.17 * openness))), iris)
        canvas.polygon(pose(_on_front(middle + _ring(8) * (0.05, 0.09 * openness))), dark)
    canvas.polygon(pose(_NOSE), (215, 120, 130))
    width = max(0.6, 0.06 * pose.scale)
    for side in (-1, 1):
        canvas.line(pose(_parts(side)["mouth"]), dark, width)
        for whisker in ("upper whisker", "lower whisker"):
            canvas.line(pose(_parts(side)[whisker]), (235, 235, 235), width / 2)


def _draw_occluder(canvas: _Canvas, random: np.random.Generator, size: int) -> None:
    """For two cats in five, something before the face: a bar or a blob."""
    kind, color = random.uniform(), _color(random, 10, 245)
    middle, turn = random.uniform(0.2, 0.8, 2) * size, random.uniform(0, np.pi)
    if kind < 0.2:
        along = np.array([np.cos(turn), np.sin(turn)]) * size
        canvas.line(np.stack([middle - along, middle + along]), color, random.uniform(0.04, 0.1) * size)
    elif kind < 0.4:
        canvas.polygon(_ring(7) * random.uniform(0.08, 0.16) * size + middle, color)


def _light(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3): brighter towards one side, warmer or colder, with noise."""
    direction = random.uniform(0, 2 * np.pi)
    steps = np.linspace(-1, 1, len(image), dtype=np.float32)
    ramp = math.cos(direction) * steps[None, :] + math.sin(direction) * steps[:, None]
    strength, brightness = random.uniform(0, 0.45), random.uniform(0.6, 1.15)
    tint = (brightness * random.uniform(0.88, 1.12, 3)).astype(np.float32)
    lit = image * ((1 + strength * ramp)[..., None] * tint)
    lit += random.standard_normal(image.shape, np.float32) * np.float32(random.uniform(1, 9))
    return np.rint(lit).clip(0, 255).astype(np.uint8)
