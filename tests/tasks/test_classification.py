"""Classification against torch, scikit-learn and the definitions, in float64 where it can be told."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnntrain.errors import UserError
from cnntrain.tasks import classification
from cnntrain.tasks.classification import Classification
from cnntrain.tasks.meter import HardestExamples, Meter, count_pairs
from cnntrain.types import DataSpec


def make(classes: int = 10, **settings) -> Classification:
    return Classification(DataSpec(1, 8, 8, tuple(f"c{i}" for i in range(classes))), **settings)


def example(task: Classification, count: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, task.num_outputs, generator=generator) * 2
    return outputs, {"label": torch.randint(0, task.num_classes, (count,), generator=generator)}


def mean_loss(task, outputs, targets, training=True) -> float:
    total, count = task.loss(outputs, targets, training)
    return float(total / count)


def metered(task, outputs, targets, cuts=()) -> Meter:
    meter = task.meter()
    edges = [0, *cuts, len(outputs)]
    for start, end in pairwise(edges):
        part = {name: value[start:end] for name, value in targets.items()}
        meter.update(outputs[start:end], part, *task.loss(outputs[start:end], part))
    return meter


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weights", [None, [0.5, 1, 2, 3, 0]])
def test_mean_loss_matches_torch_cross_entropy(smoothing, weights):
    task = make(5, label_smoothing=smoothing, class_weights=weights)
    outputs, targets = example(task)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = F.cross_entropy(outputs.double(), targets["label"], weight, label_smoothing=smoothing)
    assert mean_loss(task, outputs, targets) == pytest.approx(float(expected), rel=1e-6)
    plain = F.cross_entropy(outputs.double(), targets["label"])
    assert mean_loss(task, outputs, targets, training=False) == pytest.approx(float(plain), rel=1e-6)


def test_one_logit_matches_torch_binary_cross_entropy():
    task = make(2)
    assert task.num_outputs == 1
    outputs, targets = example(task)
    expected = F.binary_cross_entropy_with_logits(outputs[:, 0].double(), targets["label"].double())
    assert mean_loss(task, outputs, targets) == pytest.approx(float(expected), rel=1e-6)
    smoothed = F.binary_cross_entropy_with_logits(outputs[:, 0].double(), targets["label"] * 0.8 + 0.1)
    assert mean_loss(make(2, label_smoothing=0.2), outputs, targets) == pytest.approx(float(smoothed), rel=1e-6)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_one_logit_is_finite_for_saturated_sigmoids(logit):
    outputs = torch.tensor([[logit]], requires_grad=True)
    total, _ = make(2).loss(outputs, {"label": torch.tensor([int(logit < 0)])})
    (gradient,) = torch.autograd.grad(total, outputs)
    assert total.item() == 200.0
    assert float(gradient) == pytest.approx(math.copysign(1, logit))


def test_mixed_targets_weight_both_labels():
    task = make(5, class_weights=[1, 2, 3, 4, 5])
    outputs, targets = example(task, 6)
    other, mix = targets["label"].flip(0), torch.linspace(0, 1, 6)
    total, count = task.loss(outputs, {**targets, "label_b": other, "mix": mix})
    weight = torch.arange(1.0, 6)
    entropy = -outputs.log_softmax(1)
    expected, weights = 0.0, 0.0
    for i in range(6):
        for label, share in ((targets["label"][i], mix[i]), (other[i], 1 - mix[i])):
            expected += float(share * weight[label] * entropy[i, label])
            weights += float(share * weight[label])
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(count) == pytest.approx(weights, rel=1e-5)
    assert list(metered(task, outputs, {**targets, "label_b": other, "mix": mix}).compute()) == ["loss"]


def test_min_loss_with_label_smoothing():
    assert make(10, label_smoothing=0.1).min_loss() == pytest.approx(0.500288, abs=5e-7)
    assert make(10).min_loss() == 0.0


@pytest.mark.parametrize(("classes", "weights"), [(2, None), (4, None), (4, [0.2, 1, 3, 1]), (2, [1, 5])])
def test_optimal_logits_reach_min_loss(classes, weights):
    task = make(classes, label_smoothing=0.2, class_weights=weights)
    best = math.inf
    for label in range(classes):
        targets = {"label": torch.tensor([label])}
        outputs = torch.zeros(1, task.num_outputs, requires_grad=True)
        optimizer = torch.optim.LBFGS([outputs], max_iter=40, line_search_fn="strong_wolfe")

        def closure(outputs=outputs, targets=targets, optimizer=optimizer):
            optimizer.zero_grad()
            total, count = task.loss(outputs, targets)
            (total / count).backward()
            return total / count

        optimizer.step(closure)
        best = min(best, mean_loss(task, outputs.detach(), targets))
    assert best == pytest.approx(task.min_loss(), abs=2e-5)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_uninformed_loss_is_the_logarithm_of_the_number_of_classes(classes):
    task = make(classes, label_smoothing=0.1)
    outputs = torch.ones(2, task.num_outputs)
    assert task.uninformed_loss({"label": torch.tensor([0, 1])}, outputs) == pytest.approx(math.log(classes))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 39), max_size=5), st.sampled_from([2, 5, 8]), st.booleans(), st.integers(0, 99))
def test_metrics_do_not_depend_on_batches_and_ranks(cuts, classes, weighted, seed):
    task = make(classes, class_weights=list(range(1, classes + 1)) if weighted else None, label_smoothing=0.1)
    outputs, targets = example(task, seed=seed)
    whole = metered(task, outputs, targets)
    parts = metered(task, outputs, targets, sorted(set(cuts)))
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)
    half = {name: value[:17] for name, value in targets.items()}
    rest = {name: value[17:] for name, value in targets.items()}
    first, second = metered(task, outputs[:17], half), metered(task, outputs[17:], rest)
    second.merge(first.state())
    assert second.compute() == pytest.approx(whole.compute(), rel=1e-6)
    assert second.details() == pytest.approx(whole.details(), nan_ok=True)


def test_a_meter_continues_from_its_state():
    task = make(2)
    outputs, targets = example(task)
    meter = metered(task, outputs, targets)
    state = {name: value.clone() for name, value in meter.state().items()}
    other = task.meter()
    other.load_state(meter.state(), torch.device("cpu"))
    assert other.compute() == meter.compute()
    other.update(outputs, targets, *task.loss(outputs, targets))
    assert all(torch.equal(state[name], value) for name, value in meter.state().items())


@pytest.mark.parametrize("classes", [2, 7])
def test_pending_logits_are_counted_once(classes, monkeypatch):
    task = make(classes)
    outputs, targets = example(task)
    monkeypatch.setattr("cnntrain.tasks.classification.MAX_PENDING", 10 * classes)
    cuts = [4, 8, 9, 11, 30]
    meter, now_and_then = metered(task, outputs, targets, cuts), task.meter()
    for start, stop in pairwise([0, *cuts, len(outputs)]):
        part = {name: value[start:stop] for name, value in targets.items()}
        now_and_then.update(outputs[start:stop], part, *task.loss(outputs[start:stop], part))
        assert now_and_then.read()["confusion"].sum() == stop
    whole = metered(task, outputs, targets)
    for each in (meter, now_and_then):
        assert torch.equal(each.read()["confusion"], whole.read()["confusion"])
        assert each.compute() == pytest.approx(whole.compute(), rel=1e-6)
    meter.update(outputs, targets, *task.loss(outputs, targets))
    meter.load_state(whole.state(), torch.device("cpu"))  # forgets what waited
    assert meter.compute() == whole.compute()


def test_metrics_match_scikit_learn():
    from sklearn import metrics

    task = make(7)
    outputs, targets = example(task, 300)
    label, predicted = targets["label"].numpy(), outputs.argmax(1).numpy()
    meter = metered(task, outputs, targets, (100, 128))
    values = meter.compute()
    assert list(values) == ["loss", "top1", "top5"]
    assert values["top1"] == pytest.approx(metrics.accuracy_score(label, predicted))
    scores = outputs.double().numpy()
    assert values["top5"] == pytest.approx(metrics.top_k_accuracy_score(label, scores, k=5))
    assert values["loss"] == pytest.approx(metrics.log_loss(label, outputs.double().softmax(1).numpy()), rel=1e-6)
    confusion = meter.read()["confusion"].view(7, 7).numpy()
    np.testing.assert_array_equal(confusion, metrics.confusion_matrix(label, predicted))
    recall = metrics.recall_score(label, predicted, average=None)
    assert list(meter.details().values()) == pytest.approx(list(recall))
    assert list(meter.details())[3] == "accuracy/c3"


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_metrics_match_brute_force(ties):
    task = make(2)
    outputs, targets = example(task, 500)
    outputs = outputs.round() if ties else outputs
    values = metered(task, outputs, targets, (77, 400)).compute()
    label, score = targets["label"].numpy(), outputs[:, 0].double().numpy()
    difference = score[label == 1][:, None] - score[label == 0]
    assert values["roc_auc"] == pytest.approx((difference > 0).mean() + (difference == 0).mean() / 2, abs=1e-12)
    average_precision = recall = 0.0
    for threshold in sorted(set(score), reverse=True):
        found = label[score >= threshold]
        average_precision += found.mean() * (found.sum() / label.sum() - recall)
        recall = found.sum() / label.sum()
    assert values["average_precision"] == pytest.approx(average_precision, abs=1e-12)


def test_ranking_metrics_of_one_class_are_nan():
    task = make(2)
    values = metered(task, torch.randn(5, 1), {"label": torch.ones(5, dtype=torch.int64)}).compute()
    assert math.isnan(values["roc_auc"])
    assert math.isnan(metered(make(3), torch.zeros(1, 3), {"label": torch.tensor([0])}).details()["accuracy/c1"])


@pytest.mark.parametrize(("classes", "offered"), [(5, False), (6, True)])
def test_top5_needs_six_classes(classes, offered):
    task = make(classes)
    assert ("top5" in metered(task, *example(task)).compute()) == offered


def test_an_empty_meter_returns_nan():
    values = make().meter().compute()
    assert list(values) == ["loss"]
    assert math.isnan(values["loss"])


def test_count_pairs_skips_ignored_entries():
    true, predicted = torch.tensor([0, 1, 255, 1]), torch.tensor([0, 0, 1, 1])
    counts = count_pairs(true, predicted, torch.tensor([1, 1, 0, 1]), 2)
    assert counts.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("task.label_smoothing", {"label_smoothing": 1.0}),
        ("task.label_smoothing", {"label_smoothing": -0.1}),
        ("task.label_smoothing", {"label_smoothing": "much"}),
        ("task.class_weights", {"class_weights": [1, 2]}),
        ("task.class_weights", {"class_weights": [1, 2, -3]}),
        ("task.class_weights", {"class_weights": [0, 0, 0]}),
        ("task.class_weights", {"class_weights": [1, 2, "x"]}),
        ("task.class_weights", {"class_weights": "balance"}),
        ("task.class_weights", {"class_weights": {"c9": 1}}),
        ("task.binary", {"binary": True}),
        ("task.binary", {"binary": "maybe"}),
    ],
)
def test_invalid_settings_are_reported_with_their_key(key, settings):
    with pytest.raises(UserError, match=key):
        make(3, **settings)


def test_too_few_classes_are_rejected():
    with pytest.raises(UserError, match="2 classes or more"):
        make(1)


@pytest.mark.parametrize("classes", [2, 4])
def test_rows_have_truth_prediction_and_loss(classes):
    task = make(classes, label_smoothing=0.1)
    outputs, targets = example(task, 8)
    rows = task.per_example(outputs, targets)
    logits = task.logits(outputs)
    plain = F.cross_entropy(logits, targets["label"], reduction="none")
    for i, row in enumerate(rows):
        assert row["true"] == f"c{targets['label'][i]}"
        assert row["predicted"] == f"c{logits[i].argmax()}"
        assert row["probability"] == pytest.approx(float(logits[i].softmax(0).max()))
        assert row["loss"] == pytest.approx(float(plain[i]))
    assert list(rows[0]) == ["true", "predicted", "probability", "loss"]


def test_hardest_examples_do_not_depend_on_batches():
    task = make(3)
    outputs = torch.tensor([[9.0, 0, 0], [0, 5, 0], [0, 9, 0], [7, 0, 0], [0, 0, 1]])
    targets = {"label": torch.tensor([0, 0, 0, 1, 1])}
    for cut in range(1, 5):
        worst = HardestExamples(3)
        for part in (slice(0, cut), slice(cut, 5)):
            score = task.mistake_score(outputs[part], {"label": targets["label"][part]})
            worst.update(score, torch.arange(10, 15)[part])
        assert worst.rows().tolist() == [12, 13, 11]
    assert HardestExamples(3).rows().tolist() == []


@pytest.mark.parametrize("finite", [0, 3])
def test_figures_of_outputs_that_are_not_finite(finite):
    task = make(2)
    outputs = torch.full((5, 1), float("nan"))
    outputs[:finite] = torch.randn(finite, 1)
    meter = metered(task, outputs, {"label": torch.tensor([0, 1, 1, 0, 1])})
    drawn = task.figures(meter)
    assert set(drawn) == {"confusion_matrix"} | ({"ranking_curves"} if finite else set())


def test_half_precision_outputs_are_converted_to_float32():
    task = make(4)
    outputs, targets = example(task)
    half = outputs.bfloat16()
    assert mean_loss(task, half, targets) == pytest.approx(mean_loss(task, half.float(), targets), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 30])
def test_figures_and_drawings(classes):
    task = make(classes)
    outputs, targets = example(task)
    drawn = task.figures(metered(task, outputs, targets))
    assert set(drawn) == {"confusion_matrix"} | ({"ranking_curves"} if classes == 2 else set())
    images, names = torch.randn(40, 1, 8, 8), [f"val/{i}" for i in range(40)]
    figure = task.draw(images, outputs, targets, names)
    assert sum(len(ax.images) for ax in figure.axes) == 40
    assert task.draw(images[:1], outputs[:1], {}, names[:1]).axes[0].get_title().endswith("val/0")
    assert task.draw(images[:1], None, targets | {"label": targets["label"][:1]}, names[:1])


def test_many_classes_have_no_confusion_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same metrics, without a matrix that would have a row and a column for each."""
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"c{i}" for i in range(9))
    outputs = torch.randn(50, 9, generator=generator)
    targets = {"label": torch.randint(0, 8, (50,), generator=generator)}  # none of the last class
    found = []
    for most in (9, 8):
        monkeypatch.setattr(classification, "MAX_MATRIX_CLASSES", most)
        task = Classification(DataSpec(3, 8, 8, classes=names))
        meter = task.meter()
        for part in (slice(0, 30), slice(30, 50)):
            own = {"label": targets["label"][part]}
            meter.update(outputs[part], own, *task.loss(outputs[part], own))
        found.append((meter.compute(), meter.details()))
        assert ("confusion" in meter.state()) == bool(task.figures(meter)) == (most == 9)
    assert repr(found[0]) == repr(found[1]) and math.isnan(found[0][1]["accuracy/c8"])
