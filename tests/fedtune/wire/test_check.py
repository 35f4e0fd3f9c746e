"""A good update passes, and each way in which one can be bad is refused with its reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.errors import RefusedUpdateError
from fedtune.records import AdapterUpdate, DevicePlan, LoraFactors, MatrixPlan, MatrixShape
from fedtune.wire.check import check_update, product_norm
from fedtune.wire.messages import TrainReport
from fedtune.wire.tensors import pack_tensors, tensors_digest, update_tensors

SHAPES = {"q": MatrixShape("q", 6, 4, 0), "k": MatrixShape("k", 5, 4, 0)}
DENSE = {"bias": (3,)}
PLAN = DevicePlan(
    device="site-a",
    matrices=(MatrixPlan("q", 2, "fp32"), MatrixPlan("k", 0, "fp32")),
    micro_batch=2,
    batch_size=4,
    sequence_length=8,
    local_steps=5,
)


def packed(value: float = 0.5, rank: int = 2, bias: float = 1.0) -> bytes:
    pair = LoraFactors(
        np.full((rank, 4), value, dtype=np.float32), np.full((6, rank), value, dtype=np.float32)
    )
    dense = {"bias": np.full(3, bias, dtype=np.float32)}
    return pack_tensors(update_tensors({"q": pair}, dense), "fp32")


def report(data: bytes) -> TrainReport:
    return TrainReport(
        run="demo",
        round=3,
        device="site-a",
        base_digest="base",
        samples=20,
        tokens=100,
        tensors_digest=tensors_digest(data),
        metrics={"train_loss": 2.0},
    )


def check(
    data: bytes, said: TrainReport, max_norm: float = 100.0, scale: float = 2.0
) -> AdapterUpdate:
    return check_update(
        said,
        data,
        run="demo",
        round=3,
        device="site-a",
        base_digest="base",
        plan=PLAN,
        shapes=SHAPES,
        dense_shapes=DENSE,
        max_norm=max_norm,
        scale=scale,
    )


def test_a_good_update_has_its_factors_and_numbers() -> None:
    data = packed()
    update = check(data, report(data))
    assert (update.device, update.round, update.samples, update.tokens) == ("site-a", 3, 20, 100)
    assert set(update.factors) == {"q"}
    np.testing.assert_array_equal(update.factors["q"].b, np.full((6, 2), 0.5))
    assert update.factors["q"].scale == 2.0
    np.testing.assert_array_equal(update.dense["bias"], np.ones(3))
    assert update.metrics == {"train_loss": 2.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "other"}, "expected run demo, got 'other'"),
        ({"round": 2}, "expected round 3, got '2'"),
        ({"device": "site-b"}, "update of site-a: expected device site-a, got 'site-b'"),
        ({"base_digest": "x"}, "expected base model digest base, got 'x'"),
        ({"tensors_digest": "0" * 64}, "do not have the reported sha256"),
        ({"samples": 0}, "expected 1..20 samples for its plan, got 0"),
        ({"samples": 21}, "expected 1..20 samples for its plan, got 21"),
        ({"tokens": 0}, "expected 1..160 tokens for its plan, got 0"),
        ({"tokens": 161}, "expected 1..160 tokens for its plan, got 161"),
    ],
)
def test_a_report_that_is_not_of_this_work_is_refused(
    changes: dict[str, object], words: str
) -> None:
    data = packed()
    with pytest.raises(RefusedUpdateError, match=words):
        check(data, replace(report(data), **changes))


def test_tensors_that_do_not_fit_the_plan_are_refused() -> None:
    data = packed(rank=3)
    with pytest.raises(
        RefusedUpdateError, match=r"update of site-a: .* q.a: expected shape \(2, 4\), got \(3, 4\)"
    ):
        check(data, report(data))


def test_values_that_are_not_finite_are_refused() -> None:
    data = packed().replace(np.float32(0.5).tobytes(), np.float32("nan").tobytes(), 1)
    with pytest.raises(RefusedUpdateError, match="expected finite values"):
        check(data, report(data))


def test_a_huge_product_is_refused_however_its_factors_share_the_size() -> None:
    # The product of 2 * full(6, 2) @ full(2, 4) has 24 equal entries 2 * 2 * value^2.
    norm = 2 * 2 * 0.25 * np.sqrt(24)
    data = packed()
    check(data, report(data), max_norm=norm * 1.0001)
    with pytest.raises(RefusedUpdateError, match=r"norm of at most .* for q, got 4.89"):
        check(data, report(data), max_norm=norm * 0.9999)


def test_a_huge_dense_parameter_is_refused() -> None:
    data = packed(bias=1e6)
    with pytest.raises(RefusedUpdateError, match=r"for bias, got 1\.73205e"):
        check(data, report(data))


def test_the_largest_float_values_do_not_overflow_the_norm() -> None:
    data = packed(value=3e38)
    with pytest.raises(RefusedUpdateError, match="for q, got"):
        check(data, report(data))


def test_the_norm_is_that_of_the_dense_product() -> None:
    rng = np.random.default_rng(0)
    pair = LoraFactors(
        rng.normal(size=(3, 7)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32), 1.5
    )
    assert product_norm(pair) == pytest.approx(np.linalg.norm(pair.product()), rel=1e-12)
    cancelled = LoraFactors(pair.a[[0, 0]], pair.b[:, [0, 0]] * np.float32([1, -1]))
    assert product_norm(cancelled) == pytest.approx(0.0, abs=1e-6)


def test_an_update_of_several_devices_counts_as_many_as_its_site_stands_for() -> None:
    data = packed()
    said = replace(report(data), samples=60, tokens=300, devices=3, held_samples=90)

    def checked(devices: int, held_samples: int) -> AdapterUpdate:
        return check_update(
            said,
            data,
            run="demo",
            round=3,
            device="site-a",
            base_digest="base",
            plan=PLAN,
            shapes=SHAPES,
            dense_shapes=DENSE,
            max_norm=100.0,
            scale=2.0,
            devices=devices,
            held_samples=held_samples,
        )

    update = checked(3, 90)
    assert (update.devices, update.held_samples, update.samples) == (3, 90, 60)
    with pytest.raises(RefusedUpdateError, match=r"expected 1\.\.2 devices for its plan, got 3"):
        checked(2, 90)
    with pytest.raises(RefusedUpdateError, match=r"expected 0\.\.89 held samples"):
        checked(3, 89)
