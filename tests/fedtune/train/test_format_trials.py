"""Formats are tried: one that gives a wrong number is as unfit as one that raises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from fedtune.errors import MissingExtraError  # noqa: E402
from fedtune.quant.dense import DenseMatrix  # noqa: E402
from fedtune.quant.storage import StoredMatrix, store  # noqa: E402
from fedtune.records import BACKBONE_FORMATS, FormatName, MatrixForm  # noqa: E402
from fedtune.train.format_trials import try_formats  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_every_format_runs_here_in_either_dtype(compute: torch.dtype) -> None:
    trials = try_formats(CPU, compute)
    assert trials.formats == BACKBONE_FORMATS, trials.failed


def test_float16_is_tried_in_float16() -> None:
    assert try_formats(CPU, torch.float16, ("fp32", "fp16", "nf4")).formats == (
        "fp32",
        "fp16",
        "nf4",
    )


@pytest.mark.parametrize(
    "error",
    [
        MissingExtraError("bitsandbytes", "train", "a bnb-nf4 backbone"),
        NotImplementedError("no kernel for this device"),
        OSError("libbitsandbytes_cpu.so:\ncannot open shared object file"),
        AttributeError("'NoneType' object has no attribute 'cquantize'"),
    ],
)
def test_a_format_that_raises_is_listed_with_the_reason(error: Exception) -> None:
    def broken(weight: Tensor, form: MatrixForm) -> StoredMatrix:
        if form.format == "bnb-nf4":
            raise error
        return store(weight, form)

    trials = try_formats(CPU, torch.float32, ("q4", "bnb-nf4"), broken)
    assert trials.formats == ("q4",)
    reason = trials.failed["bnb-nf4"]
    assert reason.startswith(type(error).__name__)
    assert "\n" not in reason
    assert len(reason) <= 160


def test_a_format_that_holds_another_matrix_is_refused() -> None:
    def shifted(weight: Tensor, form: MatrixForm) -> StoredMatrix:
        return store(weight.roll(1, 0), form)

    trials = try_formats(CPU, torch.float32, store=shifted)
    assert trials.formats == ()
    assert all("the held matrix is off by 1.4" in reason for reason in trials.failed.values())


class Wrong(DenseMatrix):
    """Gives other values to a product than it says it holds."""

    def panels(self, dtype: torch.dtype, rows: int = 256) -> Iterator[tuple[int, Tensor]]:
        for first, panel in super().panels(dtype, rows):
            yield first, panel * 1.05


def test_a_format_whose_product_is_wrong_is_refused() -> None:
    def wrong(weight: Tensor, form: MatrixForm) -> StoredMatrix:
        return Wrong(form.format, weight)

    trials = try_formats(CPU, torch.float32, ("fp32",), wrong)
    assert "the product is off by" in trials.failed["fp32"]


def test_a_matrix_of_no_numbers_is_refused() -> None:
    def lost(weight: Tensor, form: MatrixForm) -> StoredMatrix:
        return store(weight * float("nan"), form)

    names: tuple[FormatName, ...] = ("fp32", "q4")
    trials = try_formats(CPU, torch.float32, names, lost)
    assert trials.formats == ()
    assert "nan" in trials.failed["fp32"]
    assert "not finite" in trials.failed["q4"]
    assert replace(trials, formats=names).failed == trials.failed
