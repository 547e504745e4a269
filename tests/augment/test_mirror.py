"""Whoever mirrors, relabels: and nobody else."""

import pytest
import torch

from cnntrain.augment.base import Geometry
from cnntrain.augment.geometry import Crop, HorizontalFlip, VerticalFlip
from cnntrain.augment.pipeline import Pipeline
from cnntrain.augment.points import is_mirrored
from cnntrain.augment.warp import Perspective, Rotation, Shear, Zoom
from cnntrain.types import Batch

HEIGHT, WIDTH = 44, 57


@pytest.mark.parametrize("flip", [HorizontalFlip, VerticalFlip])
@pytest.mark.parametrize("extra", [{}, {"zoom": Zoom(factor=(1.0, 1.0))}], ids=["gather", "resample"])
def test_flip_twice_is_the_identity_including_order(make_spots, faces, flip, extra):
    batch = make_spots(8, 1)
    batch.images = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8)
    once = Pipeline(faces, {"a": flip(probability=1)} | extra)(batch, 1, 0)
    assert torch.equal(once.targets["valid"][:, 1], batch.targets["valid"][:, 2])
    assert not torch.equal(once.targets["points"][:, 0], batch.targets["points"][:, 0])
    again = Pipeline(faces, {"b": flip(probability=1)} | extra)(
        Batch((once.images * 255).round().byte(), once.targets, batch.index, batch.position), 1, 0
    )
    both = Pipeline(faces, {"a": flip(probability=1), "b": flip(probability=1)} | extra)(batch, 1, 0)
    for twice in (again, both):
        assert torch.equal((twice.images * 255).round().byte(), batch.images)
        assert torch.equal(twice.targets["mask"], batch.targets["mask"])
        assert torch.equal(twice.targets["valid"], batch.targets["valid"])
        torch.testing.assert_close(twice.targets["points"], batch.targets["points"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("names", "relabels"),
    [
        ("h", True),
        ("v", True),
        ("hv", False),
        ("vh", False),
        ("hh", False),
        ("r", False),
        ("hr", True),
        ("rh", True),
        ("u", False),
        ("hu", True),
        ("vu", True),
        ("hvu", False),
        ("p", False),
        ("hp", True),
        ("ph", True),
        ("phv", False),
        ("szx", False),
        ("hszx", True),
    ],
)
def test_points_are_relabeled_exactly_when_left_became_right(make_spots, faces, names, relabels):
    kinds = {
        "h": HorizontalFlip(probability=1),
        "v": VerticalFlip(probability=1),
        "r": Rotation(degrees=180),
        "u": Rotation(degrees=(180, 180)),  # upside down: two mirrors, no mirror
        "p": Perspective(distortion=0.6, probability=1),
        "s": Shear(x_degrees=70, y_degrees=70),
        "z": Zoom(factor=(0.05, 3)),
        "x": Crop(padding=20),
    }
    batch = make_spots(40, 3)
    items = {f"{name}{i}": kinds[name] for i, name in enumerate(names)}
    matrix = Pipeline(faces, items)(batch, 5, 0).source_to_image
    assert is_mirrored(matrix, HEIGHT, WIDTH).tolist() == [relabels] * 40
    moved = Pipeline(faces, items)(batch, 5, 0).targets
    order = list(faces.flip_pairs or ()) if relabels else [0, 1, 2, 3, 4]
    before = batch.targets["points"].double()
    expected = torch.cat([before, torch.ones(40, 5, 1)], 2) @ matrix.mT
    near = expected[..., 2] > 0.2
    expected = (expected[..., :2] / expected[..., 2:])[:, order]
    near = near[:, order, None].expand(-1, -1, 2)
    torch.testing.assert_close(moved["points"].double()[near], expected[near], atol=1e-2, rtol=1e-4)
    assert not (moved["valid"] & ~batch.targets["valid"][:, order]).any()


def test_only_the_mirrored_images_of_a_batch_are_relabeled(make_spots, faces):
    batch = make_spots(64, 3)
    moved = Pipeline(faces, {"flip": HorizontalFlip()})(batch, 5, 0)
    flipped = moved.source_to_image[:, 0, 0] < 0
    assert 10 < int(flipped.sum()) < 54
    before = batch.targets["points"].clone()
    before[flipped, :, 0] = WIDTH - 1 - before[flipped, :, 0]
    before[flipped] = before[flipped][:, list(faces.flip_pairs or ())]
    torch.testing.assert_close(moved.targets["points"], before)


def test_points_behind_the_camera_are_invisible(make_spots, faces):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[2, 0] = -1 / 20  # what lies beyond x = 20 is behind

    class Tilt(Geometry):
        draws = 0

        def move(self, draws, height, width):
            return matrix.repeat(len(draws), 1, 1)

    batch = make_spots(1, 0)
    batch.targets["points"] = torch.tensor([[[10.0, 5], [19, 1], [20, 5], [21, 5], [45, 9]]])
    batch.targets["valid"][:] = True
    moved = Pipeline(faces, {"tilt": Tilt()})(batch, 0, 0)
    assert moved.targets["valid"].tolist() == [[True, False, False, False, False]]
    assert moved.targets["points"].isfinite().all()
    assert moved.images.isfinite().all()


def test_images_show_nothing_from_behind_the_camera(make_spots, faces):
    class Tilt(Geometry):
        draws = 0

        def move(self, draws, height, width):
            matrix = torch.eye(3, dtype=torch.float64)
            matrix[2, 0] = -1 / 20
            sideways = torch.eye(3, dtype=torch.float64)
            sideways[0, 2] = 50
            return (sideways @ matrix).repeat(len(draws), 1, 1)

    batch = make_spots(2, 0)
    batch.images[:] = 255
    batch.targets["mask"][:] = 1
    for border in ("zero", "edge"):
        moved = Pipeline(faces, {"tilt": Tilt()}, border)(batch, 0, 0)
        # Output columns left of 17 would show columns beyond 53 of the image through the back of the camera.
        assert (moved.targets["mask"][:, :, :30] == 255).all()
        assert (moved.targets["mask"] == 1).any()
        if border == "zero":
            assert (moved.images[:, :, :, :30] == 0).all()
