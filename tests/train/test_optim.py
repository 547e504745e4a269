"""Parameter groups by weight decay and layer; freezing and unfreezing a backbone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from cnntrain import compose, train
from cnntrain.errors import StoppedError, UserError
from cnntrain.models.fcn import FCN
from cnntrain.models.resnet import ResNet
from cnntrain.models.sequential.parser import Sequential
from cnntrain.train import checkpoint
from cnntrain.train.optim import build_optimizer, by_name, layers_of, set_learning_rate
from cnntrain.train.schedule import Constant, Cosine
from cnntrain.train.setup import build_components
from tests.runs import stop_at

SMALL = (
    *(
        "data.limit=300 epochs=3 batch_size=32 log.figures=false log.tensorboard=false threads=1 "
        "model=fmnist_cnn schedule=constant"
    ).split(),
)
FROZEN = (*SMALL, "model.freeze=backbone")
STEPS_PER_EPOCH = 9
FACTS: dict[str, Any] = {"in_channels": 3, "num_outputs": 10, "image_size": (32, 32)}


def resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet(depth=18, **FACTS)


def sgd(model: nn.Module, layer_decay: float | None, **options: Any) -> Optimizer:
    return build_optimizer(lambda p: SGD(p, lr=0.5, **options), model, 0.0, False, layer_decay)


def names(model: nn.Module) -> list[list[str]]:
    known = {id(p): name for name, p in model.named_parameters()}
    return [[known[id(p)] for p in layer] for layer in layers_of(model)]


def rates(optimizer: Optimizer) -> dict[int, float]:
    """Return the learning rate of each parameter; a parameter is in one group only."""
    found: dict[int, float] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert id(p) not in found
            found[id(p)] = group["lr"]
    return found


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(run_dir) / "checkpoints" / "last.pt")["state"]["model"]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_resnets_layers_are_its_blocks() -> None:
    """The stem with its norm, eight blocks, the head."""
    layers = names(resnet())
    assert layers[0] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert layers[-1] == ["fc.weight", "fc.bias"]
    blocks = [{".".join(name.split(".")[:2]) for name in layer} for layer in layers[1:-1]]
    assert blocks == [{f"layer{stage}.{block}"} for stage in (1, 2, 3, 4) for block in (0, 1)]


def test_a_norm_belongs_to_the_layer_of_its_convolution() -> None:
    layers = [{"conv": 4}, "batch_norm", "relu", {"repeat": {"times": 2, "layers": [{"conv": 4}, "relu"]}}]
    found = names(Sequential(layers=[*layers, "flatten", "output"], **FACTS))
    assert [layer[0] for layer in found] == [f"layers.{n}.weight" for n in ("0", "3.0.0", "3.1.0", "5")]
    assert found[0] == [f"layers.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")]


def test_the_head_is_the_last_layer_wherever_it_is_registered() -> None:
    """The three scoring layers of an FCN are its head; a wrapper is not a layer."""
    net = FCN(**FACTS)
    assert [name.split(".")[0] for name in names(net)[-1]] == ["score"] * 6
    wrapped = nn.Sequential(nn.ModuleDict({"network": resnet()}))
    assert [len(layer) for layer in names(wrapped)] == [len(layer) for layer in names(resnet())]


def test_each_layer_has_a_lower_rate_than_the_next() -> None:
    """lr * decay^distance (Bao et al. 2022, BEiT) at every step of a schedule; the head's rate is logged."""
    model = resnet()
    optimizer = sgd(model, 0.5, weight_decay=0.1)
    schedule = Cosine(final=0.1, total_steps=10, steps_per_epoch=5)
    for step in range(10):
        head = set_learning_rate(optimizer, schedule, step)
        assert head == pytest.approx(0.5 * schedule.multiplier(step))
        found = rates(optimizer)
        assert found.keys() == {id(p) for p in model.parameters()}
        for distance, layer in enumerate(reversed(layers_of(model))):
            assert [found[id(p)] for p in layer] == pytest.approx([head * 0.5**distance] * len(layer))


def test_the_size_of_a_step_is_proportional_to_the_layers_rate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = sgd(model, 0.25)
    set_learning_rate(optimizer, Constant(total_steps=1, steps_per_epoch=1), 0)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    for old, new, rate in zip(before, model.parameters(), (0.125, 0.125, 0.5, 0.5), strict=True):
        assert new.grad is not None
        torch.testing.assert_close(new.detach(), old - rate * new.grad)


def test_a_decay_of_one_changes_no_bit() -> None:
    for name, extra in (("none", ()), ("one", ("optimizer.layer_decay=1",))):
        train(compose(*SMALL, "epochs=1", *extra, f"run_dir={name}"))
    assert not changed(weights("none"), weights("one"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.layer_decay=0", r"optimizer\.layer_decay: must be a number >= 1e-06 and <= 1 or null, got 0"),
        ("optimizer.layer_decay=1.1", r"optimizer\.layer_decay: must be a number .* got 1\.1"),
        ("optimizer.layer_decay=deep", r"optimizer\.layer_decay: must be a number .* got 'deep'"),
        ("optimizer.layer_dekay=0.5", r"optimizer\.layer_dekay: no such key; did you mean 'optimizer\.layer_decay'"),
        ("model.unfreeze=2", r"model\.unfreeze=2: nothing is frozen; set model\.freeze=backbone"),
        ("model.unfreeze=1", r"model\.unfreeze: must be a whole number >= 2 or null, got 1"),
    ],
)
def test_invalid_fine_tuning_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(compose(*SMALL, override))
    assert not Path("outputs").exists()


def test_parameter_groups_unlike_the_checkpoints_are_refused() -> None:
    train(compose(*SMALL, "epochs=1", "run_dir=run"))
    with pytest.raises(UserError, match=r"resume: .* parameter groups .* optimizer\.layer_decay"):
        train(compose(*SMALL, "epochs=2", "run_dir=run", "resume=auto", "optimizer.layer_decay=0.5"))


def test_a_backbone_is_unfrozen_at_its_epoch() -> None:
    """Before that epoch only the head changes; from then on everything does, including running statistics."""
    model = build_components(compose(*FROZEN)).model
    start, (last,) = model.state_dict(), model.head_names
    head = {f"{last}.weight", f"{last}.bias"}
    settings = (*FROZEN, "model.unfreeze=3", "run_dir=run")
    train(compose(*settings, "epochs=2"))
    before = weights("run")
    assert changed(start, before) == head
    train(compose(*settings, "epochs=3", "resume=auto"))
    assert changed(before, weights("run")) == set(start)


def test_an_unfreeze_epoch_after_the_end_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "cnntrain"):
        train(compose(*FROZEN, "epochs=1", "model.unfreeze=2", "run_dir=run"))
    assert "model.unfreeze=2: the training ends before that epoch" in caplog.text


@pytest.mark.parametrize("step", [STEPS_PER_EPOCH - 4, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 4])
def test_a_run_stopped_around_the_unfreeze_epoch_resumes_with_the_same_bits(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, at the start of and within the epoch that unfreezes the backbone; with learning rates by layer."""
    settings = (*FROZEN, "model.unfreeze=2", "optimizer.layer_decay=0.7", "ema_decay=0.9")
    train(compose(*settings, "run_dir=whole"))
    stop_at(monkeypatch, step)
    with pytest.raises(StoppedError):
        train(compose(*settings, "run_dir=broken"))
    progress = checkpoint.load(Path("broken/checkpoints/last.pt"))["state"]["progress"]
    assert (progress["epoch"], progress["batch"]) == divmod(step, STEPS_PER_EPOCH)
    train(compose(*settings, "run_dir=broken", "resume=auto"))
    whole, broken = (checkpoint.load(Path(f"{run}/checkpoints/last.pt"))["state"] for run in ("whole", "broken"))
    for part in ("model", "ema"):
        assert not changed(whole[part], broken[part])
    for index, moments in whole["optimizer"]["state"].items():
        assert not changed(moments, broken["optimizer"]["state"][index])


def test_norms_and_biases_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    optimizer = build_optimizer(lambda p: SGD(p, lr=0.1, weight_decay=0.5), model, 0.5, False)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model[0].weight)}
    everything = build_optimizer(lambda p: SGD(p, lr=0.1, weight_decay=0.5), model, 0.5, True)
    assert len(everything.param_groups[0]["params"]) == 4


def test_optimizers_are_built_by_name_and_similar_names_suggested() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 2))]
    made = by_name(parameters, "RMSprop", 0.01, 0.0, {"momentum": 0.5})
    assert made.defaults["momentum"] == 0.5 and math.isclose(made.defaults["lr"], 0.01)
    with pytest.raises(UserError, match="did you mean 'RMSprop'"):
        by_name(parameters, "RMSProp", 0.01, 0.0, None)
    with pytest.raises(UserError, match=r"optimizer\.options\.momentun.*did you mean 'momentum'"):
        by_name(parameters, "RMSprop", 0.01, 0.0, {"momentun": 0.5})
