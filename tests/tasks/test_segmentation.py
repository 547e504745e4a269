"""Segmentation against torch, scikit-learn and brute force, and the properties of sums over labeled
pixels."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnntrain.augment.geometry import Crop
from cnntrain.augment.pipeline import Pipeline
from cnntrain.config.compose import read_settings
from cnntrain.errors import UserError
from cnntrain.tasks.segmentation import Segmentation, choose_resizing, dice_loss
from cnntrain.train.setup import build_components
from cnntrain.types import Batch, DataSpec

LOSSES = ("cross_entropy", "dice", "ce_dice")


def make(classes: int = 4, ignore: int | None = 255, **settings) -> Segmentation:
    names = tuple(f"c{i}" for i in range(classes))
    return Segmentation(DataSpec(3, 9, 11, classes=names, ignore_index=ignore), **settings)


def test_pixels_uncovered_by_a_crop_are_ignored():
    spec = DataSpec(3, 12, 12, classes=("sky", "road"), per_pixel=True)
    task, count = Segmentation(spec), 4
    mask = torch.randint(0, 2, (count, 12, 12), dtype=torch.uint8)
    batch = Batch(
        torch.zeros(count, 3, 12, 12, dtype=torch.uint8), {"mask": mask}, torch.arange(count), torch.arange(count)
    )
    moved = Pipeline(spec, {"crop": Crop(size=12, padding=6)})(batch, 0, 0)
    uncovered = int((moved.targets["mask"] == 255).sum())
    _, counts = task.losses(torch.zeros(count, 2, 12, 12), moved.targets)
    assert 0 < uncovered == mask.numel() - int(counts.sum())


def example(task: Segmentation, count: int = 6, seed: int = 0, size=(9, 11)):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, task.num_classes, *size, generator=generator)
    mask = torch.randint(0, task.num_classes, (count, *size), generator=generator).to(torch.uint8)
    if task.spec.ignore_index is not None:
        mask[torch.rand(count, *size, generator=generator) < 0.3] = task.ignore_index
    return outputs, {"mask": mask}


def mean_loss(task, outputs, targets, training=True) -> float:
    total, count = task.loss(outputs, targets, training)
    return float(total / count)


def metered(task, outputs, targets):
    meter = task.meter()
    meter.update(outputs, targets, *task.loss(outputs, targets, training=False))
    return meter


def certain(task: Segmentation, mask: torch.Tensor) -> torch.Tensor:
    """Outputs that are sure of the truth (of class 0 where it is ignored)."""
    label = torch.where(mask == task.ignore_index, 0, mask.long())
    return F.one_hot(label, task.num_classes).movedim(-1, 1).float() * 60


@pytest.mark.parametrize("ignore", [None, 255, 3])
@pytest.mark.parametrize("weights", [None, [1, 2, 0.5, 3]])
def test_cross_entropy_matches_torch(ignore, weights):
    task = make(ignore=ignore, class_weights=weights)
    outputs, targets = example(task)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    mask, skipped = targets["mask"].long(), -100 if ignore is None else ignore
    expected = F.cross_entropy(outputs.double(), mask, weight, ignore_index=skipped)
    assert mean_loss(task, outputs, targets) == pytest.approx(float(expected), rel=1e-6)
    plain = F.cross_entropy(outputs.double(), mask, ignore_index=skipped)
    assert mean_loss(task, outputs, targets, training=False) == pytest.approx(float(plain), rel=1e-6)


def test_dice_matches_its_definition():
    task = make(loss="dice")
    outputs, targets = example(task)
    probability = outputs.double().softmax(1).numpy()
    total = pixels = 0.0
    for p, mask in zip(probability, targets["mask"].numpy(), strict=True):
        labeled = mask != 255
        scores = []
        for c in np.unique(mask[labeled]):
            g = (mask == c) & labeled
            scores.append(2 * p[c][g].sum() / (p[c][labeled].sum() + g.sum()))
        total += labeled.sum() * (1 - np.mean(scores))
        pixels += labeled.sum()
    assert mean_loss(task, outputs, targets) == pytest.approx(total / pixels, rel=1e-6)


def test_ce_dice_is_the_sum_of_both_losses():
    outputs, targets = example(make())
    parts = [mean_loss(make(loss=loss), outputs, targets) for loss in LOSSES]
    assert parts[2] == pytest.approx(parts[0] + parts[1], rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ignore", [None, 255, 0])
def test_a_perfect_prediction_reaches_min_loss(loss, ignore):
    task = make(loss=loss, ignore=ignore)
    _, targets = example(task)
    outputs = certain(task, targets["mask"])
    assert mean_loss(task, outputs, targets) == pytest.approx(task.min_loss(), abs=1e-6)
    values = metered(task, outputs, targets).compute()
    assert values["miou"] == 1.0
    assert values["pixel_accuracy"] == 1.0


def test_dice_loss_of_a_missed_class():
    mask = torch.zeros(1, 4, 4, dtype=torch.int64)
    mask[0, :, 2:] = 1
    labeled = torch.ones_like(mask, dtype=torch.bool)
    wrong = F.one_hot(1 - mask, 2).movedim(-1, 1).float() * 60
    assert float(dice_loss(wrong, mask, labeled)) == pytest.approx(1)
    assert float(dice_loss(wrong, mask, ~labeled)) == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_pixels_have_no_gradient_and_no_effect(loss):
    task = make(loss=loss)
    outputs, targets = example(task)
    outputs.requires_grad_()
    total, _ = task.loss(outputs, targets)
    total.backward()
    assert outputs.grad is not None
    touched = outputs.grad.abs().sum(1) > 0
    assert torch.equal(touched, targets["mask"] != 255)
    noise = torch.where((targets["mask"] == 255)[:, None], 50.0, 0.0) * torch.randn(outputs.shape)
    other = (outputs + noise).detach()
    assert mean_loss(task, other, targets) == pytest.approx(float(total.detach() / task.loss(outputs, targets)[1]))
    assert metered(task, other, targets).compute() == pytest.approx(metered(task, outputs.detach(), targets).compute())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_labels_has_no_loss(loss):
    task = make(loss=loss)
    outputs, targets = example(task)
    targets["mask"][:] = 255
    outputs.requires_grad_()
    total, count = task.loss(outputs, targets)
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0.0)
    assert outputs.grad is not None
    assert float(outputs.grad.abs().sum()) == 0.0
    values = metered(task, outputs.detach(), targets).compute()
    assert math.isnan(values["miou"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 99), st.sampled_from(LOSSES), st.booleans())
def test_metrics_do_not_depend_on_batches(cut, seed, loss, weighted):
    task = make(loss=loss, class_weights=[1, 2, 3, 4] if weighted else None)
    outputs, targets = example(task, seed=seed)
    first, rest = {"mask": targets["mask"][:cut]}, {"mask": targets["mask"][cut:]}
    sums = [task.loss(o, t) for o, t in ((outputs[:cut], first), (outputs[cut:], rest))]
    whole = task.loss(outputs, targets)
    assert float(sums[0][0] + sums[1][0]) == pytest.approx(float(whole[0]), rel=1e-5)
    assert float(sums[0][1] + sums[1][1]) == pytest.approx(float(whole[1]), rel=1e-5)
    meter = metered(task, outputs[:cut], first)
    meter.merge(metered(task, outputs[cut:], rest).state())
    together = metered(task, outputs, targets)
    assert meter.compute() == pytest.approx(together.compute(), rel=1e-6)
    assert meter.details() == together.details()


@pytest.mark.parametrize("ignore", [None, 255, 2])
def test_metrics_match_scikit_learn_and_brute_force(ignore):
    from sklearn import metrics

    task = make(ignore=ignore)
    outputs, targets = example(task)
    meter = metered(task, outputs, targets)
    predicted = outputs.argmax(1).numpy()
    mask = targets["mask"].numpy()
    labeled = mask != (-1 if ignore is None else ignore)
    matrix = metrics.confusion_matrix(mask[labeled], predicted[labeled], labels=range(4))
    np.testing.assert_array_equal(meter.read()["confusion"].view(4, 4).numpy(), matrix)
    iou = {}
    for c in range(4):
        both = ((mask == c) & (predicted == c) & labeled).sum()
        either = (((mask == c) | (predicted == c)) & labeled).sum()
        iou[f"iou/c{c}"] = both / either if c != ignore else math.nan
    assert meter.details() == pytest.approx(iou, nan_ok=True)
    values = meter.compute()
    assert values["miou"] == pytest.approx(np.nanmean(list(iou.values())))
    assert values["pixel_accuracy"] == pytest.approx((mask == predicted)[labeled].mean())


def test_absent_classes_are_excluded_from_the_mean():
    task = make(classes=3)
    targets = {"mask": torch.zeros(1, 2, 2, dtype=torch.uint8)}
    outputs = torch.zeros(1, 3, 2, 2)
    outputs[:, 0] = 1
    meter = metered(task, outputs, targets)
    assert meter.compute()["miou"] == 1.0
    assert math.isnan(meter.details()["iou/c2"])


def test_the_uninformed_loss_is_the_logarithm_of_the_number_of_classes():
    task = make(classes=5)
    outputs, targets = example(task)
    assert task.uninformed_loss(targets, outputs) == pytest.approx(math.log(5))


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        ((90, 120), (180, 240), True),
        ((45, 60), (180, 240), True),
        ((6, 8), (180, 240), True),  # 5.6 and 7.5, rounded up
        ((388, 388), (572, 572), False),
        ((92, 92), (284, 284), False),
    ],
)
def test_resizing_is_chosen_from_sizes(given, wanted, expected):
    assert (choose_resizing(given, wanted, None) == "upsample") is expected


@pytest.mark.parametrize(
    ("given", "wanted", "scale", "expected"),
    [
        ((388, 388), (572, 572), 1, "crop"),
        ((32, 32), (64, 64), 1, "crop"),  # half the size by chance
        ((68, 66), (64, 64), 1, "crop"),
        ((31, 31), (64, 64), 0.5, "upsample"),  # a stride of 2 without padding
        ((32, 32), (64, 64), 0.5, "upsample"),
        ((128, 128), (64, 64), 2, "upsample"),
        ((22, 21), (64, 64), 1 / 3, "upsample"),
        ((24, 24), (64, 64), 0.5, None),  # the middle, at half the scale
        ((31, 31), (64, 64), None, None),
        ((10, 14), (16, 20), None, None),
        ((32, 32), (64, 64), None, "upsample"),
        ((7, 7), (64, 64), 0, None),  # always so many
        ((8, 8), (64, 64), 0, "upsample"),
    ],
)
def test_only_outputs_at_equal_scale_are_cropped(given, wanted, scale, expected):
    assert choose_resizing(given, wanted, scale) == expected


LAYERS = {
    "half": [{"conv": {"out": 4, "kernel": 3, "stride": 2, "padding": 0}}],  # 64 -> 31
    "half of the middle": [
        {"conv": {"out": 4, "kernel": 2, "stride": 2, "padding": 0}},
        *[{"conv": {"out": 4, "kernel": 3, "padding": 0}}] * 4,
    ],  # 64 -> 24
    "middle": [{"conv": {"out": 4, "kernel": 3, "padding": 0}}] * 2,  # 64 -> 60
    "double": [{"transposed_conv": {"out": 4, "kernel": 2, "stride": 2}}],
}


def assembled(layers: list, *more: str):
    given = ["data=toy_shapes", "data.size=64", "model=sequential", "threads=1", "augment=none", *more]
    settings, last = read_settings(given), {"output": {"kernel": 1}}
    return build_components(dataclasses.replace(settings, model={**settings.model, "layers": [*layers, last]}))


@pytest.mark.parametrize(("name", "size"), [("half", (64, 64)), ("middle", (60, 60)), ("double", (64, 64))])
def test_the_scale_is_measured_on_the_network(name, size):
    made = assembled(LAYERS[name])
    outputs = made.model(torch.rand(1, 3, 64, 64))
    fitted, mask = made.task.match_sizes(outputs, torch.zeros(1, 64, 64, dtype=torch.uint8))
    assert fitted.shape[-2:] == mask.shape[-2:] == size
    if name == "half":
        expected = F.interpolate(outputs, (64, 64), mode="bilinear", align_corners=True)
        assert torch.equal(fitted, expected)


def test_center_maps_at_another_scale_are_rejected_before_data_is_read():
    with pytest.raises(
        UserError, match=r"task\.resize_outputs=auto: the network's outputs are 24x24 px for masks of 64x64"
    ):
        assembled(LAYERS["half of the middle"])
    assert assembled(LAYERS["half of the middle"], "task.resize_outputs=crop").task.output_scale is None


@pytest.mark.parametrize("factors", [(1, 2), (2, 1)])
def test_different_scales_per_axis_give_no_scale(factors):
    """Along the other axis the network does something else: nothing is cropped."""
    task = make()
    size = task.spec.image_size
    with pytest.raises(UserError, match=r"task\.resize_outputs=auto"):
        task.configure_outputs(lambda asked: (factors[0] * asked[0], factors[1] * asked[1]), [size])
    assert task.output_scale is None


def test_the_unpadded_unet_is_cropped():
    data = ["data=toy_shapes", "data.size=108", "data.train_count=4", "data.test_count=2", "augment=none"]
    model = ["model=unet", "model.padding=valid", "model.depth=2", "model.width=4", "threads=1"]
    made = build_components(read_settings([*data, *model]))
    assert made.task.output_scale == 1
    made.load()
    assert made.task.output_scale == 1  # the task is made anew, with what the data say
    with torch.no_grad():
        outputs = made.model.eval()(torch.rand(1, 3, 108, 108))
    assert outputs.shape[-1] < 108
    fitted, mask = made.task.match_sizes(outputs, torch.arange(108 * 108).view(1, 108, 108) % 4)
    assert torch.equal(fitted, outputs)
    rest = (108 - outputs.shape[-1]) // 2
    assert torch.equal(mask[0], (torch.arange(108 * 108).view(108, 108) % 4)[rest : 108 - rest, rest : 108 - rest])


def test_a_network_without_padding_is_evaluated_at_the_center():
    task = make()
    task.output_scale = 1
    outputs, targets = example(task, size=(16, 20))
    inner = {"mask": targets["mask"][:, 3:13, 3:17]}
    small = outputs[:, :, 3:13, 3:17]
    assert mean_loss(task, small, targets) == mean_loss(task, small, inner)
    assert metered(task, small, targets).compute() == metered(task, small, inner).compute()
    masks = task.masks(small, (16, 20))
    assert torch.equal(masks[:, 3:13, 3:17].long(), small.argmax(1))
    assert int((masks == 255).sum()) == 6 * (16 * 20 - 10 * 14)


def test_larger_outputs_are_cropped_and_smaller_ones_upsampled():
    task = make()
    outputs, targets = example(task, size=(16, 20))
    padded = F.pad(outputs, (2, 2, 1, 1))
    with pytest.raises(UserError, match=r"auto.*task\.resize_outputs=upsample.*task\.resize_outputs=crop"):
        mean_loss(task, padded, targets)
    same_scale = make()
    same_scale.output_scale = 1
    assert mean_loss(same_scale, padded, targets) == mean_loss(task, outputs, targets)
    coarse = F.interpolate(outputs[:, :, ::2, ::2], (16, 20), mode="bilinear", align_corners=True)
    assert mean_loss(task, outputs[:, :, ::2, ::2], targets) == mean_loss(task, coarse, targets)
    assert mean_loss(make(resize_outputs="crop"), outputs[:, :, ::2, ::2], targets) != mean_loss(task, coarse, targets)


def test_balanced_weights_count_labeled_pixels():
    mask = torch.tensor([[[0, 0, 0, 1, 255, 255]]], dtype=torch.uint8)
    task = make(classes=2, class_weights="balanced")
    task.prepare({"mask": mask})
    assert task.class_weights.values is not None
    assert task.class_weights.values.tolist() == pytest.approx([4 / 6, 2.0])
    with pytest.raises(UserError, match=r"task\.class_weights.*in memory"):
        task.prepare({})  # a streamed dataset reads masks as they are needed


def test_rows_predictions_and_scores():
    task = make()
    outputs, targets = example(task)
    rows = task.per_example(outputs, targets)
    for i, row in enumerate(rows):
        alone = {"mask": targets["mask"][i : i + 1]}
        values = metered(task, outputs[i : i + 1], alone).compute()
        assert row == pytest.approx(values, rel=1e-6)
    scores = task.mistake_score(outputs, targets)
    assert scores.tolist() == pytest.approx([1 - float(str(row["pixel_accuracy"])) for row in rows])
    shares = task.mask_columns(task.masks(outputs, (outputs.shape[-2], outputs.shape[-1]))[0].numpy())
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("task.loss: 'dise' is not one of .*did you mean 'dice'", {"loss": "dise"}),
        ("task.resize_outputs", {"resize_outputs": "stretch"}),
        ("task.class_weights", {"class_weights": [1, 2]}),
    ],
)
def test_invalid_settings_are_reported_with_their_key(key, settings):
    with pytest.raises(UserError, match=key):
        make(**settings)


def test_data_without_mask_classes_is_rejected():
    with pytest.raises(UserError, match="mask classes"):
        make(classes=1)


def test_drawings():
    task = make()
    outputs, targets = example(task, 5)
    images, names = torch.randn(5, 3, 9, 11), list("abcde")
    cases = ((outputs, targets, 15), (None, targets, 10), (outputs[:, :, :5, :5], {}, 10))
    for answer, known, cells in cases:
        figure = task.draw(images, answer, known, names)
        assert sum(len(ax.images) for ax in figure.axes) == cells
        figure.canvas.draw()
    assert set(task.figures(metered(task, outputs, targets))) == {"confusion_matrix", "iou_per_class"}


def test_masks_without_a_labeled_pixel_are_rejected() -> None:
    task = make(ignore=255)
    task.prepare({"mask": torch.tensor([[[255, 0]]], dtype=torch.uint8)})
    with pytest.raises(UserError, match="ignore_index"):
        task.prepare({"mask": torch.full((1, 2, 2), 255, dtype=torch.uint8)})
