"""U-Net: an encoder and a decoder with skip connections.

Source: Ronneberger et al. 2015, U-Net: Convolutional Networks for Biomedical Image Segmentation, figure 1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnntrain.errors import UserError
from cnntrain.models.norm_act import check_choice
from cnntrain.types import format_shape

UPSAMPLINGS = ("transposed", "nearest", "bilinear", "bicubic", "unpool")
PADDINGS = ("same", "valid")


def _two_convs(in_channels: int, width: int, padding: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, width):
        layers.append(nn.Conv2d(channels, width, 3, padding=padding, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Up(nn.Module):
    """Upsample by 2, halve the channels, concatenate the encoder's map, and apply two convolutions."""

    def __init__(self, width: int, padding: int, batch_norm: bool, upsampling: str) -> None:
        super().__init__()
        self.upsampling = upsampling
        if upsampling == "transposed":
            self.halve: nn.Module = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        else:
            self.halve = nn.Conv2d(2 * width, width, 1)
        self.unpool = nn.MaxUnpool2d(2) if upsampling == "unpool" else None
        self.convs = _two_convs(2 * width, width, padding, batch_norm)

    def forward(self, x: Tensor, skip: Tensor, indices: Tensor | None) -> Tensor:
        x = self.halve(x)
        if self.unpool is not None and indices is not None:
            x = self.unpool(_crop(x, indices.shape[-2:]), indices, output_size=skip.shape[-2:])
        elif self.upsampling in ("bilinear", "bicubic"):
            x = F.interpolate(x, scale_factor=2.0, mode=self.upsampling, align_corners=False)
        elif self.upsampling == "nearest":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        missing = [max(0, b - a) if b - a <= 1 else 0 for a, b in zip(x.shape[-2:], skip.shape[-2:], strict=True)]
        if any(missing):  # a pool dropped the last row or column of an odd map: repeat the one before it
            x = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
        return self.convs(torch.cat([_crop(skip, x.shape[-2:]), x], dim=1))


def _crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return the center of a map."""
    top, left = (x.shape[-2] - size[0]) // 2, (x.shape[-1] - size[1]) // 2
    return x[..., top : top + size[0], left : left + size[1]]


class UNet(nn.Module):
    """(N, C, H, W) -> (N, num_outputs, H, W), for images of at least 2**depth px.

    Args:
        width: channels of the first level, doubled at each of the `depth` levels below it.
        padding: same (the output has the image's size), or valid as in the paper (572 px give an output of 388 px).
        upsampling: transposed (the paper's 2x2 up-convolution), nearest, bilinear, bicubic (each after a 1x1
            convolution that halves the channels), or unpool (values return to the positions of the encoder's maxima).
        batch_norm: batch norm after each 3x3 convolution; the paper has none.
    """

    head_names = ("head",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_outputs: int,
        image_size: Sequence[int],
        width: int = 64,
        depth: int = 4,
        padding: str = "same",
        upsampling: str = "transposed",
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_choice("padding", padding, PADDINGS)
        check_choice("upsampling", upsampling, UPSAMPLINGS)
        if padding == "valid" and upsampling == "unpool":
            raise UserError(
                "model.upsampling=unpool needs model.padding=same: it returns values to their old positions"
            )
        smallest = 2**depth if padding == "same" else _smallest_valid(depth)
        if min(image_size) < smallest:
            raise UserError(
                f"model.depth={depth} with padding={padding} needs images of at least {smallest} px, not "
                f"{format_shape(image_size)}; lower model.depth or use larger images"
            )
        pixels = 1 if padding == "same" else 0
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _two_convs(a, b, pixels, batch_norm) for a, b in zip([in_channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2, return_indices=upsampling == "unpool")
        self.up = nn.ModuleList(Up(w, pixels, batch_norm, upsampling) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, num_outputs, 1)
        for module in self.modules():  # section 3: N(0, 2 / fan_in)
            if isinstance(module, nn.Conv2d) and module is not self.head:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        skips: list[tuple[Tensor, Tensor | None]] = []
        x = images
        for level, convs in enumerate(self.down):
            x = convs(x)
            if level < len(self.up):
                pooled = self.pool(x)
                smaller, indices = pooled if isinstance(pooled, tuple) else (pooled, None)
                skips.append((x, indices))
                x = smaller
        for up, (skip, indices) in zip(self.up, reversed(skips), strict=True):
            x = up(x, skip, indices)
        return self.head(x)


def _smallest_valid(depth: int) -> int:
    """Return the smallest image size for which no map is empty with valid padding (188 px at depth 4)."""
    size = 1
    for _ in range(depth):
        size = -(-(size + 4) // 2)  # before the decoder's two convolutions and its upsampling
    size += 4
    for _ in range(depth):
        size = 2 * size + 4
    return size
