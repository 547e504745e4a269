"""What every network can have done to it once it is built: other norms, activations, weights, a frozen
backbone.

These are the common keys of `conf/model/_base.yaml`; no network needs to know them.
"""

import logging
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cnntrain.errors import UserError, suggest
from cnntrain.models.norm_act import check_word
from cnntrain.models.pretrained import Weights, in_head, load_pretrained
from cnntrain.models.swap import swap_activation, swap_norm

INITS = ("default", "he", "xavier")


def prepare(
    model: nn.Module,
    *,
    norm: str | None = None,
    activation: str | None = None,
    init: str = "default",
    freeze: str | Sequence[str] | None = None,
    unfreeze: int | None = None,
    weights: Weights | None = None,
    num_outputs: int = 0,
    outputs: tuple[str, ...] = (),
    image_size: Sequence[int] = (),
) -> nn.Module:
    """Apply the common keys of a model's YAML, in this order; null and 'default' leave the network as it is.

    Args:
        norm: batch, layer, instance, group or none; replaces every norm. Not allowed for networks with layer norms or
            pretrained weights.
        activation: relu, gelu, tanh, ... in place of every activation.
        init: he or xavier, for every convolution and dense layer; not allowed with pretrained weights.
        freeze: backbone (train only the head), or names of layers.
        unfreeze: epoch from which frozen layers are trained too; the training loop reads it and calls `unfreeze`.
        weights: pretrained weights to load.
        num_outputs, outputs, image_size: task and data properties for loading the weights; see `load_pretrained`.

    Raises:
        UserError: an unknown option, an option that does not apply to this network, or weights that do not fit.
    """
    if unfreeze is not None and freeze is None:
        raise UserError(f"model.unfreeze={unfreeze}: nothing is frozen; set model.freeze=backbone too")
    _check_same_parts(model, weights, norm, activation)
    if norm is not None:
        swap_norm(model, norm)
    if activation is not None:
        swap_activation(model, activation)
    new: tuple[str, ...] = ()
    if weights is not None:
        model.pretrained_from = weights.name  # type: ignore[assignment]
    if init != "default":
        initialize(model, init)
    if weights is not None:
        new = load_pretrained(model, weights, num_outputs=num_outputs, outputs=outputs, image_size=image_size)
    if freeze is not None:
        freeze_layers(model, freeze, new)
    return model


def is_pretrained(model: nn.Module) -> bool:
    """Return True if the network was initialized with pretrained weights."""
    return any(hasattr(module, "pretrained_from") for module in model.modules())


def _check_same_parts(
    model: nn.Module, weights: Weights | None, norm: str | None, activation: str | None
) -> None:
    """Reject norms that differ from those of the pretrained weights; warn if the activations differ."""
    before = weights.model if weights is not None else None
    if norm is not None and before is None and (weights is not None or is_pretrained(model)):
        raise UserError(
            f"model.norm={norm} would replace the norms that the pretrained weights were trained with; "
            "set model.norm=null"
        )
    if before is not None and before.get("norm") != norm:
        then, now = (value or "null" for value in (before.get("norm"), norm))
        raise UserError(
            f"model.norm={now}: the pretrained weights were trained with model.norm={then}; use the same value"
        )
    then = before.get("activation") if before is not None else None
    if activation != then and (weights is not None or is_pretrained(model)):
        logging.getLogger("cnntrain").warning(
            "model.activation=%s: the pretrained weights were trained with %s",
            activation or "null", then or "the network's own activations",
        )  # fmt: skip


def materialize(model: nn.Module, channels: int, image_size: tuple[int, int]) -> None:
    """Give torch's lazy layers (`nn.LazyLinear`) their shapes, by two black images of `image_size` (height, width).

    Raises:
        UserError: the network can't take them.
    """
    if not any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        return
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, channels, *image_size))
    except Exception as error:  # whatever the user's own network raises
        raise UserError(
            f"model: its lazy layers take their shapes from a first batch, and the network raised on one of shape "
            f"{(2, channels, *image_size)}: {type(error).__name__}: {error}"
        ) from error
    model.train(mode)


def initialize(model: nn.Module, init: str) -> None:
    """Reinitialize the weights of every convolution and dense layer and set biases to 0; norms are unchanged.

    he: N(0, 2 / fan_in) (He et al. 2015); xavier: uniform, variance 2 / (fan_in + fan_out) (Glorot and Bengio
    2010).

    Raises:
        UserError: unknown `init`, or the network has pretrained weights that would be lost.
    """
    check_word("init", init, INITS)
    if init == "default":
        return
    if is_pretrained(model):
        raise UserError(f"model.init={init} would throw the pretrained weights away; set model.init=default")
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or not isinstance(weight, Tensor):
            continue
        if init == "he":
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(weight)
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)


def freeze_layers(model: nn.Module, freeze: str | Sequence[str], new: Sequence[str] = ()) -> None:
    """Freeze layers: their parameters get no gradient, and their norms keep their running statistics.

    Parameters that the network froze itself stay frozen, even after `unfreeze`.

    Args:
        freeze: backbone (everything except the head), or names of layers, including their submodules.
        new: randomly initialized layers that the pretrained weights lack; they must not be frozen.

    Raises:
        UserError: an unknown layer, a layer in `new`, or freeze=backbone for a network without `head_names` (names of
            the head's modules).
    """
    heads: tuple[str, ...] = getattr(model, "head_names", ())
    if freeze == "backbone":
        if not heads:
            raise UserError(
                f"model.freeze=backbone: {type(model).__name__} does not define its head; set the class attribute "
                "head_names = ('fc',) with the names of its last layers, or list the layers to freeze: "
                "model.freeze=[conv1,conv2]"
            )
    else:
        _check_layers(model, freeze)
    names = (freeze,) if isinstance(freeze, str) else tuple(freeze)

    def is_frozen(name: str) -> bool:
        return not in_head(name, heads) if freeze == "backbone" else in_head(name, names)

    if random := [name for name in new if is_frozen(name)]:
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


def _check_layers(model: nn.Module, freeze: object) -> None:
    """Reject names that are not a layer or parameter of the network."""
    known = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    names = [freeze] if isinstance(freeze, str) else freeze
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"model.freeze: must be null, backbone, or a list of layers like [layer1,layer2], got {freeze!r}"
        )
    for name in names:
        if name not in known:
            top = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"model.freeze: {name!r} is neither `backbone` nor a layer of this network"
                f"{suggest(name, ['backbone', *known])} (it has {top}; `cnntrain inspect inspect.depth=0` shows all)"
            )


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """Return the number of trainable parameters and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def keep_in_eval(module: nn.Module) -> None:
    """Let a norm use its statistics and leave them as they are, whoever calls `train()`, until `unfreeze`."""
    module.eval()
    module.register_forward_pre_hook(_stay_in_eval)


def stays_in_eval(module: nn.Module) -> bool:
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
    """A hook and not an override of train(): it survives deepcopy, and whoever calls model.train()."""
    module.training = False
