"""One class per pixel: cross-entropy, Dice or their sum; mean IoU from one confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cnntrain.errors import UserError
from cnntrain.plots import images as drawing
from cnntrain.plots import overlays
from cnntrain.tasks.arguments import choice
from cnntrain.tasks.class_weights import ClassWeights, balanced_weights, parse_class_weights
from cnntrain.tasks.dense import center, choose_fit, dice_loss
from cnntrain.tasks.meter import Meter, count_pairs, ratio
from cnntrain.tasks.task import Size, Targets, Task
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FURTHER = (
    384  # pixels by which an image grows to measure the scale: strides of 3 and of powers of 2 divide it
)


class Segmentation(Task):
    """A class for each pixel; pixels of the ignore id count nowhere.

    Targets: `mask` (N, H, W) uint8 class ids. The model gives (N, C, h, w). All losses are sums over labeled
    pixels: cross-entropy of each, and for Dice the image's loss times its number of labeled pixels, so that
    the mean over a data set doesn't depend on how it was cut into batches.

    Args:
        spec: facts of the data; `classes` are the pixels' classes.
        loss: 'cross_entropy', 'dice' or their sum 'ce_dice'.
        class_weights: for the cross-entropy: one number per class, {class: weight}, or 'balanced' (inverse to
            the class's pixels in the training data).
        resize_outputs: how outputs of another size meet the mask. 'upsample' them (bilinear, corner to corner); 'crop'
            the larger of the two about its center (networks without padding); 'auto' crops at equal scale, upsamples
            coarser outputs that cover the image, and refuses what is neither. The scale is measured on the network (see
            `settle`); until then 'auto' upsamples outputs of the mask's size divided by a power of 2.

    Raises:
        UserError: the data has no mask classes, or an argument is wrong.
    """

    def __init__(
        self,
        spec: DataSpec,
        loss: str = "cross_entropy",
        class_weights: ClassWeights = None,
        resize_outputs: str = "auto",
    ) -> None:
        super().__init__(spec)
        if len(spec.classes) < 2:
            raise UserError("task: segmentation needs data with 2 mask classes or more; try data=toy_shapes")
        self.loss_name = choice("task.loss", loss, ("cross_entropy", "dice", "ce_dice"))
        self.fit_name = choice("task.resize_outputs", resize_outputs, ("auto", "upsample", "crop"))
        self._balanced = class_weights == "balanced"
        self._weights = parse_class_weights(class_weights, spec.classes)
        self.num_classes = self.num_outputs = len(spec.classes)
        self.ignore = spec.mask_fill
        self.monitor = ("miou", "max")
        self.monitor_range = (0.0, 1.0)

    def output_shape(self) -> tuple[int | None, ...]:
        return (self.num_outputs, None, None)

    def prepare(self, targets: Targets) -> None:
        if "mask" in targets and bool((targets["mask"] == self.ignore).all()):
            raise UserError(
                f"data: no pixel of the training masks is labeled: all have the id {self.ignore}, "
                "which data.ignore_index leaves out"
            )
        if self._balanced:
            if "mask" not in targets:
                raise UserError(
                    "task.class_weights: balanced needs all masks in memory, and these are read as they are"
                    " needed; set data.cache=ram, or give a number per class"
                )
            counts = torch.bincount(targets["mask"].flatten().cpu(), minlength=256)
            counts[self.ignore] = 0
            self._weights = balanced_weights(counts[: self.num_classes])

    def fit(self, outputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (N, C, h, w) float32 and mask (N, H, W) int64 of one size, as `resize_outputs` says."""
        outputs, mask = outputs.float(), mask.long()
        given, wanted = tuple(outputs.shape[-2:]), tuple(mask.shape[-2:])
        if given == wanted:
            return outputs, mask
        if self._way(given, wanted) == "upsample":
            return F.interpolate(outputs, wanted, mode="bilinear", align_corners=True), mask
        height, width = min(given[0], wanted[0]), min(given[1], wanted[1])
        return center(outputs, height, width), center(mask, height, width)

    def _way(self, given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        """'crop' or 'upsample', for sizes (height, width) that differ.

        Raises:
            UserError: `resize_outputs` is auto, and neither suits.
        """
        way = choose_fit(given, wanted, self.output_scale) if self.fit_name == "auto" else self.fit_name
        if way is None:
            sizes = "{}x{} px for masks of ".format(*given) + "{}x{} px".format(*wanted)
            raise UserError(
                f"task.resize_outputs=auto: the network's outputs are {sizes}, which is neither a network without "
                "padding at the masks' own scale nor a coarser map of the whole image; set "
                "task.resize_outputs=upsample if the outputs cover the whole image, task.resize_outputs=crop if they "
                "show its middle at the same scale"
            )
        return way

    def settle(self, output_size: Callable[[Size], Size | None], sizes: Sequence[Size]) -> None:
        found = {size: output_size(size) for size in dict.fromkeys(sizes)}
        other = {size: given for size, given in found.items() if given is not None and given != size}
        if not other or self.fit_name != "auto":
            return
        (height, width), given = next(iter(other.items()))
        larger = output_size((height + FURTHER, width + FURTHER))
        if larger is not None:
            growth = {(after - before) / FURTHER for before, after in zip(given, larger, strict=True)}
            self.output_scale = growth.pop() if len(growth) == 1 else None
        for size, given in other.items():
            self._way(given, size)

    def losses(self, outputs: Tensor, targets: Targets, plain: bool = False) -> tuple[Tensor, Tensor]:
        logits, mask = self.fit(outputs, targets["mask"])
        labeled = mask != self.ignore
        weights = None if plain or self.loss_name == "dice" else self._weights_on(logits.device)
        label = torch.where(labeled, mask, 0)
        share = labeled.float() if weights is None else weights[label] * labeled
        counts = share.flatten(1).sum(1)
        sums = torch.zeros_like(counts)
        if self.loss_name != "dice":
            # (N,C,H,W) -> (N*H*W,C): the loss for flat rows has a deterministic backward pass on every
            # device.
            rows = logits.movedim(1, -1).reshape(-1, self.num_classes)
            entropy = F.cross_entropy(rows, label.flatten(), reduction="none").view(mask.shape)
            sums = sums + (entropy * share).flatten(1).sum(1)
        if self.loss_name != "cross_entropy":
            sums = sums + counts * dice_loss(logits, label, labeled)
        return sums, counts

    def _weights_on(self, device: torch.device) -> Tensor | None:
        """The class weights, moved once."""
        if self._balanced and self._weights is None:
            raise RuntimeError(
                "class_weights='balanced' needs prepare(training targets) before the first loss"
            )
        if self._weights is not None and self._weights.device != device:
            self._weights = self._weights.to(device)
        return self._weights

    def min_loss(self, plain: bool = False) -> float:
        return 0.0

    def zero_outputs(self, targets: Targets) -> Tensor:
        count, height, width = targets["mask"].shape
        return torch.zeros(count, self.num_outputs, height, width, device=targets["mask"].device)

    def meter(self) -> SegmentationMeter:
        return SegmentationMeter(self)

    @torch.no_grad()
    def masks(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        """Predicted ids (N, H, W) uint8 for images of `size` (height, width); where the outputs don't reach
        (networks without padding) the ignore id."""
        logits, _ = self.fit(outputs, torch.zeros(len(outputs), *size, device=outputs.device))
        result = torch.full((len(outputs), *size), self.ignore, dtype=torch.uint8)
        center(result, *logits.shape[-2:])[:] = logits.argmax(1).to(torch.uint8).cpu()
        return result

    @torch.no_grad()
    def answers(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Nothing: the answers are masks, and `shares` counts them when they lie on the image again."""
        return [{} for _ in outputs]

    def shares(self, mask: np.ndarray) -> dict[str, float]:
        """The share of an image's answered pixels that each class got, from its mask of ids (H, W) uint8."""
        counts = np.bincount(mask.ravel(), minlength=256)[: self.num_classes].astype(float)
        if self.ignore < self.num_classes:
            counts[self.ignore] = 0
        return dict(zip(self.spec.classes, (counts / max(counts.sum(), 1)).tolist(), strict=True))

    @torch.no_grad()
    def rows(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """`pixel_accuracy`, `miou` (over the classes that the image or the answer has), `loss`."""
        sums, counts = self.losses(outputs, targets, plain=True)
        rows: list[dict[str, object]] = []
        for i in range(len(outputs)):
            part = {"mask": targets["mask"][i : i + 1]}
            square = self.confusion(outputs[i : i + 1], part).view(self.num_classes, -1).cpu().double()
            iou = self.iou(square)
            accuracy = ratio(square.trace(), square.sum())
            mean = float(iou[~iou.isnan()].mean())
            rows.append({"pixel_accuracy": accuracy, "miou": mean, "loss": ratio(sums[i], counts[i])})
        return rows

    def confusion(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Confusion counts of the labeled pixels: (C * C,) int64 on the device."""
        logits, mask = self.fit(outputs, targets["mask"])
        labeled, predicted = mask != self.ignore, logits.argmax(1)
        return count_pairs(mask.flatten(), predicted.flatten(), labeled.flatten(), self.num_classes)

    def iou(self, square: Tensor) -> Tensor:
        """Intersection over union of each class (C,) from a confusion matrix (C, C); NaN for a class that
        neither truth nor answer has, and for one that is ignored."""
        both = square.diagonal()
        either = square.sum(0) + square.sum(1) - both
        iou = both / either  # 0 / 0 is NaN
        if self.ignore < self.num_classes:
            iou[self.ignore] = float("nan")
        return iou

    @torch.no_grad()
    def mistake_score(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Share of the image's labeled pixels that are wrong."""
        logits, mask = self.fit(outputs, targets["mask"])
        labeled = mask != self.ignore
        wrong = (logits.argmax(1) != mask) & labeled
        return wrong.flatten(1).sum(1) / labeled.flatten(1).sum(1).clamp(min=1)

    def figures(self, meter: Meter) -> dict[str, Figure]:
        values = meter.read() if meter.state() else {}
        if "confusion" not in values:
            return {}
        square = values["confusion"].view(self.num_classes, -1)
        per_class = {name.split("/", 1)[1]: value for name, value in meter.details().items()}
        return {
            "confusion_matrix": drawing.confusion_matrix(square, self.spec.classes, "Pixels"),
            "iou_per_class": drawing.bars(per_class, "IoU per class", "intersection over union", 1.0),
        }

    @torch.no_grad()
    def draw(
        self,
        images: Tensor,
        outputs: Tensor | None,
        targets: Targets,
        names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Figure:
        size = (images.shape[-2], images.shape[-1])
        layers: dict[str, np.ndarray] = {}
        scores = [""] * len(images)
        if "mask" in targets:
            truth = targets["mask"].cpu().numpy().astype(np.int64)
            layers["true"] = np.where(truth == self.ignore, 255, truth)
        if outputs is not None:
            predicted = self.masks(outputs, size).numpy().astype(np.int64)
            layers["predicted"] = np.where(predicted == self.ignore, 255, predicted)
            if "outside" in targets:  # (N, H, W) of what is no part of the image: letterbox borders
                layers["predicted"][targets["outside"].cpu().numpy()] = 255
            if "mask" in targets:
                wrong = self.mistake_score(outputs, targets).tolist()
                scores = [f" {100 - 100 * share:.0f}%" for share in wrong]
        captions = []
        for name, score in zip(names, scores, strict=True):
            captions += [name, *(layer + (score if layer == "predicted" else "") for layer in layers)]
        pictures = drawing.unnormalize(images, mean, std)
        return overlays.mask_grid(pictures, captions, list(layers.values()), self.spec.classes)


class SegmentationMeter(Meter):
    """Loss, pixel accuracy and mean IoU, over the labeled pixels of the whole data set."""

    def __init__(self, task: Segmentation) -> None:
        super().__init__()
        self._task = task

    def _collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        self._add("confusion", self._task.confusion(outputs, targets))

    def _metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        square = values["confusion"].view(self._task.num_classes, -1)
        iou = self._task.iou(square)
        known = iou[~iou.isnan()]
        return {"miou": ratio(known.sum(), len(known)), "pixel_accuracy": ratio(square.trace(), square.sum())}

    def details(self) -> dict[str, float]:
        """`iou/<class>`."""
        iou = self._task.iou(self.confusion_matrix())
        return {f"iou/{name}": float(value) for name, value in zip(self._task.spec.classes, iou, strict=True)}

    def confusion_matrix(self) -> Tensor:
        """(C, C) float64 counts of pixels on the CPU; row = true class, column = predicted."""
        return self.read()["confusion"].view(self._task.num_classes, -1)
