"""The list of layers: words, inferred widths, and errors that name the layer."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models.sequential.parser import Sequential, layer_builders


def build(
    *layers: object, channels: int = 3, size: tuple[int, ...] = (32, 32), outputs: int = 10
) -> Sequential:
    return Sequential(layers=list(layers), in_channels=channels, num_outputs=outputs, image_size=size)


def shape_after(*layers: object, channels: int = 4, size: tuple[int, ...] = (8, 8)) -> tuple[int, ...]:
    """Of the map that reaches a per-pixel output."""
    network = build(*layers, {"output": {"kernel": 1}}, channels=channels, size=size, outputs=5)
    images = torch.randn(2, channels, *size)
    assert network(images).shape[:2] == (2, 5)
    return tuple(network.layers[:-1](images).shape[1:])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        pytest.param({"conv": 7}, (7, 6, 6), id="first argument"),
        pytest.param({"conv": {"out": 7, "kernel": 5, "padding": "same"}}, (7, 8, 8), id="same"),
        pytest.param({"conv": {"out": 7, "kernel": 4, "padding": "same"}}, (7, 8, 8), id="even same"),
        pytest.param(
            {"conv": {"out": 7, "kernel": 3, "stride": 2, "padding": "same"}}, (7, 4, 4), id="halved"
        ),
        pytest.param({"conv": {"out": 7, "kernel": 3, "padding": "full"}}, (7, 10, 10), id="full"),
        pytest.param({"conv": {"out": 7, "kernel": 3, "padding": 4, "dilation": 4}}, (7, 8, 8), id="dilated"),
        pytest.param({"conv": {"out": 8, "kernel": [1, 3], "groups": 4}}, (8, 8, 6), id="groups"),
        pytest.param(
            {"conv": {"out": 7, "padding": 1, "padding_mode": "reflect"}}, (7, 8, 8), id="padding_mode"
        ),
        pytest.param({"transposed_conv": 7}, (7, 16, 16), id="transposed"),
        pytest.param({"depthwise_separable": {"out": 7, "stride": 2}}, (7, 4, 4), id="depthwise separable"),
        pytest.param("max_pool", (4, 4, 4), id="max pool"),
        pytest.param({"max_pool": {"kernel": 3, "stride": 2, "ceil": True}}, (4, 4, 4), id="ceil"),
        pytest.param({"avg_pool": 3}, (4, 2, 2), id="avg pool"),
        pytest.param({"adaptive_avg_pool": 3}, (4, 3, 3), id="adaptive"),
        pytest.param({"upsample": {"scale": 2, "mode": "bicubic"}}, (4, 16, 16), id="upsample"),
        pytest.param({"pixel_shuffle": 2}, (1, 16, 16), id="pixel shuffle"),
        pytest.param({"channel_shuffle": 2}, (4, 8, 8), id="channel shuffle"),
        pytest.param({"pad": {"pixels": 1, "mode": "circular"}}, (4, 10, 10), id="pad"),
        pytest.param({"group_norm": 2}, (4, 8, 8), id="group norm"),
        pytest.param("instance_norm", (4, 8, 8), id="instance norm"),
        pytest.param({"lrn": 5}, (4, 8, 8), id="lrn"),
        pytest.param({"dropout2d": 0.1}, (4, 8, 8), id="dropout2d"),
        pytest.param("prelu", (4, 8, 8), id="prelu"),
        pytest.param({"repeat": {"times": 3, "layers": [{"conv": 6}, "relu"]}}, (6, 2, 2), id="repeat"),
        pytest.param({"branches": [[{"conv": {"out": 2, "kernel": 1}}], ["relu"]]}, (6, 8, 8), id="branches"),
        pytest.param({"inception": {"out": [1, 2, 3, 4], "reduce": [1, 1]}}, (10, 8, 8), id="inception"),
        pytest.param({"inception": {"out": [1, 2, 3, 4], "kind": "naive"}}, (10, 8, 8), id="naive inception"),
        pytest.param(
            {"residual": {"layers": [{"conv": {"out": 4, "padding": 1}}]}}, (4, 8, 8), id="residual"
        ),
        pytest.param(
            {"residual": {"layers": [{"conv": {"out": 6, "stride": 2, "padding": 1}}]}},
            (6, 4, 4),
            id="projected",
        ),
        pytest.param(
            {"residual": {"layers": [{"conv": {"out": 6, "stride": 2, "padding": 1}}], "shortcut": "pad"}},
            (6, 4, 4),
            id="padded",
        ),
    ],
)
def test_words_make_the_shape_that_their_arguments_say(layer: object, shape: tuple[int, ...]) -> None:
    assert shape_after(layer) == shape


@pytest.mark.parametrize("size", [(40,), (12, 12, 12)])
def test_signals_and_volumes(size: tuple[int, ...]) -> None:
    network = build({"conv": 4}, "batch_norm", "relu", "max_pool", "global_avg_pool", "output", size=size)
    assert network(torch.randn(2, 3, *size)).shape == (2, 10)


def test_a_layer_stands_where_the_list_has_it() -> None:
    network = build({"conv": 4}, "relu", "flatten", "output")
    assert list(network.state_dict()) == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.3.weight",
        "layers.3.bias",
    ]
    assert network.head_names == ("layers.3",)
    assert network.layers[0].in_config == "model.layers[0] conv(out=4)"


def test_depthwise_separable_counts() -> None:
    """3x3 on 16 to 32 channels: 16*9 + 16*32 weights, 704 with biases, against 4,640 (lecture)."""
    layer = {"depthwise_separable": {"out": 32, "norm": "none", "activation": "none"}}
    network = build(layer, {"output": {"kernel": 1}}, channels=16)
    assert count(network.layers[0]) == 16 * 9 + 16 * 32 == 656
    with_bias = build(
        {"depthwise_separable": {"out": 32, "norm": "none", "bias": True}}, "flatten", "output", channels=16
    )
    assert count(with_bias.layers[0]) == 704
    assert count(build({"conv": {"out": 32}}, "flatten", "output", channels=16).layers[0]) == 4640


def test_lrn_is_the_papers() -> None:
    """b = a / (k + alpha * sum a^2)^beta over 5 channels (Krizhevsky et al. 2012, section 3.3)."""
    lrn = build({"lrn": {"size": 5, "alpha": 0.01}}, "flatten", "output", channels=6, size=(1, 1)).layers[0]
    a = torch.rand(1, 6, 1, 1) * 10
    total = (a[:, :5] ** 2).sum()  # of the channels 2 away from channel 2 at most
    torch.testing.assert_close(lrn(a)[0, 2, 0, 0], a[0, 2, 0, 0] / (2 + 0.01 * total) ** 0.75)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        pytest.param(
            [*["max_pool"] * 3, {"conv": {"out": 50, "kernel": 5}}],
            r"model\.layers\[3\] conv\(out=50, kernel=5\): \(4 - 5 \+ 2\*0\)/1 \+ 1 < 1: .* larger images",
            id="does not fit",
        ),
        pytest.param(
            [{"conv": {"out": 5, "dilation": 20}}], r"\(32 - 41 \+ 2\*0\)/1 \+ 1 < 1 \(41 = ", id="dilated"
        ),
        pytest.param(["rleu"], r"model\.layers\[0\]: unknown layer 'rleu'; did you mean 'relu'\?", id="word"),
        pytest.param(
            [{"conv": {"out": 5, "kernal": 3}}],
            r"\[0\] conv: no argument 'kernal'; .*'kernel'",
            id="argument",
        ),
        pytest.param(["conv"], r"model\.layers\[0\] conv: needs out", id="missing"),
        pytest.param([{"conv": 5, "kernel": 3}], r"a layer has one name, not conv, kernel", id="indentation"),
        pytest.param([{"relu": 3}], r"relu: takes no argument", id="no argument"),
        pytest.param(
            [{"conv": {"out": 5, "kernel": "5x5"}}], r"kernel must be a whole number .* not '5x5'", id="type"
        ),
        pytest.param([{"conv": {"out": 0}}], r"out must be at least 1", id="zero"),
        pytest.param(
            [{"conv": {"out": 5, "padding": "sane"}}], r"padding must be same, valid, full", id="padding"
        ),
        pytest.param(
            [{"conv": {"out": 5, "groups": 2}}], r"\[0\] conv\(out=5, groups=2\): .*divisible", id="groups"
        ),
        pytest.param([{"linear": 5}], r"linear\(out=5\): needs a vector.*put `flatten`", id="not flat"),
        pytest.param(["flatten", {"conv": 5}], r"\[1\] conv\(out=5\): needs a feature map", id="flat"),
        pytest.param(
            [{"repeat": {"times": 2, "layers": ["relu", {"conv": {"out": 5, "kernel": 20}}]}}],
            r"model\.layers\[0\]\.layers\[1\] conv\(out=5, kernel=20\): \(13 - 20",
            id="nested",
        ),
        pytest.param(
            [{"residual": {"layers": [{"conv": 3}], "shortcut": "identity"}}],
            r"residual.*its layers return 3x30x30, its shortcut 3x32x32",
            id="residual",
        ),
    ],
)
def test_errors_name_the_layer_and_the_remedy(layers: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(*layers, "flatten", "output")


@pytest.mark.parametrize("layers", [["flatten", {"linear": 10}], ["flatten", "output", "output"], []])
def test_exactly_one_output(layers: list[object]) -> None:
    with pytest.raises(UserError, match="exactly one layer must be `output`"):
        build(*layers)


def test_nothing_after_the_output_may_change_its_width() -> None:
    with pytest.raises(UserError, match="7 outputs, the task needs 10"):
        build("flatten", "output", {"linear": 7})
    assert build("flatten", "output", "softmax")(torch.randn(2, 3, 32, 32)).sum().item() == pytest.approx(2)


def test_every_word_is_explained() -> None:
    for word, builder in layer_builders().items():
        assert builder.__doc__, word


windows = st.fixed_dictionaries(
    {
        "kernel": st.integers(1, 7),
        "stride": st.integers(1, 3),
        "padding": st.sampled_from(["valid", "full", "same", 0, 1, 2]),
    }
)
conv_layers = st.builds(
    lambda w, out, d: {"conv": {**w, "out": out, "dilation": d}},
    windows,
    st.integers(1, 4),
    st.integers(1, 3),
)
pool_layers = st.builds(lambda w: {"max_pool": {**w, "padding": 0}}, windows)
small_layers = st.one_of(conv_layers, pool_layers, st.sampled_from(["relu", "batch_norm", "avg_pool"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(small_layers, max_size=5), st.integers(4, 20), st.integers(4, 20))
def test_what_is_built_runs_and_what_is_refused_would_not(
    layers: list[object], height: int, width: int
) -> None:
    """The verdict is torch's: a list is refused at the layer where torch, given the same modules, fails."""
    size = (height, width)
    try:
        network = build(*copy.deepcopy(layers), "flatten", "output", size=size)
    except UserError as error:
        index = int(str(error).split("[")[1].split("]")[0])
        assume("symmetric" not in str(error))
        before = build(*layers[:index], {"output": {"kernel": 1}}, size=size).layers[:-1].eval()
        shape = before(torch.zeros(2, 3, *size)).shape
        arguments = (
            layers[index]["conv"] if isinstance(layers[index], dict) and "conv" in layers[index] else None
        )
        if arguments is None:
            assert min(shape[-2:]) < 7
            return
        span = arguments["dilation"] * (arguments["kernel"] - 1)
        pixels = {"valid": 0, "full": span, "same": span // 2}.get(arguments["padding"], arguments["padding"])
        conv = nn.Conv2d(
            shape[1], 1, arguments["kernel"], arguments["stride"], pixels, dilation=arguments["dilation"]
        )
        with pytest.raises(RuntimeError):
            conv(torch.zeros(shape))
        return
    assert network(torch.randn(2, 3, *size)).shape == (2, 10)
