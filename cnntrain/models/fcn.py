"""Fully convolutional networks: per-pixel scores from the feature maps of a classifier.

Source: Long et al. 2015, Fully Convolutional Networks for Semantic Segmentation, sections 3.1 and 4.1.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnntrain.errors import UserError
from cnntrain.models.cifar_resnet import CifarResNet
from cnntrain.models.norm_act import check_choice
from cnntrain.models.resnet import ResNet
from cnntrain.models.sequential.layers import LayerContext
from cnntrain.models.sequential.parser import build_layers
from cnntrain.models.torchvision import classifier

_PROBE_PX = 256
UPSAMPLINGS = ("nearest", "bilinear", "bicubic")


class FCN(nn.Module):
    """(N, C, H, W) -> (N, num_outputs, H, W), for any image size that the backbone accepts.

    A 1x1 convolution computes scores from the last map of each size. Starting with the coarsest, the scores are
    upsampled and added, then upsampled to the image size. With a backbone of stride 32, skips=2 is the FCN-8s and
    skips=0 the FCN-32s.

    Args:
        backbone: resnet18/34/50/101/152, cifar_resnet20 (or another depth), a classifier of torchvision, or
            `{layers: [...]}` as in model=sequential (`output` may be missing). Layers after the last map are removed.
        skips: number of finer maps with scores.
        upsampling: nearest, bilinear or bicubic.
        stem: auto, imagenet or small; only for resnet backbones.
    """

    head_names = ("score",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_outputs: int,
        image_size: Sequence[int],
        backbone: str | Mapping[str, object] = "resnet18",
        skips: int = 2,
        upsampling: str = "bilinear",
        stem: str = "auto",
    ) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor

        check_choice("upsampling", upsampling, UPSAMPLINGS)
        self.upsampling = upsampling
        network = _build_backbone(backbone, in_channels, image_size, stem)
        maps = last_map_of_each_size(network, in_channels)[-(skips + 1) :]
        if not maps:
            raise UserError(f"model.backbone: {backbone!r} has no feature map; choose a convolutional network")
        try:
            self.backbone = create_feature_extractor(network, {name: str(i) for i, (name, _) in enumerate(maps)})
        except Exception as error:  # torch.fx raises whatever the network raises
            raise UserError(f"model.backbone: torch.fx cannot trace {backbone!r}: {error}") from error
        self.score = nn.ModuleList(nn.Conv2d(channels, num_outputs, 1) for _, channels in maps)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        scores = [score(features[str(i)]) for i, score in enumerate(self.score)]  # finest first
        total = scores.pop()
        while scores:
            finer = scores.pop()
            total = finer + self._upsample(total, finer.shape[-2:])
        return self._upsample(total, images.shape[-2:])

    def _upsample(self, x: Tensor, size: Sequence[int]) -> Tensor:
        corners = None if self.upsampling == "nearest" else False
        return F.interpolate(x, size=tuple(size), mode=self.upsampling, align_corners=corners)


def _build_backbone(
    backbone: str | Mapping[str, object], in_channels: int, image_size: Sequence[int], stem: str
) -> nn.Module:
    arguments = {"in_channels": in_channels, "num_outputs": 1000, "image_size": image_size}
    if isinstance(backbone, Mapping):
        layers: object = backbone.get("layers")
        context = LayerContext((in_channels, *image_size), 1, "model.backbone.layers")
        return build_layers(layers, context)[0]  # type: ignore[arg-type]
    if backbone.startswith("cifar_resnet") and backbone.removeprefix("cifar_resnet").isdigit():
        return CifarResNet(depth=int(backbone.removeprefix("cifar_resnet")), **arguments)  # type: ignore[arg-type]
    if backbone in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        return ResNet(depth=int(backbone[6:]), stem=stem, **arguments)  # type: ignore[arg-type]
    return classifier(name=backbone, **arguments)  # type: ignore[arg-type]


def last_map_of_each_size(network: nn.Module, in_channels: int) -> list[tuple[str, int]]:
    """Return (name, channels) of the module with the last feature map of each size, finest first.

    The network is run on the meta device. The search ends at the head or at a flatten. 1x1 maps
    (squeeze-and-excitation, global pools) and maps as large as the image are not included.
    """
    last: dict[int, tuple[str, int]] = {}
    ended = False
    heads: tuple[str, ...] = getattr(network, "head_names", ())

    def record(name: str, module: nn.Module, inputs: object, result: object) -> None:
        nonlocal ended
        ended = ended or isinstance(module, nn.Flatten) or name in heads
        pool = isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))
        if ended or pool or not isinstance(result, Tensor) or result.dim() != 4:
            return
        height, width = result.shape[-2:]
        if height == width and 1 < width < _PROBE_PX:  # channels-last maps inside a block are not square
            last[width] = (name, result.shape[1])

    handles = [m.register_forward_hook(partial(record, name)) for name, m in network.named_modules() if name]
    state = {name: t.to("meta") for name, t in (*network.named_parameters(), *network.named_buffers())}
    try:
        image = torch.empty(2, in_channels, _PROBE_PX, _PROBE_PX, device="meta")
        torch.func.functional_call(network, state, (image,))
    except (RuntimeError, ValueError, AssertionError):
        pass  # a dense layer for another image size; the maps before it are recorded
    finally:
        for handle in handles:
            handle.remove()
    return [last[size] for size in sorted(last, reverse=True)]
