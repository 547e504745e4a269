"""A training step needs no host sync: on the meta device, reading a value raises."""

import pytest
import torch

from cnntrain.tasks.classification import Classification
from cnntrain.tasks.keypoints import Keypoints
from cnntrain.tasks.segmentation import Segmentation
from cnntrain.tasks.task import Task
from cnntrain.types import DataSpec

CLASSES = tuple("abcdefg")
TWO = DataSpec(1, 8, 8, classes=CLASSES[:2], ignore_index=255)
SEVEN = DataSpec(1, 8, 8, classes=CLASSES, keypoints=CLASSES, ignore_index=255)
TASKS = {
    "seven classes": Classification(SEVEN, label_smoothing=0.1, class_weights=list(range(7))),
    "one logit": Classification(TWO),
    "regression": Keypoints(SEVEN, normalize_by=["a", "b"]),
    "heat maps": Keypoints(SEVEN, head="heatmap"),
    "masks": Segmentation(SEVEN, loss="ce_dice", class_weights=list(range(7))),
}


def outputs_of(task: Task) -> torch.Tensor:
    is_map = isinstance(task, Segmentation) or (isinstance(task, Keypoints) and task.head == "heatmap")
    shape = (4, task.num_outputs, 8, 8) if is_map else (4, task.num_outputs)
    return torch.zeros(shape, device="meta", requires_grad=True)


def targets(task: Task) -> dict[str, torch.Tensor]:
    if isinstance(task, Segmentation):
        return {"mask": torch.zeros(4, 8, 8, dtype=torch.uint8, device="meta")}
    if isinstance(task, Keypoints):
        valid = torch.ones(4, 7, dtype=torch.bool, device="meta")
        matrix = torch.zeros(4, 3, 3, dtype=torch.float64, device="meta")
        return {"points": torch.zeros(4, 7, 2, device="meta"), "valid": valid, "source_to_image": matrix}
    return {"label": torch.zeros(4, dtype=torch.int64, device="meta")}


@pytest.mark.parametrize("name", TASKS)
def test_loss_meter_and_scores_need_no_host_sync(name):
    task = TASKS[name]
    known = targets(task)
    outputs = outputs_of(task)
    meter = task.meter()
    for training in (True, False):
        loss_sum, loss_count = task.loss(outputs, known, training)
        (loss_sum / loss_count).backward()
        meter.update(outputs, known, loss_sum, loss_count)
    assert task.mistake_score(outputs, known).shape == (4,)
    assert loss_sum.shape == loss_count.shape == ()
    assert all(value.device.type == "meta" for value in meter.state().values())


def test_a_host_sync_raises_on_the_meta_device():
    with pytest.raises(RuntimeError):
        float(torch.zeros((), device="meta"))
