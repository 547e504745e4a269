"""The moving average of the weights, and the validation of a saved optimizer state."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnntrain.train.optim import build_optimizer, by_name
from cnntrain.train.state import ModelEMA, validate_optimizer_state

# LBFGS needs a closure, SparseAdam needs sparse gradients, and Muon accepts only matrices.
NAMES = sorted(
    name
    for name, member in vars(torch.optim).items()
    if inspect.isclass(member)
    and issubclass(member, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
)
OPTIONS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}, "Adam": {"amsgrad": True}}


def make(name: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network and its optimizer after two steps, in groups with and without weight decay."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    net.scale = nn.Parameter(torch.tensor(2.0))  # a parameter without dimensions
    factory = partial(by_name, name=name, lr=0.01, weight_decay=0.1, options=OPTIONS.get(name, {}) | options)
    optimizer = build_optimizer(factory, net, 0.1, False)
    for step in range(2):
        for number, parameter in enumerate(net.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (number + 1) * (-1) ** step)
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("name", NAMES)
def test_valid_state_is_copied(name: str) -> None:
    _, optimizer = make(name)
    before = optimizer.state_dict()
    validated = validate_optimizer_state(optimizer, before)
    assert validated["param_groups"] == before["param_groups"] and validated["state"].keys() == before["state"].keys()
    for key, values in before["state"].items():
        assert validated["state"][key].keys() == values.keys()
        for moment, value in values.items():
            mine = validated["state"][key][moment]
            if isinstance(value, Tensor):
                assert torch.equal(mine, value) and mine.dtype == value.dtype and mine.shape == value.shape
                assert mine.data_ptr() != value.data_ptr()
            else:
                assert mine == value
    optimizer.load_state_dict(validated)
    optimizer.step()


def set_overlapping_moment(state: dict[str, Any]) -> None:
    state[0]["exp_avg"] = torch.zeros(1).expand(state[0]["exp_avg"].shape)


def set_shared_moments(state: dict[str, Any]) -> None:
    state[0]["exp_avg"] = state[0]["exp_avg_sq"]


def set_transposed_moment(state: dict[str, Any]) -> None:
    value = state[0]["exp_avg"]
    state[0]["exp_avg"] = value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


@pytest.mark.parametrize("change", [set_overlapping_moment, set_shared_moments, set_transposed_moment])
def test_moments_get_their_own_contiguous_memory(change: Callable[[dict[str, Any]], None]) -> None:
    """The next step equals that of an optimizer whose moments have the same values in the usual layout."""
    _, optimizer = make("Adam")
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"])
    contiguous = copy.deepcopy(saved)
    for values in contiguous["state"].values():
        values |= {name: value.contiguous().clone() for name, value in values.items()}
    results = []
    for state in (contiguous, validate_optimizer_state(optimizer, saved)):
        twin, other = make("Adam")
        other.load_state_dict(state)
        for parameter in twin.parameters():
            parameter.grad = torch.ones_like(parameter)
        other.step()
        results.append([parameter.detach() for parameter in twin.parameters()])
        moments = [value for values in other.state.values() for value in values.values()]
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert len({value.data_ptr() for value in moments}) == len(moments)
    assert all(value.is_contiguous() for value in moments)


def test_moments_use_the_memory_format_of_their_parameters() -> None:
    """A run may be resumed with another `channels_last`; fused kernels index both tensors with the same strides."""
    net, optimizer = make("Adam")
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        net.to(memory_format=torch.channels_last)
    validated = validate_optimizer_state(optimizer, saved)
    conv = net[0].weight
    assert validated["state"][0]["exp_avg"].stride() == conv.stride() != saved["state"][0]["exp_avg"].stride()
    assert torch.equal(validated["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


INVALID: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "another shape": ("Adam", lambda s: s["state"][0].update(exp_avg=torch.zeros(3))),
    "no elements": ("Adam", lambda s: s["state"][0].update(exp_avg=torch.zeros(0))),
    "too many elements": ("SGD", lambda s: s["state"][0].update(momentum_buffer=torch.zeros(9, 9, 9, 9))),
    "a list": ("Adam", lambda s: s["state"][0].update(exp_avg=[0.0])),
    "None": ("Adam", lambda s: s["state"][0].update(exp_avg=None)),
    "missing": ("Adam", lambda s: s["state"][0].pop("exp_avg_sq")),
    "integers": ("Adam", lambda s: s["state"][0].update(exp_avg=torch.zeros(4, 3, 3, 3, dtype=torch.int64))),
    "complex": ("Adam", lambda s: s["state"][0].update(exp_avg=torch.zeros(4, 3, 3, 3, dtype=torch.complex64))),
    "not finite": ("Adam", lambda s: s["state"][0].update(exp_avg=torch.full((4, 3, 3, 3), float("nan")))),
    "a vector of steps": ("Adam", lambda s: s["state"][0].update(step=torch.zeros(4))),
    "negative step": ("Adam", lambda s: s["state"][0].update(step=torch.tensor(-1.0))),
    "an empty step": ("Adam", lambda s: s["state"][0].update(step=torch.zeros(0))),
    "a string as step": ("Adam", lambda s: s["state"][0].update(step="many")),
    "another shape of a row factor": ("Adafactor", lambda s: s["state"][0].update(row_var=torch.zeros(4, 3, 3, 3))),
    "an unknown parameter": ("Adam", lambda s: s["state"].update({99: {}})),
    "a list as state": ("Adam", lambda s: s.update(state=[])),
    "a list as moments": ("Adam", lambda s: s["state"].update({0: []})),
    "a number as groups": ("Adam", lambda s: s.update(param_groups=5)),
    "a number as group": ("Adam", lambda s: s.update(param_groups=[5])),
    "a string as learning rate": ("Adam", lambda s: s["param_groups"][0].update(lr="fast")),
    "a NaN learning rate": ("Adam", lambda s: s["param_groups"][0].update(lr=float("nan"))),
    "one beta": ("Adam", lambda s: s["param_groups"][0].update(betas=[0.9])),
    "strings as parameters": ("Adam", lambda s: s["param_groups"][0].update(params=["a"] * 3)),
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_state_is_rejected(kind: str) -> None:
    name, change = INVALID[kind]
    _, optimizer = make(name)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    with pytest.raises(TypeError):
        validate_optimizer_state(optimizer, saved)


def test_other_parameter_groups_are_rejected() -> None:
    _, optimizer = make("Adam")
    for change in (
        lambda groups: groups.pop(),
        lambda groups: groups[0]["params"].pop(),
        lambda groups: groups[0].update(params=[0, 0, 0]),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["param_groups"])
        with pytest.raises(ValueError, match="group"):
            validate_optimizer_state(optimizer, saved)


def test_unknown_settings_are_dropped() -> None:
    _, optimizer = make("Adam")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["evil"] = True
    assert "evil" not in validate_optimizer_state(optimizer, saved)["param_groups"][0]


def test_moments_that_are_missing_after_a_step_are_an_error() -> None:
    _, optimizer = make("Adam")
    saved = {**optimizer.state_dict(), "state": {}}
    assert validate_optimizer_state(optimizer, saved)["state"] == {}
    with pytest.raises(TypeError, match="missing"):
        validate_optimizer_state(optimizer, saved, has_trained=True)
    _, without_moments = make("SGD", momentum=0.0)
    validate_optimizer_state(without_moments, without_moments.state_dict(), has_trained=True)


def test_momentum_may_change() -> None:
    _, without = make("SGD", momentum=0.0)
    _, with_momentum = make("SGD")
    assert validate_optimizer_state(with_momentum, without.state_dict())["state"] == {}
    validated = validate_optimizer_state(without, with_momentum.state_dict())["state"]
    assert all("momentum_buffer" not in values or values["momentum_buffer"] is None for values in validated.values())


def test_ema_averages_weights_and_copies_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    ema = ModelEMA(model, decay=0.5)
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    model(torch.randn(2, 1, 5, 5))
    ema.update(model, step=100)
    for old, average, new in zip(before, ema.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(average, (old + new) / 2)
    for own, buffer in zip(ema.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(own, buffer) and own.dtype == buffer.dtype and own is not buffer


def test_ema_decay_grows_with_the_step() -> None:
    model = nn.Linear(2, 1)
    ema = ModelEMA(model, decay=0.9)
    with torch.no_grad():
        model.weight.zero_()
    before = ema.model.weight.clone()  # pyright: ignore
    ema.update(model, step=1)
    torch.testing.assert_close(ema.model.weight, before * 2 / 11)  # pyright: ignore
