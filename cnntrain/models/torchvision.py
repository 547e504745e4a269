"""Networks of torchvision, by name; the first convolution and the head are adapted to the data and the task."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cnntrain.errors import UserError, suggest
from cnntrain.models.pretrained import first_conv_name, last_of_width
from cnntrain.types import format_shape


def classifier(*, name: str, in_channels: int, num_outputs: int, image_size: Sequence[int]) -> nn.Module:
    """Return a classifier of torchvision with random weights: (N, C, H, W) -> (N, num_outputs).

    GoogLeNet and Inception have no auxiliary heads and no `transform_input`, so that they return one tensor and expect
    the same normalization as other networks.

    Args:
        name: one of `torchvision.models.list_models()`, for example mobilenet_v2.
    """
    model = build(name, in_channels, num_outputs, image_size)
    model.head_names = (last_of_width(model, num_outputs),)  # type: ignore[assignment]
    return model


class Segmenter(nn.Module):
    """Segmentation model of torchvision with random weights: (N, C, H, W) -> (N, num_outputs, H, W).

    Args:
        name: for example fcn_resnet50, deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large.
    """

    head_names = ("network.classifier",)

    def __init__(self, *, name: str, in_channels: int, num_outputs: int, image_size: Sequence[int]) -> None:
        super().__init__()
        self.network = build(name, in_channels, num_outputs, image_size, segmentation=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)["out"]


def build(
    name: str, in_channels: int, num_outputs: int, image_size: Sequence[int], segmentation: bool = False
) -> nn.Module:
    """Return torchvision's model with random weights and `in_channels` input channels."""
    from torchvision import models

    module = models.segmentation if segmentation else models
    known = models.list_models(module=module)
    if name not in known:
        kind = "segmentation model" if segmentation else "classifier"
        raise UserError(
            f"model.name: torchvision has no {kind} {name!r}{suggest(str(name), known)} (known: {', '.join(known)})"
        )
    options: dict[str, Any] = {"num_classes": num_outputs}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True, "transform_input": False}
    if name.startswith("vit_"):
        if len(set(image_size)) > 1:
            raise UserError(f"model.name={name}: needs square images, not {format_shape(image_size)} px")
        options["image_size"] = image_size[0]
    elif name.startswith("maxvit"):
        options["input_size"] = tuple(image_size)
    if segmentation:
        options["weights_backbone"] = None
    try:
        model = models.get_model(name, weights=None, **options)
    except (ValueError, RuntimeError) as error:
        size = format_shape(image_size)
        raise UserError(f"model.name={name}: cannot be built for images of {size} px: {error}") from error
    set_in_channels(model, in_channels)
    return model


def set_in_channels(model: nn.Module, in_channels: int) -> None:
    """Replace the first convolution if it has another number of input channels."""
    name = first_conv_name(model)
    if name is None:
        return
    parent, _, leaf = name.rpartition(".")
    old: Any = model.get_submodule(name)
    if old.in_channels != in_channels:
        sizes = (old.kernel_size, old.stride, old.padding, old.dilation)
        new = nn.Conv2d(in_channels, old.out_channels, *sizes, bias=old.bias is not None)
        setattr(model.get_submodule(parent), leaf, new)
