"""What does not fit is refused before the first step, by name; and transforms of torchvision in YAML."""

import pickle

import pytest
import torch

from cnntrain.augment.color import Brightness, ColorJitter, Hue
from cnntrain.augment.geometry import Crop, HorizontalFlip, Shift, VerticalFlip
from cnntrain.augment.mix import Cutmix, Mixup
from cnntrain.augment.pipeline import Pipeline
from cnntrain.augment.torchvision_transform import TorchvisionTransform
from cnntrain.augment.warp import Perspective, RandomResizedCrop, Rotation, Zoom
from cnntrain.errors import UserError
from cnntrain.types import DataSpec

SPEC = DataSpec(3, 12, 17)
KEYPOINTS = DataSpec(3, 12, 17, keypoints=("left_eye", "right_eye"))
MASKS = DataSpec(3, 12, 17, classes=("sky", "road"), per_pixel=True)


@pytest.mark.parametrize(
    ("spec", "items", "border", "words"),
    [
        (KEYPOINTS, {"my_flip": HorizontalFlip()}, "zero", ["augment.my_flip", "data.flip_pairs"]),
        (KEYPOINTS, {"up": VerticalFlip(probability=0.01)}, "zero", ["augment.up", "data.flip_pairs"]),
        (KEYPOINTS, {"zoom": Zoom()}, "reflect", ["border", "reflect", "zero or edge"]),
        (KEYPOINTS, {"mixup": Mixup()}, "zero", ["augment.mixup", "keypoints"]),
        (MASKS, {"mixup": Mixup()}, "zero", ["augment.mixup", "masks"]),
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
        (SPEC, {"a": Mixup(), "b": Cutmix()}, "zero", ["augment.a", "augment.b", "mixup_cutmix"]),
        (SPEC, {"net": torch.nn.ReLU()}, "zero", ["augment.net", "ReLU", "Geometry"]),
        (SPEC, {}, "reflekt", ["border", "did you mean 'reflect'"]),
        (SPEC, {"crop": Crop(size=40, padding=2)}, "zero", ["Crop", "40x40", "12x17"]),
        (DataSpec(4, 8, 8), {"jitter": Brightness()}, "zero", ["augment.jitter", "4"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(spec, items, border, words):
    with pytest.raises(UserError) as caught:
        Pipeline(spec, items, border)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_fits_keypoints_is_not_refused():
    Pipeline(KEYPOINTS, {"flip": HorizontalFlip(probability=0.0), "rotation": Rotation(degrees=180)}, "edge")
    Pipeline(KEYPOINTS, {"auto": TorchvisionTransform(name="RandomAutocontrast")})


@pytest.mark.parametrize(
    "make",
    [
        lambda: HorizontalFlip(probability=1.5),
        lambda: Crop(padding=-1),
        lambda: Crop(size=[1, 2, 3]),
        lambda: Shift(pixels=-1),
        lambda: Brightness(strength=-0.1),
        lambda: Brightness(strength=float("nan")),
        lambda: Brightness(strength=[1.2, 0.8]),
        lambda: Hue(strength=0.7),
        lambda: ColorJitter(contrast=[0.5]),
        lambda: Zoom(factor=2.0),
        lambda: Zoom(factor=(0.0, 1.0)),
        lambda: Perspective(distortion=0.9),
        lambda: Mixup(alpha=0),
        lambda: Mixup(alpha=float("nan")),
        lambda: RandomResizedCrop(scale=(0.5, 1.5)),
        lambda: TorchvisionTransform(name="RandomHorizontalFlop"),
        lambda: TorchvisionTransform(name="RandomAutocontrast", arguments={"q": 1}),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(UserError, match="augment: "):
        make()


def test_a_wrong_transform_name_gets_the_near_miss():
    with pytest.raises(UserError, match="did you mean 'RandomAutocontrast'"):
        TorchvisionTransform(name="RandomAutoContrast")


def test_torchvision_transforms_are_functions_of_seed_epoch_position_and_key(make_batch):
    items = {"a": TorchvisionTransform(name="RandomAffine", arguments={"degrees": 40, "shear": [5, 9]})}
    pipeline = Pipeline(SPEC, items)
    transform = pipeline.sample_transform(1, 2)
    assert transform is not None
    image = make_batch(1).images[0]
    state = torch.get_rng_state()
    first = transform(image, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(image, 5), first)
    assert not torch.equal(transform(image, 6), first)
    other = Pipeline(SPEC, items).sample_transform(1, 3)
    assert other is not None
    assert not torch.equal(other(image, 5), first)
    assert Pipeline(SPEC, {}).sample_transform(1, 2) is None


def test_torchvision_transforms_must_keep_shape_and_type(make_batch):
    transform = TorchvisionTransform(name="Resize", arguments={"size": [4, 4]})
    with pytest.raises(UserError, match="keep shape and type"):
        transform(make_batch(1).images[0], 0)
