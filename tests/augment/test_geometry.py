"""Images, keypoints and masks move together, whatever the moves and their order."""

import math

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from cnntrain.augment.base import Geometry
from cnntrain.augment.geometry import Crop, HorizontalFlip, Shift, VerticalFlip
from cnntrain.augment.pipeline import Pipeline
from cnntrain.augment.trivial_augment import Trivial
from cnntrain.augment.warp import Perspective, RandomResizedCrop, Rotation, Shear, Zoom

HEIGHT, WIDTH = 44, 57
ALL: dict[str, Geometry] = {
    "flip": HorizontalFlip(probability=0.5),
    "vertical_flip": VerticalFlip(probability=0.5),
    "crop": Crop(padding=6),
    "small_crop": Crop(size=(30, 41), padding=2),
    "shift": Shift(pixels=5),
    "random_resized_crop": RandomResizedCrop(scale=(0.3, 1.0)),
    "small_resized_crop": RandomResizedCrop(size=(30, 33), scale=(0.3, 1.0)),
    "zoom": Zoom(factor=(0.4, 1.6)),
    "rotation": Rotation(degrees=180),
    "shear": Shear(x_degrees=20, y_degrees=15),
    "perspective": Perspective(distortion=0.4, probability=1.0),
    "trivial_augment": Trivial(strength=0.3),
}
CHAINS = st.lists(
    st.sampled_from(sorted(ALL.keys() - {"small_crop", "trivial_augment"})),
    min_size=1,
    max_size=3,
    unique=True,
)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def centroid(weights: torch.Tensor) -> torch.Tensor:
    """(2,) x, y of weights (H, W)."""
    weights = weights.double()
    x, y = torch.arange(weights.shape[1]).double(), torch.arange(weights.shape[0]).double()
    return torch.stack([(weights.sum(0) * x).sum(), (weights.sum(1) * y).sum()]) / weights.sum()


def check_together(make_spots, faces, items: dict[str, Geometry], seed: int) -> int:
    batch = make_spots(12, seed)
    pipeline = Pipeline(faces, items)
    moved = pipeline(batch, seed, 0)
    assert moved.images.shape[2:] == moved.targets["mask"].shape[1:] == pipeline.output_size
    height, width = pipeline.output_size
    checked = 0
    for i in range(len(batch)):
        x, y = moved.targets["points"][i, 0].tolist()
        assert bool(moved.targets["valid"][i, 0]) == (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5)
        mask, image = moved.targets["mask"][i], moved.images[i, 0]
        assert set(mask.unique().tolist()) <= {0, 1, 255}
        margin = 12  # the whole spot is on the canvas
        if min(x, y, width - 1 - x, height - 1 - y) < margin:
            continue
        checked += 1
        point = torch.tensor([x, y], dtype=torch.float64)
        assert (centroid(image.clamp(min=0.02) - 0.02) - point).norm() < 0.5
        assert (centroid(mask == 1) - point).norm() < 0.8  # a disc of whole pixels has no finer center
    return checked


@pytest.mark.parametrize("name", ALL)
def test_each_move_carries_pixel_point_and_mask_together(make_spots, faces, name):
    assert sum(check_together(make_spots, faces, {name: ALL[name]}, seed) for seed in range(4)) > 3


@FEW
@given(names=CHAINS, seed=st.integers(0, 2**40))
def test_chains_carry_pixel_point_and_mask_together(make_spots, faces, names, seed):
    check_together(make_spots, faces, {name: ALL[name] for name in names}, seed)


@FEW
@given(names=CHAINS, seed=st.integers(0, 2**40))
def test_chains_equal_the_product_of_matrices_applied_by_scipy(make_spots, faces, names, seed):
    """Image by image in float64, with the matrix that the pipeline says it used."""
    items = {name: ALL[name] for name in names}
    generator = torch.Generator().manual_seed(seed)
    batch = make_spots(4, seed)
    batch.images = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8, generator=generator)
    batch.targets["mask"] = torch.randint(
        0, 5, batch.targets["mask"].shape, dtype=torch.uint8, generator=generator
    )
    moved = Pipeline(faces, items)(batch, seed, 1)
    matrices, height, width = draw_matrices(items, batch, seed, 1)
    torch.testing.assert_close(moved.source_to_image, matrices)
    y, x = numpy.mgrid[0:height, 0:width]
    for i in range(len(batch)):
        # Points: the matrix itself, exactly; renamed where its determinant is negative.
        points = batch.targets["points"][i].double()
        expected = torch.cat([points, torch.ones(len(points), 1)], 1) @ matrices[i].T
        expected = expected[:, :2] / expected[:, 2:]
        order = list(faces.flip_pairs or ()) if mirrors_by_cross_product(matrices[i]) else [0, 1, 2, 3, 4]
        torch.testing.assert_close(moved.targets["points"][i].double(), expected[order], atol=1e-3, rtol=1e-4)
        inverse = numpy.linalg.inv(matrices[i].numpy())
        place = inverse @ numpy.stack([x.ravel(), y.ravel(), numpy.ones(x.size)])
        place = place[:2] / place[2]
        if step_is_wide(matrices[i], height, width):
            continue  # prefiltered
        image = batch.images[i, 0].double().numpy()
        expected = ndimage.map_coordinates(image, place[::-1], order=1, mode="grid-constant")
        numpy.testing.assert_allclose(moved.images[i, 0].numpy().ravel() * 255, expected, atol=0.05)
        mask = batch.targets["mask"][i].numpy()
        nearest = numpy.round(place).astype(int)
        inside = (nearest >= 0).all(0) & (nearest[0] < WIDTH) & (nearest[1] < HEIGHT)
        expected = numpy.where(inside, mask[nearest[1] * inside, nearest[0] * inside], 255)
        undecided = (numpy.abs(place - numpy.floor(place) - 0.5) < 1e-3).any(0)
        got = moved.targets["mask"][i].numpy().ravel()
        assert (got == expected)[~undecided].all()


def draw_matrices(items, batch, seed, epoch):
    from cnntrain.randomness import uniform

    total = torch.eye(3, dtype=torch.float64).repeat(len(batch), 1, 1)
    height, width = HEIGHT, WIDTH
    for key, item in items.items():
        draws = uniform(seed, epoch, batch.position, key, item.draws)
        total = item.move(draws, height, width) @ total
        height, width = item.output_size(height, width)
    return total, height, width


def mirrors_by_cross_product(matrix) -> bool:
    """Whether a small triangle at the image's center turns the other way round after the move."""
    center = torch.tensor([(WIDTH - 1) / 2, (HEIGHT - 1) / 2], dtype=torch.float64)
    corners = center + torch.tensor([[0.0, 0.0], [0.01, 0.0], [0.0, 0.01]], dtype=torch.float64)
    moved = torch.cat([corners, torch.ones(3, 1)], 1) @ matrix.T
    moved = moved[:, :2] / moved[:, 2:]
    (ax, ay), (bx, by) = (moved[1] - moved[0]).tolist(), (moved[2] - moved[0]).tolist()
    return ax * by - ay * bx < 0


def step_is_wide(matrix, height, width) -> bool:
    inverse = torch.linalg.inv(matrix)
    center = torch.tensor([(width - 1) / 2, (height - 1) / 2, 1.0], dtype=torch.float64)

    def place(x, y):
        there = inverse @ (center + torch.tensor([x, y, 0.0], dtype=torch.float64))
        return there[:2] / there[2]

    along_x, along_y = place(0.5, 0) - place(-0.5, 0), place(0, 0.5) - place(0, -0.5)
    return max(math.hypot(along_x[axis], along_y[axis]) for axis in (0, 1)) > 1.45
