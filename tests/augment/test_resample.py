"""Images, keypoints and masks are transformed together; borders, shrinking and flip pairs."""

import math

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from cnntrain.augment.base import Geometry
from cnntrain.augment.geometry import (
    Crop,
    HorizontalFlip,
    Perspective,
    RandomResizedCrop,
    Rotation,
    Shear,
    Shift,
    VerticalFlip,
    Zoom,
)
from cnntrain.augment.pipeline import Pipeline
from cnntrain.augment.resample import is_flipped
from cnntrain.augment.trivial_augment import TrivialAugment
from cnntrain.randomness import uniform
from cnntrain.types import Batch, DataSpec

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
    "trivial_augment": TrivialAugment(strength=0.3),
}
CHAINS = st.lists(
    st.sampled_from(sorted(ALL.keys() - {"small_crop", "trivial_augment"})), min_size=1, max_size=3, unique=True
)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def centroid(weights: torch.Tensor) -> torch.Tensor:
    """(2,) x, y of weights (H, W)."""
    weights = weights.double()
    x, y = torch.arange(weights.shape[1]).double(), torch.arange(weights.shape[0]).double()
    return torch.stack([(weights.sum(0) * x).sum(), (weights.sum(1) * y).sum()]) / weights.sum()


def check_aligned(make_spots, faces, items: dict[str, Geometry], seed: int) -> int:
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
def test_image_keypoints_and_mask_stay_aligned(make_spots, faces, name):
    assert sum(check_aligned(make_spots, faces, {name: ALL[name]}, seed) for seed in range(4)) > 3


@FEW
@given(names=CHAINS, seed=st.integers(0, 2**40))
def test_image_keypoints_and_mask_stay_aligned_in_sequences(make_spots, faces, names, seed):
    check_aligned(make_spots, faces, {name: ALL[name] for name in names}, seed)


@FEW
@given(names=CHAINS, seed=st.integers(0, 2**40))
def test_sequences_equal_the_product_of_matrices_applied_by_scipy(make_spots, faces, names, seed):
    """Image by image in float64, with the matrix that the pipeline says it used."""
    items = {name: ALL[name] for name in names}
    generator = torch.Generator().manual_seed(seed)
    batch = make_spots(4, seed)
    batch.images = torch.randint(0, 256, batch.images.shape, dtype=torch.uint8, generator=generator)
    batch.targets["mask"] = torch.randint(0, 5, batch.targets["mask"].shape, dtype=torch.uint8, generator=generator)
    moved = Pipeline(faces, items)(batch, seed, 1)
    matrices, height, width = draw_matrices(items, batch, seed, 1)
    torch.testing.assert_close(moved.source_to_image, matrices)
    y, x = numpy.mgrid[0:height, 0:width]
    for i in range(len(batch)):
        # Points: the matrix itself, exactly; renamed where its determinant is negative.
        points = batch.targets["points"][i].double()
        expected = torch.cat([points, torch.ones(len(points), 1)], 1) @ matrices[i].T
        expected = expected[:, :2] / expected[:, 2:]
        order = list(faces.flip_pairs or ()) if is_flipped_by_cross_product(matrices[i]) else [0, 1, 2, 3, 4]
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
    total = torch.eye(3, dtype=torch.float64).repeat(len(batch), 1, 1)
    height, width = HEIGHT, WIDTH
    for key, item in items.items():
        draws = uniform(seed, epoch, batch.position, key, item.num_uniforms)
        total = item.matrix(draws, height, width) @ total
        height, width = item.output_size(height, width)
    return total, height, width


def is_flipped_by_cross_product(matrix) -> bool:
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
def test_flip_pairs_are_swapped_iff_left_and_right_are_exchanged(make_spots, faces, names, relabels):
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
    assert is_flipped(matrix, HEIGHT, WIDTH).tolist() == [relabels] * 40
    moved = Pipeline(faces, items)(batch, 5, 0).targets
    order = list(faces.flip_pairs or ()) if relabels else [0, 1, 2, 3, 4]
    before = batch.targets["points"].double()
    expected = torch.cat([before, torch.ones(40, 5, 1)], 2) @ matrix.mT
    near = expected[..., 2] > 0.2
    expected = (expected[..., :2] / expected[..., 2:])[:, order]
    near = near[:, order, None].expand(-1, -1, 2)
    torch.testing.assert_close(moved["points"].double()[near], expected[near], atol=1e-2, rtol=1e-4)
    assert not (moved["valid"] & ~batch.targets["valid"][:, order]).any()


def test_flip_pairs_are_swapped_only_in_flipped_images(make_spots, faces):
    batch = make_spots(64, 3)
    moved = Pipeline(faces, {"flip": HorizontalFlip()})(batch, 5, 0)
    flipped = moved.source_to_image[:, 0, 0] < 0
    assert 10 < int(flipped.sum()) < 54
    before = batch.targets["points"].clone()
    before[flipped, :, 0] = WIDTH - 1 - before[flipped, :, 0]
    before[flipped] = before[flipped][:, list(faces.flip_pairs or ())]
    torch.testing.assert_close(moved.targets["points"], before)


def test_points_behind_the_camera_are_invalid(make_spots, faces):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[2, 0] = -1 / 20  # what lies beyond x = 20 is behind

    class Tilt(Geometry):
        num_uniforms = 0

        def matrix(self, uniforms, height, width):
            return matrix.repeat(len(uniforms), 1, 1)

    batch = make_spots(1, 0)
    batch.targets["points"] = torch.tensor([[[10.0, 5], [19, 1], [20, 5], [21, 5], [45, 9]]])
    batch.targets["valid"][:] = True
    moved = Pipeline(faces, {"tilt": Tilt()})(batch, 0, 0)
    assert moved.targets["valid"].tolist() == [[True, False, False, False, False]]
    assert moved.targets["points"].isfinite().all()
    assert moved.images.isfinite().all()


def test_images_show_nothing_from_behind_the_camera(make_spots, faces):
    class Tilt(Geometry):
        num_uniforms = 0

        def matrix(self, uniforms, height, width):
            matrix = torch.eye(3, dtype=torch.float64)
            matrix[2, 0] = -1 / 20
            sideways = torch.eye(3, dtype=torch.float64)
            sideways[0, 2] = 50
            return (sideways @ matrix).repeat(len(uniforms), 1, 1)

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


@pytest.mark.parametrize("border", ["zero", "edge", "reflect"])
@pytest.mark.parametrize("extra", [{}, {"zoom": Zoom(factor=(1.0, 1.0))}], ids=["gather", "resample"])
def test_borders(border, extra):
    spec = DataSpec(1, 6, 9, ignore_index=11)
    images = torch.arange(1, 55, dtype=torch.uint8).view(1, 1, 6, 9)
    batch = Batch(
        images, {"mask": torch.ones(1, 6, 9, dtype=torch.uint8)}, torch.zeros(1).long(), torch.zeros(1).long()
    )
    moved = Pipeline(spec, {"crop": Crop(size=(12, 17), padding=4)} | extra, border)(batch, 0, 0)
    left, top = (-moved.source_to_image[0, :2, 2]).long().tolist()
    mode = {"zero": "constant", "edge": "edge", "reflect": "reflect"}[border]
    padded = numpy.pad(images[0, 0].numpy(), 8, mode=mode)
    expected = padded[top + 8 : top + 20, left + 8 : left + 25]
    numpy.testing.assert_allclose(moved.images[0, 0].numpy() * 255, expected, atol=1e-3)
    # The ignore id around the mask, whatever the image shows there.
    expected = numpy.pad(numpy.ones((6, 9)), 8, constant_values=11)[top + 8 : top + 20, left + 8 : left + 25]
    assert (moved.targets["mask"][0].numpy() == expected).all()


def test_shrinking_does_not_alias(make_batch):
    """Stripes finer than the output can show become gray, not wider stripes."""
    height, width = 44, 57
    batch = make_batch(6, 1, height, width)
    batch.images[:] = (255 * (torch.arange(width) % 2)).to(torch.uint8)
    shrunk = Pipeline(DataSpec(1, height, width), {"zoom": Zoom(factor=(0.37, 0.45))})(batch, 0, 0).images
    inner = shrunk[:, :, 16:28, 20:37]
    assert float((inner - 0.5).abs().max()) < 0.06


def test_resize_agrees_with_torchvision(make_batch):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    batch = make_batch(3)
    pipeline = Pipeline(DataSpec(3, 25, 31), {}, border="edge")
    expected = functional.resize(batch.images.float(), [25, 31], antialias=False)
    torch.testing.assert_close(pipeline.resize(batch).images, expected, atol=0.03, rtol=0)
    expected = functional.resize(batch.images.float() / 255, [25, 31], antialias=False)
    torch.testing.assert_close(pipeline.eval_transform(batch).images, expected, atol=1e-4, rtol=0)
