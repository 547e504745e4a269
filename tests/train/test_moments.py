"""An optimizer's saved state: what fits is copied, what does not is refused before a kernel sees it."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnntrain.train.moments import fit_state
from cnntrain.train.optim import build_optimizer, by_name

# LBFGS and SparseAdam can't do a step from dense gradients alone; Muon takes matrices alone.
NAMES = sorted(
    name for name, found in vars(torch.optim).items()
    if inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
)  # fmt: skip
OPTIONS = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
}


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
def test_an_optimizers_own_state_comes_through_as_a_copy(name: str) -> None:
    _, optimizer = make(name)
    before = optimizer.state_dict()
    fitted = fit_state(optimizer, before)
    assert (
        fitted["param_groups"] == before["param_groups"] and fitted["state"].keys() == before["state"].keys()
    )
    for key, values in before["state"].items():
        assert fitted["state"][key].keys() == values.keys()
        for moment, value in values.items():
            mine = fitted["state"][key][moment]
            if isinstance(value, Tensor):
                assert torch.equal(mine, value) and mine.dtype == value.dtype and mine.shape == value.shape
                assert mine.data_ptr() != value.data_ptr()
            else:
                assert mine == value
    optimizer.load_state_dict(fitted)
    optimizer.step()


def overlapping(state: dict[str, Any]) -> None:
    state[0]["exp_avg"] = torch.zeros(1).expand(state[0]["exp_avg"].shape)


def shared(state: dict[str, Any]) -> None:
    state[0]["exp_avg"] = state[0]["exp_avg_sq"]


def transposed(state: dict[str, Any]) -> None:
    value = state[0]["exp_avg"]
    state[0]["exp_avg"] = value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


@pytest.mark.parametrize("change", [overlapping, shared, transposed])
def test_moments_get_memory_and_layout_of_their_own(change: Callable[[dict[str, Any]], None]) -> None:
    """The step after it is that of an optimizer whose moments have the same values in the usual layout."""
    _, optimizer = make("Adam")
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"])
    plain = copy.deepcopy(saved)
    for values in plain["state"].values():
        values |= {name: value.contiguous().clone() for name, value in values.items()}
    found = []
    for state in (plain, fit_state(optimizer, saved)):
        twin, other = make("Adam")
        other.load_state_dict(state)
        for parameter in twin.parameters():
            parameter.grad = torch.ones_like(parameter)
        other.step()
        found.append([parameter.detach() for parameter in twin.parameters()])
        moments = [value for values in other.state.values() for value in values.values()]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert len({value.data_ptr() for value in moments}) == len(moments)
    assert all(value.is_contiguous() for value in moments)


def test_a_moment_lies_in_memory_as_its_parameter_does() -> None:
    """A run that goes on with the other channels_last: a fused kernel walks through both side by side."""
    net, optimizer = make("Adam")
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        net.to(memory_format=torch.channels_last)
    fitted = fit_state(optimizer, saved)
    conv = net[0].weight
    assert fitted["state"][0]["exp_avg"].stride() == conv.stride() != saved["state"][0]["exp_avg"].stride()
    assert torch.equal(fitted["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


BAD: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "another shape": ("Adam", lambda s: s["state"][0].update(exp_avg=torch.zeros(3))),
    "no elements": ("Adam", lambda s: s["state"][0].update(exp_avg=torch.zeros(0))),
    "more elements": ("SGD", lambda s: s["state"][0].update(momentum_buffer=torch.zeros(9, 9, 9, 9))),
    "no tensor": ("Adam", lambda s: s["state"][0].update(exp_avg=[0.0])),
    "none": ("Adam", lambda s: s["state"][0].update(exp_avg=None)),
    "missing": ("Adam", lambda s: s["state"][0].pop("exp_avg_sq")),
    "whole numbers": (
        "Adam",
        lambda s: s["state"][0].update(exp_avg=torch.zeros(4, 3, 3, 3, dtype=torch.int64)),
    ),
    "complex": (
        "Adam",
        lambda s: s["state"][0].update(exp_avg=torch.zeros(4, 3, 3, 3, dtype=torch.complex64)),
    ),
    "not finite": ("Adam", lambda s: s["state"][0].update(exp_avg=torch.full((4, 3, 3, 3), float("nan")))),
    "many steps": ("Adam", lambda s: s["state"][0].update(step=torch.zeros(4))),
    "negative step": ("Adam", lambda s: s["state"][0].update(step=torch.tensor(-1.0))),
    "no step": ("Adam", lambda s: s["state"][0].update(step=torch.zeros(0))),
    "text for a step": ("Adam", lambda s: s["state"][0].update(step="many")),
    "rows of another length": ("Adafactor", lambda s: s["state"][0].update(row_var=torch.zeros(4, 3, 3, 3))),
    "a parameter too many": ("Adam", lambda s: s["state"].update({99: {}})),
    "state that is a list": ("Adam", lambda s: s.update(state=[])),
    "values that are a list": ("Adam", lambda s: s["state"].update({0: []})),
    "groups that are none": ("Adam", lambda s: s.update(param_groups=5)),
    "a group that is none": ("Adam", lambda s: s.update(param_groups=[5])),
    "a learning rate in words": ("Adam", lambda s: s["param_groups"][0].update(lr="fast")),
    "a learning rate that is none": ("Adam", lambda s: s["param_groups"][0].update(lr=float("nan"))),
    "one beta": ("Adam", lambda s: s["param_groups"][0].update(betas=[0.9])),
    "parameters in words": ("Adam", lambda s: s["param_groups"][0].update(params=["a"] * 3)),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused(kind: str) -> None:
    name, change = BAD[kind]
    _, optimizer = make(name)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    with pytest.raises(TypeError):
        fit_state(optimizer, saved)


def test_other_groups_are_told_apart() -> None:
    _, optimizer = make("Adam")
    for change in (lambda groups: groups.pop(), lambda groups: groups[0]["params"].pop(),
                   lambda groups: groups[0].update(params=[0, 0, 0])):  # fmt: skip
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["param_groups"])
        with pytest.raises(ValueError, match="group"):
            fit_state(optimizer, saved)


def test_settings_that_were_not_there_are_left_out_and_steps_may_be_numbers() -> None:
    _, optimizer = make("Adam")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["evil"] = True
    for values in saved["state"].values():
        values["step"] = 2
    fitted = fit_state(optimizer, saved)
    assert "evil" not in fitted["param_groups"][0]
    assert fitted["state"][0]["step"].shape == () and float(fitted["state"][0]["step"]) == 2


def test_another_momentum_than_before_is_a_setting() -> None:
    _, without = make("SGD", momentum=0.0)
    _, with_momentum = make("SGD")
    assert fit_state(with_momentum, without.state_dict())["state"] == {}
    fitted = fit_state(without, with_momentum.state_dict())["state"]
    assert all(
        "momentum_buffer" not in values or values["momentum_buffer"] is None for values in fitted.values()
    )
