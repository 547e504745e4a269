"""What every network can have done to it once it is built: other norms, activations, weights, a frozen
backbone.

These are the common keys of `conf/model/_base.yaml`; no network needs to know them.
"""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cnntrain.errors import UserError
from cnntrain.models.elements import check_word
from cnntrain.models.swap import swap_activation, swap_norm

INITS = ("default", "he", "xavier")


def prepare(
    model: nn.Module,
    *,
    norm: str | None = None,
    activation: str | None = None,
    init: str = "default",
    freeze: str | None = None,
    unfreeze: int | None = None,
) -> nn.Module:
    """Apply the common keys of a model's YAML, in this order; null and 'default' leave the network as it is.

    Args:
        norm: batch, layer, instance, group or none, in place of every norm there is; not for a network with
            layer norms.
        activation: relu, gelu, tanh, ... in place of every activation.
        init: he or xavier, for every convolution and dense layer.
        freeze: backbone (only the head is trained).
        unfreeze: epoch from which the backbone is trained too; read by the loop, which calls `unfreeze`.

    Raises:
        UserError: an unknown word, or one that this network has no place for.
    """
    if unfreeze is not None and freeze is None:
        raise UserError(f"model.unfreeze={unfreeze}: nothing is frozen; set model.freeze=backbone too")
    if norm is not None:
        swap_norm(model, norm)
    if activation is not None:
        swap_activation(model, activation)
    if init != "default":
        initialise(model, init)
    if freeze is not None:
        check_word("freeze", freeze, ("backbone",))
        freeze_backbone(model)
    return model


def materialise(model: nn.Module, channels: int, image_size: tuple[int, int]) -> None:
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


def initialise(model: nn.Module, init: str) -> None:
    """Draw the weights of every convolution and dense layer anew, biases 0; norms keep what they have.

    he: N(0, 2 / fan_in) (He et al. 2015); xavier: uniform, variance 2 / (fan_in + fan_out) (Glorot and Bengio
    2010).

    Raises:
        UserError: an unknown word, or pretrained weights, which it would throw away.
    """
    check_word("init", init, INITS)
    if init == "default":
        return
    if any(hasattr(module, "pretrained_from") for module in model.modules()):
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


def freeze_backbone(model: nn.Module) -> None:
    """Leave only the head's parameters trainable; the backbone's norms keep their statistics.

    Raises:
        UserError: the network does not say what its head is (`head_names`: the names of the head's modules).
    """
    heads = getattr(model, "head_names", None)
    if not heads:
        raise UserError(
            f"model.freeze=backbone: {type(model).__name__} does not say what its head is; give the class "
            "head_names = ('fc',), the names of its last layers"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_head(name, heads))
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and not in_head(name, heads):
            keep_in_eval(module)


def keep_in_eval(module: nn.Module) -> None:
    """Let a norm use its statistics and leave them as they are, whoever calls `train()`, until `unfreeze`."""
    module.eval()
    module.register_forward_pre_hook(_stay_in_eval)


def stays_in_eval(module: nn.Module) -> bool:
    return _stay_in_eval in module._forward_pre_hooks.values()


def unfreeze(model: nn.Module) -> None:
    """Make every parameter trainable again and let the norms follow train and eval mode."""
    model.requires_grad_(True)
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _stay_in_eval:
                del module._forward_pre_hooks[key]
    model.train(model.training)


def in_head(name: str, heads: tuple[str, ...]) -> bool:
    """Whether a parameter or module of this name lies in one of the modules that are the head."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def _stay_in_eval(module: nn.Module, inputs: object) -> None:
    """A hook and not an override of train(): it survives deepcopy, and whoever calls model.train()."""
    module.training = False
