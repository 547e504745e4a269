"""Pretrained weights: those that torchvision or timm publish, a file, or an earlier run; found, read, loaded."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

from torch import Tensor, nn

from cnntrain.errors import UserError, suggest
from cnntrain.tensor_file import read_tensors

log = logging.getLogger("cnntrain")
FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
# Where a file of somebody's training keeps the weights, beside optimizer and epoch.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class Preprocessing:
    """How images were prepared when weights were learned.

    Attributes:
        mean, std: per channel, on the 0-1 scale.
        size: (height, width) in pixels; None where the weights take images of any size.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation for images of other channels, as `adapt_first_conv` adapts the filters."""
        return _for_channels(self.mean, channels), _for_channels(self.std, channels)


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if channels == 1:
        return (math.fsum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(channels))


@dataclass(frozen=True)
class Published:
    """The weights that a library publishes for an architecture.

    Attributes:
        part: the submodule that the architecture is in a network of the config; "" where it is all of it.
    """

    library: Literal["torchvision", "timm"]
    architecture: str
    part: str = ""

    def names(self) -> tuple[str, ...]:
        """What `model.pretrained` may name; DEFAULT also where the library does not know the architecture."""
        if self.library == "timm":
            return ("DEFAULT",)
        return ("DEFAULT", *(entry.name for entry in self._weights() or ()))

    def preprocessing(self, name: str) -> Preprocessing | None:
        """How the images for the weights called `name` are prepared; None where the library does not say."""
        if self.library == "timm":
            from cnntrain.models.from_timm import preprocessing

            return preprocessing(self.architecture)
        weights = self._weights()
        if not weights:
            return None
        transforms = weights[name].transforms()
        crop = getattr(transforms, "crop_size", None)
        return Preprocessing(
            tuple(transforms.mean), tuple(transforms.std), (crop[0], crop[-1]) if crop else None
        )

    def read(self, name: str, image_size: Sequence[int]) -> Mapping[str, Tensor]:
        """The state dict; fetched, unless it has been before.

        Args:
            image_size: (height, width) in pixels, for position embeddings.

        Raises:
            UserError: there is none, or it can't be fetched.
        """
        if self.library == "timm":
            from cnntrain.models.from_timm import published_weights

            return published_weights(self.architecture, image_size)
        weights = self._weights()
        if not weights:
            raise UserError(
                f"model.pretrained: torchvision has no weights for {self.architecture}; give a file"
            )
        chosen = weights[name]
        try:
            return chosen.get_state_dict(progress=False, check_hash=True)
        except (URLError, OSError) as error:
            raise UserError(
                f"model.pretrained: could not fetch {chosen.url} ({error}); fetch it elsewhere and give "
                "the file: model.pretrained=FILE.pth"
            ) from error

    def _weights(self) -> Any:
        """torchvision's enumeration; None where it has none."""
        from torchvision import models

        try:
            return models.get_model_weights(self.architecture)
        except ValueError:
            return None


def published_for(model: Mapping[str, Any]) -> Published | None:
    """Whose weights fit the network that a node of the config describes; None where nobody publishes any."""
    target = str(model.get("_target_")).removeprefix("cnntrain.models.")
    name, backbone = str(model.get("name")), model.get("backbone", "resnet18")
    if target == model.get("_target_"):  # the user's own
        return None
    if target == "resnet.ResNet":
        return Published("torchvision", f"resnet{model.get('depth')}")
    if target == "from_torchvision.classifier":
        return Published("torchvision", name)
    if target == "from_torchvision.Segmenter":
        return Published("torchvision", name, "network")
    if target == "from_timm.classifier":
        return Published("timm", name)
    if target == "fcn.FCN" and isinstance(backbone, str) and not backbone.startswith("cifar_resnet"):
        return Published("torchvision", backbone, "backbone")
    return None


@dataclass(frozen=True)
class Weights:
    """What `model.pretrained` names.

    Attributes:
        name: as in the config, for messages.
        published: the library that has weights for this network, if one does.
        state: the tensors of a file; None where the library has them.
        preprocessing: how their images were prepared; None where nobody says.
        outputs: names of the classes or keypoints that an earlier run learned; None where the file doesn't tell.
        model: the `model` section of an earlier run's config; None for other weights.
    """

    name: str
    published: Published | None
    state: Mapping[str, Tensor] | None
    preprocessing: Preprocessing | None
    outputs: tuple[str, ...] | None = None
    model: Mapping[str, Any] | None = None

    @property
    def part(self) -> str:
        """The submodule that the tensors belong to; "" for the whole network, as in a checkpoint of its own."""
        part = self.published.part if self.published else ""
        whole = self.state is not None and any(key.startswith(f"{part}.") for key in self.state)
        return "" if whole else part

    @property
    def stem(self) -> str | None:
        """The stem of one of our ResNets that has these weights: imagenet or small; None where it has neither."""
        if self.state is None:
            return "imagenet"
        first = next(
            (self.state[key] for key in ("conv1.weight", "backbone.conv1.weight") if key in self.state), None
        )
        sizes = {7: "imagenet", 3: "small"}
        return sizes.get(first.shape[-1]) if first is not None and first.ndim == 4 else None


def find_weights(
    model: Mapping[str, Any], pretrained: object, check_run: Callable[[dict[str, Any]], dict[str, Any]]
) -> Weights | None:
    """The weights that `pretrained` means for the network that the node `model` describes; reads a file, fetches none.

    Args:
        pretrained: null or false (None); true or DEFAULT; the name of a library's weights; a file; a run's folder.
        check_run: returns the content of a run's checkpoint once every field has been checked; else a UserError.

    Raises:
        UserError: no such weights, no such file, or no weights in it.
    """
    if pretrained is None or pretrained is False:
        return None
    if pretrained is not True and not isinstance(pretrained, str):
        raise UserError(
            f"model.pretrained: must be DEFAULT, a name, a file or a run's folder, got {pretrained!r}"
        )
    name = "DEFAULT" if pretrained is True else pretrained
    published = published_for(model)
    names = published.names() if published else ()
    if published and name in names:
        return Weights(name, published, None, published.preprocessing(name))
    path = Path(name).expanduser()
    if path.suffix in FILE_ENDINGS or path.is_dir() or path.is_file():
        return _read_file(name, _find_file(path), published, check_run)
    if published is None:
        raise UserError(
            f"model.pretrained: nobody publishes weights for this network, and there is no file {path.absolute()}; "
            "give a file of its weights, or the folder of a run that trained it"
        )
    raise UserError(
        f"model.pretrained: {published.architecture} has no weights {name!r}{suggest(name, names)} "
        f"(known: {', '.join(names)}, or a .pth file, or a run's folder)"
    )


def _find_file(path: Path) -> Path:
    for candidate in (path, path / "checkpoints" / "best.pt", path / "best.pt"):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(
            f"model.pretrained: {path.absolute()} has no checkpoints/best.pt; give a file or a run's folder"
        )
    raise UserError(f"model.pretrained: no file {path.absolute()}")


def _read_file(
    name: str,
    path: Path,
    published: Published | None,
    check_run: Callable[[dict[str, Any]], dict[str, Any]],
) -> Weights:
    """The weights in a file: a state dict, one beside other things, or a checkpoint of cnntrain's."""
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path)
    if not isinstance(content, dict):
        content = {}
    if isinstance(content.get("state"), dict) and "config" in content:
        try:
            return _from_run(name, check_run(content), published)
        except UserError as error:
            raise UserError(
                f"model.pretrained: {path}: not the checkpoint of a training ({error})"
            ) from error
    state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    if not state or not all(
        isinstance(key, str) and isinstance(value, Tensor) and not value.is_complex()
        for key, value in state.items()
    ):
        raise UserError(
            f"model.pretrained: {path} holds no state dict (real tensors by the names of their layers)"
        )
    if all(key.startswith("module.") for key in state):  # as DataParallel names them
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return Weights(name, published, state, published.preprocessing("DEFAULT") if published else None)


def _from_run(name: str, saved: Mapping[str, Any], published: Published | None) -> Weights:
    """Weights of an earlier run: those that were validated.

    Args:
        saved: the content of its checkpoint, checked.
    """
    state, spec, model = saved["state"], saved["spec"], saved["config"]["model"]
    for key in ("norm", "activation"):
        if not isinstance(model.get(key), str | None):
            raise UserError(f"config.model.{key}: must be a name or null, got a {type(model[key]).__name__}")
    mean, std = spec.get("mean"), spec.get("std")
    preprocessing = Preprocessing(mean, std, (spec["height"], spec["width"])) if mean and std else None
    outputs = tuple(spec.get("classes") or spec.get("keypoints") or ())
    return Weights(name, published, state["average"] or state["model"], preprocessing, outputs, model)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file  # pyright: ignore[reportMissingImports]  (comes with timm)
    except ImportError as error:
        raise UserError(
            f"model.pretrained: {path.name} needs safetensors: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError is derived from Exception itself
        raise UserError(
            f"{path}: not a readable file of tensors ({type(error).__name__}); use another one"
        ) from error


def load_pretrained(
    model: nn.Module,
    weights: Weights,
    *,
    num_outputs: int,
    outputs: tuple[str, ...] = (),
    image_size: Sequence[int] = (),
) -> tuple[str, ...]:
    """Load `weights` into `model`, whole layers at a time.

    What may start from scratch instead is named in the log: the head, where it has another shape or the run of the
    weights learned other classes; a first convolution of another kernel size; a dense layer that reads maps of another
    size. A first convolution with other channels is adapted. What only the file has (auxiliary heads) is left out.

    Args:
        outputs: names of the classes or keypoints that are to be learned.

    Returns:
        names of the layers that start from scratch.

    Raises:
        UserError: weights of another architecture.
    """
    theirs = dict(weights.state) if weights.state is not None else {}
    if weights.state is None and weights.published:
        theirs = dict(weights.published.read(weights.name, image_size))
    prefix = f"{weights.part}." if weights.part else ""
    theirs = {f"{prefix}{key}": value for key, value in theirs.items()}
    heads = heads_of(model, num_outputs)
    first = first_conv_name(model.get_submodule(weights.part))
    first = None if first is None else f"{prefix}{first}"
    ours = model.state_dict()
    for key, value in theirs.items():
        if 0 in value.shape and key in ours and value.shape != ours[key].shape:
            raise UserError(
                f"model.pretrained: {weights.name!r}: {key} is empty (shape {tuple(value.shape)})"
            )
    if first is not None and (key := f"{first}.weight") in theirs and theirs[key].ndim == 4:
        theirs[key] = adapt_first_conv(theirs[key], ours[key].shape[1])
    other_outputs = weights.outputs is not None and weights.outputs != outputs
    new: list[str] = []
    foreign: list[str] = []
    for name, keys in _by_layer(ours).items():
        if other_outputs and in_head(name, heads):
            new.append(name)
        elif any(key not in theirs or theirs[key].shape != ours[key].shape for key in keys):
            new.append(name)
            replaceable = (
                name == first or in_head(name, heads) or _reads_another_size(name, keys, ours, theirs)
            )
            foreign += [] if replaceable else [name]
    if foreign or len(new) == len(_by_layer(ours)):
        architecture = weights.published.architecture if weights.published else type(model).__name__
        raise UserError(
            f"model.pretrained: {weights.name!r} does not fit {architecture}: {(foreign or new)[0]} is missing "
            f"or has another shape ({len(foreign or new)} layers in all)"
        )
    fitting = {key: theirs[key] for key in ours if key in theirs and _layer(key) not in new}
    model.load_state_dict({**ours, **fitting})
    log.info("loaded %s; not in it, so untrained: %s", weights.name, ", ".join(new) or "nothing")
    return tuple(new)


def _layer(key: str) -> str:
    """The layer that a tensor is of; one right below the network stands for itself."""
    return key.rpartition(".")[0] or key


def _by_layer(state: Iterable[str]) -> dict[str, list[str]]:
    """Keys of a state dict by the layer that they are of. Old files lack BatchNorm's count of batches."""
    found: dict[str, list[str]] = {}
    for key in state:
        if not key.endswith(".num_batches_tracked"):
            found.setdefault(_layer(key), []).append(key)
    return found


def _reads_another_size(
    name: str, keys: Sequence[str], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> bool:
    """Whether a dense layer differs in its inputs alone, as after a flattened map of another size."""
    weight = f"{name}.weight"
    if weight not in keys or any(key not in theirs for key in keys):
        return False
    if any(theirs[key].shape != ours[key].shape for key in keys if key != weight):
        return False
    mine, other = ours[weight].shape, theirs[weight].shape
    return len(mine) == len(other) == 2 and mine[0] == other[0]


def heads_of(model: nn.Module, num_outputs: int) -> tuple[str, ...]:
    """Names of a network's last layers: `head_names`, or else the last layer that has as many outputs."""
    heads: tuple[str, ...] = getattr(model, "head_names", ())
    return heads or tuple(filter(None, [last_of_width(model, num_outputs)]))


def last_of_width(model: nn.Module, num_outputs: int) -> str:
    """Name of the last layer: dense, or SqueezeNet's convolution; "" where none has as many outputs."""
    name = ""
    for candidate, module in model.named_modules():
        width = getattr(module, "out_features", getattr(module, "out_channels", None))
        if width == num_outputs and isinstance(module, (nn.Linear, nn.Conv2d)):
            name = candidate
    return name


def in_head(name: str, heads: tuple[str, ...]) -> bool:
    """Whether a parameter or module of this name lies in one of the modules that are the head."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


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
