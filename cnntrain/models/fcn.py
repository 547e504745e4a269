"""Fully convolutional networks: a classifier's maps, scored pixel by pixel and enlarged again.

Source: Long et al. 2015, Fully Convolutional Networks for Semantic Segmentation, sections 3.1 and 4.1.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnntrain.errors import UserError
from cnntrain.models.cifar_resnet import CifarResNet
from cnntrain.models.norm_act import check_word
from cnntrain.models.resnet import ResNet
from cnntrain.models.sequential.parser import build_layers
from cnntrain.models.sequential.shapes import Place
from cnntrain.models.torchvision import classifier

_PROBE_PX = 256
UPSAMPLINGS = ("nearest", "bilinear", "bicubic")


class FCN(nn.Module):
    """(N, C, H, W) -> (N, num_outputs, H, W), any size that the backbone takes.

    The last map of each size in the backbone gets a 1x1 convolution to `num_outputs` channels; the scores are
    enlarged and added from the coarsest up, then enlarged to the image: with skips=2 and a backbone of stride
    32 this is the FCN-8s, with skips=0 the FCN-32s.

    Args:
        backbone: resnet18/34/50/101/152 (ours), cifar_resnet20 or any other depth, any classifier of
            torchvision, or `{layers: [...]}` as model=sequential has it (`output` may be left out); whatever
            follows its last map is left out.
        skips: how many finer maps are scored too.
        upsampling: nearest, bilinear or bicubic.
        stem: auto, imagenet or small; only for resnet backbones.

    Raises:
        UserError: an unknown backbone or word; a backbone without maps, or that can't be traced.
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

        check_word("upsampling", upsampling, UPSAMPLINGS)
        self.upsampling = upsampling
        network = _build_backbone(backbone, in_channels, image_size, stem)
        maps = last_map_of_each_size(network, in_channels)[-(skips + 1) :]
        if not maps:
            raise UserError(
                f"model.backbone: {backbone!r} makes no feature map; choose a convolutional network"
            )
        try:
            self.backbone = create_feature_extractor(
                network, {name: str(i) for i, (name, _) in enumerate(maps)}
            )
        except Exception as error:  # torch.fx raises what the network's own code raises
            raise UserError(f"model.backbone: {backbone!r} can't be traced by torch.fx: {error}") from error
        self.score = nn.ModuleList(nn.Conv2d(channels, num_outputs, 1) for _, channels in maps)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        scores = [score(features[str(i)]) for i, score in enumerate(self.score)]  # finest first
        total = scores.pop()
        while scores:
            finer = scores.pop()
            total = finer + self._enlarge(total, finer.shape[-2:])
        return self._enlarge(total, images.shape[-2:])

    def _enlarge(self, x: Tensor, size: Sequence[int]) -> Tensor:
        corners = None if self.upsampling == "nearest" else False
        return functional.interpolate(x, size=tuple(size), mode=self.upsampling, align_corners=corners)


def _build_backbone(
    backbone: str | Mapping[str, object], in_channels: int, image_size: Sequence[int], stem: str
) -> nn.Module:
    facts = {"in_channels": in_channels, "num_outputs": 1000, "image_size": image_size}
    if isinstance(backbone, Mapping):
        layers: object = backbone.get("layers")
        place = Place((in_channels, *image_size), 1, "model.backbone.layers")
        return build_layers(layers, place)[0]  # type: ignore[arg-type]
    if backbone.startswith("cifar_resnet") and backbone.removeprefix("cifar_resnet").isdigit():
        return CifarResNet(depth=int(backbone.removeprefix("cifar_resnet")), **facts)  # type: ignore[arg-type]
    if backbone in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        return ResNet(depth=int(backbone[6:]), stem=stem, **facts)  # type: ignore[arg-type]
    return classifier(name=backbone, **facts)  # type: ignore[arg-type]


def last_map_of_each_size(network: nn.Module, in_channels: int) -> list[tuple[str, int]]:
    """(name, channels) of the module that makes the last map of each size, finest first.

    Found by running the network on shapes alone. The head and a flattening end the search; single numbers per
    channel (those of squeeze-and-excitation, global pools) and maps as large as the image don't count.
    """
    found: dict[int, tuple[str, int]] = {}
    ended: list[str] = []
    heads: tuple[str, ...] = getattr(network, "head_names", ())

    def look(name: str, module: nn.Module, result: object) -> None:
        if isinstance(module, nn.Flatten) or name in heads:
            ended.append(name)
        if ended or not isinstance(result, Tensor) or result.dim() != 4:
            return
        if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
            return
        height, width = result.shape[-2:]
        if height == width and 1 < width < _PROBE_PX:  # channels-last maps inside a block are not square
            found[width] = (name, result.shape[1])

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, inputs, result: look(name, module, result)

    handles = [m.register_forward_hook(hook(name)) for name, m in network.named_modules() if name]
    state = {name: t.to("meta") for name, t in (*network.named_parameters(), *network.named_buffers())}
    try:
        image = torch.empty(2, in_channels, _PROBE_PX, _PROBE_PX, device="meta")
        torch.func.functional_call(network, state, (image,))
    except (RuntimeError, ValueError, AssertionError):
        pass  # a dense layer made for another image size: the maps before it have been seen
    finally:
        for handle in handles:
            handle.remove()
    return [found[size] for size in sorted(found, reverse=True)]
