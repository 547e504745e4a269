"""Plain and residual networks for CIFAR, of depth 6n + 2.

Source: He et al. 2016, Deep Residual Learning for Image Recognition, section 4.2.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from cnntrain.errors import UserError
from cnntrain.models.norm_act import PadShortcut, check_choice

SHORTCUTS = ("pad", "projection", "none")
MAX_DEPTH = 6 * 500 + 2  # the deepest network in He et al. 2016 has 1202 layers


class CifarBlock(nn.Module):
    """Two 3x3 convolutions, with or without a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if shortcut == "none":
            return
        if in_channels == width:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(width - in_channels, stride)
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self.relu2(out)


class CifarResNet(nn.Module):
    """(N, C, H, W) -> (N, num_outputs): stages of 16, 32 and 64 channels, global average pool, dense layer.

    Args:
        depth: number of layers with weights, 6n + 2.
        shortcut: pad (option A, without parameters), projection (option B), or none (the plain network).
    """

    head_names = ("fc",)

    def __init__(
        self, *, depth: int, in_channels: int, num_outputs: int, image_size: Sequence[int], shortcut: str = "pad"
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            below = max(8, (depth - 2) // 6 * 6 + 2)
            raise UserError(f"model.depth: {depth} is not 6n + 2; the nearest are {below} and {below + 6}")
        if depth > MAX_DEPTH:
            raise UserError(f"model.depth: {depth} is too deep; the maximum is {MAX_DEPTH}")
        check_choice("shortcut", shortcut, SHORTCUTS)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        stages, channels = [], 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            blocks = []
            for i in range((depth - 2) // 6):
                blocks.append(CifarBlock(channels, width, stride if i == 0 else 1, shortcut))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stage1, self.stage2, self.stage3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.avgpool(x).flatten(1))
