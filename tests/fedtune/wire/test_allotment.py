"""Bits go to the directions that are worth them, and never more of them than the codec has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.coding import ALLOTTED_CODECS, BITS, CODECS, CodecName, coded_bytes
from fedtune.records import Dispatch, LoraFactors
from fedtune.wire.allotment import Weighted, allot
from fedtune.wire.packing import pack_tensors, unpack_tensors
from fedtune.wire.tensors import dispatch_tensors, pack_dispatch


def adapter(rank: int = 16, decay: float = 0.6, seed: int = 0) -> LoraFactors:
    """Singular directions as they are sent: rows of A of norm 1, columns of B falling."""
    rng = np.random.default_rng(seed)
    a = np.linalg.qr(rng.standard_normal((96, rank)))[0].T
    b = np.linalg.qr(rng.standard_normal((128, rank)))[0] * decay ** np.arange(rank)
    return LoraFactors(a.astype(np.float32), b.astype(np.float32), 2.0)


def product_error(packed: bytes, pair: LoraFactors) -> float:
    shapes = {"q.a": pair.a.shape, "q.b": pair.b.shape}
    found = unpack_tensors(packed, shapes)
    whole = pair.b @ pair.a
    return float(np.linalg.norm(found["q.b"] @ found["q.a"] - whole) / np.linalg.norm(whole))


@pytest.mark.parametrize("codec", ALLOTTED_CODECS)
def test_an_adapter_of_falling_directions_loses_a_fifth_of_what_equal_bits_lose(
    codec: CodecName,
) -> None:
    pair = adapter()
    sent = Dispatch(trained={"q": pair})
    given, equal = pack_dispatch(sent, codec), pack_tensors(dispatch_tensors(sent), codec)
    assert len(given) <= len(equal) + 40  # their digits in the header
    assert product_error(given, pair) < 0.2 * product_error(equal, pair)


def test_equal_directions_get_equal_bits() -> None:
    found = allot({"q.a": Weighted(np.ones(8), 64), "q.b": Weighted(np.ones(8), 64)}, "q3")
    assert set(found["q.a"]) | set(found["q.b"]) == {3}


def test_larger_directions_get_no_fewer_bits() -> None:
    weights = np.array([1.0, 1e-2, 1e-4, 1e-6])
    (bits,) = allot({"q.b": Weighted(weights, 256)}, "q3").values()
    assert list(bits) == sorted(bits, reverse=True)
    assert bits[0] >= 5
    assert sum(bits) <= 12 + 1  # a direction without bits leaves its scales' to others


def test_a_fresh_direction_keeps_a_row_of_a_and_sends_nothing_of_b() -> None:
    """All columns of B are zero before the first round, and one is here, beside a strong one."""
    pair = adapter(rank=4)
    for columns in (slice(0, 4), slice(3, 4)):
        b = pair.b.copy()
        b[:, columns] = 0.0
        sent = Dispatch(trained={"q": LoraFactors(pair.a, b, 1.0)})
        for codec in ALLOTTED_CODECS:
            shapes = {"q.a": pair.a.shape, "q.b": pair.b.shape}
            found = unpack_tensors(pack_dispatch(sent, codec), shapes)
            assert np.abs(found["q.a"]).max(axis=1).min() > 0.01
            np.testing.assert_array_equal(found["q.b"][:, columns], 0.0)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec not in ALLOTTED_CODECS])
def test_codecs_without_a_choice_allot_nothing(codec: CodecName) -> None:
    assert allot({"q.a": Weighted(np.ones(8), 64)}, codec) == {}


def test_a_square_factor_is_left_to_the_codec() -> None:
    rng = np.random.default_rng(0)
    pair = LoraFactors(*(rng.standard_normal((64, 64)).astype(np.float32) for _ in "ab"))
    sent = Dispatch(trained={"q": pair})
    assert pack_dispatch(sent, "q3") == pack_tensors(dispatch_tensors(sent), "q3")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(0, 1e30), min_size=1, max_size=9),
            st.integers(10, 300),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(ALLOTTED_CODECS),
)
def test_a_message_is_never_longer_than_at_equal_bits(
    tensors: list[tuple[list[float], int, bool]], codec: CodecName
) -> None:
    weighted = {
        str(i): Weighted(np.array(weights), length, needed)
        for i, (weights, length, needed) in enumerate(tensors)
    }
    found = allot(weighted, codec)
    assert found.keys() == weighted.keys()
    most = total = 0
    for name, each in weighted.items():
        shape = (len(each.weights), each.length)
        assert len(found[name]) == shape[0]
        assert all(0 <= bits <= 8 for bits in found[name])
        assert not each.needed or min(found[name]) >= 1
        total += coded_bytes(codec, shape, found[name])
        most += coded_bytes(codec, shape)
    assert total <= most + 8 * len(tensors)  # each width's last byte is filled up
    assert BITS[codec] in (2, 3, 4)
