"""Modify a built network: replace norms and activations, initialize, load pretrained weights, freeze layers.

These are the keys that every model config has; the networks themselves do not implement them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cnntrain.config.schema import ModelSettings
from cnntrain.errors import UserError, suggest
from cnntrain.models.norm_act import ACTIVATIONS, check_choice, make_activation, make_norm
from cnntrain.models.pretrained import PretrainedWeights, is_inside, load_pretrained
from cnntrain.transfer import constant

log = logging.getLogger("cnntrain")
INITS = ("default", "he", "xavier")
_NORM_DIMENSIONS: dict[type[nn.Module], int] = {
    nn.BatchNorm1d: 0,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
    nn.GroupNorm: 2,
}
_SWAPPED_ACTIVATIONS = tuple(kind for kind in ACTIVATIONS.values() if kind is not nn.Sigmoid)


def apply_model_settings(
    model: nn.Module,
    settings: ModelSettings,
    weights: PretrainedWeights | None = None,
    *,
    num_outputs: int = 0,
    outputs: tuple[str, ...] = (),
    image_size: Sequence[int] = (),
) -> nn.Module:
    """Apply the keys that every model config has; None and 'default' change nothing.

    Args:
        settings: norm (batch, layer, instance, group or none) replaces every norm; it is not allowed for networks with
            layer norms, nor with pretrained weights. activation (relu, gelu, tanh, ...) replaces every activation. init
            (he or xavier) initializes every convolution and dense layer; it is not allowed with pretrained weights.
            freeze: backbone (train only the head), or names of layers. unfreeze: epoch in which the training loop calls
            `unfreeze`.
        weights: pretrained weights to load.
        num_outputs, outputs, image_size: task and data properties for loading the weights; see `load_pretrained`.
    """
    if settings.unfreeze is not None and settings.freeze is None:
        raise UserError(f"model.unfreeze={settings.unfreeze}: nothing is frozen; set model.freeze=backbone too")
    if weights is not None or is_pretrained(model):
        _check_pretrained_layers(weights.model if weights else None, settings)
    if settings.norm is not None:
        swap_norm(model, settings.norm)
    if settings.activation is not None:
        swap_activation(model, settings.activation)
    if weights is not None:
        model.pretrained_from = weights.name  # type: ignore[assignment]
    initialize(model, settings.init)
    random_layers: tuple[str, ...] = ()
    if weights is not None:
        random_layers = load_pretrained(model, weights, num_outputs=num_outputs, outputs=outputs, image_size=image_size)
    if settings.freeze is not None:
        freeze_layers(model, settings.freeze, random_layers)
    return model


def is_pretrained(model: nn.Module) -> bool:
    """Return True if the network was initialized with pretrained weights."""
    return any(hasattr(module, "pretrained_from") for module in model.modules())


def _check_pretrained_layers(config: Mapping[str, Any] | None, settings: ModelSettings) -> None:
    """Reject norms that differ from those of the pretrained weights; warn if the activations differ.

    Args:
        config: `model` section of the run that trained the weights; None for other weights, which have the network's
            own norms and activations.
    """
    norm, activation = (config.get("norm"), config.get("activation")) if config else (None, None)
    if settings.norm != norm:
        raise UserError(
            f"model.norm={settings.norm or 'null'}: the pretrained weights were trained with "
            f"model.norm={norm or 'null'}; use that value"
        )
    if settings.activation != activation:
        log.warning(
            "model.activation=%s: the pretrained weights were trained with %s",
            settings.activation or "null",
            activation or "the network's own activations",
        )


def initialize_lazy_modules(model: nn.Module, channels: int, image_size: tuple[int, int]) -> None:
    """Initialize lazy modules (`nn.LazyLinear`) by a forward pass of two images of `image_size` (height, width)."""
    if not any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        return
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, channels, *image_size))
    except Exception as error:  # a user's network may raise anything
        raise UserError(
            f"model: the forward pass that initializes its lazy layers failed for images of shape "
            f"{(2, channels, *image_size)}: {type(error).__name__}: {error}"
        ) from error
    model.train(training)


def swap_norm(model: nn.Module, norm: str) -> None:
    """Replace every batch, instance and group norm of `model` in place; scale and shift are initialized anew.

    Local response normalization stays. With 'none', convolutions without a bias get none. Networks with layer norms are
    refused: these normalize the last dimensions, which need not be channels.
    """
    make_norm(norm, 1)
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        raise UserError(
            f"model.norm={norm}: this network has layer norms, which cannot be replaced; set model.norm=null"
        )
    count = _replace(model, tuple(_NORM_DIMENSIONS), lambda old: _replacement_norm(old, norm))
    if not count and norm != "none":
        raise UserError(f"model.norm={norm}: this network has no norm to replace; set model.norm=null")


def _replacement_norm(old: nn.Module, norm: str) -> nn.Module:
    """Return a replacement for the norm `old`; timm's BatchNormAct2d and GroupNormAct keep their activation."""
    if isinstance(old, nn.GroupNorm):
        new = make_norm(norm, old.num_channels)
    else:
        dimensions = next(n for kind, n in _NORM_DIMENSIONS.items() if isinstance(old, kind))
        new = make_norm(norm, old.num_features, dimensions)  # type: ignore[arg-type]
    if type(old) in _NORM_DIMENSIONS:
        return new
    parts = dict(old.named_children())
    if not type(old).__module__.startswith("timm.layers.") or set(parts) != {"drop", "act"}:
        raise UserError(
            f"model.norm={norm}: {type(old).__name__} may compute more than a norm, which would be lost; "
            "set model.norm=null"
        )
    return nn.Sequential(new, parts["drop"], parts["act"])


def swap_activation(model: nn.Module, activation: str) -> None:
    """Replace every activation module of `model` in place; sigmoids (gates of squeeze-and-excitation) stay."""
    make_activation(activation)
    if not _replace(model, _SWAPPED_ACTIVATIONS, lambda old: make_activation(activation)):
        raise UserError(
            f"model.activation={activation}: this network has no activation module to replace; set "
            "model.activation=null"
        )


def _replace(model: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module]) -> int:
    """Replace the submodules of the given types, shared ones by one new module; return the number of new modules."""
    replacements: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # `named_children` skips further names of the same module
            if isinstance(child, kinds):
                if child not in replacements:
                    replacements[child] = make(child)
                    if hasattr(child, "in_config"):
                        replacements[child].in_config = child.in_config  # type: ignore[assignment]
                setattr(parent, name, replacements[child])
    return len(replacements)


def initialize(model: nn.Module, init: str) -> None:
    """Reinitialize the weights of every convolution and dense layer and set biases to 0; norms are unchanged.

    he: N(0, 2 / fan_in) (He et al. 2015); xavier: uniform, variance 2 / (fan_in + fan_out) (Glorot and Bengio
    2010).
    """
    check_choice("init", init, INITS)
    if init == "default":
        return
    if is_pretrained(model):
        raise UserError(f"model.init={init}: would overwrite the pretrained weights; set model.init=default")
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        if init == "he":
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def freeze_layers(model: nn.Module, freeze: str | Sequence[str], random_layers: Sequence[str] = ()) -> None:
    """Freeze layers: their parameters get no gradient, and their norms keep their running statistics.

    Parameters that the network froze itself stay frozen, even after `unfreeze`.

    Args:
        freeze: backbone (everything except the head), or names of layers, including their submodules.
        random_layers: layers that the pretrained weights lack; they must not be frozen.

    Raises:
        UserError: an unknown layer, a layer in `random_layers`, or freeze=backbone for a network without
            `head_names` (names of the head's modules).
    """
    heads: tuple[str, ...] = getattr(model, "head_names", ())
    names = _layer_names(model, freeze)
    if freeze == "backbone" and not heads:
        raise UserError(
            f"model.freeze=backbone: {type(model).__name__} does not define its head; set the class attribute "
            "head_names = ('fc',) with the names of its last layers, or list the layers to freeze: "
            "model.freeze=[conv1,conv2]"
        )

    def is_frozen(name: str) -> bool:
        return not is_inside(name, heads) if freeze == "backbone" else is_inside(name, names)

    if random := [name for name in random_layers if is_frozen(name)]:
        raise UserError(
            f"model.freeze: {', '.join(random[:4])} would be frozen with random weights because model.pretrained has "
            "no weights of that shape; freeze other layers (model.freeze=[...]), or change the network"
        )
    chosen = [name for name, p in model.named_parameters() if p.requires_grad and is_frozen(name)]
    for name in chosen:
        model.get_parameter(name).requires_grad_(False)
    model.frozen_parameters = chosen  # type: ignore[assignment]
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and is_frozen(name):
            keep_in_eval(module)


def _layer_names(model: nn.Module, freeze: object) -> tuple[str, ...]:
    """Return `freeze` as names; reject names other than `backbone` that the network lacks."""
    names = [freeze] if isinstance(freeze, str) else freeze
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"model.freeze: must be null, backbone, or a list of layers like [layer1,layer2], got {freeze!r}"
        )
    known = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    for name in names:
        if name not in known and freeze != "backbone":
            top = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"model.freeze: {name!r} is neither `backbone` nor a layer of this network"
                f"{suggest(name, ['backbone', *known])} (it has {top}; `cnntrain inspect inspect.depth=0` shows all)"
            )
    return tuple(names)


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """Return the number of trainable parameters and of all parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def keep_in_eval(module: nn.Module) -> None:
    """Keep a norm in evaluation mode, even after `train()`, until `unfreeze`."""
    module.eval()
    module.register_forward_pre_hook(_stay_in_eval)


def stays_in_eval(module: nn.Module) -> bool:
    """Return True if `keep_in_eval` was applied to the module."""
    return _stay_in_eval in module._forward_pre_hooks.values()


def unfreeze(model: nn.Module) -> None:
    """Undo `freeze_layers`: its parameters become trainable, and its norms follow train and eval mode again."""
    for name in getattr(model, "frozen_parameters", ()):
        model.get_parameter(name).requires_grad_(True)
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _stay_in_eval:
                del module._forward_pre_hooks[key]
    model.train(model.training)


def _stay_in_eval(module: nn.Module, inputs: object) -> None:
    """Forward pre-hook; unlike an override of `train`, it survives deepcopy."""
    module.training = False


def make_pooling_deterministic(model: nn.Module) -> None:
    """Make the network's `nn.AdaptiveAvgPool2d` modules use `deterministic_adaptive_avg_pool2d`.

    PyTorch's own backward pass is nondeterministic on CUDA.
    """
    for module in model.modules():
        if type(module) is nn.AdaptiveAvgPool2d:
            size = module.output_size
            height, width = size if isinstance(size, tuple) else (size, size)
            module.forward = partial(deterministic_adaptive_avg_pool2d, height=height, width=width)


def deterministic_adaptive_avg_pool2d(input: Tensor, height: int | None, width: int | None) -> Tensor:
    """Compute `F.adaptive_avg_pool2d` for (N, C, H, W) or (C, H, W) input; None keeps a side.

    If the output size divides the input size, the windows do not overlap and average pooling with a stride is used.
    Otherwise the input is multiplied by one matrix per side.
    """
    height, width = height or input.shape[-2], width or input.shape[-1]
    if (height, width) == (1, 1):
        return input.mean((-2, -1), keepdim=True)
    if input.shape[-2] % height == 0 and input.shape[-1] % width == 0:
        return F.avg_pool2d(input, (input.shape[-2] // height, input.shape[-1] // width))
    rows = window_means(input.shape[-2], height, input.device)
    columns = window_means(input.shape[-1], width, input.device)
    with torch.autocast(input.device.type, enabled=False):  # bf16 would round the averaging weights
        return (rows @ input.float() @ columns.mT).to(input.dtype)


def window_means(length: int, output_length: int, device: torch.device) -> Tensor:
    """Return the averaging matrix (output_length, length) float32.

    Row i averages inputs floor(i * length / output_length) to ceil((i + 1) * length / output_length), end excluded, as
    in `torch.nn.AdaptiveAvgPool2d`.
    """
    rows = []
    for row in range(output_length):
        start, end = row * length // output_length, -(-(row + 1) * length // output_length)
        rows += [1 / (end - start) if start <= i < end else 0.0 for i in range(length)]
    return constant(rows, device).view(output_length, length)
