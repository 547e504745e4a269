"""Drawn datasets: reproducible, with exact labels, and not symmetric."""

import numpy as np
import pytest
import torch

from cnntrain.data.load import load_data
from cnntrain.data.sources.toys import CLASSES, ToyFaces, ToyShapes, _Drawing, _ring, draw_face, draw_shapes
from cnntrain.errors import UserError


@pytest.mark.parametrize("source", [ToyFaces, ToyShapes])
def test_drawings_depend_on_the_seed_and_not_on_the_count(source):
    first, longer, other = (
        source(size=32, train_count=n, test_count=2, seed=s).load() for n, s in ((4, 0), (6, 0), (4, 1))
    )
    assert torch.equal(first["train"].images, longer["train"].images[:4])
    for name, target in first["train"].targets.items():
        assert torch.equal(target, longer["train"].targets[name][:4])
    assert not torch.equal(first["train"].images, other["train"].images)
    assert not torch.equal(first["train"].images[:2], first["test"].images)
    assert first["train"].fingerprint() != other["train"].fingerprint()


@pytest.mark.parametrize("source", [ToyFaces, ToyShapes])
def test_invalid_arguments_name_their_key(source):
    for arguments, key in (
        ({"size": 4}, "data.size"),
        ({"train_count": 0}, "data.train_count"),
        ({"train_count": 1_000_001}, "data.train_count"),
        ({"test_count": 10**12}, "data.test_count"),
    ):
        with pytest.raises(UserError, match=key):
            source(**arguments)


def test_drawn_pixels_are_at_their_coordinates():
    for x, y in ((20.0, 30.0), (31.4, 17.7)):
        drawing = _Drawing(64, (0, 0, 0))
        drawing.polygon(_ring(48) * 6 + (x, y), (255, 255, 255))
        weights = np.asarray(drawing.image.reduce(3), dtype=np.float64)[..., 0]
        ys, xs = np.mgrid[:64, :64]
        centroid = (weights * xs).sum() / weights.sum(), (weights * ys).sum() / weights.sum()
        assert np.hypot(centroid[0] - x, centroid[1] - y) < 0.1


def test_eyes_are_at_their_labels():
    """Averaged over many cats, a pupil is darker than what is around it."""
    pupils, rims = [], []
    for seed in range(60):
        image, points = draw_face(64, seed)
        gray = image.mean(-1)
        for x, y in np.rint(points[:2]).astype(int):
            pupils.append(gray[y, x])
            rims.append(gray[y - 2 : y + 3, x - 2 : x + 3].mean())
    assert np.mean(pupils) < 0.8 * np.mean(rims)


def test_flip_pairs_fit_the_mean_shape():
    source = ToyFaces(size=32, train_count=200, test_count=1)
    spec = source.spec()
    assert spec.flip_pairs == (1, 0, 2, 8, 7, 6, 5, 4, 3)
    targets = source.load()["train"].targets
    assert targets["valid"].float().mean() > 0.97
    mean = (targets["points"] * targets["valid"][..., None]).sum(0) / targets["valid"].sum(0)[:, None]
    mean = mean - mean.mean(0)
    mirrored = mean * torch.tensor([-1.0, 1.0])
    permutation = list(spec.flip_pairs)
    right = (mirrored[permutation] - mean).norm()
    assert right < 0.3 * (mirrored - mean).norm()
    for a in range(9):
        for b in range(a):
            swapped = permutation.copy()
            swapped[a], swapped[b] = swapped[b], swapped[a]
            assert (mirrored[swapped] - mean).norm() > right


def test_masks_contain_all_classes_and_shapes_are_uniform():
    source = ToyShapes(size=32, train_count=30, test_count=2)
    data = load_data(source)
    assert data.spec.classes == CLASSES
    masks = data.train.targets["mask"]
    assert masks.unique().tolist() == list(range(len(CLASSES)))
    assert (masks == 0).float().mean() < 0.9


def test_masks_agree_with_the_image():
    """Where the class changes, so does the color, far more than elsewhere."""
    across, within = [], []
    for seed in range(20):
        image, mask = draw_shapes(64, seed)
        step = np.abs(np.diff(image.astype(float), axis=1)).mean(-1)
        edge = np.diff(mask.astype(int), axis=1) != 0
        across.append(step[edge].mean())
        within.append(step[~edge].mean())
    assert np.mean(across) > 2.5 * np.mean(within)


def test_left_and_right_are_the_cats_own() -> None:
    """As in the datasets of real faces; with its head upright a cat's own left is on the right of the picture."""
    source = ToyFaces(size=64, train_count=40, test_count=1)
    names, train = source.spec().keypoints, source.load()["train"]
    x = {name: train.targets["points"][:, i, 0] for i, name in enumerate(names)}
    seen = {name: train.targets["valid"][:, i] for i, name in enumerate(names)}
    for part in ("eye", "ear_1", "ear_2", "ear_3"):
        both = seen[f"left_{part}"] & seen[f"right_{part}"]
        assert both.sum() > 20
        assert (x[f"left_{part}"] > x[f"right_{part}"])[both].float().mean() > 0.9
