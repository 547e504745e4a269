"""Networks of timm, an optional extra: `pip install cnntrain[timm]`."""

from collections.abc import Sequence

from torch import nn

from cnntrain.errors import UserError, suggest


def classifier(
    *,
    name: str,
    in_channels: int,
    num_outputs: int,
    image_size: Sequence[int],
    pretrained: bool | str | None = None,
) -> nn.Module:
    """A classification model of timm: (N, C, H, W) -> (N, num_outputs).

    Args:
        name: as `timm.list_models()` has it, e.g. convnext_atto; with `.tag` for certain weights.
        pretrained: null or false, true (timm's weights), or a file.

    Raises:
        UserError: timm is not installed; an unknown name, with the near miss; weights that can't be had.
    """
    try:
        import timm  # pyright: ignore[reportMissingImports]  (an optional extra)
    except ImportError as error:
        raise UserError("model=timm needs timm: pip install cnntrain[timm]") from error
    if not timm.is_model(name):
        known = timm.list_models()
        raise UserError(
            f"model.name: timm has no {name!r}{suggest(str(name), known)} ({len(known)} models known)"
        )
    file = pretrained if isinstance(pretrained, str) else None
    options = {
        "pretrained": bool(pretrained) and file is None,
        "in_chans": in_channels,
        "num_classes": num_outputs,
    }
    try:
        try:
            model = timm.create_model(name, checkpoint_path=file or "", img_size=tuple(image_size), **options)
        except TypeError:  # only those with position embeddings take img_size
            model = timm.create_model(name, checkpoint_path=file or "", **options)
    except (RuntimeError, OSError) as error:
        raise UserError(f"model.name={name}: {str(error).splitlines()[0]}") from error
    head = model.get_classifier()  # type: ignore[operator]
    model.head_names = tuple(n for n, module in model.named_modules() if module is head)  # type: ignore[assignment]
    return model
