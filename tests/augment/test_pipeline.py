"""Invariants of the pipeline: an image does not depend on its batch or on other augmentations."""

import contextlib
from itertools import pairwise

import pytest
import torch

from cnntrain.augment.base import Augmentation, Geometry
from cnntrain.augment.color import Brightness, ColorJitter, Contrast, Invert
from cnntrain.augment.effects import CutMix, GaussianBlur, GaussianNoise, MixUp, RandomErasing
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
from cnntrain.augment.torchvision_transform import TorchvisionTransform
from cnntrain.augment.trivial_augment import TrivialAugment
from cnntrain.errors import UserError
from cnntrain.types import Batch, DataSpec

ITEMS: dict[str, Augmentation] = {
    "flip": HorizontalFlip(),
    "vertical_flip": VerticalFlip(),
    "crop": Crop(padding=3),
    "shift": Shift(pixels=2),
    "random_resized_crop": RandomResizedCrop(),
    "zoom": Zoom(factor=(0.4, 1.6)),
    "rotation": Rotation(degrees=50),
    "shear": Shear(),
    "perspective": Perspective(),
    "trivial_augment": TrivialAugment(),
    "jitter": ColorJitter(hue=0.1),
    "contrast": Contrast(strength=0.8),
    "invert": Invert(probability=0.5),
    "random_erasing": RandomErasing(),
    "blur": GaussianBlur(),
    "noise": GaussianNoise(),
}
SPEC = DataSpec(3, 12, 17, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
KEYPOINTS = DataSpec(3, 12, 17, keypoints=("left_eye", "right_eye"))
MASKS = DataSpec(3, 12, 17, classes=("sky", "road"), per_pixel=True)


def part(batch: Batch, rows: slice) -> Batch:
    targets = {name: values[rows] for name, values in batch.targets.items()}
    return Batch(batch.images[rows], targets, batch.index[rows], batch.position[rows])


@pytest.mark.parametrize("name", [*ITEMS, "all", "whole pixels"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_its_batch(make_batch, name, channels):
    """Bit by bit: not on the batch's size, nor on what else is in it."""
    chosen = {"all": list(ITEMS), "whole pixels": ["flip", "vertical_flip", "crop", "shift"]}.get(name, [name])
    spec = DataSpec(channels, 12, 17)
    pipeline = Pipeline(spec, {key: ITEMS[key] for key in chosen})
    batch = make_batch(11, channels=channels)
    whole = pipeline(batch, 1, 2)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 11)):
        assert torch.equal(pipeline(part(batch, rows), 1, 2).images, whole.images[rows])
    others = make_batch(11, channels=channels)
    others.images[1:] = 255 - others.images[1:]
    others.position[1:] += 1000
    assert torch.equal(pipeline(others, 1, 2).images[0], whole.images[0])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("names", [["flip", "crop"], ["rotation", "perspective", "jitter"], list(ITEMS)])
def test_grouped_batches_equal_single_batches(make_batch, monkeypatch, names, threads):
    """Bit by bit, wherever a group begins; what has no image, and what an effect may mix, stays by itself."""
    torch.set_num_threads(threads)
    spec = DataSpec(3, 40, 41, mean=SPEC.mean, std=SPEC.std)
    pipeline = Pipeline(spec, {name: ITEMS[name] for name in names})
    nothing = torch.zeros(0, dtype=torch.int64)
    ends = (0, 9, 18, 27, 30, 30, 41, 45)
    batches = [
        make_batch(stop - start, height=40, width=41, first=start)
        if stop > start
        else Batch(torch.zeros(0), {}, nothing, nothing)
        for start, stop in pairwise(ends)
    ]
    alone = [pipeline(batch, 1, 2) if len(batch) else batch for batch in batches]
    sizes: list[int] = []
    augment = Pipeline.__call__

    def counted(self: Pipeline, batch: Batch, seed: int, epoch: int) -> Batch:
        sizes.append(len(batch))
        return augment(self, batch, seed, epoch)

    monkeypatch.setattr(Pipeline, "__call__", counted)
    monkeypatch.setattr("cnntrain.augment.pipeline.MAX_GROUP", {"cpu": (4, 20 * 3 * 40 * 41)})
    for first in range(len(batches)):
        sizes.clear()
        got = list(pipeline.augment_batches(iter(batches[first:]), 1, 2, grouped=True))
        assert len(got) == len(batches) - first
        for one, other in zip(got, alone[first:], strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.position, other.position)
            assert one.targets.keys() == other.targets.keys()
            assert all(torch.equal(one.targets[name], other.targets[name]) for name in other.targets)
        if first == 0:
            assert sizes == ([9, 9, 9, 3, 11, 4] if len(names) == len(ITEMS) else [18, 12, 15])
    sizes.clear()
    asked: list[int] = []
    for _ in pipeline.augment_batches((asked.append(len(batch)) or batch for batch in batches), 1, 2):
        assert len(asked) == len(sizes) + asked.count(0)  # nothing is fetched beforehand
    assert sizes == [9, 9, 9, 3, 11, 4]


def test_random_numbers_depend_on_seed_epoch_and_position(make_batch):
    pipeline = Pipeline(SPEC, ITEMS)
    batch = make_batch(3)
    first = pipeline(batch, 1, 2)
    torch.manual_seed(99)
    assert torch.equal(pipeline(batch, 1, 2).images, first.images)
    assert not torch.equal(pipeline(batch, 2, 2).images, first.images)
    assert not torch.equal(pipeline(batch, 1, 3).images, first.images)
    batch.position += 1
    assert not torch.equal(pipeline(batch, 1, 2).images, first.images)


def test_random_numbers_do_not_depend_on_other_augmentations(make_batch):
    batch = make_batch(16)
    for name, item in ITEMS.items():
        if not isinstance(item, Geometry):
            continue
        alone = Pipeline(SPEC, {name: item})(batch, 1, 2).source_to_image
        rest = {key: other for key, other in ITEMS.items() if not isinstance(other, Geometry)}
        together = Pipeline(SPEC, {**rest, name: item})(batch, 1, 2).source_to_image
        assert alone is not None
        assert together is not None
        assert torch.equal(alone, together)
    flip_only = Pipeline(SPEC, {"flip": HorizontalFlip()})(batch, 1, 2).source_to_image
    with_crop = Pipeline(SPEC, {"crop": Crop(), "flip": HorizontalFlip()})(batch, 1, 2).source_to_image
    assert torch.equal(flip_only[:, 0, 0], with_crop[:, 0, 0])


def test_the_input_batch_is_not_modified(make_batch):
    batch = make_batch(5)
    batch.targets |= {
        "points": torch.rand(5, 2, 2) * 10,
        "valid": torch.ones(5, 2, dtype=torch.bool),
        "mask": torch.ones(5, 12, 17, dtype=torch.uint8),
    }
    before = {name: values.clone() for name, values in batch.targets.items()}
    images = batch.images.clone()
    for items in (ITEMS, {"flip": HorizontalFlip()}, {"mixup": MixUp()}, {}):
        Pipeline(SPEC, items)(batch, 1, 2)
        assert torch.equal(batch.images, images)
        assert batch.targets.keys() == before.keys()
        assert all(torch.equal(batch.targets[name], before[name]) for name in before)
        assert batch.source_to_image is None


def test_autocast_changes_nothing(make_batch):
    pipeline = Pipeline(SPEC, ITEMS)
    batch = make_batch(5)
    expected = pipeline(batch, 1, 2).images
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = pipeline(batch, 1, 2).images
        plain = pipeline.eval_transform(batch).images
    assert result.dtype == plain.dtype == torch.float32
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", [*ITEMS, "mixup", "cutmix", "all"])
def test_no_host_sync(make_batch, monkeypatch, name):
    """A meta tensor has no values: reading one, as waiting for a GPU would, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    mixing = {"mixup": MixUp(), "cutmix": CutMix()}
    items = {**ITEMS, "cutmix": CutMix()} if name == "all" else {name: (ITEMS | mixing)[name]}
    batch = make_batch(5)
    batch.images = batch.images.to("meta")
    batch.targets = {"label": batch.targets["label"].to("meta")}
    if name not in ("mixup", "cutmix", "all"):
        batch.targets = {
            "points": torch.zeros(5, 2, 2, device="meta"),
            "valid": torch.zeros(5, 2, dtype=torch.bool, device="meta"),
            "mask": torch.zeros(5, 12, 17, dtype=torch.uint8, device="meta"),
        }
    spec = DataSpec(3, 12, 17, keypoints=("l", "r"), flip_pairs=(1, 0)) if "points" in batch.targets else SPEC
    pipeline = Pipeline(spec, items)
    moved = pipeline(batch, 1, 2)
    assert moved.images.shape == (5, 3, 12, 17)
    assert moved.images.is_meta
    assert all(values.is_meta for values in moved.targets.values())
    assert pipeline.eval_transform(batch).images.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["whole pixels", "all"])
def test_a_gpu_gives_the_same_batch_without_host_sync(make_batch, name):
    items = ITEMS if name == "all" else {key: ITEMS[key] for key in ("flip", "crop", "shift", "jitter")}
    pipeline = Pipeline(SPEC, items)
    batch = make_batch(9)
    expected = pipeline(batch, 1, 2).images
    batch.images = batch.images.cuda()
    pipeline(batch, 1, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = pipeline(batch, 1, 2).images
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected, atol=2e-3, rtol=0)
    alone = pipeline(part(batch, slice(3, 4)), 1, 2).images
    assert torch.equal(alone[0], result[3])


def test_source_to_image_is_composed_with_the_matrix(make_batch):
    batch = make_batch(4)
    batch.source_to_image = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
    batch.source_to_image[:, 0, 0] = 0.25
    moved = Pipeline(SPEC, {"crop": Crop(), "flip": HorizontalFlip()})(batch, 1, 2)
    alone = make_batch(4)
    move = Pipeline(SPEC, {"crop": Crop(), "flip": HorizontalFlip()})(alone, 1, 2).source_to_image
    assert torch.equal(moved.source_to_image, move @ batch.source_to_image)
    plain = Pipeline(SPEC, {"crop": Crop(), "flip": HorizontalFlip()}).eval_transform(batch)
    assert torch.equal(plain.source_to_image, batch.source_to_image)


def test_eval_transform_uses_the_center_at_the_output_size(make_batch):
    batch = make_batch(2, height=20, width=30)
    spec = DataSpec(3, 20, 30)
    pipeline = Pipeline(spec, {"random_resized_crop": RandomResizedCrop(size=10)}, "edge")
    plain = pipeline.eval_transform(batch)
    assert plain.images.shape == pipeline(batch, 0, 0).images.shape == (2, 3, 10, 10)
    # The box is the largest square in the middle: columns 5 to 25, on its edges.
    edges = plain.source_to_image[0] @ torch.tensor([[4.5, 24.5], [-0.5, 19.5], [1, 1]], dtype=torch.float64)
    torch.testing.assert_close(edges[:2], torch.tensor([[-0.5, 9.5], [-0.5, 9.5]]).double())


def test_eval_transform_keeps_images_with_masks_whole() -> None:
    spec = DataSpec(1, 12, 16, ("a", "b"), per_pixel=True, ignore_index=255)
    pipeline = Pipeline(spec, {"crop": Crop(size=[6, 8], padding=0)})
    rows = torch.arange(2)
    batch = Batch(
        torch.rand(2, 1, 12, 16).mul(255).byte(), {"mask": torch.randint(0, 2, (2, 12, 16)).byte()}, rows, rows
    )
    assert pipeline(batch, 0, 0).images.shape[-2:] == (6, 8)
    plain = pipeline.eval_transform(batch)
    assert plain.images.shape[-2:] == (12, 16)
    assert torch.equal(plain.targets["mask"], batch.targets["mask"])


@pytest.mark.parametrize(
    ("spec", "items", "border", "words"),
    [
        (KEYPOINTS, {"my_flip": HorizontalFlip()}, "zero", ["augment.my_flip", "data.flip_pairs"]),
        (KEYPOINTS, {"up": VerticalFlip(probability=0.01)}, "zero", ["augment.up", "data.flip_pairs"]),
        (KEYPOINTS, {"zoom": Zoom()}, "reflect", ["border", "reflect", "zero or edge"]),
        (KEYPOINTS, {"mixup": MixUp()}, "zero", ["augment.mixup", "keypoints"]),
        (MASKS, {"mixup": MixUp()}, "zero", ["augment.mixup", "masks"]),
        (
            MASKS,
            {"odd": TorchvisionTransform(name="RandomRotation", arguments={"degrees": 3})},
            "zero",
            ["augment.odd", "RandomRotation may move pixels", "masks"],
        ),
        (
            KEYPOINTS,
            {"odd": TorchvisionTransform(name="RandomHorizontalFlip")},
            "zero",
            ["augment.odd", "RandomHorizontalFlip", "keypoints"],
        ),
        (SPEC, {"a": MixUp(), "b": CutMix()}, "zero", ["augment.a", "augment.b", "mixup_cutmix"]),
        (SPEC, {"net": torch.nn.ReLU()}, "zero", ["augment.net", "ReLU", "Geometry"]),
        (SPEC, {}, "reflekt", ["border", "did you mean 'reflect'"]),
        (SPEC, {"crop": Crop(size=40, padding=2)}, "zero", ["Crop", "40x40", "12x17"]),
        (DataSpec(4, 8, 8), {"jitter": Brightness()}, "zero", ["augment.jitter", "4"]),
    ],
)
def test_invalid_pipelines_name_the_key(spec, items, border, words):
    with pytest.raises(UserError) as caught:
        Pipeline(spec, items, border)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_valid_augmentations_for_keypoints():
    Pipeline(KEYPOINTS, {"flip": HorizontalFlip(probability=0.0), "rotation": Rotation(degrees=180)}, "edge")
    Pipeline(KEYPOINTS, {"auto": TorchvisionTransform(name="RandomAutocontrast")})
