"""Lists of layers: parsing, inferred widths, and errors that name the layer."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models.sequential.parser import Sequential, count_layers


def build(*layers: object, channels: int = 3, size: tuple[int, ...] = (32, 32), outputs: int = 10) -> Sequential:
    return Sequential(layers=list(layers), in_channels=channels, num_outputs=outputs, image_size=size)


def test_list_index_is_the_module_index() -> None:
    network = build({"conv": 4}, "relu", "flatten", "output")
    assert list(network.state_dict()) == ["layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"]
    assert network.head_names == ("layers.3",)
    assert network.layers[0].in_config == "model.layers[0] conv(out=4)"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        pytest.param(
            [*["max_pool"] * 3, {"conv": {"out": 50, "kernel": 5}}],
            r"model\.layers\[3\] conv\(out=50, kernel=5\): \(4 - 5 \+ 2\*0\)/1 \+ 1 < 1: .* larger images",
            id="does not fit",
        ),
        pytest.param([{"conv": {"out": 5, "dilation": 20}}], r"\(32 - 41 \+ 2\*0\)/1 \+ 1 < 1 \(41 = ", id="dilated"),
        pytest.param(["rleu"], r"model\.layers\[0\]: unknown layer 'rleu'; did you mean 'relu'\?", id="word"),
        pytest.param(
            [{"conv": {"out": 5, "kernal": 3}}], r"\[0\] conv: no argument 'kernal'; .*'kernel'", id="argument"
        ),
        pytest.param(["conv"], r"model\.layers\[0\] conv: needs out", id="missing"),
        pytest.param([{"conv": 5, "kernel": 3}], r"a layer has one name, not conv, kernel", id="indentation"),
        pytest.param([{"relu": 3}], r"relu: takes no argument", id="no argument"),
        pytest.param([{"conv": {"out": 5, "kernel": "5x5"}}], r"kernel must be a whole number .* not '5x5'", id="type"),
        pytest.param([{"conv": {"out": 0}}], r"out must be at least 1", id="zero"),
        pytest.param([{"conv": {"out": 5, "padding": "sane"}}], r"padding must be same, valid, full", id="padding"),
        pytest.param([{"conv": {"out": 5, "groups": 2}}], r"\[0\] conv\(out=5, groups=2\): .*divisible", id="groups"),
        pytest.param([{"linear": 5}], r"linear\(out=5\): needs a vector.*put `flatten`", id="not flat"),
        pytest.param(["flatten", {"conv": 5}], r"\[1\] conv\(out=5\): needs a feature map", id="flat"),
        pytest.param(
            [{"inception": {"out": [1, 2, 3, 4], "reduce": [1, 1], "norm": "group"}}],
            "norm must be batch or none, not 'group'",
            id="inception norm",
        ),
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


def test_layers_after_the_output_must_keep_its_width() -> None:
    with pytest.raises(UserError, match="7 outputs, the task needs 10"):
        build("flatten", "output", {"linear": 7})
    assert build("flatten", "output", "softmax")(torch.randn(2, 3, 32, 32)).sum().item() == pytest.approx(2)


RELU: list[Any] = ["relu"]


def nested(times: object, depth: int) -> list[Any]:
    layers: list[Any] = RELU
    for _ in range(depth):
        layers = [{"repeat": {"times": times, "layers": layers}}]
    return layers


def test_layers_are_counted_with_repeats_expanded() -> None:
    layers = ["relu", {"repeat": {"times": 3, "layers": ["relu", {"conv": {"out": 3}}]}}, "output"]
    assert count_layers(layers) == 8
    assert count_layers([{"residual": {"layers": ["relu", "relu"]}}, {"branches": [RELU, RELU * 2]}]) == 5


BOMBS = [
    nested(10**9, 1),
    nested(1e9, 1),
    nested(100, 3),
    nested(2, 15),
    [{"repeat": {"times": 10**9, "layers": []}}],
    [{"residual": {"layers": nested(10**9, 1)}}],
    [{"branches": [nested(10**9, 1)]}],
    [{"residual": [{"repeat": {"times": 10**9, "layers": RELU}}]}],
]


@pytest.mark.parametrize("layers", BOMBS)
def test_too_many_layers_are_rejected_before_building(layers: list[Any]) -> None:
    with pytest.raises(UserError, match=r"model\.layers"):
        Sequential(layers=["flatten", *layers, "output"], in_channels=1, num_outputs=2, image_size=(8, 8))


windows = st.fixed_dictionaries(
    {
        "kernel": st.integers(1, 7),
        "stride": st.integers(1, 3),
        "padding": st.sampled_from(["valid", "full", "same", 0, 1, 2]),
    }
)


conv_layers = st.builds(
    lambda w, out, d: {"conv": {**w, "out": out, "dilation": d}}, windows, st.integers(1, 4), st.integers(1, 3)
)


pool_layers = st.builds(lambda w: {"max_pool": {**w, "padding": 0}}, windows)


small_layers = st.one_of(conv_layers, pool_layers, st.sampled_from(["relu", "batch_norm", "avg_pool"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(small_layers, max_size=5), st.integers(4, 20), st.integers(4, 20))
def test_a_list_is_rejected_exactly_if_torch_rejects_its_layers(layers: list[object], height: int, width: int) -> None:
    """A list is rejected at the layer at which torch fails with the same modules."""
    size = (height, width)
    try:
        network = build(*copy.deepcopy(layers), "flatten", "output", size=size)
    except UserError as error:
        index = int(str(error).split("[")[1].split("]")[0])
        assume("symmetric" not in str(error))
        before = build(*layers[:index], {"output": {"kernel": 1}}, size=size).layers[:-1].eval()
        shape = before(torch.zeros(2, 3, *size)).shape
        arguments = layers[index]["conv"] if isinstance(layers[index], dict) and "conv" in layers[index] else None
        if arguments is None:
            assert min(shape[-2:]) < 7
            return
        span = arguments["dilation"] * (arguments["kernel"] - 1)
        pixels = {"valid": 0, "full": span, "same": span // 2}.get(arguments["padding"], arguments["padding"])
        conv = nn.Conv2d(shape[1], 1, arguments["kernel"], arguments["stride"], pixels, dilation=arguments["dilation"])
        with pytest.raises(RuntimeError):
            conv(torch.zeros(shape))
        return
    assert network(torch.randn(2, 3, *size)).shape == (2, 10)
