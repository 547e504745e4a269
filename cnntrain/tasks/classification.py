"""Classification of images: cross-entropy, top-1 and top-5 accuracy, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cnntrain.errors import UserError
from cnntrain.plots.charts import plot_confusion_matrix, plot_ranking_curves
from cnntrain.plots.figure import BAD, GOOD, INK
from cnntrain.plots.images import plot_images, unnormalize
from cnntrain.tasks.class_weights import ClassWeights, ClassWeightsSetting
from cnntrain.tasks.meter import Meter, count_pairs, ratio
from cnntrain.tasks.task import Targets, Task, check_number
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PENDING = 1 << 15  # logits that wait to be counted together
MAX_MATRIX_CLASSES = 2000  # with more classes, a confusion matrix would need gigabytes
TOP5_MIN_CLASSES = 6


class Classification(Task):
    """One class per image: cross-entropy over C classes, or binary cross-entropy with one logit for two classes.

    Targets: `label` (N,) int64. Mixed images (mixup, cutmix) also have `label_b` (N,) and `mix` (N,), the weight of
    `label`: loss = mix * loss(label) + (1 - mix) * loss(label_b). Accuracy is not reported for them.

    Args:
        spec: metadata of the dataset, with its `classes`.
        label_smoothing: in [0, 1): fraction of the target distributed evenly over all classes (Szegedy et al. 2016).
        class_weights: one number per class, {class: weight} (1 for classes not named), or 'balanced': inversely
            proportional to the class counts of the training data. Sum and count of the loss are both weighted, as in
            `torch.nn.CrossEntropyLoss`.
        binary: 'auto' uses one logit for two classes; False uses two outputs.
    """

    def __init__(
        self,
        spec: DataSpec,
        label_smoothing: float = 0.0,
        class_weights: ClassWeightsSetting = None,
        binary: str | bool = "auto",
    ) -> None:
        super().__init__(spec)
        self.num_classes = len(spec.classes)
        if self.num_classes < 2:
            raise UserError(
                f"task: classification needs 2 classes or more, the data has {self.num_classes}; see data.root"
            )
        if binary not in ("auto", True, False):
            raise UserError(f"task.binary: must be auto, true or false, got {binary!r}")
        if binary is True and self.num_classes != 2:
            raise UserError(
                f"task.binary: one logit separates 2 classes, the data has {self.num_classes}; set task.binary=auto"
            )
        self.label_smoothing = check_number("task.label_smoothing", label_smoothing, 0.0, 1.0)
        self.class_weights = ClassWeights(class_weights, spec.classes)
        self.binary = self.num_classes == 2 if binary == "auto" else bool(binary)
        self.num_outputs = 1 if self.binary else self.num_classes
        self.monitor = ("top1", "max")
        self.monitor_range = (0.0, 1.0)

    def prepare(self, targets: Targets) -> None:
        if self.class_weights.balanced:
            self.class_weights.set_counts(torch.bincount(targets["label"].cpu(), minlength=self.num_classes))

    def logits(self, outputs: Tensor) -> Tensor:
        """Return logits (N, C) float32. One logit z gives the pair (0, z), which has the same probabilities."""
        outputs = outputs.float()
        return torch.cat([torch.zeros_like(outputs), outputs], 1) if self.binary else outputs

    def probabilities(self, outputs: Tensor) -> Tensor:
        return self.logits(outputs).softmax(1)

    def losses(self, outputs: Tensor, targets: Targets, training: bool = True) -> tuple[Tensor, Tensor]:
        logits, label = self.logits(outputs), targets["label"]
        weights = self.class_weights.to(logits.device) if training else None
        smoothing = self.label_smoothing if training else 0.0

        def loss_and_count(label: Tensor) -> tuple[Tensor, Tensor]:
            loss = F.cross_entropy(logits, label, weights, reduction="none", label_smoothing=smoothing)
            count = torch.ones(len(label), device=logits.device) if weights is None else weights[label]
            return loss, count

        loss, count = loss_and_count(label)
        if "label_b" in targets:
            mix = targets["mix"].to(loss.dtype)
            loss_b, count_b = loss_and_count(targets["label_b"])
            loss = mix * loss + (1 - mix) * loss_b
            if weights is not None:
                count = mix * count + (1 - mix) * count_b
        return loss, count

    def min_loss(self, training: bool = True) -> float:
        """Return the entropy of the smoothed target: 0.500288 for 10 classes and smoothing 0.1.

        With class weights, the minimum over the classes.
        """
        if not training or not self.label_smoothing:
            return 0.0
        weights = self.class_weights.values
        weights = torch.ones(self.num_classes) if weights is None else weights.cpu()
        minima = []
        for label in weights.nonzero().flatten():
            target = weights.double() * self.label_smoothing / self.num_classes
            target[label] += weights[label].double() * (1 - self.label_smoothing)
            entropy = -(torch.xlogy(target, target).sum() - torch.xlogy(target.sum(), target.sum()))
            minima.append(float(entropy / weights[label]))
        return min(minima)

    def output_shape(self) -> tuple[int, ...]:
        return (self.num_outputs,)

    def meter(self) -> ClassificationMeter:
        return ClassificationMeter(self)

    def predictions(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Return the `predicted` class and its `probability`."""
        probability, predicted = self.probabilities(outputs.detach()).max(1)
        pairs = zip(predicted.tolist(), probability.tolist(), strict=True)
        return [{"predicted": self.spec.classes[i], "probability": p} for i, p in pairs]

    @torch.no_grad()
    def per_example(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """Return `true` and `predicted` class names, `probability` of the predicted class, and `loss`."""
        losses = self.losses(outputs, targets, training=False)[0].tolist()
        true = [self.spec.classes[label] for label in targets["label"].tolist()]
        predictions = self.predictions(outputs, targets)
        return [{"true": name, **row, "loss": loss} for name, row, loss in zip(true, predictions, losses, strict=True)]

    @torch.no_grad()
    def mistake_score(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Return the probability of the predicted class if it is wrong, else 0."""
        probability, predicted = self.probabilities(outputs).max(1)
        return probability * (predicted != targets["label"])

    def figures(self, meter: Meter) -> dict[str, Figure]:
        values = meter.read()
        if "confusion" not in values:
            return {}
        matrix = values["confusion"].view(self.num_classes, self.num_classes)
        figures = {"confusion_matrix": plot_confusion_matrix(matrix, self.spec.classes)}
        if "rows/score" in values:
            scores, positive = values["rows/score"], values["rows/positive"]
            finite = scores.isfinite()  # a diverged model; scikit-learn refuses NaN
            if finite.any():
                name = self.spec.classes[1]
                figures["ranking_curves"] = plot_ranking_curves(scores[finite], positive[finite], name)
        return figures

    @torch.no_grad()
    def draw(self, images: Tensor, outputs: Tensor | None, targets: Targets, names: Sequence[str]) -> Figure:
        classes, count = self.spec.classes, len(images)
        true = [classes[i] for i in targets["label"].tolist()] if "label" in targets else [None] * count
        captions, colors = [label or name for label, name in zip(true, names, strict=True)], [INK] * count
        if outputs is not None:
            probability, predicted = self.probabilities(outputs).max(1)
            for i, (p, index) in enumerate(zip(probability.tolist(), predicted.tolist(), strict=True)):
                captions[i] = f"{classes[index]} {100 * p:.0f}%"
                if true[i] is None:
                    captions[i] += f"\n{names[i]}"
                elif true[i] == classes[index]:
                    colors[i] = GOOD
                else:
                    captions[i] += f"\ntrue: {true[i]}"
                    colors[i] = BAD
        return plot_images(unnormalize(images, *self.spec.normalization), captions, colors)


class ClassificationMeter(Meter):
    """Loss, top1, top5 (from 6 classes), accuracy per class and, up to 2,000 classes, the confusion matrix.

    With one logit, also ROC AUC and average precision.
    """

    def __init__(self, task: Classification) -> None:
        super().__init__()
        self._task = task
        # Logits and labels of small batches are counted together: the time per call hardly depends on their number.
        self._pending: tuple[Tensor, Tensor] | None = None
        self._num_pending = 0

    def collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        if "label_b" in targets:
            return  # a mixed image has no single correct class
        logits, label = self._task.logits(outputs), targets["label"]
        capacity = MAX_PENDING // self._task.num_classes
        if self._num_pending + len(label) > capacity:
            self._count_pending()
        if 2 * len(label) > capacity:
            self._count(logits, label)
            return
        if self._pending is None:
            self._pending = logits.new_empty(capacity, self._task.num_classes), label.new_empty(capacity)
        part = slice(self._num_pending, self._num_pending + len(label))
        self._pending[0][part], self._pending[1][part] = logits, label
        self._num_pending += len(label)

    def state(self) -> dict[str, Tensor]:
        self._count_pending()
        return super().state()

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self._num_pending = 0
        super().load_state(state, device)

    @torch.no_grad()
    def _count_pending(self) -> None:
        if self._pending is not None and self._num_pending:
            logits, label = (part[: self._num_pending] for part in self._pending)
            self._num_pending = 0
            self._count(logits, label)

    def _count(self, logits: Tensor, label: Tensor) -> None:
        predicted, ones, num_classes = logits.argmax(1), torch.ones_like(label), self._task.num_classes
        if num_classes <= MAX_MATRIX_CLASSES:
            self.add("confusion", count_pairs(label, predicted, ones, num_classes))
        else:
            zeros = torch.zeros(num_classes, dtype=torch.int64, device=label.device)
            self.add("seen", zeros.index_add(0, label, ones))
            self.add("right", zeros.index_add(0, label, (predicted == label).to(torch.int64)))
        if num_classes >= TOP5_MIN_CLASSES:
            self.add("top5", (logits.topk(5, dim=1).indices == label[:, None]).sum())
        if self._task.binary:
            self.append("score", logits[:, 1])
            self.append("positive", label)

    def compute_metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        right, seen = self._by_class(values)
        if right is None or seen is None:
            return {}
        total = seen.sum()
        metrics = {"top1": ratio(right.sum(), total)}
        if "top5" in values:
            metrics["top5"] = ratio(values["top5"], total)
        if "rows/score" in values:
            metrics |= ranking_metrics(values["rows/score"], values["rows/positive"])
        return metrics

    def details(self) -> dict[str, float]:
        """Return `accuracy/<class>`: the recall of each class."""
        right, seen = self._by_class(self.read())
        if right is None or seen is None:
            return {}
        rows = zip(self._task.spec.classes, right, seen, strict=True)
        return {f"accuracy/{name}": ratio(hits, count) for name, hits, count in rows}

    def _by_class(self, values: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Return the number of correct predictions and of examples per class (C,); None if nothing was counted."""
        if "confusion" not in values:
            return values.get("right"), values.get("seen")
        matrix = values["confusion"].view(self._task.num_classes, -1)
        return matrix.diagonal(), matrix.sum(1)


def ranking_metrics(scores: Tensor, positive: Tensor) -> dict[str, float]:
    """Return `roc_auc` and `average_precision` of scores (N,) with labels 0 or 1 (N,), both on the CPU.

    NaN where a metric is not defined: without positives, for ROC AUC without negatives, or if a score is not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    metrics = {"roc_auc": float("nan"), "average_precision": float("nan")}
    if bool(scores.isfinite().all()) and bool(positive.any()):
        metrics["average_precision"] = float(average_precision_score(positive, scores))
        if not bool(positive.all()):
            metrics["roc_auc"] = float(roc_auc_score(positive, scores))
    return metrics
