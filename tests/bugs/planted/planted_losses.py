"""Tasks whose loss is not what it should be; otherwise sound."""

import torch
from torch import Tensor

from cnntrain.tasks.classification import Classification


class SumLoss(Classification):
    """A sum where a mean belongs: nothing counts the examples."""

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
    """Each loss compared with the largest of the batch."""

    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        sums, counts = super().losses(outputs - outputs.mean(0), targets, training)
        return sums, counts


class OffByOneInLoss(Classification):
    """The loss takes the class after the one that the metric counts as right."""

    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        other = {**targets, "label": (targets["label"] + 1) % self.num_classes}
        return super().losses(outputs, other, training)


class RoundedLoss(Classification):
    """Sound: computes in float32 whatever it is given."""

    def losses(self, outputs: Tensor, targets, training: bool = True) -> tuple[Tensor, Tensor]:
        return super().losses(outputs.to(torch.float32), targets, training)
