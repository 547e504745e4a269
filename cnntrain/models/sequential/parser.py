"""Network from a list of layers in YAML: input widths are inferred, the output width comes from the task.

    layers:
      - conv: {out: 20, kernel: 5, padding: same}
      - relu
      - max_pool: 2
      - flatten
      - output

A layer is a name, a name with its first argument, or a name with named arguments. Entry i of the list is the module
`layers.i`: `model.layers[7]` in a message is `layers.7` in a state dict.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cnntrain.errors import MachineError, UserError, is_out_of_memory, suggest
from cnntrain.models.norm_act import ACTIVATIONS, Branches, PadShortcut, Residual
from cnntrain.models.sequential.layers import LAYERS, LayerContext, Shape
from cnntrain.summary.failures import explain_error, first_line
from cnntrain.types import format_shape

MAX_LAYERS = 10_000  # with repeats expanded; ResNet-1202 has about 3,000
Builder = Callable[..., nn.Module]


class Sequential(nn.Module):
    """Layers in sequence: (N, C, H, W) -> (N, num_outputs); (N, num_outputs, H, W) if `output` is a convolution.

    Args:
        layers: list of layers; see `layer_builders` for their names and arguments.
        in_channels, image_size: of the images; one to three spatial dimensions.
        num_outputs: width of the layer `output`.
        values: numbers that the list refers to, for example `${model.values.dropout}`; not used here.

    Raises:
        UserError: names the layer by its config path, the problem and the remedy.
    """

    def __init__(
        self,
        *,
        layers: Sequence[object],
        in_channels: int,
        num_outputs: int,
        image_size: Sequence[int],
        values: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        context = LayerContext((in_channels, *image_size), num_outputs, "model.layers")
        if (count := count_layers(layers)) > MAX_LAYERS:
            raise UserError(f"model.layers: expands to {count:,} layers; the maximum is {MAX_LAYERS:,}")
        outputs = [i for i, entry in enumerate(layers) if _name_of(entry) == "output"]
        if len(outputs) != 1:
            raise UserError(f"model.layers: exactly one layer must be `output`, the list has {len(outputs)}")
        self.layers, shape = build_layers(layers, context)
        if shape[0] != num_outputs:
            raise UserError(
                f"model.layers: the network has {shape[0]} outputs, the task needs {num_outputs}; layers after "
                "`output` must keep the number of channels"
            )
        self.head_names = (f"layers.{outputs[0]}",)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def count_layers(entry: object) -> int:
    """Return an upper bound of the number of layers after expansion; invalid layers are rejected when built."""
    if isinstance(entry, list | tuple):
        return sum(max(1, count_layers(each)) for each in entry)
    if not isinstance(entry, Mapping):
        return 0
    nested = sum(map(count_layers, entry.values()))
    arguments = entry.get("repeat")
    times = arguments.get("times") if isinstance(arguments, Mapping) else None
    if isinstance(times, int | float) and times > 1:
        nested = max(1, nested) * int(min(times, 10 * MAX_LAYERS))
    return nested


def build_layers(layers: Sequence[object], context: LayerContext) -> tuple[nn.Sequential, Shape]:
    """Return the modules of a list, and the shape of the last one's output."""
    if isinstance(layers, (str, Mapping)) or not isinstance(layers, Sequence):
        raise UserError(f"{context.path}: must be a list of layers, not {layers!r}")
    modules, shape = nn.Sequential(), context.shape
    for i, entry in enumerate(layers):
        module, shape = _build_layer(entry, context.at(f"[{i}]", shape))
        modules.append(module)
    return modules, shape


@cache
def layer_builders() -> dict[str, Builder]:
    """Return the builder of each layer name; its parameters after the first are the layer's arguments."""
    builders: dict[str, Builder] = {f.__name__: f for f in (*LAYERS, repeat, residual, branches, inception)}
    return builders | {name: partial(_activation, make=make) for name, make in ACTIVATIONS.items()}


def _activation(context: LayerContext, make: Callable[[], nn.Module]) -> nn.Module:
    return make()


def _name_of(entry: object) -> object:
    return next(iter(entry)) if isinstance(entry, Mapping) and len(entry) == 1 else entry


def _parse(entry: object, path: str) -> tuple[str, Builder, dict[str, object]]:
    """Return the layer's name, its builder, and its arguments by name."""
    builders = layer_builders()
    name, value = _name_of(entry), None
    if isinstance(entry, Mapping) and len(entry) == 1:
        value = entry[name]
    if isinstance(name, Mapping):
        keys = ", ".join(map(str, name))
        raise UserError(f"{path}: a layer has one name, not {keys}; write `- conv: {{out: 32, kernel: 3}}`")
    if not isinstance(name, str) or name not in builders:
        raise UserError(
            f"{path}: unknown layer {name!r}{suggest(str(name), list(builders))} (known: {', '.join(sorted(builders))})"
        )
    builder = builders[name]
    parameters = inspect.signature(builder).parameters
    legal = [] if isinstance(builder, partial) else list(parameters)[1:]
    arguments: dict[str, object] = {}
    if isinstance(value, Mapping):
        for key in value:
            if key not in legal:
                takes = f"it takes {', '.join(legal)}" if legal else "it takes none"
                raise UserError(f"{path} {name}: no argument {key!r}; {takes}{suggest(str(key), legal)}")
        arguments = {str(key): argument for key, argument in value.items()}
    elif value is not None:
        if not legal:
            raise UserError(f"{path} {name}: takes no argument, got {value!r}; write `- {name}`")
        arguments = {legal[0]: value}
    for key in legal:
        if parameters[key].default is inspect.Parameter.empty and key not in arguments:
            raise UserError(f"{path} {name}: needs {key}; write `- {name}: {{{key}: ...}}`")
    return name, builder, arguments


def _build_layer(entry: object, context: LayerContext) -> tuple[nn.Module, Shape]:
    name, builder, arguments = _parse(entry, context.path)
    shown = ", ".join(f"{k}={v}" for k, v in arguments.items() if not isinstance(v, (list, Mapping)) or len(v) < 4)
    described = f"{context.path} {name}({shown})" if shown else f"{context.path} {name}"
    module: nn.Module | None = None
    try:
        module = builder(context, **arguments)
        shape = output_shape(module, context.shape)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        problem, remedy = explain_error(module, (2, *context.shape), error) if module is not None else ("", "")
        hint = f"; {remedy}; larger images help too" if remedy else ""
        kind = MachineError if is_out_of_memory(error) else UserError
        raise kind(f"{described}: {problem or first_line(error)}{hint}") from error
    module.in_config = described  # type: ignore[assignment]  # the layer's name in messages
    return module, shape


def output_shape(module: nn.Module, shape: Shape) -> Shape:
    """Return the output shape of `module` for one example of `shape`, by running it on the meta device."""
    tensors = {k: t.to("meta") for k, t in (*module.named_parameters(), *module.named_buffers())}
    with torch.no_grad():
        return tuple(functional_call(module, tensors, (torch.empty(2, *shape, device="meta"),)).shape[1:])


def repeat(context: LayerContext, times: int, layers: Sequence[object]) -> nn.Module:
    """The same layers `times` in sequence, each time with new weights."""
    copies, shape = nn.Sequential(), context.shape
    for _ in range(times):
        copy, shape = build_layers(layers, context.at(".layers", shape))
        copies.append(copy)
    return copies


def residual(context: LayerContext, layers: Sequence[object], shortcut: object = "auto") -> nn.Module:
    """layers(x) + shortcut(x).

    Args:
        shortcut: auto (identity if the shape stays the same, else projection), identity, projection (1x1 convolution
            and batch norm: option B of He et al. 2016), pad (option A), or a list of layers.
    """
    body, shape = build_layers(layers, context.at(".layers"))
    if shortcut == "auto":
        shortcut = "identity" if shape == context.shape else "projection"
    strides = [-(-before // after) for before, after in zip(context.shape[1:], shape[1:], strict=True)]
    if shortcut == "projection":
        conv = {"conv": {"out": shape[0], "kernel": 1, "stride": strides, "bias": False}}
        shortcut = [conv, "batch_norm"]
    if shortcut == "identity":
        side: nn.Module = nn.Identity()
    elif shortcut == "pad":
        side = PadShortcut(shape[0] - context.channels, max(strides))
    elif isinstance(shortcut, Sequence) and not isinstance(shortcut, str):
        side, _ = build_layers(shortcut, context.at(".shortcut"))
    else:
        raise ValueError(f"shortcut must be auto, identity, projection, pad or a list of layers, not {shortcut!r}")
    side_shape = output_shape(side, context.shape)
    if side_shape != shape:
        raise ValueError(
            f"its layers return {format_shape(shape)}, its shortcut {format_shape(side_shape)}; they must be equal"
        )
    return Residual(body, side)


def branches(context: LayerContext, branches: Sequence[Sequence[object]]) -> nn.Module:
    """Several lists of layers applied to the same input; their channels are concatenated."""
    built = [build_layers(layers, context.at(f".branches[{i}]")) for i, layers in enumerate(branches)]
    if len({shape[1:] for _, shape in built}) > 1:
        sizes = ", ".join(format_shape(shape) for _, shape in built)
        raise ValueError(f"its branches return different sizes: {sizes}")
    return Branches([module for module, _ in built])


def inception(
    context: LayerContext, out: Sequence[int], reduce: Sequence[int] = (), kind: str = "reduced", norm: str = "batch"
) -> nn.Module:
    """1x1, 3x3 and 5x5 convolutions and a 3x3 max pool in parallel (Szegedy et al. 2015, figure 2).

    Args:
        out: channels of the 1x1, 3x3 and 5x5 branches and of the pool's projection.
        reduce: channels of the 1x1 convolutions before the 3x3 and the 5x5 convolution.
        kind: reduced (figure 2b), or naive (figure 2a: without the 1x1 reductions and the pool's projection).
        norm: batch or none, after each convolution.
    """
    if kind not in ("reduced", "naive"):
        raise ValueError(f"kind must be reduced or naive, not {kind!r}")
    if norm not in ("batch", "none"):
        raise ValueError(f"norm must be batch or none, not {norm!r}")
    if len(out) != 4 or (kind == "reduced" and len(reduce) != 2):
        raise ValueError("out needs 4 numbers (1x1, 3x3, 5x5, pool) and reduce 2 (before 3x3, before 5x5)")

    def unit(width: int, kernel: int) -> list[object]:
        conv = {"conv": {"out": width, "kernel": kernel, "padding": "same", "bias": norm == "none"}}
        return [conv, *(["batch_norm"] if norm != "none" else []), "relu"]

    pool: list[object] = [{"max_pool": {"kernel": 3, "stride": 1, "padding": 1}}]
    if kind == "naive":
        lists = [unit(out[0], 1), unit(out[1], 3), unit(out[2], 5), pool]
    else:
        three, five = unit(reduce[0], 1) + unit(out[1], 3), unit(reduce[1], 1) + unit(out[2], 5)
        lists = [unit(out[0], 1), three, five, pool + unit(out[3], 1)]
    return branches(context, lists)
