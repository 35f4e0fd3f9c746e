"""The adapted linear layer against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedtune.lora.linear import AdaptedLinear, Factors, attach, detach
from fedtune.quant.storage import store
from fedtune.records import BACKBONE_FORMATS, FormatName, MatrixForm

OUT, IN, RANK, TAIL, SCALE = 12, 20, 3, 4, 0.5


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _factors(*, trains: bool = True, tail: int = TAIL) -> Factors:
    a, b = _random(RANK, IN, seed=1), _random(OUT, RANK, seed=2)
    return Factors(
        a.requires_grad_(trains),
        b.requires_grad_(trains),
        _random(tail, IN, seed=3),
        _random(OUT, tail, seed=4),
        SCALE,
    )


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, f: Factors) -> Tensor:
    dense = weight + f.scale * (f.b @ f.a + f.tail_b @ f.tail_a)
    return x @ dense.t() if bias is None else x @ dense.t() + bias


@pytest.mark.parametrize("format_name", BACKBONE_FORMATS)
@pytest.mark.parametrize("tail", [0, TAIL])
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_and_gradients_equal_plain_autograd(
    format_name: FormatName, tail: int, with_bias: bool
) -> None:
    bias = _random(OUT, seed=5) if with_bias else None
    layer = AdaptedLinear(store(_random(OUT, IN, seed=0), MatrixForm(format_name)), bias)
    weight = layer.matrix.values(torch.float32)
    ours, plain = _factors(tail=tail), _factors(tail=tail)
    layer.factors = ours
    x_ours = _random(2, 5, IN, seed=6).requires_grad_(True)
    x_plain = x_ours.detach().clone().requires_grad_(True)
    gradient = _random(2, 5, OUT, seed=7)

    y_ours, y_plain = layer(x_ours), _plain(x_plain, weight, bias, plain)
    torch.testing.assert_close(y_ours, y_plain, rtol=1e-5, atol=1e-5)
    y_ours.backward(gradient)
    y_plain.backward(gradient)
    torch.testing.assert_close(x_ours.grad, x_plain.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.a.grad, plain.a.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.b.grad, plain.b.grad, rtol=1e-5, atol=1e-5)


def test_the_tail_gets_no_gradient() -> None:
    layer = AdaptedLinear(store(_random(OUT, IN, seed=0), MatrixForm("fp32")), None)
    layer.factors = _factors()
    layer(_random(3, IN, seed=6)).sum().backward()
    assert layer.factors.tail_a.grad is None
    assert layer.factors.tail_b.grad is None


def test_without_factors_the_layer_is_the_frozen_matrix() -> None:
    weight = _random(OUT, IN, seed=0)
    layer = AdaptedLinear(store(weight, MatrixForm("fp32")), None)
    x = _random(3, IN, seed=6).requires_grad_(True)
    y = layer(x)
    torch.testing.assert_close(y, x @ weight.t())
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, OUT) @ weight)


def test_nothing_is_recorded_below_the_first_trained_layer() -> None:
    layer = AdaptedLinear(store(_random(OUT, IN, seed=0), MatrixForm("nf4")), None)
    assert not layer(_random(3, IN, seed=6)).requires_grad
    layer.factors = _factors(trains=False)
    assert not layer(_random(3, IN, seed=6)).requires_grad


def test_attach_takes_the_factors_of_the_last_device_away() -> None:
    layers = {
        name: AdaptedLinear(store(_random(OUT, IN, seed=0), MatrixForm("fp32")), None)
        for name in ("p", "q")
    }
    attach(layers, {"p": _factors(), "q": _factors()})
    attach(layers, {"q": _factors()})
    assert layers["p"].factors is None
    assert layers["q"].factors is not None
    detach(layers)
    assert layers["q"].factors is None


def test_attach_refuses_a_matrix_that_is_not_there() -> None:
    layers = {"p": AdaptedLinear(store(_random(OUT, IN, seed=0), MatrixForm("fp32")), None)}
    with pytest.raises(KeyError, match="no adapted matrix named ghost"):
        attach(layers, {"ghost": _factors()})
