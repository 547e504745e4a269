"""A network from a list of layers, as YAML writes it: widths are inferred, the last one comes from the task.

    layers:
      - conv: {out: 20, kernel: 5, padding: same}
      - relu
      - max_pool: 2
      - flatten
      - output

A layer is a word, or a word with its first argument, or a word with named arguments. The i-th layer of the
list is the module `layers.i`, so that `model.layers[7]` in a message is the same thing as `layers.7` in a
state dict.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from cnntrain.errors import MachineError, UserError, is_out_of_memory, suggest
from cnntrain.models.blocks import Branches, PadShortcut, Residual
from cnntrain.models.norm_act import ACTIVATIONS
from cnntrain.models.sequential import layers as windows
from cnntrain.models.sequential import pointwise
from cnntrain.models.sequential.shapes import Place, Shape, output_shape

MOST_LAYERS = 10_000  # with repeats expanded; ResNet-1202 has about 3,000
Shaped = tuple[nn.Module, Shape]
Builder = Callable[..., nn.Module | Shaped]
"""(place, arguments of the YAML) -> the module; one made of lists knows the shape that leaves it, too."""


class Sequential(nn.Module):
    """Layers one after the other: (N, C, H, W) -> (N, num_outputs); (N, num_outputs, H, W) for a 1x1 output.

    Args:
        layers: the list; `layer_words()` has every word with its arguments.
        in_channels, image_size: of the images; any number of dimensions from one to three.
        num_outputs: what the word `output` makes.
        values: numbers that the list refers to, as `${model.values.dropout}`; for the config alone.

    Raises:
        UserError: naming the layer by its place, with what is wrong and what to change.
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
        place = Place((in_channels, *image_size), num_outputs, "model.layers")
        count = count_layers(layers) if isinstance(layers, list | tuple) else 0
        if count > MOST_LAYERS:
            raise UserError(f"model.layers: expands to {count:,} layers; the maximum is {MOST_LAYERS:,}")
        outputs = [i for i, entry in enumerate(layers) if _word_of(entry) == "output"]
        if len(outputs) != 1:
            raise UserError(f"model.layers: exactly one layer must be `output`, the list has {len(outputs)}")
        self.layers, shape = build_layers(layers, place)
        if shape[0] != num_outputs:
            raise UserError(
                f"model.layers: ends in {shape[0]} outputs, the task asks for {num_outputs}; only "
                "layers that keep the width may follow `output`"
            )
        self.head_names = (f"layers.{outputs[0]}",)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def count_layers(layers: Sequence[object]) -> int:
    """Return an upper bound of the number of layers after expansion; invalid layers are rejected when built."""
    total = 0
    for entry in layers:
        if isinstance(entry, list | tuple):
            total += count_layers(entry)
        elif isinstance(entry, Mapping):
            below = max(1, sum(map(count_layers, _lists_in(entry))))
            inner = entry.get("repeat")
            times = inner.get("times") if isinstance(inner, Mapping) else None
            if isinstance(times, int | float) and times > 1:
                below *= int(min(times, 10 * MOST_LAYERS))
            total += below
        else:
            total += 1
    return total


def _lists_in(entry: Mapping[Any, object]) -> Iterator[Sequence[object]]:
    for value in entry.values():
        if isinstance(value, list | tuple):
            yield value
        elif isinstance(value, Mapping):
            yield from _lists_in(value)


def build_layers(layers: Sequence[object], place: Place) -> tuple[nn.Sequential, Shape]:
    """The modules of a list, and the shape that leaves the last of them."""
    if isinstance(layers, (str, Mapping)) or not isinstance(layers, Sequence):
        raise UserError(f"{place.path}: must be a list of layers, not {layers!r}")
    modules = nn.Sequential()
    for i, entry in enumerate(layers):
        module, shape = _build_layer(entry, Place(place.shape, place.num_outputs, f"{place.path}[{i}]"))
        modules.append(module)
        place = place.moved(shape)
    return modules, place.shape


@cache
def layer_words() -> dict[str, Builder]:
    """Every word that a list may use, and the function that builds it; its signature holds the arguments."""
    words: dict[str, Builder] = {f.__name__: f for f in (*windows.WORDS, *pointwise.WORDS)}
    words |= {name: partial(_activation, make=make) for name, make in ACTIVATIONS.items()}
    return words | {f.__name__: f for f in (repeat, residual, branches, inception)}


def _activation(place: Place, make: Callable[[], nn.Module]) -> nn.Module:
    return make()


def _word_of(entry: object) -> object:
    return next(iter(entry)) if isinstance(entry, Mapping) and len(entry) == 1 else entry


def _parse(entry: object, path: str) -> tuple[str, Builder, dict[str, object]]:
    """The word of a list's entry, its builder, and its arguments by name."""
    words = layer_words()
    word, value = _word_of(entry), None
    if isinstance(entry, Mapping) and len(entry) == 1:
        value = entry[word]
    if isinstance(word, Mapping):
        names = ", ".join(map(str, word))
        raise UserError(f"{path}: a layer is one word, not {names}; write `- conv: {{out: 32, kernel: 3}}`")
    if not isinstance(word, str) or word not in words:
        raise UserError(
            f"{path}: no layer is called {word!r}{suggest(str(word), list(words))} "
            f"(known: {', '.join(sorted(words))})"
        )
    builder = words[word]
    legal = [] if isinstance(builder, partial) else list(inspect.signature(builder).parameters)[1:]
    if value is None:
        return word, builder, {}
    if not isinstance(value, Mapping):
        if not legal:
            raise UserError(f"{path} {word}: takes no argument, but {value!r} is given; write `- {word}`")
        return word, builder, {legal[0]: value}
    for name in value:
        if name not in legal:
            takes = f"it takes {', '.join(legal)}" if legal else "it takes none"
            raise UserError(f"{path} {word}: no argument {name!r}; {takes}{suggest(str(name), legal)}")
    return word, builder, {str(name): argument for name, argument in value.items()}


def _build_layer(entry: object, place: Place) -> Shaped:
    word, builder, arguments = _parse(entry, place.path)
    shown = ", ".join(
        f"{k}={v}" for k, v in arguments.items() if not isinstance(v, (list, Mapping)) or len(v) < 4
    )
    described = f"{place.path} {word}({shown})" if shown else f"{place.path} {word}"
    missing = [
        name
        for name, parameter in list(inspect.signature(builder).parameters.items())[1:]
        if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise UserError(f"{described}: needs {missing[0]}; write `- {word}: {{{missing[0]}: ...}}`")
    try:
        built = builder(place, **arguments)
        module, shape = built if isinstance(built, tuple) else (built, output_shape(built, place.shape))
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        kind = MachineError if is_out_of_memory(error) else UserError
        raise kind(f"{described}: {str(error).strip().splitlines()[0]}") from error
    module.in_config = described  # type: ignore[assignment]  # what a message calls this layer
    return module, shape


def repeat(place: Place, times: int, layers: Sequence[object]) -> Shaped:
    """The same layers `times` over, each time with weights of their own."""
    copies = nn.Sequential()
    for _ in range(times):
        copy, shape = build_layers(layers, Place(place.shape, place.num_outputs, f"{place.path}.layers"))
        copies.append(copy)
        place = place.moved(shape)
    return copies, place.shape


def residual(place: Place, layers: Sequence[object], shortcut: object = "auto") -> Shaped:
    """layers(x) + shortcut(x).

    Args:
        shortcut: auto (identity where the shape stays, else projection), identity, projection (1x1
            convolution and
            batch norm: option B of He et al. 2016), pad (option A), or a list of layers.
    """
    body, shape = build_layers(layers, Place(place.shape, place.num_outputs, f"{place.path}.layers"))
    if shortcut == "auto":
        shortcut = "identity" if shape == place.shape else "projection"
    strides = [-(-before // after) for before, after in zip(place.shape[1:], shape[1:], strict=True)]
    if shortcut == "identity":
        side: nn.Module = nn.Identity()
    elif shortcut == "pad":
        side = PadShortcut(shape[0] - place.channels, max(strides))
    elif shortcut == "projection":
        projection = [
            {"conv": {"out": shape[0], "kernel": 1, "stride": strides, "bias": False}},
            "batch_norm",
        ]
        side, _ = build_layers(projection, Place(place.shape, place.num_outputs, f"{place.path}.shortcut"))
    elif isinstance(shortcut, Sequence) and not isinstance(shortcut, str):
        side, _ = build_layers(shortcut, Place(place.shape, place.num_outputs, f"{place.path}.shortcut"))
    else:
        raise ValueError(
            f"shortcut must be auto, identity, projection, pad or a list of layers, not {shortcut!r}"
        )
    reached = output_shape(side, place.shape)
    if reached != shape:
        raise ValueError(
            f"its layers make {_times(shape)}, its shortcut {_times(reached)}: they can't be added"
        )
    return Residual(body, side), shape


def branches(place: Place, branches: Sequence[Sequence[object]]) -> Shaped:
    """Several lists of layers on the same input, their channels side by side."""
    built = [
        build_layers(layers, Place(place.shape, place.num_outputs, f"{place.path}.branches[{i}]"))
        for i, layers in enumerate(branches)
    ]
    if len({shape[1:] for _, shape in built}) > 1:
        raise ValueError(
            f"its branches end in different sizes: {', '.join(_times(shape) for _, shape in built)}"
        )
    channels = sum(shape[0] for _, shape in built)
    return Branches([module for module, _ in built]), (channels, *built[0][1][1:])


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))


def inception(
    place: Place, out: Sequence[int], reduce: Sequence[int] = (), kind: str = "reduced", norm: str = "batch"
) -> Shaped:
    """1x1, 3x3, 5x5 convolutions and a 3x3 max pool side by side (Szegedy et al. 2015, figure 2).

    Args:
        out: channels of the 1x1, the 3x3, the 5x5 branch and of the pool's projection.
        reduce: channels of the 1x1 convolutions before the 3x3 and the 5x5 one.
        kind: reduced (figure 2b), or naive (figure 2a: without the 1x1 reductions and the pool's projection).
        norm: batch or none, after each convolution.
    """
    if kind not in ("reduced", "naive"):
        raise ValueError(f"kind must be reduced or naive, not {kind!r}")
    if len(out) != 4 or (kind == "reduced" and len(reduce) != 2):
        raise ValueError("out needs 4 numbers (1x1, 3x3, 5x5, pool) and reduce 2 (before 3x3, before 5x5)")

    def unit(width: int, kernel: int) -> list[object]:
        layer = {"conv": {"out": width, "kernel": kernel, "padding": "same", "bias": norm == "none"}}
        return [layer, *(["batch_norm"] if norm != "none" else []), "relu"]

    pool: list[object] = [{"max_pool": {"kernel": 3, "stride": 1, "padding": 1}}]
    if kind == "naive":
        return branches(place, [unit(out[0], 1), unit(out[1], 3), unit(out[2], 5), pool])
    return branches(
        place,
        [
            unit(out[0], 1),
            unit(reduce[0], 1) + unit(out[1], 3),
            unit(reduce[1], 1) + unit(out[2], 5),
            pool + unit(out[3], 1),
        ],
    )
