"""Geometry of convolutions and pools: notation, size errors, unread rows."""

import pytest
from torch import nn

from cnntrain.summary.conv_arithmetic import ConvGeometry, describe_module, module_geometry


def geometry(module: nn.Module) -> ConvGeometry:
    found = module_geometry(module)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("module", "notation", "description"),
    [
        (nn.Conv2d(3, 64, 11, 4, 2), "C64 K11 P2 S4", "Conv2d(3 -> 64, K11 P2 S4)"),
        (
            nn.Conv2d(4, 8, (3, 1), padding="same", dilation=2, groups=4),
            "C8 K3x1 P2x0 S1 D2 G4",
            "Conv2d(4 -> 8, K3x1 P2x0 S1 D2 G4)",
        ),
        (nn.ConvTranspose1d(4, 8, 2, 2), "C8 K2 P0 S2", "ConvTranspose1d(4 -> 8, K2 P0 S2)"),
        (nn.MaxPool2d(3, 2, 1), "K3 P1 S2", "MaxPool2d(K3 P1 S2)"),
        (nn.AvgPool3d(2), "K2 P0 S2", "AvgPool3d(K2 P0 S2)"),
    ],
)
def test_notation(module: nn.Module, notation: str, description: str) -> None:
    assert geometry(module).notation() == notation
    assert describe_module(module) == description


def test_other_modules_have_no_geometry() -> None:
    assert module_geometry(nn.Linear(2, 3)) is None
    assert describe_module(nn.Linear(2, 3)) == "Linear(2 -> 3)"
    assert describe_module(nn.BatchNorm2d(5)) == "BatchNorm2d(5)"


def test_size_error_has_the_arithmetic() -> None:
    assert geometry(nn.Conv2d(1, 1, 5)).size_error((5, 4)) == "(4 - 5 + 2*0)/1 + 1 < 1"
    assert geometry(nn.Conv2d(1, 1, 5, padding=1)).size_error((5, 4)) == ""
    dilated = geometry(nn.Conv2d(1, 1, 3, dilation=4))
    assert dilated.size_error((8, 9)) == "(8 - 9 + 2*0)/1 + 1 < 1 (9 = 4*(3 - 1) + 1)"
    assert geometry(nn.ConvTranspose2d(1, 1, 5)).size_error((1, 1)) == ""


@pytest.mark.parametrize(
    ("module", "size", "out", "unread"),
    [
        (nn.Conv2d(1, 1, 5, stride=3), 33, 10, 1),  # the last window ends at row 32 of 33
        (nn.Conv2d(1, 1, 2, stride=3), 8, 3, 2),  # a gap after each window
        (nn.Conv2d(1, 1, 1, stride=2), 8, 4, 0),  # shortcut
        (nn.MaxPool2d(2), 7, 3, 1),
    ],
)
def test_unread_rows(module: nn.Module, size: int, out: int, unread: int) -> None:
    assert geometry(module).count_unread(0, size, out) == unread
