"""Custom networks and tasks with one fault each; the config files in this folder refer to them."""

import torch
from torch import Tensor, nn

from cnntrain.tasks.classification import Classification


class Sound(nn.Module):
    """A small network without a fault; the others are variants of it."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32 * 4, num_outputs)

    def features(self, images: Tensor) -> Tensor:
        x = torch.relu(self.first(images))
        x = torch.relu(self.second(x))
        return nn.functional.adaptive_max_pool2d(x, 2).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Detached(Sound):
    def features(self, images: Tensor) -> Tensor:
        x = torch.relu(self.first(images)).detach()
        return nn.functional.adaptive_max_pool2d(torch.relu(self.second(x)), 2).flatten(1)


class FrozenFirst(Sound):
    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        self.first.requires_grad_(False)


class IgnoresImage(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(torch.ones_like(images))


class DeadRelus(Sound):
    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        nn.init.constant_(self.second.bias, -100.0)


class SoftmaxInside(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(dim=1)


class FlippedSign(Classification):
    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        sums, counts = super().losses(outputs, targets, training)
        return -sums, counts


class BlindToLabel(Classification):
    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        blind = {**targets, "label": torch.zeros_like(targets["label"])}
        return super().losses(outputs, blind, training)
