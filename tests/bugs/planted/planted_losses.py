"""Tasks with a wrong loss."""

import torch
from torch import Tensor

from cnntrain.tasks.classification import Classification


class SumLoss(Classification):
    """A sum instead of a mean over the examples."""

    def loss(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        total, count = super().loss(outputs, targets, training)
        return total, torch.ones_like(count)


class MeanOfMean(Classification):
    """Divided by the size of the batch twice."""

    def loss(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        total, count = super().loss(outputs, targets, training)
        return total / len(outputs), count


class SoftmaxInLoss(Classification):
    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        return super().losses(outputs.softmax(1), targets, training)


class NotDifferentiable(Classification):
    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        wrong = (outputs.argmax(1) != targets["label"]).float()
        return wrong, torch.ones_like(wrong)


class MixedLosses(Classification):
    """Each loss relative to the largest of the batch."""

    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        sums, counts = super().losses(outputs - outputs.mean(0), targets, training)
        return sums, counts


class OffByOneInLoss(Classification):
    """The loss uses the class after the correct one."""

    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        other = {**targets, "label": (targets["label"] + 1) % self.num_classes}
        return super().losses(outputs, other, training)


class RoundedLoss(Classification):
    """Sound: always computes in float32."""

    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        return super().losses(outputs.to(torch.float32), targets, training)
