"""Find and load pretrained weights: of torchvision or timm, of a file, or of an earlier run."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal
from urllib.error import URLError

from torch import Tensor, nn

from cnntrain.errors import UserError, suggest
from cnntrain.io.tensor_file import read_tensors

log = logging.getLogger("cnntrain")
FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
# Keys under which common training scripts store the state dict in a checkpoint.
STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class Preprocessing:
    """Image preprocessing that the weights were trained with.

    Attributes:
        mean, std: per channel, on the 0-1 scale.
        size: (height, width) in pixels; None if the weights work with images of any size.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and std for another number of channels, consistent with `adapt_first_conv`."""
        if channels == 1:
            return (fmean(self.mean),), (fmean(self.std),)
        return tuple(islice(cycle(self.mean), channels)), tuple(islice(cycle(self.std), channels))


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that a library publishes for an architecture.

    Attributes:
        submodule: the submodule of the configured network that has this architecture; "" for the whole network.
    """

    library: Literal["torchvision", "timm"]
    architecture: str
    submodule: str = ""

    def names(self) -> tuple[str, ...]:
        """Return the valid names for `model.pretrained`; includes DEFAULT even if the architecture is unknown."""
        return ("DEFAULT", *(entry.name for entry in self._enum()))

    def preprocessing(self, name: str) -> Preprocessing | None:
        """Return the preprocessing of the weights `name`; None if the library does not define it."""
        if self.library == "timm":
            from cnntrain.models.timm import preprocessing

            return preprocessing(self.architecture)
        if not (weights := self._enum()):
            return None
        transforms = weights[name].transforms()
        crop = getattr(transforms, "crop_size", None)
        return Preprocessing(tuple(transforms.mean), tuple(transforms.std), (crop[0], crop[-1]) if crop else None)

    def read(self, name: str, image_size: Sequence[int]) -> Mapping[str, Tensor]:
        """Return the state dict (downloaded unless cached); position embeddings fit `image_size` (height, width)."""
        if self.library == "timm":
            from cnntrain.models.timm import published_weights

            return published_weights(self.architecture, image_size)
        if not (weights := self._enum()):
            raise UserError(f"model.pretrained: torchvision has no weights for {self.architecture}; give a file")
        chosen = weights[name]
        try:
            return chosen.get_state_dict(progress=False, check_hash=True)
        except (URLError, OSError) as error:
            raise UserError(
                f"model.pretrained: cannot download {chosen.url} ({error}); download it on another machine "
                "and set model.pretrained=FILE.pth"
            ) from error

    def _enum(self) -> Any:
        """Return torchvision's enum of weights; empty if it has none."""
        if self.library == "timm":
            return ()
        from torchvision import models

        try:
            return models.get_model_weights(self.architecture)
        except ValueError:
            return ()


def published_for(model: Mapping[str, Any]) -> PublishedWeights | None:
    """Return the published weights for the network of a config node; None if there are none."""
    name, backbone = str(model.get("name")), model.get("backbone", "resnet18")
    match model.get("_target_"):
        case "cnntrain.models.resnet.ResNet":
            return PublishedWeights("torchvision", f"resnet{model.get('depth')}")
        case "cnntrain.models.torchvision.classifier":
            return PublishedWeights("torchvision", name)
        case "cnntrain.models.torchvision.Segmenter":
            return PublishedWeights("torchvision", name, "network")
        case "cnntrain.models.timm.classifier":
            return PublishedWeights("timm", name)
        case "cnntrain.models.fcn.FCN" if isinstance(backbone, str) and not backbone.startswith("cifar_resnet"):
            return PublishedWeights("torchvision", backbone, "backbone")
    return None


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights named by `model.pretrained`.

    Attributes:
        name: as in the config, for messages.
        published: the library's weights for this network, if any.
        state: state dict from a file; None if the library provides it.
        preprocessing: image preprocessing of the weights; None if unknown.
        outputs: names of the classes or keypoints of an earlier run; None if unknown.
        model: the `model` section of an earlier run's config; None for other weights.
    """

    name: str
    published: PublishedWeights | None
    state: Mapping[str, Tensor] | None
    preprocessing: Preprocessing | None
    outputs: tuple[str, ...] | None = None
    model: Mapping[str, Any] | None = None

    @property
    def submodule(self) -> str:
        """Return the submodule that the tensors belong to; "" for the whole network, as in a run's checkpoint."""
        submodule = self.published.submodule if self.published else ""
        whole = self.state is not None and any(key.startswith(f"{submodule}.") for key in self.state)
        return "" if whole else submodule

    @property
    def stem(self) -> str | None:
        """Return the ResNet stem of these weights, imagenet or small; None if they have neither."""
        if self.state is None:
            return "imagenet"
        first = self.state.get("conv1.weight", self.state.get("backbone.conv1.weight"))
        return {7: "imagenet", 3: "small"}.get(first.shape[-1]) if first is not None and first.ndim == 4 else None


def find_weights(
    model: Mapping[str, Any], pretrained: object, check_run: Callable[[dict[str, Any]], dict[str, Any]]
) -> PretrainedWeights | None:
    """Find the weights that `pretrained` names for the network `model` (a config node); does not download.

    Args:
        pretrained: null or false (None); true or DEFAULT; a name of published weights; a file; a run folder.
        check_run: validates the content of a run's checkpoint and returns it, or raises UserError.
    """
    if pretrained is None or pretrained is False:
        return None
    if pretrained is not True and not isinstance(pretrained, str):
        raise UserError(f"model.pretrained: must be DEFAULT, a name, a file or a run folder, got {pretrained!r}")
    name = "DEFAULT" if pretrained is True else pretrained
    published = published_for(model)
    names = published.names() if published else ()
    if published and name in names:
        return PretrainedWeights(name, published, None, published.preprocessing(name))
    path = Path(name).expanduser()
    if path.suffix in FILE_ENDINGS or path.is_dir() or path.is_file():
        return _read_file(name, _find_file(path), published, check_run)
    if published is None:
        raise UserError(
            f"model.pretrained: there are no published weights for this network, and no file {path.absolute()}; give "
            "a file with its weights, or the folder of a run that trained it"
        )
    raise UserError(
        f"model.pretrained: {published.architecture} has no weights {name!r}{suggest(name, names)} "
        f"(known: {', '.join(names)}, or a .pth file, or a run folder)"
    )


def _find_file(path: Path) -> Path:
    for candidate in (path, path / "checkpoints" / "best.pt", path / "best.pt"):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(f"model.pretrained: {path.absolute()} has no checkpoints/best.pt; give a file or a run folder")
    raise UserError(f"model.pretrained: no file {path.absolute()}")


def _read_file(
    name: str, path: Path, published: PublishedWeights | None, check_run: Callable[[dict[str, Any]], dict[str, Any]]
) -> PretrainedWeights:
    """Read weights from a file: a state dict, a checkpoint that contains one, or a cnntrain checkpoint."""
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path)
    content = content if isinstance(content, dict) else {}
    if isinstance(content.get("state"), dict) and "config" in content:
        try:
            return _from_run(name, check_run(content), published)
        except UserError as error:
            raise UserError(f"model.pretrained: {path}: not a valid training checkpoint ({error})") from error
    state = next((content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)), content)
    if not state or not all(
        isinstance(key, str) and isinstance(value, Tensor) and not value.is_complex() for key, value in state.items()
    ):
        raise UserError(f"model.pretrained: {path} contains no state dict (a mapping from layer names to real tensors)")
    if all(key.startswith("module.") for key in state):  # prefix of DataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return PretrainedWeights(name, published, state, published.preprocessing("DEFAULT") if published else None)


def _from_run(name: str, saved: Mapping[str, Any], published: PublishedWeights | None) -> PretrainedWeights:
    """Return the weights in a validated checkpoint: the EMA weights if it has them, as used in validation."""
    state, spec, model = saved["state"], saved["spec"], saved["config"]["model"]
    for key in ("norm", "activation"):
        if not isinstance(model.get(key), str | None):
            raise UserError(f"config.model.{key}: must be a name or null, got a {type(model[key]).__name__}")
    mean, std = spec.get("mean"), spec.get("std")
    preprocessing = Preprocessing(mean, std, (spec["height"], spec["width"])) if mean and std else None
    outputs = tuple(spec.get("classes") or spec.get("keypoints") or ())
    return PretrainedWeights(name, published, state["ema"] or state["model"], preprocessing, outputs, model)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file  # pyright: ignore[reportMissingImports]  (comes with timm)
    except ImportError as error:
        raise UserError(f"model.pretrained: {path.name} needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError is a direct subclass of Exception
        raise UserError(f"{path}: not a readable tensor file ({type(error).__name__}); use another one") from error


def load_pretrained(
    model: nn.Module,
    weights: PretrainedWeights,
    *,
    num_outputs: int,
    outputs: tuple[str, ...] = (),
    image_size: Sequence[int] = (),
) -> tuple[str, ...]:
    """Load `weights` into `model`; each layer is loaded completely or not at all.

    These layers may stay randomly initialized, and the log lists them: the head, if its shape or the classes differ; a
    first convolution with another kernel size; a dense layer whose input maps have another size. A first convolution
    with another number of channels is adapted. Layers that only the file has (auxiliary heads) are ignored.

    Args:
        outputs: names of the classes or keypoints to learn.

    Returns:
        names of the randomly initialized layers.
    """
    state = weights.state
    if state is None:
        state = weights.published.read(weights.name, image_size) if weights.published else {}
    prefix = f"{weights.submodule}." if weights.submodule else ""
    loaded = {f"{prefix}{key}": value for key, value in state.items()}
    heads: tuple[str, ...] = getattr(model, "head_names", ())
    heads = heads or tuple(filter(None, [last_of_width(model, num_outputs)]))
    first = first_conv_name(model.get_submodule(weights.submodule))
    first = None if first is None else f"{prefix}{first}"
    current = model.state_dict()
    for key, value in loaded.items():
        if 0 in value.shape and key in current and value.shape != current[key].shape:
            raise UserError(f"model.pretrained: {weights.name!r}: {key} is empty (shape {tuple(value.shape)})")
    if first is not None and (key := f"{first}.weight") in loaded and loaded[key].ndim == 4:
        loaded[key] = adapt_first_conv(loaded[key], current[key].shape[1])
    other_outputs = weights.outputs is not None and weights.outputs != outputs
    layers = _by_layer(current)
    random_layers: list[str] = []
    mismatched: list[str] = []
    for name, keys in layers.items():
        fits = all(key in loaded and loaded[key].shape == current[key].shape for key in keys)
        is_head = is_inside(name, heads)
        if not fits or (other_outputs and is_head):
            random_layers.append(name)
        if not (fits or is_head or name == first or _differs_in_inputs(name, keys, current, loaded)):
            mismatched.append(name)
    if mismatched or len(random_layers) == len(layers):
        architecture = weights.published.architecture if weights.published else type(model).__name__
        bad = mismatched or random_layers
        raise UserError(
            f"model.pretrained: {weights.name!r} does not fit {architecture}: {bad[0]} is missing or has another shape "
            f"({len(bad)} layers in all)"
        )
    fitting = {key: loaded[key] for key in current if key in loaded and _layer(key) not in random_layers}
    model.load_state_dict({**current, **fitting})
    log.info("loaded %s; layers without pretrained weights: %s", weights.name, ", ".join(random_layers) or "none")
    return tuple(random_layers)


def _layer(key: str) -> str:
    """Return the layer that a tensor belongs to; a top-level tensor counts as its own layer."""
    return key.rpartition(".")[0] or key


def _by_layer(state: Iterable[str]) -> dict[str, list[str]]:
    """Group the keys of a state dict by layer. `num_batches_tracked` is skipped, because old files lack it."""
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for key in state:
        if not key.endswith(".num_batches_tracked"):
            layers[_layer(key)].append(key)
    return layers


def _differs_in_inputs(
    name: str, keys: Sequence[str], current: Mapping[str, Tensor], loaded: Mapping[str, Tensor]
) -> bool:
    """Return True if a dense layer differs only in its number of inputs, as after flattening another map size."""
    weight = f"{name}.weight"
    if weight not in keys or any(key not in loaded for key in keys):
        return False
    if any(loaded[key].shape != current[key].shape for key in keys if key != weight):
        return False
    shape, other = current[weight].shape, loaded[weight].shape
    return len(shape) == len(other) == 2 and shape[0] == other[0]


def last_of_width(model: nn.Module, num_outputs: int) -> str:
    """Return the name of the last dense layer or convolution with `num_outputs` outputs; "" if there is none."""
    name = ""
    for candidate, module in model.named_modules():
        width = getattr(module, "out_features", getattr(module, "out_channels", None))
        if width == num_outputs and isinstance(module, (nn.Linear, nn.Conv2d)):
            name = candidate
    return name


def is_inside(name: str, heads: tuple[str, ...]) -> bool:
    """Return True if the parameter or module belongs to one of the head's modules."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def first_conv_name(model: nn.Module) -> str | None:
    """Return the name of the first convolution, which reads the image; None if there is none."""
    return next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)


def adapt_first_conv(weight: Tensor, in_channels: int) -> Tensor:
    """Adapt filters to another number of input channels: (O, 3, K, K) -> (O, in_channels, K, K).

    One channel: sum over the colors, equal to the response to a gray image repeated three times. Otherwise repeat the
    colors, scaled by 3 / in_channels so that the responses keep their magnitude.
    """
    colors = weight.shape[1]
    if in_channels == colors:
        return weight
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, -(-in_channels // colors), 1, 1)[:, :in_channels]
    return repeated * (colors / in_channels)
