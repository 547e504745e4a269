"""Norms, dropout and shared blocks."""

import pytest
import torch

from cnntrain.models.norm_act import Dropout, dropout, make_norm


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.97])
def test_dropout_zeroes_with_the_given_probability_and_rescales(p):
    torch.manual_seed(0)
    outputs = dropout(torch.ones(1_000_000), p)
    assert outputs.eq(0).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
    kept = outputs[outputs != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=2**-12, atol=0)


def test_dropout_masks_of_neighbors_are_independent():
    """One draw of the generator serves four elements: all 16 combinations must be equally frequent."""
    torch.manual_seed(0)
    kept = dropout(torch.ones(400_000), 0.5).view(-1, 4).ne(0).long()
    counts = torch.bincount(kept @ torch.tensor([1, 2, 4, 8]), minlength=16).double()
    chi_squared = ((counts - 6250) ** 2 / 6250).sum().item()
    assert chi_squared < 37.7  # 15 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize(
    "inputs",
    [
        torch.randn(3, 5, 7, 2),
        torch.randn(3, 5, 7, 2).to(memory_format=torch.channels_last),
        torch.randn(4, 6)[:, ::2],
        torch.randn(1, 6).expand(4, 6),
        torch.randn(0, 6),
        torch.randn(()),
        torch.randn(3, 5).bfloat16(),
        torch.randn(3, 5).double(),
    ],
    ids=["plain", "channels_last", "strided", "expanded", "empty", "scalar", "bf16", "fp64"],
)
def test_dropout_gradient_has_the_same_mask(inputs):
    inputs = inputs.detach().requires_grad_()
    outputs = dropout(inputs, 0.25)
    (gradient,) = torch.autograd.grad(outputs.sum(), inputs)
    assert outputs.dtype == inputs.dtype and outputs.shape == inputs.shape
    assert torch.equal(outputs, inputs * gradient)
    assert set(gradient.unique().tolist()) <= {0.0, torch.tensor(4 / 3, dtype=inputs.dtype).item()}


def test_dropout_keeps_channels_last():
    images = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    assert dropout(images).is_contiguous(memory_format=torch.channels_last)


def test_dropout_depends_on_the_seed():
    layer, inputs = Dropout(0.3), torch.randn(100)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(inputs)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_dropout_in_evaluation_and_with_probability_0_and_1():
    inputs = torch.randn(50)
    assert Dropout(0.5).eval()(inputs) is inputs
    assert torch.equal(dropout(inputs, 0.0), inputs)
    assert torch.equal(dropout(inputs, 1.0), torch.zeros(50))


@pytest.mark.slow
def test_compiled_dropout_is_one_graph():
    compiled = torch.compile(Dropout(0.25), backend="eager", fullgraph=True)
    outputs = compiled(torch.ones(100_000))
    assert outputs.eq(0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(outputs.unique(), torch.tensor([0.0, 4 / 3]))


@pytest.mark.parametrize(("norm", "over"), [("layer", (1, 2, 3)), ("instance", (2, 3))])
def test_norms_normalize_over_the_right_dimensions(norm: str, over: tuple[int, ...]) -> None:
    """Wu and He 2018, figure 2."""
    x = torch.randn(2, 8, 16, 16) * 5 + 3
    y = make_norm(norm, 8)(x)
    torch.testing.assert_close(y.mean(over), torch.zeros_like(y.mean(over)), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var(over, correction=0), torch.ones_like(y.mean(over)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("channels", [1, 20, 64, 96])
def test_group_norm_accepts_any_number_of_channels(channels: int) -> None:
    assert make_norm("group", channels)(torch.randn(2, channels, 4, 4)).isfinite().all()
