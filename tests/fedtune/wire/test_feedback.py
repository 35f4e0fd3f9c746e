"""What a device sends in few bits and what it keeps add up to what it has trained."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.coding import CODECS, CodecName
from fedtune.records import DevicePlan, Dispatch, FloatArray, LoraFactors, MatrixPlan, MatrixShape
from fedtune.wire.feedback import ErrorFeedback, Lost, encode_update
from fedtune.wire.packing import unpack_tensors
from fedtune.wire.tensors import update_from_tensors, update_shapes

SHAPES = {"q": MatrixShape("q", 40, 70, 0)}
HEAD = {"score": (3, 20)}
RANK = 6
PLAN = DevicePlan("a", (MatrixPlan("q", RANK, "fp32"),), 1, 1, 8, 1)
LOSSY = [codec for codec in CODECS if codec != "fp32"]


def sent_of(seed: int) -> Dispatch:
    """A start of a round: other directions each time, rows of A of norm 1."""
    rng = np.random.default_rng([seed, 1])
    a = np.linalg.qr(rng.standard_normal((70, RANK)))[0].T
    b = rng.standard_normal((40, RANK)) * 0.5 ** np.arange(RANK)
    pair = LoraFactors(a.astype(np.float32), b.astype(np.float32), 2.0)
    return Dispatch(trained={"q": pair}, dense={"score": np.ones((3, 20), np.float32)})


def trained_of(sent: Dispatch, seed: int) -> tuple[dict[str, LoraFactors], dict[str, FloatArray]]:
    rng = np.random.default_rng([seed, 2])
    pair = sent.trained["q"]
    a = pair.a + 0.02 * rng.standard_normal(pair.a.shape).astype(np.float32)
    b = pair.b + 0.05 * rng.standard_normal(pair.b.shape).astype(np.float32)
    head = 1.0 + 0.1 * rng.standard_normal((3, 20)).astype(np.float32)
    return {"q": LoraFactors(a, b, pair.scale)}, {"score": head}


def product(pair: LoraFactors) -> np.ndarray:
    return pair.scale * (pair.b.astype(np.float64) @ pair.a.astype(np.float64))


def arrived(packed: bytes, sent: Dispatch, codec: CodecName) -> tuple[LoraFactors, FloatArray]:
    tensors = unpack_tensors(packed, update_shapes(PLAN, SHAPES, HEAD), codec=codec)
    since = None if codec == "fp32" else sent
    factors, dense = update_from_tensors(tensors, PLAN, 2.0, since)
    return factors["q"], dense["score"]


def test_fp32_sends_what_the_device_ends_with_bit_for_bit() -> None:
    sent = sent_of(0)
    factors, dense = trained_of(sent, 0)
    packed, lost = encode_update(sent, factors, dense, "fp32", Lost())
    found, head = arrived(packed, sent, "fp32")
    np.testing.assert_array_equal(found.a, factors["q"].a)
    np.testing.assert_array_equal(found.b, factors["q"].b)
    np.testing.assert_array_equal(head, dense["score"])
    assert lost == Lost()


@pytest.mark.parametrize(
    ("codec", "most"),
    [("fp16", 1e-3), ("bf16", 5e-3), ("int8", 0.02), ("q4", 0.12), ("q3", 0.25), ("q2", 0.5)],
)
def test_the_error_is_a_share_of_the_change_and_not_of_the_whole(
    codec: CodecName, most: float
) -> None:
    sent = sent_of(0)
    factors, dense = trained_of(sent, 0)
    found, head = arrived(encode_update(sent, factors, dense, codec)[0], sent, codec)
    change = product(factors["q"]) - product(sent.trained["q"])
    assert np.linalg.norm(product(found) - product(factors["q"])) < most * np.linalg.norm(change)
    assert np.linalg.norm(head - dense["score"]) < most * np.linalg.norm(dense["score"] - 1.0)


@pytest.mark.parametrize("codec", LOSSY)
def test_one_round_leaves_out_exactly_what_did_not_arrive(codec: CodecName) -> None:
    """The pair's rank is cut: what it holds is the best of that rank, and never more."""
    sent = sent_of(0)
    factors, dense = trained_of(sent, 0)
    packed, lost = encode_update(sent, factors, dense, codec, Lost())
    found, head = arrived(packed, sent, codec)
    gap = product(factors["q"]) - product(found)
    u, sigma, v = np.linalg.svd(gap)
    best = (u[:, :RANK] * sigma[:RANK]) @ v[:RANK]
    scale = np.linalg.norm(product(factors["q"]) - product(sent.trained["q"]))
    assert np.linalg.norm(product(lost.factors["q"]) - best) < 1e-5 * scale
    np.testing.assert_allclose(lost.dense["score"], dense["score"] - head, atol=1e-6)


@pytest.mark.parametrize("codec", ["q4", "q2"])
def test_rounds_add_up(codec: CodecName) -> None:
    """arrived + kept = trained - cut, where each round starts from other directions."""
    feedback = ErrorFeedback()
    trained_sum = np.zeros((40, 70))
    arrived_sum, cut_sum = np.zeros((40, 70)), np.zeros((40, 70))
    heads = arrived_heads = np.zeros((3, 20))
    for round in range(1, 7):
        sent = sent_of(round)
        factors, dense = trained_of(sent, round)
        owed = feedback.at(round)
        packed, lost = encode_update(sent, factors, dense, codec, owed)
        found, head = arrived(packed, sent, codec)
        start, before = product(sent.trained["q"]), owed.factors.get("q")
        whole = product(factors["q"]) - product(found)
        if before is not None:
            whole += product(before)
        cut_sum += whole - product(lost.factors["q"])
        trained_sum += product(factors["q"]) - start
        arrived_sum += product(found) - start
        heads = heads + dense["score"] - 1.0
        arrived_heads = arrived_heads + head - 1.0
        feedback.keep(round, lost)
    kept = product(feedback.after.factors["q"])
    total = np.linalg.norm(trained_sum)
    assert np.linalg.norm(arrived_sum + kept + cut_sum - trained_sum) < 1e-5 * total
    # A truncation never adds: what was cut is small beside what came through.
    assert np.linalg.norm(cut_sum) < 0.35 * total
    np.testing.assert_allclose(arrived_heads + feedback.after.dense["score"], heads, atol=1e-5)


def test_what_was_left_out_arrives_when_the_directions_stay() -> None:
    """The same change, round for round, from one start: without feedback each loses the same.

    With it the sum loses a third less in 2 bits: a pair of factors of rank 6 can hold no more.
    """
    errors = {}
    for on in (True, False):
        feedback, total = ErrorFeedback(), np.zeros((40, 70))
        sent = sent_of(0)
        factors, dense = trained_of(sent, 0)
        for round in range(1, 9):
            owed = feedback.at(round) if on else None
            packed, lost = encode_update(sent, factors, dense, "q2", owed)
            total += product(arrived(packed, sent, "q2")[0]) - product(sent.trained["q"])
            if on:
                feedback.keep(round, lost)
        wanted = 8 * (product(factors["q"]) - product(sent.trained["q"]))
        errors[on] = np.linalg.norm(total - wanted) / np.linalg.norm(wanted)
    assert errors[True] < 0.75 * errors[False]


def test_a_round_played_again_starts_from_what_there_was_before_it() -> None:
    feedback = ErrorFeedback()
    pairs = [Lost(factors=trained_of(sent_of(i), i)[0]) for i in range(4)]
    feedback.keep(1, pairs[1])
    feedback.keep(2, pairs[2])
    assert feedback.at(3).factors == pairs[2].factors
    assert feedback.at(2).factors == pairs[1].factors
    feedback.keep(2, pairs[3])
    assert feedback.at(3).factors == pairs[3].factors
    assert feedback.at(2).factors == pairs[1].factors
    assert feedback.at(1) == Lost()  # what there was is not known any more


def test_a_matrix_that_is_not_trained_in_a_round_keeps_what_it_is_owed() -> None:
    feedback = ErrorFeedback()
    pair = trained_of(sent_of(0), 0)[0]["q"]
    feedback.keep(1, Lost({"q": pair, "k": pair}, {"x": np.ones(3)}))
    feedback.keep(2, Lost({"q": pair}))
    assert set(feedback.at(3).factors) == {"q", "k"}
    np.testing.assert_array_equal(feedback.at(3).dense["x"], 1.0)


def test_it_comes_back_from_its_tensors() -> None:
    feedback = ErrorFeedback()
    for round in (1, 2):
        sent = sent_of(round)
        factors, dense = trained_of(sent, round)
        feedback.keep(round, encode_update(sent, factors, dense, "q3", feedback.at(round))[1])
    found = ErrorFeedback.from_tensors(feedback.tensors())
    assert found.round == 2
    for mine, other in ((found.before, feedback.before), (found.after, feedback.after)):
        np.testing.assert_array_equal(product(mine.factors["q"]), product(other.factors["q"]))
        np.testing.assert_array_equal(mine.dense["score"], other.dense["score"])
    assert ErrorFeedback.from_tensors(ErrorFeedback().tensors()) == ErrorFeedback()
