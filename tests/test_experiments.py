"""Experiments resolve to the settings of their sources."""

import pytest
import torch
from torch import nn

from cnntrain.config.compose import read_settings
from cnntrain.config.instantiate import build
from cnntrain.train.device import choose_compute
from cnntrain.train.optim import make_optimizer, set_learning_rate
from cnntrain.train.setup import make_model


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_lecture_follows_the_published_recipe(depth: int) -> None:
    """He et al. 2016, section 3.4: He init, SGD 0.9, lr 0.1 divided by 10 on plateaus, batch size 256, decay 1e-4."""
    settings = read_settings(["experiment=resnet_lecture", f"model=resnet{depth}", "device=cpu"])
    assert (settings.batch_size, settings.choices["data"]) == (256, "cifar10")
    torch.manual_seed(0)
    model = make_model(settings, 3, 10, (32, 32))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
    optimizer = make_optimizer(settings, model, choose_compute("cpu", "fp32", True))
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 1e-4)
    schedule = build(settings.schedule, "schedule", "schedule", total_steps=1000, steps_per_epoch=10)
    rates = []
    for epoch in range(14):  # the loss does not decrease
        rates.append(set_learning_rate(optimizer, schedule, 10 * epoch))
        schedule.observe(1.0)
    assert sorted(set(rates), reverse=True) == pytest.approx([0.1, 0.01, 0.001])


def test_resnet_lecture_expects_the_parameters_of_resnet18() -> None:
    """ResNet-18 with a 3x3 stem and ten classes has 11,173,962 parameters."""
    settings = read_settings(["experiment=resnet_lecture"])
    with torch.device("meta"):
        model = make_model(settings, 3, 10, (32, 32))
    assert settings.expect == {"parameters": sum(p.numel() for p in model.parameters())}
