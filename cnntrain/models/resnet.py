"""ResNet-18/34/50/101/152, with torchvision's modules and state-dict keys.

Source: He et al. 2016, Deep Residual Learning for Image Recognition, table 1. The bottleneck has its stride in the 3x3
convolution, as in torchvision ("v1.5"); in the paper it is in the first 1x1 convolution.
"""

import logging
from collections.abc import Sequence
from functools import cache

from torch import Tensor, nn

from cnntrain.errors import UserError
from cnntrain.models.norm_act import check_choice
from cnntrain.types import format_shape

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_SMALL_STEM_MAX_PX = 64


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (figure 5, left)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut; the last has four times the width (figure 5, right)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + shortcut)


class ResNet(nn.Module):
    """(N, C, H, W) -> (N, num_outputs), for any image size.

    Args:
        depth: 18, 34, 50, 101 or 152.
        stem: imagenet (7x7 stride 2, then 3x3 max pool stride 2), small (3x3 stride 1, no pool), or auto: small if the
            longer side of the images is at most 64 px. The attribute `stem` holds the choice.
        zero_init_last_norm: initialize every block as the identity (Goyal et al. 2017, section 5.1).
    """

    head_names = ("fc",)

    def __init__(
        self,
        *,
        depth: int,
        in_channels: int,
        num_outputs: int,
        image_size: Sequence[int],
        stem: str = "auto",
        zero_init_last_norm: bool = False,
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise UserError(f"model.depth: {depth!r} is not one of {', '.join(map(str, _BLOCKS))}")
        self.stem = choose_stem(stem, image_size)
        block = BasicBlock if depth < 50 else Bottleneck
        small = self.stem == "small"
        self.conv1 = nn.Conv2d(in_channels, 64, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, channels = _stage(block, 64, 64, _BLOCKS[depth][0], stride=1)
        self.layer2, channels = _stage(block, channels, 128, _BLOCKS[depth][1], stride=2)
        self.layer3, channels = _stage(block, channels, 256, _BLOCKS[depth][2], stride=2)
        self.layer4, channels = _stage(block, channels, 512, _BLOCKS[depth][3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_last_norm and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def choose_stem(stem: str, image_size: Sequence[int]) -> str:
    """Return 'small' or 'imagenet'; 'auto' depends on the longer side of the images and is logged."""
    check_choice("stem", stem, ("auto", "small", "imagenet"))
    if stem != "auto":
        return stem
    chosen = "small" if max(image_size) <= _SMALL_STEM_MAX_PX else "imagenet"
    log_stem(chosen, format_shape(image_size))
    return chosen


@cache  # once per process
def log_stem(chosen: str, size: str) -> None:
    layers = "3x3, stride 1, no max pool" if chosen == "small" else "7x7, stride 2, then max pool"
    logging.getLogger("cnntrain").info("model.stem=auto: %s (%s) for images of %s px", chosen, layers, size)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, count: int, stride: int
) -> tuple[nn.Sequential, int]:
    """Return `count` blocks, the first with `stride`, and their number of output channels."""
    out_channels = width * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    blocks = [block(in_channels, width, stride, downsample)]
    blocks += [block(out_channels, width, 1, None) for _ in range(1, count)]
    return nn.Sequential(*blocks), out_channels
