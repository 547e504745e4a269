"""What every task offers to the training step and to the commands."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnntrain.tasks.meter import Meter
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Meter", "Targets", "Task"]

Targets = Mapping[str, Tensor]
Size = tuple[int, int]  # (height, width) in pixels


class Task(ABC):
    """The opinions about a data set: which outputs, which loss, which metrics, how to draw an answer.

    A task lives on the CPU and works on whatever device its inputs are on. Losses are kept as a sum and a
    count per example, so that a mean over accumulated or short batches, or over processes, is total sum over
    total count.

    Attributes:
        num_outputs: numbers (or channels) that the model gives.
        monitor: the metric that chooses the best checkpoint and which end of it is best, e.g. `('top1',
            'max')`.
        monitor_range: the lowest and highest value that the metric can take; infinite where there is no limit.
        output_scale: of maps, output pixels per image pixel of the network, where `settle` has measured it.
    """

    output_scale: float | None = None
    num_outputs: int
    monitor: tuple[str, str]
    monitor_range: tuple[float, float] = (-math.inf, math.inf)

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def prepare(self, targets: Targets) -> None:  # noqa: B027  (most tasks need nothing)
        """Learn what the task needs from the training targets (class counts for balanced weights). Call
        before the first training step; evaluation does without."""

    def settle(self, output_size: Callable[[Size], Size | None], sizes: Sequence[Size]) -> None:  # noqa: B027
        """Find out how the network's outputs meet the targets, before any data is read.

        Args:
            output_size: tells the size of the output map for images of a size; None where there is no such map.
            sizes: of the images that the network will see, in training and in evaluation.

        Raises:
            UserError: they don't fit.
        """

    def output_shape(self) -> tuple[int | None, ...] | None:
        """The shape that a model's output for an image must have; None for a side that may have any length (maps), or
        where the task takes anything."""
        return None

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Targets, plain: bool = False) -> tuple[Tensor, Tensor]:
        """Loss of each example as (sum, count), both (N,) float32 on the device.

        Args:
            outputs: the model's, of any float type.
            targets: as in `Batch.targets`.
            plain: leave out what only helps training (label smoothing, class weights): for validation.
        """

    def loss(self, outputs: Tensor, targets: Targets, plain: bool = False) -> tuple[Tensor, Tensor]:
        """Loss of a batch as (sum, count), scalars on the device; the mean loss is sum / count. No host
        sync."""
        sums, counts = self.losses(outputs, targets, plain)
        return sums.sum(), counts.sum()

    @abstractmethod
    def min_loss(self, plain: bool = False) -> float:
        """The smallest mean training loss (or plain loss, without label smoothing) that any outputs can reach."""

    def learned_loss(self, uninformed: float) -> float:
        """The mean plain loss at which examples count as learned by heart: a fiftieth of the way left from
        `uninformed`, the loss of an answer that knows nothing, to the lowest."""
        lowest = self.min_loss(plain=True)
        return lowest + 0.02 * max(uninformed - lowest, 0.0)

    @torch.no_grad()
    def uninformed_loss(self, targets: Targets, outputs: Tensor | None = None) -> float:
        """Mean loss of the answer that knows nothing: all outputs zero (ln C for C classes).

        Args:
            outputs: outputs whose shape is to be used, where the task alone can't know it (heat maps).
        """
        zeros = self.zero_outputs(targets) if outputs is None else torch.zeros_like(outputs)
        loss_sum, loss_count = self.loss(zeros, targets, plain=True)
        return float(loss_sum / loss_count)

    @abstractmethod
    def zero_outputs(self, targets: Targets) -> Tensor:
        """Zeros in the shape that a model's outputs would have for `targets`."""

    @abstractmethod
    def meter(self) -> Meter:
        """A fresh collector of this task's metrics."""

    @abstractmethod
    def answers(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """What the outputs say, one row per example, for people and CSV files. Needs no truth in `targets`
        (keypoints: `source_to_image` is used where present, to answer in the source image's pixels)."""

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """(N, C): how likely each class is, for a task that gives an image one class; None for others."""
        return None

    def masks(self, outputs: Tensor, size: tuple[int, int]) -> Tensor | None:
        """(N, H, W) uint8 on the CPU: the answer's ids for images of `size`, for a task of pixels; None for others."""
        return None

    @abstractmethod
    def rows(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Truth, answer and plain loss, one row per example: what `evaluate` writes."""

    @abstractmethod
    def mistake_score(self, outputs: Tensor, targets: Targets) -> Tensor:
        """(N,) on the device: how badly wrong each answer is, and how surely; 0 or less where it is right."""

    @abstractmethod
    def figures(self, meter: Meter) -> dict[str, Figure]:
        """Pictures of a whole pass, by name, e.g. `confusion_matrix`."""

    @abstractmethod
    def draw(
        self,
        images: Tensor,
        outputs: Tensor | None,
        targets: Targets,
        names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Figure:
        """A grid of images with what the model answered and what is true.

        Args:
            images: (N, C, H, W) float, normalized by `mean` and `std` (0-1 scale, per channel).
            outputs: the model's for these images; None draws the truth alone.
            targets: as in `Batch.targets`; a truth that is absent is not drawn.
            names: N captions: ids of the examples.
        """
