"""Class weights of a loss: given by the user, or balanced by the class counts of the training data."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cnntrain.errors import UserError, suggest
from cnntrain.tasks.task import check_number

ClassWeightsSetting = Sequence[float] | Mapping[str, float] | str | None


class ClassWeights:
    """Weights of C classes, cached on the device of the loss.

    Args:
        setting: one number per class, {class: weight} (1 for classes not named), 'balanced', or None for equal weights.
        classes: names of the classes.

    Attributes:
        balanced: whether the weights depend on the training data (`set_counts`).
        values: weights (C,) float32; None if all are equal, or not known yet.
    """

    def __init__(self, setting: ClassWeightsSetting, classes: Sequence[str]) -> None:
        self.balanced = setting == "balanced"
        self.values = None if self.balanced else parse_class_weights(setting, classes)

    def set_counts(self, counts: Tensor) -> None:
        """Balance the weights by the class counts (C,) of the training data, so that all classes weigh the same.

        The weights are total / (C * count), and 0 for absent classes, as in scikit-learn's `class_weight='balanced'`
        (King and Zeng 2001).
        """
        counts = counts.double()
        weights = counts.sum() / ((counts > 0).sum() * counts.clamp(min=1))
        self.values = torch.where(counts > 0, weights, 0.0).float()

    def to(self, device: torch.device) -> Tensor | None:
        """Return the weights (C,) float32 on `device`; None if all are equal."""
        if self.balanced and self.values is None:
            raise RuntimeError("class_weights='balanced' needs prepare(training targets) before the first loss")
        if self.values is not None and self.values.device != device:
            self.values = self.values.to(device)
        return self.values


def parse_class_weights(setting: ClassWeightsSetting, classes: Sequence[str]) -> Tensor | None:
    """Return weights (C,) float32 from the user's setting, or None for equal weights."""
    if setting is None:
        return None
    if isinstance(setting, str):
        hint = suggest(setting, ["balanced"])
        raise UserError(f"task.class_weights: {setting!r} is neither a list nor 'balanced'{hint}")
    if isinstance(setting, Mapping):
        setting = {str(name): weight for name, weight in setting.items()}  # YAML reads 0 as a number
        for name in setting:
            if name not in classes:
                raise UserError(f"task.class_weights: {name!r} is not a class{suggest(name, list(classes))}")
        setting = [setting.get(name, 1.0) for name in classes]
    if len(setting) != len(classes):
        raise UserError(
            f"task.class_weights: {len(setting)} weights for {len(classes)} classes ({', '.join(classes[:6])}"
            f"{', ...' if len(classes) > 6 else ''}); give one weight per class, in this order"
        )
    weights = torch.tensor([check_number("task.class_weights", weight, 0.0) for weight in setting])
    if not float(weights.sum()):
        raise UserError("task.class_weights: all weights are 0; at least one must be positive")
    return weights
