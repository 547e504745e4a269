"""Base class of tasks: outputs, loss, metrics and plots of a problem."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cnntrain.config.renamed_keys import renamed
from cnntrain.errors import UserError, suggest
from cnntrain.tasks.meter import Meter
from cnntrain.types import DataSpec, Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Targets = Mapping[str, Tensor]


class Task(ABC):
    """Everything that depends on the problem: outputs, loss, metrics, and how predictions are drawn.

    A task is not a module and stays on the CPU; it works on the device of its inputs. Losses are sums and counts per
    example, so that the mean over accumulated batches, short batches or several ranks is total sum / total count.

    Attributes:
        num_outputs: number of outputs (or output channels) of the model.
        monitor: the metric that selects the best checkpoint and its direction, for example `('top1', 'max')`.
        monitor_range: lowest and highest possible value of that metric.
        output_scale: for tasks with output maps, output pixels per input pixel of the network, if measured by
            `configure_outputs`.
    """

    output_scale: float | None = None
    num_outputs: int
    monitor: tuple[str, str]
    monitor_range: tuple[float, float] = (-math.inf, math.inf)

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec

    def prepare(self, targets: Targets) -> None:  # noqa: B027  (optional)
        """Read what the loss needs from the training targets, such as class counts for balanced weights.

        Called before the first training step, not for evaluation.
        """

    def configure_outputs(self, output_size: Callable[[Size], Size | None], sizes: Sequence[Size]) -> None:  # noqa: B027
        """Determine how output maps of the network correspond to the targets, before data is read.

        Args:
            output_size: returns the size of the output map for an image size; None if the output is not a map.
            sizes: sizes of the images in training and evaluation.
        """

    def output_shape(self) -> tuple[int | None, ...] | None:
        """Return the required output shape for one image; None for a side of any length, or if any shape is valid."""
        return None

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Targets, training: bool = True) -> tuple[Tensor, Tensor]:
        """Return the loss of each example as (sum, count), both (N,) float32 on the device.

        `outputs` may have any floating-point type. `training=False` leaves out label smoothing and class weights.
        """

    def loss(self, outputs: Tensor, targets: Targets, training: bool = True) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch as (sum, count), scalars on the device, without a host sync."""
        sums, counts = self.losses(outputs, targets, training)
        return sums.sum(), counts.sum()

    def min_loss(self, training: bool = True) -> float:
        """Return the smallest possible mean loss; above 0 with label smoothing."""
        return 0.0

    def memorized_loss(self, uninformed: float) -> float:
        """Return the mean validation loss below which examples count as memorized.

        It is the minimum plus 2 % of the way to `uninformed`, the loss of constant outputs.
        """
        lowest = self.min_loss(training=False)
        return lowest + 0.02 * max(uninformed - lowest, 0.0)

    @torch.no_grad()
    def uninformed_loss(self, targets: Targets, outputs: Tensor) -> float:
        """Return the mean validation loss of all-zero outputs (ln C for C classes) in the shape of `outputs`."""
        loss_sum, loss_count = self.loss(torch.zeros_like(outputs), targets, training=False)
        return float(loss_sum / loss_count)

    @abstractmethod
    def meter(self) -> Meter:
        """Return a new meter of the metrics of this task."""

    @abstractmethod
    def predictions(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Return the prediction for each example as a row of a table. Does not need ground truth.

        Keypoints are given in pixels of the source file if `targets` has `source_to_image`.
        """

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """Return class probabilities (N, C); None for tasks without one class per image."""
        return None

    def masks(self, outputs: Tensor, size: Size) -> Tensor | None:
        """Return predicted masks (N, H, W) uint8 on the CPU for images of `size`; None for tasks without masks."""
        return None

    def mask_columns(self, mask: np.ndarray) -> dict[str, float]:
        """Return columns for a row of predictions, from a mask (H, W) uint8 of class ids."""
        return {}

    @abstractmethod
    def per_example(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Return ground truth, prediction and validation loss of each example as a row of a table."""

    @abstractmethod
    def mistake_score(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Return (N,) on the device: how wrong and how confident each prediction is; 0 or less if it is right."""

    @abstractmethod
    def figures(self, meter: Meter) -> dict[str, Figure]:
        """Return figures of the metrics of an epoch by name, for example `confusion_matrix`."""

    @abstractmethod
    def draw(self, images: Tensor, outputs: Tensor | None, targets: Targets, names: Sequence[str]) -> Figure:
        """Plot normalized images (N, C, H, W) with predictions and ground truth, captioned by `names`.

        Without outputs, only the ground truth is plotted. Missing targets are not plotted.
        """


def check_number(key: str, value: object, low: float, high: float = math.inf, exclude_low: bool = False) -> float:
    """Return `value` as a float; raise `UserError` if it is not in [low, high), or (low, high) with `exclude_low`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and low <= value < high and not (exclude_low and value == low):  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    above = f"above {low:g}" if exclude_low else f"{low:g} or more"
    below = f" and below {high:g}" if math.isfinite(high) else ""
    raise UserError(f"{key}: must be a number, {above}{below}; got {value!r}")


def check_choice(key: str, value: object, choices: Sequence[str]) -> str:
    """Return `value`; raise `UserError` with the closest choice if it is not one of `choices`."""
    if value in choices:
        return str(value)
    hint = renamed(key, value) or suggest(str(value), list(choices))
    raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}{hint}")
