"""Which dtype a device computes in, and the guard of float16."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from fedtune.records import ComputeName
from fedtune.train.compute import LossScale, compute_dtype, faster_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_dtype_that_is_asked_for_is_taken(asked: ComputeName, dtype: torch.dtype) -> None:
    assert compute_dtype(asked, CPU) == dtype


def test_auto_is_measured_once_per_process(caplog: pytest.LogCaptureFixture) -> None:
    first = compute_dtype("auto", CPU)
    assert first in (torch.float32, torch.bfloat16)
    with caplog.at_level(logging.INFO):
        assert compute_dtype("auto", CPU) == first
    assert not caplog.records


@pytest.mark.parametrize(
    ("seconds", "dtype"), [(0.2, torch.bfloat16), (0.7, torch.float32), (17.0, torch.float32)]
)
def test_a_cpu_takes_bfloat16_only_where_it_is_clearly_faster(
    seconds: float, dtype: torch.dtype
) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: seconds}
    assert faster_dtype(times.__getitem__) == dtype


def with_gradients(*values: float) -> list[Tensor]:
    parameters = [torch.zeros(1, requires_grad=True) for _ in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor([value])
    return parameters


def test_finite_gradients_are_divided_by_the_scale() -> None:
    parameters = with_gradients(8.0, -4.0)
    assert LossScale(value=4.0).unscale(parameters)
    assert [p.grad.item() for p in parameters if p.grad is not None] == [2.0, -1.0]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_gradient_that_is_not_finite_halves_the_scale(bad: float) -> None:
    scale = LossScale(value=4.0)
    assert not scale.unscale(with_gradients(1.0, bad))
    assert (scale.value, scale.skipped) == (2.0, 1)


def test_the_scale_never_falls_below_one() -> None:
    scale = LossScale(value=1.0)
    scale.unscale(with_gradients(float("inf")))
    assert scale.value == 1.0


def test_the_scale_doubles_after_good_steps_in_a_row_only() -> None:
    scale = LossScale(value=8.0, patience=3)
    for value in (1.0, 1.0, float("inf"), 1.0, 1.0):
        scale.unscale(with_gradients(value))
    assert scale.value == 4.0
    scale.unscale(with_gradients(1.0))
    assert scale.value == 8.0


def test_no_gradients_are_finite() -> None:
    assert LossScale().unscale([torch.zeros(1, requires_grad=True)])
