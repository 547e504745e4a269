"""Weights that someone else trained: fetched or read, fitted to other channels and outputs, loaded."""

import logging
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

from torch import Tensor, nn

from cnntrain.errors import UserError, suggest
from cnntrain.tensor_file import read_tensors


def load_pretrained(model: nn.Module, architecture: str, pretrained: str) -> None:
    """Load torchvision's weights for `architecture` into `model`.

    What the model has in another shape starts afresh and is named in the log: the head, and a first
    convolution of another size. A first convolution with other channels is adapted instead. Auxiliary heads
    are left out.

    Args:
        pretrained: DEFAULT, the name of torchvision's weights (IMAGENET1K_V1, ...), or a file with a state
            dict.

    Raises:
        UserError: no such weights, no such file, no network, or weights of another architecture.
    """
    theirs = dict(read_state(architecture, pretrained))
    ours = model.state_dict()
    first = first_conv_name(model)
    if first is not None and f"{first}.weight" in theirs:
        key = f"{first}.weight"
        theirs[key] = adapt_first_conv(theirs[key], ours[key].shape[1])
    heads: tuple[str, ...] = getattr(model, "head_names", ())
    fitting = {key: value for key, value in theirs.items() if key in ours and value.shape == ours[key].shape}
    afresh = sorted({key.rpartition(".")[0] for key in ours if key not in fitting})
    foreign = [name for name in afresh if name != first and not name.startswith(heads)]
    if foreign:
        raise UserError(
            f"model.pretrained: {pretrained!r} does not fit {architecture}: {foreign[0]} is missing "
            f"or has another shape ({len(foreign)} layers in all)"
        )
    model.load_state_dict({**ours, **fitting})
    model.pretrained_from = f"{architecture} {pretrained}"  # type: ignore[assignment]
    logging.getLogger("cnntrain").info(
        "loaded %s; new from scratch: %s", pretrained, ", ".join(afresh) or "nothing"
    )


def read_state(architecture: str, pretrained: str) -> Mapping[str, Tensor]:
    """The state dict that `pretrained` means."""
    path = Path(pretrained)
    if path.suffix in (".pt", ".pth", ".bin"):
        if not path.is_file():
            raise UserError(f"model.pretrained: no file {path.absolute()}")
        state = read_tensors(path)
        state = state["model"] if isinstance(state, dict) and isinstance(state.get("model"), dict) else state
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(
                f"model.pretrained: {path} holds no state dict (tensors by the names of their layers)"
            )
        return state
    from torchvision import models

    weights = models.get_model_weights(architecture)
    names = ("DEFAULT", *(entry.name for entry in weights))
    if pretrained not in names:
        raise UserError(
            f"model.pretrained: {architecture} has no weights {pretrained!r}{suggest(pretrained, names)} "
            f"(known: {', '.join(names)}, or a .pth file)"
        )
    chosen = weights[pretrained]
    try:
        return chosen.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError) as error:
        raise UserError(
            f"model.pretrained: could not fetch {chosen.url} ({error}); fetch it elsewhere and give "
            "the file: model.pretrained=FILE.pth"
        ) from error


def first_conv_name(model: nn.Module) -> str | None:
    """Name of the convolution that reads the image: the first that was made."""
    return next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)


def adapt_first_conv(weight: Tensor, in_channels: int) -> Tensor:
    """Filters for images of other channels: (O, 3, K, K) -> (O, in_channels, K, K).

    One channel: the sum over colour, which is what the filters answer to a grey image written three times.
    Otherwise the colours in turn, scaled by 3 / in_channels so that the answers keep their size.
    """
    colours = weight.shape[1]
    if in_channels == colours:
        return weight
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, -(-in_channels // colours), 1, 1)[:, :in_channels]
    return repeated * (colours / in_channels)
