"""Semantic segmentation: cross-entropy, Dice or their sum; mean IoU from one confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cnntrain.errors import UserError
from cnntrain.plots.charts import plot_bars, plot_confusion_matrix
from cnntrain.plots.images import plot_masks, unnormalize
from cnntrain.tasks.class_weights import ClassWeights, ClassWeightsSetting
from cnntrain.tasks.meter import Meter, count_pairs, ratio
from cnntrain.tasks.task import Targets, Task, check_choice
from cnntrain.types import DataSpec, Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Pixels by which an image is enlarged to measure the scale of the output map: divisible by strides of 3 and of powers
# of 2.
SCALE_TEST_PX = 384


class Segmentation(Task):
    """One class per pixel. Pixels with the ignore index are excluded from the loss and the metrics.

    Targets: `mask` (N, H, W) uint8 class ids. Outputs: (N, C, h, w). Losses are sums over labeled pixels (the Dice loss
    of an image is multiplied by their number), so that the mean over a dataset does not depend on the batches.

    Args:
        spec: metadata of the dataset, with its `classes`.
        loss: 'cross_entropy', 'dice', or their sum 'ce_dice'.
        class_weights: for the cross-entropy: one number per class, {class: weight}, or 'balanced' (inversely
            proportional to the pixels of the class in the training data).
        resize_outputs: how outputs of another size are matched to the mask. 'upsample': bilinear, with aligned
            corners. 'crop': crop the larger of the two about its center, for networks without padding. 'auto': crop at
            equal scale, upsample coarser maps of the whole image, and raise UserError otherwise. The scale is
            measured by `configure_outputs`; without it, 'auto' upsamples outputs whose size is that of the mask divided
            by a power of 2.
    """

    def __init__(
        self,
        spec: DataSpec,
        loss: str = "cross_entropy",
        class_weights: ClassWeightsSetting = None,
        resize_outputs: str = "auto",
    ) -> None:
        super().__init__(spec)
        if len(spec.classes) < 2:
            raise UserError("task: segmentation needs data with 2 mask classes or more; try data=toy_shapes")
        self.loss_name = check_choice("task.loss", loss, ("cross_entropy", "dice", "ce_dice"))
        choices = ("auto", "upsample", "crop")
        self.resize_outputs = check_choice("task.resize_outputs", resize_outputs, choices)
        self.class_weights = ClassWeights(class_weights, spec.classes)
        self.num_classes = self.num_outputs = len(spec.classes)
        self.ignore_index = spec.mask_fill
        self.monitor = ("miou", "max")
        self.monitor_range = (0.0, 1.0)

    def output_shape(self) -> tuple[int | None, ...]:
        return (self.num_outputs, None, None)

    def prepare(self, targets: Targets) -> None:
        if "mask" in targets and bool((targets["mask"] == self.ignore_index).all()):
            raise UserError(
                f"data: the training masks have no labeled pixel: all pixels have the ignore index {self.ignore_index} "
                "(data.ignore_index)"
            )
        if self.class_weights.balanced:
            if "mask" not in targets:
                raise UserError(
                    "task.class_weights: balanced needs all masks in memory, but they are read from disk; set "
                    "data.cache=ram, or give one number per class"
                )
            counts = torch.bincount(targets["mask"].flatten().cpu(), minlength=256)
            counts[self.ignore_index] = 0
            self.class_weights.set_counts(counts[: self.num_classes])

    def configure_outputs(self, output_size: Callable[[Size], Size | None], sizes: Sequence[Size]) -> None:
        output_sizes = {size: output_size(size) for size in dict.fromkeys(sizes)}
        others = {size: out for size, out in output_sizes.items() if out is not None and out != size}
        if not others or self.resize_outputs != "auto":
            return
        (height, width), before = next(iter(others.items()))
        after = output_size((height + SCALE_TEST_PX, width + SCALE_TEST_PX))
        if after is not None:
            scales = {(large - small) / SCALE_TEST_PX for small, large in zip(before, after, strict=True)}
            self.output_scale = scales.pop() if len(scales) == 1 else None
        for size, out in others.items():
            self._choose_resizing(out, size)

    def match_sizes(self, outputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs (N, C, h, w) float32 and mask (N, H, W) int64 at the same size, see `resize_outputs`."""
        outputs, mask = outputs.float(), mask.long()
        output_size, mask_size = tuple(outputs.shape[-2:]), tuple(mask.shape[-2:])
        if output_size == mask_size:
            return outputs, mask
        if self._choose_resizing(output_size, mask_size) == "upsample":
            return F.interpolate(outputs, mask_size, mode="bilinear", align_corners=True), mask
        height, width = min(output_size[0], mask_size[0]), min(output_size[1], mask_size[1])
        return center_crop(outputs, height, width), center_crop(mask, height, width)

    def _choose_resizing(self, output_size: tuple[int, ...], mask_size: tuple[int, ...]) -> str:
        """Return 'crop' or 'upsample' for sizes (height, width) that differ."""
        if self.resize_outputs != "auto":
            return self.resize_outputs
        resizing = choose_resizing(output_size, mask_size, self.output_scale)
        if resizing is None:
            sizes = "{}x{} px for masks of {}x{} px".format(*output_size, *mask_size)
            raise UserError(
                f"task.resize_outputs=auto: the network's outputs are {sizes}; it is unclear whether they cover "
                "the whole image; set task.resize_outputs=upsample if they do, or task.resize_outputs=crop if they "
                "show its center at the scale of the masks"
            )
        return resizing

    def losses(self, outputs: Tensor, targets: Targets, training: bool = True) -> tuple[Tensor, Tensor]:
        logits, mask = self.match_sizes(outputs, targets["mask"])
        labeled = mask != self.ignore_index
        use_weights = training and self.loss_name != "dice"
        weights = self.class_weights.to(logits.device) if use_weights else None
        label = torch.where(labeled, mask, 0)
        weight = labeled.float() if weights is None else weights[label] * labeled
        counts = weight.flatten(1).sum(1)
        sums = torch.zeros_like(counts)
        if self.loss_name != "dice":
            # (N, C, H, W) -> (N*H*W, C): the loss of a matrix has a deterministic backward pass on all devices.
            rows = logits.movedim(1, -1).reshape(-1, self.num_classes)
            entropy = F.cross_entropy(rows, label.flatten(), reduction="none").view(mask.shape)
            sums = sums + (entropy * weight).flatten(1).sum(1)
        if self.loss_name != "cross_entropy":
            sums = sums + counts * dice_loss(logits, label, labeled)
        return sums, counts

    def meter(self) -> SegmentationMeter:
        return SegmentationMeter(self)

    @torch.no_grad()
    def masks(self, outputs: Tensor, size: Size) -> Tensor:
        """Return predicted class ids (N, H, W) uint8 on the CPU for images of `size`.

        Pixels that the outputs do not cover (networks without padding) get the ignore index.
        """
        logits, _ = self.match_sizes(outputs, torch.zeros(len(outputs), *size, device=outputs.device))
        masks = torch.full((len(outputs), *size), self.ignore_index, dtype=torch.uint8)
        center_crop(masks, *logits.shape[-2:])[:] = logits.argmax(1).to(torch.uint8).cpu()
        return masks

    def predictions(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Return empty rows: predictions are masks, and `mask_columns` counts them at the size of the file."""
        return [{} for _ in outputs]

    def mask_columns(self, mask: np.ndarray) -> dict[str, float]:
        """Return the share of pixels predicted as each class."""
        counts = np.bincount(mask.ravel(), minlength=256)[: self.num_classes].astype(float)
        if self.ignore_index < self.num_classes:
            counts[self.ignore_index] = 0
        shares = (counts / max(counts.sum(), 1)).tolist()
        return {f"share/{name}": share for name, share in zip(self.spec.classes, shares, strict=True)}

    @torch.no_grad()
    def per_example(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Return `pixel_accuracy`, `miou` (over the classes in the image or the prediction), and `loss`."""
        sums, counts = self.losses(outputs, targets, training=False)
        rows: list[dict[str, object]] = []
        for i in range(len(outputs)):
            target = {"mask": targets["mask"][i : i + 1]}
            matrix = self.confusion(outputs[i : i + 1], target).view(self.num_classes, -1).cpu().double()
            iou = self.iou(matrix)
            accuracy = ratio(matrix.trace(), matrix.sum())
            rows.append({"pixel_accuracy": accuracy, "miou": mean_iou(iou), "loss": ratio(sums[i], counts[i])})
        return rows

    def confusion(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Return the flat confusion matrix (C * C,) int64 of the labeled pixels, on the device."""
        logits, mask = self.match_sizes(outputs, targets["mask"])
        labeled, predicted = mask != self.ignore_index, logits.argmax(1)
        return count_pairs(mask.flatten(), predicted.flatten(), labeled.flatten(), self.num_classes)

    def iou(self, matrix: Tensor) -> Tensor:
        """Return the intersection over union of each class (C,) from a confusion matrix (C, C).

        NaN for classes that are neither in the masks nor predicted, and for the ignored class.
        """
        intersection = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - intersection
        iou = intersection / union  # 0 / 0 is NaN
        if self.ignore_index < self.num_classes:
            iou[self.ignore_index] = float("nan")
        return iou

    @torch.no_grad()
    def mistake_score(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Return the fraction of labeled pixels that are wrong."""
        logits, mask = self.match_sizes(outputs, targets["mask"])
        labeled = mask != self.ignore_index
        wrong = (logits.argmax(1) != mask) & labeled
        return wrong.flatten(1).sum(1) / labeled.flatten(1).sum(1).clamp(min=1)

    def figures(self, meter: Meter) -> dict[str, Figure]:
        values = meter.read()
        if "confusion" not in values:
            return {}
        matrix = values["confusion"].view(self.num_classes, -1)
        per_class = {name.split("/", 1)[1]: value for name, value in meter.details().items()}
        return {
            "confusion_matrix": plot_confusion_matrix(matrix, self.spec.classes, "Pixels"),
            "iou_per_class": plot_bars(per_class, "IoU per class", "intersection over union", 1.0),
        }

    @torch.no_grad()
    def draw(self, images: Tensor, outputs: Tensor | None, targets: Targets, names: Sequence[str]) -> Figure:
        layers: dict[str, np.ndarray] = {}
        scores = [""] * len(images)
        if "mask" in targets:
            layers["true"] = targets["mask"].cpu().numpy()
        if outputs is not None:
            layers["predicted"] = self.masks(outputs, (images.shape[-2], images.shape[-1])).numpy()
            if "outside" in targets:  # (N, H, W) bool: letterbox borders, not part of the image
                layers["predicted"][targets["outside"].cpu().numpy()] = self.ignore_index
            if "mask" in targets:
                wrong = self.mistake_score(outputs, targets).tolist()
                scores = [f" {100 - 100 * fraction:.0f}%" for fraction in wrong]
        captions = []
        for name, score in zip(names, scores, strict=True):
            captions += [name, *(layer + (score if layer == "predicted" else "") for layer in layers)]
        # Masks are uint8: with 255 as the id of ignored pixels, they are not colored.
        masks = [np.where(mask == self.ignore_index, 255, mask) for mask in layers.values()]
        return plot_masks(unnormalize(images, *self.spec.normalization), captions, masks, self.spec.classes)


class SegmentationMeter(Meter):
    """Loss, pixel accuracy and mean IoU over the labeled pixels of the dataset."""

    def __init__(self, task: Segmentation) -> None:
        super().__init__()
        self._task = task

    def collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        self.add("confusion", self._task.confusion(outputs, targets))

    def compute_metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        matrix = values["confusion"].view(self._task.num_classes, -1)
        iou = self._task.iou(matrix)
        return {"miou": mean_iou(iou), "pixel_accuracy": ratio(matrix.trace(), matrix.sum())}

    def details(self) -> dict[str, float]:
        """Return `iou/<class>`."""
        iou = self._task.iou(self.read()["confusion"].view(self._task.num_classes, -1))
        return {f"iou/{name}": float(value) for name, value in zip(self._task.spec.classes, iou, strict=True)}


def mean_iou(iou: Tensor) -> float:
    """Return the mean of `Segmentation.iou` over the classes where it is defined."""
    defined = iou[~iou.isnan()]
    return ratio(defined.sum(), len(defined))


def dice_loss(logits: Tensor, label: Tensor, labeled: Tensor) -> Tensor:
    """Return 1 - soft Dice of each image (N,), averaged over the classes that it has.

    The Dice of a class is 2 sum(p g) / (sum(p) + sum(g)) over labeled pixels, with probabilities p and targets g
    (Milletari et al., V-Net, 3DV 2016, without the squares, so that a perfect prediction gives 0).

    Args:
        logits: (N, C, H, W). label: (N, H, W) int64. labeled: (N, H, W) bool, False for ignored pixels.
    """
    probability = logits.softmax(1) * labeled[:, None]
    target = torch.zeros_like(probability).scatter_(1, label[:, None], labeled[:, None].to(probability.dtype))
    overlap = (probability * target).sum((2, 3))
    target_sum, probability_sum = target.sum((2, 3)), probability.sum((2, 3))
    present = target_sum > 0
    dice = torch.where(present, 2 * overlap / (probability_sum + target_sum).clamp(min=1e-12), 0.0)
    num_present = present.sum(1)
    return torch.where(num_present > 0, 1 - dice.sum(1) / num_present.clamp(min=1), 0.0)


def choose_resizing(output_size: tuple[int, ...], mask_size: tuple[int, ...], scale: float | None) -> str | None:
    """Return 'crop' or 'upsample' for outputs and masks of different (height, width); None if neither is certain.

    `scale` is the number of output pixels per input pixel of the network; None if unknown.
    """
    if scale == 1:
        return "crop"  # a network without padding: the output shows the center
    sides = list(zip(output_size, mask_size, strict=True))
    if scale:
        covers_all = all(abs(out - scale * mask) <= 1 for out, mask in sides)
    else:  # the mask size divided by one power of 2, rounded up or down
        covers_all = any(
            all(out in (mask // 2**power, -(-mask // 2**power)) for out, mask in sides) for power in range(1, 8)
        )
    return "upsample" if covers_all else None


def center_crop(tensor: Tensor, height: int, width: int) -> Tensor:
    """Return the center (height, width) of the last two dimensions, as a view."""
    top, left = (tensor.shape[-2] - height) // 2, (tensor.shape[-1] - width) // 2
    return tensor[..., top : top + height, left : left + width]
