"""A block of tensors is exact, deterministic, and refused when a bit of it is wrong."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from fedtune.errors import ProtocolError
from fedtune.wire.packing import (
    pack_tensors,
    packed_shapes,
    round_to_wire,
    tensors_digest,
    unpack_tensors,
)

SHAPES = {"m.a": (2, 5), "m.b": (3, 2), "dense.bias": (3,)}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def block(header: object, values: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_arrives_is_what_rounding_to_the_wire_gives(dtype: str) -> None:
    sent = arrays()
    found = unpack_tensors(pack_tensors(sent, dtype), SHAPES)
    assert set(found) == set(sent)
    for name, value in sent.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], round_to_wire(value, dtype))
    if dtype == "float32":
        np.testing.assert_array_equal(found["m.a"], sent["m.a"])


def test_the_order_of_the_tensors_does_not_change_the_bytes() -> None:
    sent = arrays()
    turned = dict(reversed(sent.items()))
    assert pack_tensors(sent, "float32") == pack_tensors(turned, "float32")
    assert tensors_digest(pack_tensors(sent, "float16")) == tensors_digest(
        pack_tensors(turned, "float16")
    )


def test_the_safetensors_package_reads_a_block() -> None:
    sent = arrays()
    found = load(pack_tensors(sent, "float32"))
    np.testing.assert_array_equal(found["m.b"], sent["m.b"])


def test_arrays_that_are_not_contiguous_are_packed_by_their_values() -> None:
    value = np.arange(10, dtype=np.float32).reshape(5, 2).T
    found = unpack_tensors(pack_tensors({"x": value}, "float32"), {"x": (2, 5)})
    np.testing.assert_array_equal(found["x"], value)


def test_what_is_unpacked_has_its_own_memory() -> None:
    found = unpack_tensors(pack_tensors(arrays(), "float32"), SHAPES)
    found["m.a"][0, 0] = 7.0
    assert found["m.a"][0, 0] == 7.0


def test_no_tensors_make_a_block_too() -> None:
    assert unpack_tensors(pack_tensors({}, "float32"), {}) == {}


def test_shapes_are_read_from_the_header_alone() -> None:
    assert packed_shapes(pack_tensors(arrays(), "float16")) == SHAPES


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_neither_sent_nor_taken(value: float) -> None:
    bad = {"x": np.array([1.0, value], dtype=np.float32)}
    with pytest.raises(ProtocolError, match="x: expected finite float32 values"):
        pack_tensors(bad, "float32")
    data = block({"x": entry("F32", [2], 0, 8)}, bad["x"].tobytes())
    with pytest.raises(ProtocolError, match="tensor x: expected finite values, got nan or inf"):
        unpack_tensors(data, {"x": (2,)})


def test_a_value_too_large_for_float16_is_refused_and_not_made_infinite() -> None:
    with pytest.raises(ProtocolError, match=r"the largest is 70000; .* wire\.dtype to float32"):
        round_to_wire(np.array([7e4], dtype=np.float32), "float16")


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FOUR = np.ones(2, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected at least 8 bytes, got 0"),
        (b"\x01\x02", "expected at least 8 bytes, got 2"),
        (block({}, length=2**60), "expected a header of at most 2 bytes, got 1152921504606846976"),
        (block(b"nope"), "the header is not valid JSON"),
        (block(b"\xff\xfe"), "the header is not valid JSON"),
        (block(b"[" * 60), "the header is not valid JSON"),
        (block([1]), "expected a JSON object as header"),
        (block({"y": entry("F32", [2], 0, 8)}, FOUR), "x is missing"),
        (
            block({"x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 8, 16)}, FOUR * 2),
            "expected 1 tensors, got 'y' besides",
        ),
        (block({"x": entry("F32", [1, 2], 0, 8)}, FOUR), r"tensor x: expected shape \(2,\), got"),
        (block({"x": entry("I32", [2], 0, 8)}, FOUR), "expected dtype F32 or F16, got 'I32'"),
        (block({"x": entry("BF16", [2], 0, 4)}, FOUR[:4]), "expected dtype F32 or F16"),
        (block({"x": entry(["F32"], [2], 0, 8)}, FOUR), "expected dtype F32 or F16"),
        (block({"x": entry("F32", [2], 0, 4)}, FOUR), "expected 8 bytes for its shape, got 4"),
        (block({"x": entry("F32", [-2], 0, 8)}, FOUR), "expected a shape, got"),
        (block({"x": entry("F32", [True, 2], 0, 8)}, FOUR), "expected a shape, got"),
        (block({"x": entry("F32", [2.0], 0, 8)}, FOUR), "expected a shape, got"),
        (block({"x": entry("F32", 2, 0, 8)}, FOUR), "expected a shape, got"),
        (block({"x": entry("F32", [2], None, 8)}, FOUR), "expected two offsets, got"),
        (block({"x": entry("F32", [2], 8, 16)}, FOUR * 2), "expected its values at byte 0, got 8"),
        (block({"x": entry("F32", [2], 0, 8)}, FOUR * 2), "expected 8 bytes of values, got 16"),
        (block({"x": entry("F32", [2], 0, 8)}, FOUR[:5]), "expected 8 bytes of values, got 5"),
        (block({"x": 3}), "expected dtype, shape and data_offsets"),
        (block({"__metadata__": {}}), "expected dtype, shape and data_offsets"),
        (
            block(b'{"x":%s,"x":1}' % json.dumps(entry("F32", [2], 0, 8)).encode(), FOUR),
            "'x' comes twice",
        ),
    ],
)
def test_a_wrong_block_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        unpack_tensors(data, {"x": (2,)}, max_bytes=10**6)


def test_overlapping_tensors_are_refused() -> None:
    data = block({"x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 4, 12)}, FOUR + FOUR[:4])
    with pytest.raises(ProtocolError, match="tensor 'y': expected its values at byte 8, got 4"):
        unpack_tensors(data, {"x": (2,), "y": (2,)})


def test_a_block_longer_than_the_tensors_can_take_is_not_read() -> None:
    with pytest.raises(
        ProtocolError, match=re.escape("packed tensors: expected at most 292 bytes")
    ):
        unpack_tensors(bytes(10_000), {"x": (2,)})


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_a_protocol_error(data: bytes) -> None:
    for candidate in (data, block(data), block({"m.a": entry("F32", [2], 0, 8)}, data)):
        with pytest.raises(ProtocolError):
            unpack_tensors(candidate, SHAPES)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 10**9), st.sampled_from(["float32", "float16"]))
def test_a_flipped_bit_gives_a_refusal_or_finite_values_of_the_right_shape(
    seed: int, position: int, dtype: str
) -> None:
    data = bytearray(pack_tensors(arrays(seed), dtype))
    bit = position % (8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    try:
        found = unpack_tensors(bytes(data), SHAPES)
    except ProtocolError:
        return
    assert {name: value.shape for name, value in found.items()} == SHAPES
    assert all(np.isfinite(value).all() for value in found.values())


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["m.a", "m.b", "dense.bias", "\ud800", "__metadata__"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
            lambda below: (
                st.lists(below, max_size=4)
                | st.dictionaries(
                    st.sampled_from(["dtype", "shape", "data_offsets"]), below, max_size=3
                )
            ),
            max_leaves=8,
        ),
    ),
    st.binary(max_size=80),
)
def test_any_json_header_raises_nothing_but_a_protocol_error(
    header: dict[str, object], values: bytes
) -> None:
    with pytest.raises(ProtocolError):
        unpack_tensors(block(header, values), SHAPES, max_bytes=10**6)
