"""Explanations of failed forward passes: the layer, its input, the arithmetic."""

from torch import Tensor, nn

from cnntrain.summary.preflight import preflight
from tests.summary.test_preflight import only, torchvision


def test_wrong_channels() -> None:
    finding = only(preflight(torchvision("alexnet"), 1, (224, 224)))
    assert "model.features.0 Conv2d" in finding.evidence
    assert "needs 3 channels, but gets 1" in finding.evidence
    assert "in_channels=1" in finding.remedy


def test_missing_flatten() -> None:
    finding = only(preflight(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(2704, 10)), 1, (28, 28)))
    assert "model.1 Linear" in finding.evidence
    assert "flatten" in finding.remedy


def test_layers_of_a_list_have_their_config_path() -> None:
    """A layer built from a list in the config has the name that it has in that list."""
    net = nn.Sequential(nn.MaxPool2d(7), nn.Conv2d(1, 50, 5))
    net[1].in_config = "model.layers[7] conv(out=50, kernel=5)"  # type: ignore[assignment]
    finding = only(preflight(net, 1, (28, 28)))
    assert finding.evidence.startswith("model.layers[7] conv(out=50, kernel=5): (4 - 5 + 2*0)/1 + 1 < 1")


def test_an_operation_is_named_by_its_module_and_shapes() -> None:
    """An error in an operation between layers names the module and the shapes of the operands."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + x

    finding = only(preflight(nn.Sequential(nn.Conv2d(1, 4, 1), Block()), 1, (28, 28)))
    assert finding.evidence.startswith("model.1 Block: add of 4x26x26 and 4x28x28")


def test_batch_norm_with_one_value_per_channel() -> None:
    """The network runs in evaluation mode, but in training mode a batch of one image has no variance."""
    net = nn.Sequential(nn.Conv2d(1, 8, 28), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
    finding = only(preflight(net, 1, (28, 28), batch_size=1))
    assert "model.1 BatchNorm2d(8): one value per channel" in finding.evidence
    assert "batch_size" in finding.remedy
