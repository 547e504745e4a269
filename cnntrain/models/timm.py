"""Networks of timm, an optional dependency: `pip install cnntrain[timm]`."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cnntrain.errors import UserError, suggest
from cnntrain.models.pretrained import Preprocessing


def classifier(*, name: str, in_channels: int, num_outputs: int, image_size: Sequence[int]) -> nn.Module:
    """Return a classifier of timm with random weights: (N, C, H, W) -> (N, num_outputs).

    Args:
        name: one of `timm.list_models()`, for example convnext_atto; `.tag` selects pretrained weights.
    """
    timm = _timm()
    if not timm.is_model(name):
        known = timm.list_models()
        raise UserError(f"model.name: timm has no {name!r}{suggest(str(name), known)} ({len(known)} models known)")
    try:
        model = _create(name, image_size, in_chans=in_channels, num_classes=num_outputs)
    except (RuntimeError, OSError) as error:
        raise UserError(f"model.name={name}: {str(error).splitlines()[0]}") from error
    head = model.get_classifier()  # type: ignore[operator]
    if isinstance(head, nn.Linear):
        # timm initializes an EfficientNet's head in +-1/sqrt(outputs). With one output (two classes) this gives logits
        # of +-10, which slow down the start of training.
        head.reset_parameters()
    model.head_names = tuple(n for n, module in model.named_modules() if module is head)  # type: ignore[assignment]
    return model


def published_weights(name: str, image_size: Sequence[int]) -> Mapping[str, Tensor]:
    """Download timm's weights for a model, with position embeddings for `image_size` (height, width)."""
    try:
        return _create(name, image_size, pretrained=True).state_dict()
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"model.pretrained: cannot download timm's weights for {name}: {str(error).splitlines()[0]}; download "
            "them on another machine and set model.pretrained=FILE.safetensors"
        ) from error


def preprocessing(name: str) -> Preprocessing | None:
    """Return the preprocessing of timm's weights; None if timm is not installed or does not know the model."""
    with contextlib.suppress(UserError, RuntimeError):
        config = _timm().get_pretrained_cfg(name)
        if config is not None:
            _, height, width = config.input_size
            return Preprocessing(tuple(config.mean), tuple(config.std), (height, width))
    return None


def _timm() -> Any:
    try:
        import timm  # pyright: ignore[reportMissingImports]  (an optional extra)
    except ImportError as error:
        raise UserError("model=timm needs timm: pip install cnntrain[timm]") from error
    return timm


def _create(name: str, image_size: Sequence[int], **options: Any) -> nn.Module:
    timm = _timm()
    try:
        return timm.create_model(name, img_size=tuple(image_size), **options)
    except TypeError:  # only networks with position embeddings have img_size
        return timm.create_model(name, **options)
