"""Class weights, as a user writes them and as a loss needs them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cnntrain.errors import UserError, suggest
from cnntrain.tasks.arguments import number

ClassWeights = Sequence[float] | Mapping[str, float] | str | None


def parse_class_weights(value: ClassWeights, classes: Sequence[str]) -> Tensor | None:
    """(C,) float32 weights, or None for equal ones and for 'balanced' (which waits for the counts).

    Raises:
        UserError: wrong length, an unknown class, a number that is negative or not finite.
    """
    if value is None or value == "balanced":
        return None
    if isinstance(value, str):
        raise UserError(
            f"task.class_weights: {value!r} is neither a list nor 'balanced'{suggest(value, ['balanced'])}"
        )
    if isinstance(value, Mapping):
        value = {str(name): weight for name, weight in value.items()}  # YAML reads 0 as a number
        for name in value:
            if name not in classes:
                raise UserError(f"task.class_weights: {name!r} is no class{suggest(name, list(classes))}")
        value = [value.get(name, 1.0) for name in classes]
    if len(value) != len(classes):
        raise UserError(
            f"task.class_weights: {len(value)} weights for {len(classes)} classes ({', '.join(classes[:6])}"
            f"{', ...' if len(classes) > 6 else ''}); give one for each, in this order"
        )
    weights = torch.tensor([number("task.class_weights", weight, 0.0) for weight in value])
    if not float(weights.sum()):
        raise UserError("task.class_weights: all weights are 0; nothing would count")
    return weights


def balanced_weights(counts: Tensor) -> Tensor:
    """(C,) float32: total / (C * count), so that each class weighs the same in all; 0 for a class never seen.

    As scikit-learn's `class_weight='balanced'` (King and Zeng 2001).
    """
    counts = counts.double()
    weights = counts.sum() / ((counts > 0).sum() * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 0.0).float()
