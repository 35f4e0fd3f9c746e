"""The adapted linear layer against plain autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedtune.kernels import dispatch
from fedtune.kernels.packed import PackedWeights
from fedtune.lora.linear import (
    AdaptedLinear,
    Correction,
    Factors,
    adapted_products,
    attach,
    detach,
)
from fedtune.quant.block import BlockMatrix
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


# ---------------------------------------------------------------- layers with one input


class Held:
    """A frozen matrix that gives panels of five rows in one reused buffer, and counts its uses."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape = weight, (int(weight.shape[0]), int(weight.shape[1]))
        self.uses = 0

    @property
    def bytes(self) -> int:
        return self.weight.nbytes

    def values(self, dtype: torch.dtype) -> Tensor:
        self.uses += 1
        return self.weight.to(dtype)

    def to(self, device: torch.device) -> Held:
        return self

    def panels(self, dtype: torch.dtype, rows: int = 256) -> Iterator[tuple[int, Tensor]]:
        self.uses += 1
        buffer = torch.empty(5, self.shape[1], dtype=dtype)
        for first in range(0, self.shape[0], 5):
            part = self.weight[first : first + 5]
            yield first, buffer[: part.shape[0]].copy_(part)
        buffer.fill_(float("nan"))  # nobody reads it afterwards


class Group:
    """Three layers with one input: one trained with all that there is, one frozen with a
    correction, one trained alone and with a bias; and the same in plain torch.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.outs = dtype, (12, 7, 16)
        self.layers = []
        for i, out in enumerate(self.outs):
            bias = self.tensor(out, seed=10 + i) if i == 2 else None
            layer = AdaptedLinear(Held(self.tensor(out, IN, seed=20 + i)), bias)
            if i < 2:
                layer.correction = Correction(
                    self.tensor(2, IN, seed=30 + i), self.tensor(out, 2, seed=40 + i)
                )
            self.layers.append(layer)
        self.layers[0].factors = self.factors(12, rank=3, tail=4, scale=0.5)
        self.layers[2].factors = self.factors(16, rank=2, tail=0, scale=1.7)
        self.x = self.tensor(2, 5, IN, seed=6).requires_grad_(True)
        self.gradients = [self.tensor(2, 5, out, seed=50 + out) for out in self.outs]

    def tensor(self, *shape: int, seed: int) -> Tensor:
        return _random(*shape, seed=seed).to(self.dtype)

    def factors(self, out: int, rank: int, tail: int, scale: float) -> Factors:
        a, b = self.tensor(rank, IN, seed=out), self.tensor(out, rank, seed=out + 1)
        tail_a, tail_b = self.tensor(tail, IN, seed=out + 2), self.tensor(out, tail, seed=out + 3)
        return Factors(a.requires_grad_(True), b.requires_grad_(True), tail_a, tail_b, scale)

    def plain(self) -> list[Tensor]:
        outputs = []
        for layer in self.layers:
            assert isinstance(layer.matrix, Held)
            weight, f, c = layer.matrix.weight, layer.factors, layer.correction
            if f is not None:
                weight = weight + f.scale * (f.b @ f.a + f.tail_b @ f.tail_a)
            if c is not None:
                weight = weight + c.b @ c.a
            y = self.x @ weight.t()
            outputs.append(y if layer.bias is None else y + layer.bias)
        return outputs

    def results(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs and every gradient, which are then forgotten."""
        torch.autograd.backward(outputs, self.gradients)
        leaves = [self.x, *(t for layer in self.layers if (f := layer.factors) for t in (f.a, f.b))]
        found = [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        assert len(found) == len(outputs) + len(leaves)
        for leaf in leaves:
            leaf.grad = None
        return [t.detach() for t in found]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)]
)
def test_layers_together_equal_plain_autograd(dtype: torch.dtype, tolerance: float) -> None:
    group = Group(dtype)
    together = group.results(adapted_products(group.x, group.layers))
    plain = group.results(group.plain())
    for one, other in zip(together, plain, strict=True):
        assert one.dtype == dtype
        error = (one - other).abs().max() / other.abs().max()
        assert error < tolerance


def test_b_alone_gets_the_gradient_that_it_gets_beside_a() -> None:
    group = Group(torch.float64)
    whole = group.results(adapted_products(group.x, group.layers))
    held = [f for layer in group.layers if (f := layer.factors) is not None]
    for factors in held:
        factors.a.requires_grad_(False)
    attach({str(i): layer for i, layer in enumerate(group.layers)}, {"0": held[0], "2": held[1]})
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = adapted_products(group.x, group.layers)
    torch.autograd.backward(outputs, group.gradients)
    assert group.x.data_ptr() not in kept
    # Outputs, then x, then a and b of each layer.
    for i, factors in enumerate(held):
        assert factors.a.grad is None
        assert factors.b.grad is not None
        torch.testing.assert_close(factors.b.grad, whole[len(outputs) + 2 + 2 * i])
    assert group.x.grad is not None
    torch.testing.assert_close(group.x.grad, whole[len(outputs)])


def test_whoever_observes_a_layer_sees_its_inputs() -> None:
    group = Group(torch.float32)
    seen: list[Tensor] = []
    group.layers[1].observe = seen.append
    adapted_products(group.x, group.layers)
    (rows,) = seen
    assert torch.equal(rows, group.x.reshape(-1, IN))


def test_layers_together_equal_the_layers_one_by_one() -> None:
    group = Group(torch.float64)
    together = group.results(adapted_products(group.x, group.layers))
    one_by_one = group.results([layer(group.x) for layer in group.layers])
    for one, other in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_factors_stay_in_float32_while_the_product_runs_in_bfloat16() -> None:
    layer = AdaptedLinear(Held(_random(OUT, IN, seed=0)), None)
    layer.factors = _factors()
    x = _random(4, IN, seed=6).to(torch.bfloat16).requires_grad_(True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert layer.factors.a.grad is not None
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert layer.factors.a.grad.dtype == torch.float32


def test_an_output_that_nobody_uses_gets_no_share() -> None:
    group = Group(torch.float64)
    group.gradients = group.gradients[:1]
    outputs = adapted_products(group.x, group.layers)[:1]
    outputs[0].backward(group.gradients[0])
    last = group.layers[2].factors
    assert last is not None
    assert last.b.grad is not None
    assert not last.b.grad.any()


def test_no_tokens_give_empty_outputs_and_zero_gradients() -> None:
    group = Group(torch.float32)
    outputs = adapted_products(group.x[:, :0], group.layers)
    assert [tuple(y.shape) for y in outputs] == [(2, 0, out) for out in group.outs]
    sum(y.sum() for y in outputs).backward()  # type: ignore[union-attr]
    first = group.layers[0].factors
    assert first is not None
    assert first.a.grad is not None
    assert not first.a.grad.any()


def test_an_update_in_place_is_seen_by_the_next_product() -> None:
    group = Group(torch.float64)
    adapted_products(group.x, group.layers)
    with torch.no_grad():
        for layer in group.layers:
            if layer.factors is not None:
                layer.factors.a.mul_(2.0)
                layer.factors.b.add_(1.0)
    for one, other in zip(adapted_products(group.x, group.layers), group.plain(), strict=True):
        torch.testing.assert_close(one, other)


def test_micro_batches_of_a_step_share_the_stacked_factors() -> None:
    group = Group(torch.float32)
    adapted_products(group.x, group.layers)
    first = dict(group.layers[0]._stacked)
    assert first
    adapted_products(group.x, group.layers)
    again = group.layers[0]._stacked
    assert all(again[key] is stack for key, stack in first.items())
    layers = {str(i): layer for i, layer in enumerate(group.layers)}
    detach(layers)
    assert not any(layer._stacked for layer in group.layers)


def test_few_tokens_are_multiplied_by_the_packed_weights_where_that_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = AdaptedLinear(store(_random(OUT, IN, seed=0), MatrixForm("q4")), _random(OUT, seed=5))
    layer.factors = _factors()
    x = _random(3, IN, seed=6)
    expected, asked = layer(x), []

    def wins(tokens: int, packed: PackedWeights, dtype: torch.dtype) -> bool:
        asked.append((tokens, packed.shape, dtype))
        return True

    monkeypatch.setattr(dispatch, "packed_product_wins", wins)
    monkeypatch.setattr(BlockMatrix, "panels", None)
    torch.testing.assert_close(layer(x), expected)
    assert asked == [(3, (OUT, IN), torch.float32)]


def test_a_bias_that_is_trained_gets_its_gradient() -> None:
    layer = AdaptedLinear(Held(_random(OUT, IN, seed=0)), _random(OUT, seed=5))
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    x = _random(3, IN, seed=6)
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.matrix.values(x.dtype).t() + layer.bias)
    y.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 3.0))


def test_a_frozen_layer_remembers_nothing_of_its_input() -> None:
    layer = AdaptedLinear(Held(_random(OUT, IN, seed=0)), None)
    layer.factors = _factors(trains=False)
    x = _random(64, IN, seed=6).requires_grad_(True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        layer(x)
    assert kept
    assert all(64 not in shape for shape in kept)


@pytest.mark.parametrize(("keeps", "uses"), [(False, 3), (True, 2)])
def test_a_recomputed_layer_can_keep_its_values_for_the_backward_pass(
    keeps: bool, uses: int
) -> None:
    group = Group(torch.float64)
    plain = group.results(group.plain())
    for layer in group.layers:
        layer.keeps_values = keeps

    def block(x: Tensor) -> tuple[Tensor, ...]:
        return adapted_products(x, group.layers)

    found = group.results(checkpoint(block, group.x, use_reentrant=False))
    assert [layer.matrix.uses for layer in group.layers if isinstance(layer.matrix, Held)] == (
        [uses] * 3
    )
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_a_layer_that_trains_no_a_shows_the_parts_of_its_matrix_gradient() -> None:
    weight = _random(OUT, IN, seed=5)
    layer = AdaptedLinear(store(weight, MatrixForm("fp32")), None)
    b = torch.zeros(OUT, 0)
    nothing = Factors(torch.zeros(0, IN), b.clone().requires_grad_(), torch.zeros(0, IN), b, 1.0)
    attach({"q": layer}, {"q": nothing})
    seen: list[Tensor] = []
    layer.observe_gradient = lambda g, rows: seen.append(g.t() @ rows)
    layer(_random(2, 3, IN, seed=6)).square().sum().backward()
    plain = weight.clone().requires_grad_()
    torch.nn.functional.linear(_random(2, 3, IN, seed=6), plain).square().sum().backward()
    assert plain.grad is not None
    torch.testing.assert_close(seen, [plain.grad])
