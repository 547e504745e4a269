"""Keypoints against brute force in float64, and the properties that a loss over valid points must have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnntrain.errors import UserError
from cnntrain.tasks.keypoints import Keypoints, image_to_source, object_sizes
from cnntrain.types import DataSpec

NAMES = ("left_eye", "right_eye", "nose", "mouth")
LOSSES = [("regression", loss) for loss in ("mse", "l1", "smooth_l1", "wing")]
LOSSES += [("heatmap", "auto"), ("heatmap", "mse")]


def make(height: int = 24, width: int = 40, **settings) -> Keypoints:
    skeleton = ((0, 1), (1, 2))
    return Keypoints(DataSpec(3, height, width, keypoints=NAMES, skeleton=skeleton), **settings)


def example(task: Keypoints, count: int = 12, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    height, width = task.spec.image_size
    size = torch.tensor([width - 1.0, height - 1.0])
    points = torch.rand(count, len(NAMES), 2, generator=generator) * size
    valid = torch.rand(count, len(NAMES), generator=generator) < 0.7
    shape = (count, task.num_outputs) + ((12, 20) if task.head == "heatmap" else ())
    outputs = torch.randn(shape, generator=generator) * (1 if task.head == "heatmap" else 0.4)
    matrix = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    matrix[:, :2, :2] += torch.randn(count, 2, 2, generator=generator).double() * 0.2
    matrix[:, :2, 2] = torch.randn(count, 2, generator=generator).double() * 9
    return outputs, {"points": points, "valid": valid, "source_to_image": matrix}


def metered(task, outputs, targets):
    meter = task.meter()
    meter.update(outputs, targets, *task.loss(outputs, targets, training=False))
    return meter


def part_of(targets, rows):
    return {name: value[rows] for name, value in targets.items()}


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1", "wing"])
def test_regression_losses_match_their_definitions(loss):
    task = make(loss=loss, smooth_l1_beta=0.2, wing_width=0.3, wing_curvature=0.05)
    outputs, targets = example(task)

    def distance(e: float) -> float:
        e = abs(e)
        if loss == "mse":
            return e * e
        if loss == "smooth_l1":
            return 0.5 * e * e / 0.2 if e < 0.2 else e - 0.1
        if loss == "wing":
            return 0.3 * math.log(1 + e / 0.05) if e < 0.3 else e - (0.3 - 0.3 * math.log(1 + 0.3 / 0.05))
        return e

    total, count = 0.0, 0
    for i in range(len(outputs)):
        for k in range(len(NAMES)):
            if targets["valid"][i, k]:
                count += 1
                for axis, center in enumerate((19.5, 11.5)):
                    true = (float(targets["points"][i, k, axis]) - center) / 19.5
                    total += distance(float(outputs[i, 2 * k + axis]) - true) / 2
    loss_sum, loss_count = task.loss(outputs, targets)
    assert float(loss_sum) == pytest.approx(total, rel=1e-5)
    assert float(loss_count) == count


def test_regression_losses_match_torch():
    error = torch.linspace(-1, 1, 41, dtype=torch.float64)
    smooth = make(loss="smooth_l1", smooth_l1_beta=0.25)._regression_losses(error)
    expected = torch.nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.25, reduction="none")
    torch.testing.assert_close(smooth, expected)
    wing = make(loss="wing", wing_width=0.3, wing_curvature=0.05)
    just_inside, just_outside = (wing._regression_losses(torch.tensor([0.3 + e])) for e in (-1e-9, 1e-9))
    torch.testing.assert_close(just_inside, just_outside)  # no jump at the bend


@pytest.mark.parametrize(("head", "loss"), LOSSES)
def test_invalid_points_have_no_gradient(head, loss):
    task = make(head=head, loss=loss)
    outputs, targets = example(task)
    targets["points"][~targets["valid"]] = math.nan
    outputs.requires_grad_()
    task.loss(outputs, targets)[0].backward()
    assert outputs.grad is not None
    assert bool(outputs.grad.isfinite().all())
    gradient = outputs.grad.reshape(len(outputs), len(NAMES), -1).abs().sum(2)
    assert torch.equal(gradient > 0, targets["valid"])
    values = metered(task, outputs.detach(), targets).compute()
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize(("head", "loss"), LOSSES)
def test_a_batch_without_valid_points_has_no_loss(head, loss):
    task = make(head=head, loss=loss)
    outputs, targets = example(task, 3)
    targets["valid"][:] = False
    assert [float(v) for v in task.loss(outputs, targets)] == [0.0, 0.0]
    assert math.isnan(metered(task, outputs, targets).compute()["nme"])
    assert task.mistake_score(outputs, targets).tolist() == [0.0] * 3


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 11), st.integers(0, 99), st.sampled_from(LOSSES))
def test_metrics_do_not_depend_on_batches(cut, seed, kind):
    task = make(head=kind[0], loss=kind[1], normalize_by=["left_eye", "right_eye"])
    outputs, targets = example(task, seed=seed)
    whole = metered(task, outputs, targets)
    parts = metered(task, outputs[:cut], part_of(targets, slice(0, cut)))
    parts.merge(metered(task, outputs[cut:], part_of(targets, slice(cut, None))).state())
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-5, nan_ok=True)
    assert parts.details() == pytest.approx(whole.details(), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("annotated", [False, True])
@pytest.mark.parametrize("normalize_by", ["box", ["left_eye", "mouth"]])
def test_metrics_match_their_definitions_in_source_pixels(normalize_by, annotated):
    task = make(normalize_by=normalize_by)
    outputs, targets = example(task, 30)
    targets["valid"][0] = torch.tensor([True, False, False, False])
    targets["valid"][1], targets["points"][1] = True, torch.tensor([11.0, 8.0])  # all in one place
    if annotated:
        targets["box_size"] = torch.rand(30, 2) * 60
        targets["box_size"][2:8] = 0
    values = metered(task, outputs, targets).compute()
    predicted = (outputs.double().reshape(30, 4, 2) * 19.5 + torch.tensor([19.5, 11.5])).numpy()
    errors, shares = [], []
    for i in range(30):
        inverse = np.linalg.inv(targets["source_to_image"][i].numpy())
        seen = targets["valid"][i].numpy()

        def source(points, inverse=inverse):
            return points @ inverse[:2, :2].T + inverse[:2, 2]

        true = source(targets["points"][i].double().numpy())
        error = np.linalg.norm(source(predicted[i]) - true, axis=1)
        errors += list(error[seen])
        if normalize_by == "box":
            boxed = targets["box_size"][i].double().numpy() if annotated else np.zeros(2)
            sides = boxed if boxed.all() else np.ptp(true[seen], axis=0) if seen.any() else boxed
            norm = math.sqrt(max(sides) * max(min(sides), max(sides) / 2))
            known = seen.sum() >= (1 if boxed.all() else 2)
        else:
            norm, known = float(np.linalg.norm(true[0] - true[3])), seen[0] and seen[3]
        corner = abs(np.linalg.det(inverse[:2, :2])) ** 0.5
        if known:
            shares += list(error[seen] / max(norm, 0.05 * 40 * corner))
    assert values["error_px"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert values["nme"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert values["pck@0.1"] == pytest.approx(np.mean(np.array(shares) <= 0.1))
    assert values["pck@0.05"] == pytest.approx(np.mean(np.array(shares) <= 0.05))


def nme(task, points: list, guess: float, **more) -> float:
    """Of objects with valid points `points` (N, K, 2), each guessed `guess` pixels too far to the right."""
    true = torch.tensor(points)
    targets = {"points": true, "valid": torch.ones(true.shape[:2], dtype=torch.bool), **more}
    outputs = task.normalize_points(true + torch.tensor([guess, 0.0])).flatten(1)
    return metered(task, outputs, targets).compute()["nme"]


def test_points_on_a_line_have_a_size():
    task = make()
    square = [[5.0, 5.0], [15.0, 5.0], [5.0, 15.0], [15.0, 15.0]]
    level = [[5.0, 5.0], [15.0, 5.001], [8.0, 5.0], [12.0, 5.0]]
    alone = nme(task, [square], 1.0)
    assert alone == pytest.approx(0.1)
    assert nme(task, [level], 1.0) == pytest.approx(0.1 * 2**0.5, rel=1e-4)
    assert nme(task, [square] * 9 + [level], 1.0) == pytest.approx(0.1 * (9 + 2**0.5) / 10, rel=1e-4)
    spot = [[5.0, 5.0]] * 4
    assert nme(task, [spot], 1.0) == pytest.approx(1 / (0.05 * 40))


def test_the_object_size_scales_and_rotates_with_the_object():
    task = make(48, 48)
    level, upright = [[5.0, 20.0], [25.0, 20.0]] * 2, [[20.0, 5.0], [20.0, 25.0]] * 2
    assert nme(task, [level], 1.0) == pytest.approx(nme(task, [upright], 1.0), rel=1e-6)
    larger = [[5.0, 20.0], [45.0, 20.0]] * 2
    assert nme(task, [larger], 1.0) == pytest.approx(nme(task, [level], 1.0) / 2, rel=1e-6)


def test_annotated_boxes_take_precedence_over_points():
    task, spread = make(), [[5.0, 5.0], [6.0, 5.0], [5.0, 6.0], [6.0, 6.0]]
    boxes = torch.tensor([[20.0, 20.0]])
    assert nme(task, [spread], 1.0, box_size=boxes) == pytest.approx(1 / 20)
    alone = nme(task, [spread], 1.0)
    for none in ([0.0, 0.0], [20.0, 0.0], [0.0, 20.0]):
        assert nme(task, [spread], 1.0, box_size=torch.tensor([none])) == alone


def test_object_sizes_are_known_with_two_points_or_a_box():
    true = torch.tensor([[[0.0, 0.0], [8.0, 2.0]]]).repeat(4, 1, 1)
    valid = torch.tensor([[True, True], [True, False], [True, False], [False, False]])
    boxes = torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 4.0], [9.0, 4.0]])
    size, known = object_sizes(true, valid, boxes)
    assert known.tolist() == [True, False, True, False]
    assert size[known].tolist() == pytest.approx([(8 * 4) ** 0.5, (9 * 4.5) ** 0.5])
    assert object_sizes(true, valid, None)[1].tolist() == [True, False, False, False]


def test_details_have_the_error_of_each_keypoint():
    task = make()
    outputs, targets = example(task)
    del targets["source_to_image"]
    details = metered(task, outputs, targets).details()
    error = (task.points(outputs) - targets["points"]).norm(dim=2)
    expected = (error * targets["valid"]).sum(0) / targets["valid"].sum(0)
    assert list(details) == [f"error_px/{name}" for name in NAMES]
    assert list(details.values()) == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_perfect_prediction_has_no_loss_and_no_error():
    task = make()
    _, targets = example(task)
    outputs = task.normalize_points(targets["points"]).reshape(12, -1)
    values = metered(task, outputs, targets).compute()
    assert values["loss"] == pytest.approx(0, abs=1e-5)
    assert values["error_px"] == pytest.approx(0, abs=1e-4)
    assert values["pck@0.05"] == 1.0


def test_flipping_the_image_changes_the_sign_of_x():
    task = make()
    points = torch.tensor([[[3.0, 5.0]]])
    flipped = torch.tensor([[[39 - 3.0, 5.0]]])
    assert torch.equal(task.normalize_points(flipped), task.normalize_points(points) * torch.tensor([-1.0, 1.0]))


def test_normalized_coordinates_round_trip():
    task = make()
    _, targets = example(task)
    outputs = task.normalize_points(targets["points"]).reshape(12, -1)
    torch.testing.assert_close(task.points(outputs), targets["points"], rtol=0, atol=1e-5)


def test_outputs_of_zero_predict_the_center():
    task = make(loss="l1")
    outputs, targets = example(task)
    expected = task.normalize_points(targets["points"]).abs().mean(2)[targets["valid"]].mean()
    assert task.uninformed_loss(targets, outputs) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("loss", ["auto", "mse"])
def test_optimizing_a_heatmap_finds_the_point(loss):
    task = make(head="heatmap", loss=loss)
    _, targets = example(task, 1)
    targets["valid"][:] = True
    outputs = torch.zeros(1, 4, 12, 20, requires_grad=True)
    optimizer = torch.optim.Adam([outputs], lr=0.3)
    start = task.uninformed_loss(targets, outputs)
    for _ in range(150):
        optimizer.zero_grad()
        total, count = task.loss(outputs, targets)
        (total / count).backward()
        optimizer.step()
    assert float((total / count).detach()) < start / 50
    assert float((task.points(outputs.detach()) - targets["points"]).norm(dim=2).max()) < 1.5


def test_perspective_is_inverted():
    task = make()
    matrix = torch.eye(3, dtype=torch.float64)[None].clone()
    matrix[:, 2, 0] = 0.01
    source = torch.rand(1, 4, 2, dtype=torch.float64) * 20
    homogeneous = torch.cat([source, torch.ones(1, 4, 1, dtype=torch.float64)], 2) @ matrix.mT
    canvas = homogeneous[..., :2] / homogeneous[..., 2:]
    back = task.source_points(canvas, {"source_to_image": matrix.float()})
    torch.testing.assert_close(back, source, rtol=1e-5, atol=1e-5)


def test_rows_and_predictions_are_in_source_pixels():
    task = make()
    outputs, targets = example(task)
    rows = task.per_example(outputs, targets)
    error, valid, _ = task.errors(outputs, targets)
    for i, row in enumerate(rows):
        assert row["valid"] == int(valid[i].sum())
        expected = float(error[i].sum()) / int(valid[i].sum())
        assert row["error_px"] == pytest.approx(expected)
        hidden = not targets["valid"][i, 2]
        assert (row["true_nose_x"] is None) == hidden
    total = sum(float(str(row["loss"])) * int(str(row["valid"])) for row in rows)
    assert total == pytest.approx(float(task.loss(outputs, targets)[0]), rel=1e-5)
    answer = task.predictions(outputs, {"source_to_image": targets["source_to_image"]})[0]
    assert answer["mouth_y"] == rows[0]["mouth_y"]
    plain = task.predictions(outputs, {})[0]
    assert plain["left_eye_x"] == pytest.approx(float(task.points(outputs)[0, 0, 0]))


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("task.head", {"head": "heatmaps"}),
        ("task.loss", {"loss": "wings"}),
        ("task.loss", {"head": "heatmap", "loss": "wing"}),
        ("task.wing_width", {"wing_width": 0}),
        ("task.smooth_l1_beta", {"smooth_l1_beta": "x"}),
        ("task.heatmap_sigma", {"heatmap_sigma": -1}),
        ("'left_eey' is not a keypoint; did you mean 'left_eye'", {"normalize_by": ["left_eey", "nose"]}),
        ("task.normalize_by", {"normalize_by": ["nose", "nose"]}),
        ("task.normalize_by", {"normalize_by": "boxes"}),
        ("task.normalize_by", {"normalize_by": ["nose"]}),
    ],
)
def test_invalid_settings_are_reported_with_their_key(key, settings):
    with pytest.raises(UserError, match=key):
        make(**settings)


def test_data_without_keypoints_is_rejected():
    with pytest.raises(UserError, match="names keypoints"):
        Keypoints(DataSpec(1, 8, 8, classes=("a", "b")))


@pytest.mark.parametrize("head", ["regression", "heatmap"])
def test_drawings(head):
    task = make(head=head)
    outputs, targets = example(task, 4)
    images, names = torch.randn(4, 3, 24, 40), list("abcd")
    for answer, known in ((outputs, targets), (None, targets), (outputs, {})):
        figure = task.draw(images, answer, known, names)
        shown = [ax for ax in figure.axes if ax.images]
        assert len(shown) == 4
        assert shown[0].get_xlim() == (-0.5, 39.5)
        figure.canvas.draw()
    assert set(task.figures(metered(task, outputs, targets))) == {"error_per_keypoint"}
    assert task.figures(task.meter()) == {}


def test_caption_of_an_image_without_valid_points():
    task = make()
    outputs, targets = example(task, 2)
    targets["valid"][1] = False
    figure = task.draw(torch.randn(2, 3, 24, 40), outputs, targets, ["a", "b"])
    first, second = (ax.get_title() for ax in figure.axes if ax.images)
    assert first.endswith(" px")
    assert second == "b"


def test_inverted_matrices_match_linalg_inv():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(200, 3, 3, dtype=torch.float64, generator=generator)
    matrix[:, 2, :2] *= 1e-3
    matrix[:, 2, 2] = 1
    points = torch.rand(200, 4, 2, dtype=torch.float64, generator=generator) * 40
    homogeneous = torch.cat([points, torch.ones(200, 4, 1, dtype=torch.float64)], 2) @ torch.linalg.inv(matrix).mT
    expected = homogeneous[..., :2] / homogeneous[..., 2:]
    torch.testing.assert_close(image_to_source(points, matrix), expected, rtol=1e-9, atol=1e-9)


def test_a_singular_matrix_does_not_raise():
    assert image_to_source(torch.zeros(1, 4, 2), torch.zeros(1, 3, 3)).shape == (1, 4, 2)
