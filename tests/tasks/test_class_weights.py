"""Class weights against scikit-learn, and as YAML gives them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnntrain.tasks.class_weights import parse_class_weights
from cnntrain.tasks.classification import Classification
from cnntrain.types import DataSpec, flip_permutation


def make(classes: int = 10, **settings) -> Classification:
    return Classification(DataSpec(1, 8, 8, tuple(f"c{i}" for i in range(classes))), **settings)


def example(task: Classification, count: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, task.num_outputs, generator=generator) * 2
    return outputs, {"label": torch.randint(0, task.num_classes, (count,), generator=generator)}


def mean_loss(task, outputs, targets, training=True) -> float:
    total, count = task.loss(outputs, targets, training)
    return float(total / count)


def test_balanced_weights_match_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    label = torch.tensor([0] * 6 + [1] * 3 + [2])
    task = make(3, class_weights="balanced")
    with pytest.raises(RuntimeError, match="prepare"):
        task.loss(torch.zeros(10, 3), {"label": label})
    task.prepare({"label": label})
    expected = compute_class_weight("balanced", classes=np.arange(3), y=label.numpy())
    outputs = torch.randn(10, 3)
    entropy = F.cross_entropy(outputs, label, torch.tensor(expected, dtype=torch.float32))
    assert mean_loss(task, outputs, {"label": label}) == pytest.approx(float(entropy), rel=1e-6)
    mean_loss(make(3, class_weights="balanced"), outputs, {"label": label}, training=False)  # needs no counts


def test_weights_by_name():
    task, named = make(3, class_weights=[1, 4, 1]), make(3, class_weights={"c1": 4})
    outputs, targets = example(task)
    assert mean_loss(task, outputs, targets) == mean_loss(named, outputs, targets)


@pytest.mark.parametrize("weights", [{0: 5}, {"0": 5}])
def test_numeric_keys_are_class_names(weights: dict) -> None:
    assert parse_class_weights(weights, ("0", "1")).tolist() == [5, 1]  # pyright: ignore[reportOptionalMemberAccess]
    assert flip_permutation(("36", "45", "30"), {36: 45}) == (1, 0, 2)  # pyright: ignore[reportArgumentType]
