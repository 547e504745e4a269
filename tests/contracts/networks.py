"""The files of conf/model: numbers in their headers, and the smallest image that each network accepts.

A file's header states its parameters and its native size: `N parameters for CxHxW images and K classes`.
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MASKS = ("fcn", "torchvision_segmentation", "unet", "unet_small")
# Slow networks; smaller ones of the same families are always tested.
COSTLY = ("densenet161", "densenet169", "densenet201", "resnet101", "resnet152", "vgg16", "vgg19", "wide_resnet50")
# Smallest square image that a network accepts, in pixels, if 8 is too small.
SMALLEST_PX = {
    "keypoint_cnn": 16,
    "alexnet": 67,
    "alexnet_torchvision": 63,
    "densenet121": 29,
    "densenet161": 29,
    "densenet169": 29,
    "densenet201": 29,
    "dogs_cats_cnn": 24,
    "googlenet": 31,
    "inception_v3": 75,
    "lenet5_1998": 16,
    "squeezenet": 21,
    "unet": 16,
    "unet_small": 16,
} | {name: 32 for name in NAMES if name.startswith("vgg")}


class Header(NamedTuple):
    parameters: int
    channels: int
    size: tuple[int, int]
    outputs: int


@cache
def header(name: str) -> Header:
    text = (FOLDER / f"{name}.yaml").read_text()
    found = re.search(r"([\d,]+) parameters for (\d+)x(\d+)x(\d+) images and (\d+) (?:classes|output)", text)
    assert found, f"{name}.yaml does not state its parameters and native size"
    parameters, channels, height, width, outputs = (int(group.replace(",", "")) for group in found.groups())
    return Header(parameters, channels, (height, width), outputs)
