"""Class weights against scikit-learn, and as YAML gives them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnntrain.tasks.class_weights import parse_class_weights
from cnntrain.types import flip_permutation
from tests.tasks.test_classification import example, make, mean_loss


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
