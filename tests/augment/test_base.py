"""Settings of augmentations are checked when they are created."""

import pytest

from cnntrain.augment.color import Brightness, ColorJitter, Hue
from cnntrain.augment.effects import MixUp
from cnntrain.augment.geometry import Crop, HorizontalFlip, Perspective, RandomResizedCrop, Shift, Zoom
from cnntrain.augment.torchvision_transform import TorchvisionTransform
from cnntrain.errors import UserError


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
        lambda: MixUp(alpha=0),
        lambda: MixUp(alpha=float("nan")),
        lambda: RandomResizedCrop(scale=(0.5, 1.5)),
        lambda: TorchvisionTransform(name="RandomHorizontalFlop"),
        lambda: TorchvisionTransform(name="RandomAutocontrast", arguments={"q": 1}),
    ],
)
def test_settings_out_of_range_raise(make):
    with pytest.raises(UserError, match="augment: "):
        make()
