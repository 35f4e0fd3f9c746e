"""A dispatch and an update are the same after their way as named, packed tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.coding import CODECS, CodecName
from fedtune.errors import ProtocolError
from fedtune.records import (
    DevicePlan,
    Dispatch,
    LoraFactors,
    LoraScale,
    MatrixPlan,
    MatrixShape,
)
from fedtune.wire.tensors import (
    as_received,
    dispatch_shapes,
    dispatch_tensors,
    pack_tensors,
    unpack_dispatch,
    unpack_tensors,
    update_from_tensors,
    update_shapes,
    update_tensors,
)

SHAPES = {
    "q": MatrixShape("q", 6, 4, 0),
    "k": MatrixShape("k", 5, 4, 0),
    "v": MatrixShape("v", 3, 4, 1),
}
DENSE = {"score.weight": (2, 4)}
PLAN = DevicePlan(
    device="a",
    matrices=(
        MatrixPlan("q", 2, "fp32", tail_rank=3),
        MatrixPlan("k", 0, "fp32", tail_rank=2),
        MatrixPlan("v", 1, "fp32"),
    ),
    micro_batch=1,
    batch_size=1,
    sequence_length=8,
    local_steps=1,
)


def factors(name: str, rank: int, scale: float = 2.0) -> LoraFactors:
    rng = np.random.default_rng([rank, len(name), ord(name[0])])
    shape = SHAPES[name]
    return LoraFactors(
        rng.normal(size=(rank, shape.in_features)).astype(np.float32),
        rng.normal(size=(shape.out_features, rank)).astype(np.float32),
        scale,
    )


def dispatch(tail: dict[str, int]) -> Dispatch:
    return Dispatch(
        trained={"q": factors("q", 2), "v": factors("v", 1)},
        tail={name: factors(name, rank) for name, rank in tail.items()},
        dense={"score.weight": np.ones((2, 4), dtype=np.float32)},
    )


def same(left: Dispatch, right: Dispatch) -> None:
    for mine, other in ((left.trained, right.trained), (left.tail, right.tail)):
        assert set(mine) == set(other)
        for name in mine:
            np.testing.assert_array_equal(mine[name].a, other[name].a)
            np.testing.assert_array_equal(mine[name].b, other[name].b)
            assert mine[name].scale == other[name].scale
    assert set(left.dense) == set(right.dense)
    for name in left.dense:
        np.testing.assert_array_equal(left.dense[name], right.dense[name])


@pytest.mark.parametrize("tail", [{}, {"q": 3, "k": 2}, {"q": 1}, {"k": 1}])
@pytest.mark.parametrize("codec", CODECS)
def test_a_device_reads_exactly_what_the_coordinator_keeps(
    tail: dict[str, int], codec: CodecName
) -> None:
    data = pack_tensors(dispatch_tensors(dispatch(tail)), codec)
    kept = as_received(data, dispatch(tail), PLAN, 2.0)
    same(unpack_dispatch(data, PLAN, SHAPES, DENSE, scale=2.0), kept)
    if codec == "fp32":
        same(kept, dispatch(tail))


def test_names_of_a_dispatch_are_those_of_the_protocol() -> None:
    assert set(dispatch_tensors(dispatch({"k": 1}))) == {
        "q.a",
        "q.b",
        "v.a",
        "v.b",
        "k.tail_a",
        "k.tail_b",
        "dense.score.weight",
    }


def test_expected_shapes_follow_the_plan() -> None:
    assert update_shapes(PLAN, SHAPES, DENSE) == {
        "q.a": (2, 4),
        "q.b": (6, 2),
        "v.a": (1, 4),
        "v.b": (3, 1),
        "dense.score.weight": (2, 4),
    }
    found = dispatch_shapes(PLAN, SHAPES, DENSE, {"k.tail_a": (1, 4)})
    assert found["k.tail_a"] == (1, 4)
    assert found["k.tail_b"] == (5, 1)
    assert "q.tail_a" not in found


def test_an_update_is_the_same_after_its_way() -> None:
    sent = dispatch({})
    data = pack_tensors(update_tensors(sent.trained, sent.dense), "fp32")
    tensors = unpack_tensors(data, update_shapes(PLAN, SHAPES, DENSE))
    trained, dense = update_from_tensors(tensors, PLAN, 2.0)
    same(Dispatch(trained=trained, dense=dense), sent)


def test_device_and_coordinator_read_the_same_scale_out_of_a_rank() -> None:
    """On q two directions are trained, on k none; a tail has the scale of its matrix."""
    scale = LoraScale(2.0, "rank-stabilised")
    packed = pack_tensors(dispatch_tensors(dispatch({"q": 3, "k": 1})), "fp32")
    found = unpack_dispatch(packed, PLAN, SHAPES, DENSE, scale)
    assert found.trained["q"].scale == found.tail["q"].scale == pytest.approx(2.0 / 2**0.5)
    assert found.trained["v"].scale == found.tail["k"].scale == 2.0
    data = pack_tensors(update_tensors(found.trained, found.dense), "fp32")
    tensors = unpack_tensors(data, update_shapes(PLAN, SHAPES, DENSE))
    trained, _ = update_from_tensors(tensors, PLAN, scale)
    assert {n: f.scale for n, f in trained.items()} == {
        n: f.scale for n, f in found.trained.items()
    }


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        ({"k": 3}, r"tensor k.tail_a: expected 1..2 directions, got 3"),
        ({"v": 1}, r"got 'v.tail_a' besides"),
    ],
)
def test_a_tail_beyond_the_plan_is_refused(tail: dict[str, int], words: str) -> None:
    data = pack_tensors(dispatch_tensors(dispatch(tail)), "fp32")
    with pytest.raises(ProtocolError, match=words):
        unpack_dispatch(data, PLAN, SHAPES, DENSE)


def test_a_tail_without_its_other_half_is_refused() -> None:
    tensors = dispatch_tensors(dispatch({"k": 2}))
    for gone, words in (("k.tail_b", "k.tail_b is missing"), ("k.tail_a", "'k.tail_b' besides")):
        data = pack_tensors({n: t for n, t in tensors.items() if n != gone}, "fp32")
        with pytest.raises(ProtocolError, match=words):
            unpack_dispatch(data, PLAN, SHAPES, DENSE)


def test_a_trained_rank_other_than_planned_is_refused() -> None:
    sent = replace(dispatch({}), trained={"q": factors("q", 1), "v": factors("v", 1)})
    data = pack_tensors(dispatch_tensors(sent), "fp32")
    with pytest.raises(ProtocolError, match=r"tensor q.a: expected shape \(2, 4\), got \(1, 4\)"):
        unpack_dispatch(data, PLAN, SHAPES, DENSE)


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(ProtocolError, match="matrix q is not in the base model"):
        update_shapes(PLAN, {"v": SHAPES["v"]}, {})


def test_an_update_of_changes_is_read_as_values() -> None:
    sent = dispatch({})
    tensors = update_tensors(sent.trained, sent.dense)
    trained, dense = update_from_tensors(tensors, PLAN, 2.0, since=sent)
    np.testing.assert_array_equal(trained["q"].a, 2 * sent.trained["q"].a)
    np.testing.assert_array_equal(trained["v"].b, 2 * sent.trained["v"].b)
    np.testing.assert_array_equal(dense["score.weight"], 2.0)
