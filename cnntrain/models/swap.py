"""Other norms and other activations for a network that is already built, whoever built it."""

from collections.abc import Callable

from torch import nn

from cnntrain.errors import UserError
from cnntrain.models.norm_act import make_activation, make_norm

_NORM_DIMENSIONS: dict[type[nn.Module], int] = {
    nn.BatchNorm1d: 0,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
    nn.GroupNorm: 2,
}
_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Softplus,
    nn.Tanh,
)


def swap_norm(model: nn.Module, norm: str) -> None:
    """Replace every batch, instance and group norm of `model` in place; scale and shift start anew.

    LRN, which learns nothing, stays. With 'none' a convolution that had no bias still has none.

    Raises:
        UserError: an unknown name, or a network without norms, or with layer norms: those normalize the last
            dimensions, whatever they are, and what stands there may be no channels.
    """
    make_norm(norm, 1)
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        raise UserError(
            f"model.norm={norm}: this network has layer norms, which can't be swapped; leave it null"
        )
    found = _replace(model, tuple(_NORM_DIMENSIONS), lambda old: _norm_like(old, norm))
    if not found and norm != "none":
        raise UserError(f"model.norm={norm}: this network has no norm to swap; leave model.norm=null")


def _norm_like(old: nn.Module, norm: str) -> nn.Module:
    """Return a replacement for the norm `old`, including the activation of timm's BatchNormAct2d and GroupNormAct."""
    if type(old) not in _NORM_DIMENSIONS:
        parts = dict(old.named_children())
        if not type(old).__module__.startswith("timm.layers.") or set(parts) != {"drop", "act"}:
            raise UserError(
                f"model.norm={norm}: {type(old).__name__} may compute more than a norm, which would be lost; "
                "leave model.norm=null"
            )
        return nn.Sequential(_plain_norm_like(old, norm), parts["drop"], parts["act"])
    return _plain_norm_like(old, norm)


def _plain_norm_like(old: nn.Module, norm: str) -> nn.Module:
    if isinstance(old, nn.GroupNorm):
        return make_norm(norm, old.num_channels)
    dimensions = next(n for kind, n in _NORM_DIMENSIONS.items() if isinstance(old, kind))
    return make_norm(norm, old.num_features, dimensions)  # type: ignore[arg-type]


def swap_activation(model: nn.Module, activation: str) -> None:
    """Replace every activation of `model` in place; the gates of squeeze-and-excitation (sigmoids) stay.

    Raises:
        UserError: an unknown name, or a network without activation layers (torchvision's Inception calls
            them as functions).
    """
    make_activation(activation)
    if not _replace(model, _ACTIVATIONS, lambda old: make_activation(activation)):
        raise UserError(
            f"model.activation={activation}: this network has no activation layer to swap; leave it null"
        )


def _replace(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module]
) -> int:
    found = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds):
                new = make(child)
                if hasattr(child, "in_config"):
                    new.in_config = child.in_config  # type: ignore[assignment]
                setattr(parent, name, new)
                found += 1
    return found
