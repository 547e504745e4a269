"""One class per image: cross-entropy, top-1 and top-5, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cnntrain.errors import UserError
from cnntrain.plots import images as drawing
from cnntrain.plots.ranking import average_precision, roc_auc
from cnntrain.tasks.arguments import number
from cnntrain.tasks.class_weights import ClassWeights, balanced_weights, parse_class_weights
from cnntrain.tasks.meter import Meter, count_pairs, ratio
from cnntrain.tasks.task import Targets, Task
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_WAITING = 1 << 15  # logits
MOST_PAIRED = 2000  # classes: of more, every pair of two would take gigabytes


class Classification(Task):
    """Cross-entropy over C classes; with two classes, one logit (binary cross-entropy) and ranking metrics.

    Targets: `label` (N,) int64. Mixed images (mixup, cutmix) have besides `label_b` (N,) and `mix` (N,), the
    share of `label`; the loss is then mix * loss(label) + (1 - mix) * loss(label_b), and accuracy isn't
    reported.

    Args:
        spec: facts of the data; `classes` are the classes.
        label_smoothing: in [0, 1): share of the target spread evenly over all classes (Szegedy et al. 2016).
        class_weights: one number per class, or {class: weight} (1 for those not named), or 'balanced':
            inverse to the class's count in the training data. Both sum and count of the loss carry the
            weights, as torch's do.
        binary: 'auto' gives one logit when there are two classes; false keeps two outputs.

    Raises:
        UserError: the data has no classes, or an argument is out of range.
    """

    def __init__(
        self,
        spec: DataSpec,
        label_smoothing: float = 0.0,
        class_weights: ClassWeights = None,
        binary: str | bool = "auto",
    ) -> None:
        super().__init__(spec)
        classes = len(spec.classes)
        if classes < 2:
            raise UserError(
                f"task: classification needs 2 classes or more, the data has {classes}; see data.root"
            )
        if binary not in ("auto", True, False):
            raise UserError(f"task.binary: must be auto, true or false, got {binary!r}")
        if binary is True and classes != 2:
            raise UserError(
                f"task.binary: one logit tells 2 classes apart, the data has {classes}; set task.binary=auto"
            )
        self.label_smoothing = number("task.label_smoothing", label_smoothing, 0.0, 1.0)
        self.binary = classes == 2 if binary == "auto" else bool(binary)
        self.num_classes = classes
        self.num_outputs = 1 if self.binary else classes
        self.monitor = ("top1", "max")
        self.monitor_range = (0.0, 1.0)
        self._balanced = class_weights == "balanced"
        self._weights = parse_class_weights(class_weights, spec.classes)

    def prepare(self, targets: Targets) -> None:
        if self._balanced:
            counts = torch.bincount(targets["label"].cpu(), minlength=self.num_classes)
            self._weights = balanced_weights(counts)

    def logits(self, outputs: Tensor) -> Tensor:
        """(N, C) float32 logits. One logit z stands for the pair (0, z): the same probabilities."""
        outputs = outputs.float()
        return torch.cat([torch.zeros_like(outputs), outputs], 1) if self.binary else outputs

    def probabilities(self, outputs: Tensor) -> Tensor:
        return self.logits(outputs).softmax(1)

    def losses(self, outputs: Tensor, targets: Targets, plain: bool = False) -> tuple[Tensor, Tensor]:
        logits = self.logits(outputs)
        weights = None if plain else self._weights_on(logits.device)
        smoothing = 0.0 if plain else self.label_smoothing

        def entropy(label: Tensor) -> Tensor:
            return F.cross_entropy(logits, label, weights, reduction="none", label_smoothing=smoothing)

        sums = entropy(targets["label"])
        if "label_b" in targets:
            mix = targets["mix"].to(sums.dtype)
            sums = mix * sums + (1 - mix) * entropy(targets["label_b"])
        return sums, self._counts(targets, weights, logits.device)

    def _counts(self, targets: Targets, weights: Tensor | None, device: torch.device) -> Tensor:
        label = targets["label"]
        if weights is None:
            return torch.ones(len(label), device=device)
        if "label_b" not in targets:
            return weights[label]
        mix = targets["mix"].to(weights.dtype)
        return mix * weights[label] + (1 - mix) * weights[targets["label_b"]]

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
        """The entropy of the smoothed target (0.500288 for 10 classes and smoothing 0.1); with class weights,
        of the class where it is lowest."""
        if plain or not self.label_smoothing:
            return 0.0
        weights = torch.ones(self.num_classes) if self._weights is None else self._weights.cpu()
        floors = []
        for label in weights.nonzero().flatten():
            share = weights.double() * self.label_smoothing / self.num_classes
            share[label] += weights[label].double() * (1 - self.label_smoothing)
            floor = -(torch.xlogy(share, share).sum() - torch.xlogy(share.sum(), share.sum()))
            floors.append(float(floor / weights[label]))
        return min(floors)

    def output_shape(self) -> tuple[int, ...]:
        return (self.num_outputs,)

    def zero_outputs(self, targets: Targets) -> Tensor:
        return torch.zeros(len(targets["label"]), self.num_outputs, device=targets["label"].device)

    def meter(self) -> ClassificationMeter:
        return ClassificationMeter(self)

    def answers(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """`predicted` class and its `probability`."""
        probability, predicted = self.probabilities(outputs.detach()).max(1)
        pairs = zip(predicted.tolist(), probability.tolist(), strict=True)
        return [{"predicted": self.spec.classes[p], "probability": chance} for p, chance in pairs]

    @torch.no_grad()
    def rows(self, outputs: Tensor, targets: Targets) -> list[dict[str, object]]:
        """`true`, `predicted` (class names), `probability` of the predicted class, `loss`."""
        losses = self.losses(outputs, targets, plain=True)[0].tolist()
        true = [{"true": self.spec.classes[label]} for label in targets["label"].tolist()]
        answers = self.answers(outputs, targets)
        return [{**t, **a, "loss": loss} for t, a, loss in zip(true, answers, losses, strict=True)]

    @torch.no_grad()
    def mistake_score(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Probability of the predicted class where it is wrong, else 0."""
        probability, predicted = self.probabilities(outputs).max(1)
        return probability * (predicted != targets["label"])

    def figures(self, meter: Meter) -> dict[str, Figure]:
        values = meter.read()
        if "confusion" not in values:
            return {}
        square = values["confusion"].view(self.num_classes, self.num_classes)
        figures = {"confusion_matrix": drawing.confusion_matrix(square, self.spec.classes)}
        if "rows/score" in values:
            figures["ranking_curves"] = drawing.ranking_curves(
                values["rows/score"], values["rows/positive"], self.spec.classes[1]
            )
        return figures

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
        pictures = drawing.unnormalize(images, mean, std)
        answers = self.answers(outputs, targets) if outputs is not None else [{}] * len(images)
        true = (
            [self.spec.classes[i] for i in targets["label"].tolist()]
            if "label" in targets
            else [None] * len(images)
        )
        captions, colors = [], []
        for name, answer, label in zip(names, answers, true, strict=True):
            text, color = str(label if label is not None else name), drawing.INK
            if answer:
                says = f"{answer['predicted']} {100 * float(str(answer['probability'])):.0f}%"
                right = label is None or label == answer["predicted"]
                text = f"{says}\n{name}" if label is None else says if right else f"{says}\ntrue: {label}"
                color = drawing.INK if label is None else drawing.GOOD if right else drawing.BAD
            captions.append(text)
            colors.append(color)
        return drawing.image_grid(pictures, captions, colors)


class ClassificationMeter(Meter):
    """Loss, top1, top5 (from 6 classes on), accuracy by class and, of up to 2,000, the confusion matrix; ROC AUC and
    average precision for one logit."""

    def __init__(self, task: Classification) -> None:
        super().__init__()
        self._task = task
        # Logits and labels that wait to be counted, in one piece each: counting few takes as long as counting many.
        self._room: tuple[Tensor, Tensor] | None = None
        self._waiting = 0

    def _collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        if "label_b" in targets:
            return  # a mixed image has no right class
        logits, label = self._task.logits(outputs), targets["label"]
        rows = MOST_WAITING // self._task.num_classes
        if self._waiting + len(label) > rows:
            self._count_waiting()
        if 2 * len(label) > rows:
            self._count(logits, label)
            return
        if self._room is None:
            self._room = logits.new_empty(rows, self._task.num_classes), label.new_empty(rows)
        there = slice(self._waiting, self._waiting + len(label))
        self._room[0][there], self._room[1][there] = logits, label
        self._waiting += len(label)

    def state(self) -> dict[str, Tensor]:
        self._count_waiting()
        return super().state()

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self._waiting = 0
        super().load_state(state, device)

    @torch.no_grad()
    def _count_waiting(self) -> None:
        if self._room is not None and self._waiting:
            logits, label = (part[: self._waiting] for part in self._room)
            self._waiting = 0
            self._count(logits, label)

    def _count(self, logits: Tensor, label: Tensor) -> None:
        predicted, ones, count = logits.argmax(1), torch.ones_like(label), self._task.num_classes
        if count <= MOST_PAIRED:
            self._add("confusion", count_pairs(label, predicted, ones, count))
        else:
            nothing = torch.zeros(count, dtype=torch.int64, device=label.device)
            self._add("seen", nothing.index_add(0, label, ones))
            self._add("right", nothing.index_add(0, label, (predicted == label).to(torch.int64)))
        if self._task.num_classes >= 6:
            self._add("top5", (logits.topk(5, dim=1).indices == label[:, None]).sum())
        if self._task.binary:
            self._keep("score", logits[:, 1])
            self._keep("positive", label)

    def _metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        right, seen = self._by_class(values)
        if right is None or seen is None:
            return {}
        total = seen.sum()
        metrics = {"top1": ratio(right.sum(), total)}
        if "top5" in values:
            metrics["top5"] = ratio(values["top5"], total)
        if "rows/score" in values:
            scores, positive = values["rows/score"], values["rows/positive"]
            metrics["roc_auc"] = roc_auc(scores, positive)
            metrics["average_precision"] = average_precision(scores, positive)
        return metrics

    def details(self) -> dict[str, float]:
        """`accuracy/<class>`: share of the class's examples that were recognized (its recall)."""
        right, seen = self._by_class(self.read())
        if right is None or seen is None:
            return {}
        each = zip(self._task.spec.classes, right, seen, strict=True)
        return {f"accuracy/{name}": ratio(hits, count) for name, hits, count in each}

    def _by_class(self, values: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """How many of each class (C,) were recognized, and how many there were; None where nothing was counted."""
        if "confusion" not in values:
            return values.get("right"), values.get("seen")
        square = values["confusion"].view(self._task.num_classes, -1)
        return square.diagonal(), square.sum(1)

    def confusion_matrix(self) -> Tensor:
        """(C, C) float64 counts on the CPU; row = true class, column = predicted. Of up to 2,000 classes."""
        return self.read()["confusion"].view(self._task.num_classes, -1)
