"""Observations of a forward pass."""

import torch
from torch import nn

from cnntrain.checks.watch import alive_units, gradient_cut, never_called, signals, watch_modes
from cnntrain.models.norm_act import Dropout


def test_active_dropout_is_detected() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), Dropout(0.3)).train()
    _, calls = watch_modes(model, torch.randn(2, 1, 8, 8))
    assert calls.dropouts == [("1", 0.3)]
    _, calls = watch_modes(model.eval(), torch.randn(2, 1, 8, 8))
    assert not calls.dropouts and not calls.draws


class Reused(nn.Module):
    """A ReLU that is used twice, a layer that is detached, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second, self.unused = nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Linear(2, 2)
        nn.init.constant_(self.second.bias, -100.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.relu(self.second(self.relu(self.first(images)).detach()))


def test_units_layers_and_cuts_are_named() -> None:
    torch.manual_seed(0)
    model, images = Reused(), torch.randn(8, 4)
    alive = alive_units(model, images)
    assert list(alive) == ["relu (ReLU 1)", "relu (ReLU 2)"]
    assert len(alive["relu (ReLU 1)"]) == 3 and alive["relu (ReLU 1)"].any() and not alive["relu (ReLU 2)"].any()
    assert list(signals(model, images)) == ["first", "second"]
    assert gradient_cut(model, images) == "the graph is cut between relu and second"
    assert never_called(model, images) == ["unused"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
