"""VGG A to E.

Source: Simonyan and Zisserman 2015, Very Deep Convolutional Networks for Large-Scale Image Recognition, table 1.
"""

from collections.abc import Sequence

from cnntrain.models.norm_act import check_choice
from cnntrain.models.sequential.parser import Sequential

_WIDTHS = (64, 128, 256, 512, 512)
_CONVS_PER_STAGE = {
    "A": (1, 1, 2, 2, 2),
    "A-LRN": (1, 1, 2, 2, 2),
    "B": (2, 2, 2, 2, 2),
    "C": (2, 2, 3, 3, 3),
    "D": (2, 2, 3, 3, 3),
    "E": (2, 2, 4, 4, 4),
}


class VGG(Sequential):
    """(N, C, H, W) -> (N, num_outputs), for images of at least 32 px.

    Args:
        configuration: column of the table: A (11 layers), A-LRN, B (13), C (16, with 1x1 convolutions), D (16), E (19).
        dropout: probability after each hidden dense layer.
    """

    def __init__(
        self, *, configuration: str, in_channels: int, num_outputs: int, image_size: Sequence[int], dropout: float = 0.5
    ) -> None:
        check_choice("configuration", configuration, tuple(_CONVS_PER_STAGE))
        layers: list[object] = []
        for width, count in zip(_WIDTHS, _CONVS_PER_STAGE[configuration], strict=True):
            for i in range(count):
                kernel = 1 if configuration == "C" and i == 2 else 3
                layers += [{"conv": {"out": width, "kernel": kernel, "padding": "same"}}, "relu"]
            if configuration == "A-LRN" and width == 64:
                layers.append({"lrn": 5})
            layers.append({"max_pool": 2})
        layers.append("flatten")
        layers += [{"linear": 4096}, "relu", {"dropout": dropout}] * 2
        layers.append("output")
        super().__init__(layers=layers, in_channels=in_channels, num_outputs=num_outputs, image_size=image_size)
