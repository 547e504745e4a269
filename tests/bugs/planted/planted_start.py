"""Networks with a bad initialization, or that see little of the image."""

import torch
from broken import Sound
from torch import Tensor, nn
from torch.nn import functional


class AllZero(Sound):
    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ZeroHead(Sound):
    """Sound: the outputs of a zero head are zero at first, but it learns from the first step on."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


class HugeHead(Sound):
    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        nn.init.normal_(self.head.weight, std=10.0)


class Huge(Sound):
    """All weights are 20 times too large."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter *= 20


class Deep(nn.Module):
    """Twelve layers without norms; `std` of their weights."""

    def __init__(self, in_channels: int, num_outputs: int, std: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(12):
            layers += [nn.Conv2d(in_channels if i == 0 else 16, 16, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(16, num_outputs)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean(dim=(2, 3)))


class PooledAway(Sound):
    """Averages the image before the first layer."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(functional.adaptive_avg_pool2d(images, 1).expand_as(images))


class PooledToFour(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(functional.interpolate(functional.adaptive_avg_pool2d(images, 2), images.shape[2:]))


class BrightestPixel(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(functional.adaptive_max_pool2d(images, 1).expand_as(images))


class OneCorner(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[..., :3, :3])


class SmallDense(nn.Module):
    """Sound: one dense layer, softmax regression."""

    def __init__(self, in_channels: int, num_outputs: int, image_size: list[int]) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels * image_size[0] * image_size[1], num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


class PoolFirst(Sound):
    """Sound: max-pools the image before the first convolution."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(functional.max_pool2d(images, 2))
