"""`check wiring` finds wiring faults, and passes sound set-ups."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from cnntrain.train import loop

FACES = ("data=toy_faces", "data.train_count=60", "data.test_count=4", "data.size=32")
SHAPES = ("data=toy_shapes", "data.train_count=60", "data.test_count=4", "data.size=32")


def planted(name: str, *overrides: str) -> list[str]:
    return ["model=sound", f"model._target_=planted_wiring.{name}", *overrides]


def task(name: str) -> list[str]:
    return ["model=sound", f"task._target_=planted_losses.{name}"]


def optimizer(name: str) -> list[str]:
    return ["model=sound", "optimizer=sgd", f"optimizer._target_=planted_wiring.{name}"]


BROKEN = {
    "a block in a list": (planted("InAList"), "registered", "FAIL", "blocks[0]"),
    "a parameter in a dict": (planted("ParameterInADict"), "registered", "FAIL", "extras['scale']"),
    "one block three times": (planted("RepeatedBlock"), "shared weights", "WARN", "layers.2.0.weight = layers.3"),
    "shared storage": (planted("BorrowedStorage"), "shared weights", "WARN", "second.weight = extra.weight"),
    "frozen by mistake": (["model=frozen_first"], "frozen", "FAIL", "first.weight, first.bias"),
    "random weights frozen": (["model=cifar_resnet", "model.freeze=backbone"], "frozen", "WARN", "backbone"),
    "dropped by the optimizer": (optimizer("Forgetful"), "optimizer", "FAIL", "first.weight"),
    "learning rate 0": (["model=sound", "optimizer.lr=0"], "optimizer", "FAIL", "first.weight"),
    "steps without effect": (optimizer("Stuck"), "gradients", "FAIL", "first.bias, second.bias, head.bias"),
    "dropped by the optimizer, steps": (optimizer("Forgetful"), "gradients", "FAIL", "first.weight"),
    "detach in the middle": (
        ["model=detached"],
        "gradients",
        "FAIL",
        "between first and second",
    ),
    "no_grad around the features": (planted("NoGrad"), "gradients", "FAIL", "inside first"),
    "all detached": (planted("AllDetached"), "gradients", "FAIL", "detach"),
    "never called": (planted("NeverCalled"), "gradients", "FAIL", "forgotten"),
    "dead biases": (planted("DeadBiases"), "gradients", "FAIL", "exactly zero"),
    "mean over dim 0": (planted("MixesBatch"), "examples apart", "FAIL", "batch"),
    "reshape over the images": (planted("WrongReshape"), "examples apart", "FAIL", "batch"),
    "reshape over the images, order": (planted("WrongReshape"), "batch order", "FAIL", "batch"),
    "squeeze": (planted("Squeezes"), "examples apart", "FAIL", "squeeze()"),
    "position in the batch": (planted("PlaceMatters"), "batch order", "FAIL", "batch"),
    "batch statistics in eval": (planted("BatchStatisticsInEval"), "examples apart", "FAIL", "batch"),
    "losses mix examples": (task("MixedLosses"), "examples apart", "FAIL", "losses()"),
    "softmax": (["model=softmax_inside"], "output layer", "FAIL", "softmax"),
    "softmax written out": (planted("HiddenSoftmax"), "output layer", "FAIL", "softmax"),
    "log-softmax": (planted("LogSoftmaxInside"), "output layer", "WARN", "log-softmax"),
    "sigmoid": (planted("SigmoidInside"), "output layer", "FAIL", "sigmoid"),
    "tanh": (planted("TanhInside"), "output layer", "FAIL", "tanh"),
    "ReLU on logits": (planted("ReluOutput"), "output layer", "FAIL", "ReLU"),
    "ReLU on coordinates": (planted("ReluOutput", *FACES), "output layer", "FAIL", "center"),
    "sigmoid on coordinates": (planted("SigmoidInside", *FACES), "output layer", "FAIL", "center"),
    "positive coordinates": (planted("AbsOutput", *FACES), "output layer", "FAIL", "center"),
    "dropout in evaluation": (planted("DropoutInEval"), "modes", "FAIL", "dropout"),
    "a layer created in forward": (planted("LayerInForward"), "modes", "FAIL", "random"),
    "eval when training": (planted("EvalWhenTraining"), "modes", "FAIL", "norm"),
    "train in forward": (planted("TrainsInForward"), "modes", "FAIL", "norm"),
    "changes in evaluation": (planted("LearnsInEval"), "modes", "FAIL", "evaluation"),
    "another computation in training": (planted("OtherInTraining"), "modes", "WARN", "training"),
    "BatchNorm momentum 0": (planted("Normed", "+model.momentum=0.0"), "modes", "FAIL", "running statistics"),
    "BatchNorm momentum 1": (planted("Normed", "+model.momentum=1.0"), "modes", "FAIL", "last batch"),
    "dropout 0.99": (planted("Normed", "+model.dropout=0.99"), "modes", "FAIL", "1 %"),
    "dropout 0.85": (planted("Normed", "+model.dropout=0.85"), "modes", "WARN", "15 %"),
    "sum instead of mean": (task("SumLoss"), "loss scale", "FAIL", "sum"),
    "divided twice": (task("MeanOfMean"), "loss scale", "FAIL", "twice"),
    "flipped sign": (["model=sound", "task=flipped_sign"], "loss sign", "FAIL", "sign"),
    "softmax in the loss": (task("SoftmaxInLoss"), "loss sign", "FAIL", "softmax"),
    "no derivative": (task("NotDifferentiable"), "loss sign", "FAIL", "argmax"),
    "off by one in the loss": (task("OffByOneInLoss"), "loss sign", "FAIL", "metric"),
    "blind to the label": (["model=sound", "task=blind_to_label"], "loss sees labels", "FAIL", "target"),
    "wrong backward": (planted("WrongBackward"), "derivative", "FAIL", "first.weight, first.bias"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_faults_are_named(name: str, context_of, findings_of) -> None:
    overrides, check, verdict, subject = BROKEN[name]
    finding = findings_of(context_of(*overrides), check.replace(" ", "-"))[check]
    assert finding.verdict == verdict, finding
    assert subject in f"{finding.evidence} {finding.cause} {finding.remedy}", finding


SOUND = {
    "sound": ["model=sound"],
    "norm and dropout": planted("Normed"),
    "ends in a pool": planted("PooledOutputs"),
    "loss in float32": task("RoundedLoss"),
    "zero head": ["model=sound", "model._target_=planted_start.ZeroHead"],
    "lenet5": ["model=lenet5", "accumulate=2", "clip_grad_norm=1"],
    "mlp": ["model=mlp", "optimizer=sgd", "seed=1"],
    "sequential": ["model=sequential", "seed=2", "task.label_smoothing=0.1", "augment=mixup"],
    "fmnist_cnn": ["model=fmnist_cnn", "optimizer=adam"],
    "cifar_resnet": ["model=cifar_resnet", "task.class_weights=balanced"],
    "faces": FACES,
    "faces, mse": [*FACES, "task.loss=mse", "model=lenet5"],
    "faces, heat maps": [*FACES, "task.head=heatmap", "model=unet_small", "model.width=4"],
    "shapes, dice": [*SHAPES, "task.loss=ce_dice", "model.width=4"],
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_set_ups_pass(name: str, context_of, findings_of) -> None:
    found = findings_of(context_of(*SOUND[name]), "wiring")
    assert {f.name: f"{f.cause} {f.evidence}" for f in found.values() if f.verdict in ("WARN", "FAIL")} == {}
    assert found["loop"].verdict == found["derivative"].verdict == found["loss sign"].verdict == "PASS", found


def test_a_float32_network_skips_the_derivative(context_of, findings_of) -> None:
    finding = findings_of(context_of(*planted("Float32Alone")), "derivative")["derivative"]
    assert finding.verdict == "SKIP" and "float64" in finding.evidence


def test_trained_weights_are_checked_too(context_of, findings_of) -> None:
    context = context_of("model=mlp")
    context.trained = True
    assert {finding.verdict for finding in findings_of(context, "wiring").values()} == {"PASS"}


def test_a_frozen_pretrained_backbone_passes(context_of, findings_of) -> None:
    context = context_of("model=cifar_resnet", "model.freeze=backbone", "model.depth=8")
    context.model.pretrained_from = "another training"
    found = findings_of(context, "wiring")
    assert {f.name: f.cause for f in found.values() if f.verdict in ("WARN", "FAIL")} == {}
    assert "2 of 2 trainable" in found["optimizer"].evidence


def without_zeroing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda self, set_to_none=True: None)


def dividing_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply_gradients(state, plan, group_count, *rest, **more):
        group_count = torch.as_tensor(float(plan.batch_size))
        return real(state, plan, group_count, *rest, **more)

    real = loop.apply_gradients
    monkeypatch.setattr(loop, "apply_gradients", apply_gradients)


def evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    def train_epoch(trainer, state, *rest, **more):
        train, state.model.train = state.model.train, lambda mode=True: nn.Module.train(state.model, False)
        try:
            return real(trainer, state, *rest, **more)
        finally:
            state.model.train = train

    real = loop.train_epoch
    monkeypatch.setattr(loop, "train_epoch", train_epoch)


def wrong_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.set_learning_rate
    monkeypatch.setattr(
        loop, "set_learning_rate", lambda optimizer, schedule, step: real(optimizer, schedule, step + 1)
    )


def no_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", lambda *rest, **more: None)


def validation_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(trainer, model, *rest, **more):
        evaluation, model.eval = model.eval, lambda: model.train()
        try:
            return real(trainer, model, *rest, **more)
        finally:
            model.eval = evaluation

    real = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", evaluate)


BROKEN_LOOPS = {
    "gradients not reset": (without_zeroing, "zero_grad"),
    "accumulation without division": (dividing_wrongly, "batches"),
    "evaluation mode in training": (evaluation_mode, "training mode"),
    "schedule one step early": (wrong_schedule, "learning rate"),
    "no clipping": (no_clipping, "clip"),
    "training mode in validation": (
        validation_in_training_mode,
        "norm.",
    ),
}


@pytest.mark.parametrize("name", BROKEN_LOOPS)
def test_a_broken_loop_is_found(name: str, context_of, findings_of, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, subject = BROKEN_LOOPS[name]
    extra = {"no clipping": ["clip_grad_norm=0.01"], "accumulation without division": ["accumulate=2"]}
    context = context_of(*planted("Normed"), *extra.get(name, []))
    assert findings_of(context, "loop")["loop"].verdict == "PASS"
    plant(monkeypatch)
    finding = findings_of(context, "loop")["loop"]
    assert finding.verdict == "FAIL" and subject in finding.cause, finding


def test_checks_do_not_change_models_data_or_random_states(context_of, findings_of) -> None:
    context = context_of(*planted("Normed"))
    before = {name: value.clone() for name, value in context.model.state_dict().items()}
    training = [module.training for module in context.model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in context.model.modules()]
    stored = context.loaders["train"].examples.images.clone()
    random_states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    findings_of(context, "start", "wiring")
    assert torch.equal(random_states[0], torch.get_rng_state())
    assert (random_states[1] == np.random.get_state()[1]).all() and random_states[2] == random.getstate()
    assert all(torch.equal(value, before[name]) for name, value in context.model.state_dict().items())
    assert training == [module.training for module in context.model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in context.model.modules()]
    assert all(parameter.grad is None for parameter in context.model.parameters())
    assert torch.equal(stored, context.loaders["train"].examples.images)


def test_an_exception_does_not_stop_other_checks(context_of, findings_of) -> None:
    """`squeeze()` returns (10,) for a single image, which the loss refuses."""
    found = findings_of(context_of(*planted("Squeezes")), "examples-apart", "one-example", "optimizer")
    assert found["examples apart"].verdict == "FAIL"
    assert found["one example"].verdict == "FAIL"
    assert found["optimizer"].verdict == "PASS"
