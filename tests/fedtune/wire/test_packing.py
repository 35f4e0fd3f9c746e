"""A block of tensors is exact, deterministic, and refused when a bit of it is wrong."""

from __future__ import annotations

import json
import mmap
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.coding import CODECS, CodecName, coded_bytes
from fedtune.errors import ProtocolError
from fedtune.wire.codecs import rounded
from fedtune.wire.packing import (
    MAX_HEADER_BYTES,
    PackedTensors,
    pack_tensors,
    packed_shapes,
    tensors_digest,
    unpack_tensors,
)

SHAPES = {"m.a": (2, 5), "m.b": (3, 2), "dense.bias": (3,)}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def block(header: object, values: bytes = b"", length: int | None = None) -> bytes:
    text = zlib.compress(header if isinstance(header, bytes) else json.dumps(header).encode())
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


@pytest.mark.parametrize("codec", CODECS)
def test_what_arrives_is_what_the_codec_gives(codec: CodecName) -> None:
    sent = arrays()
    found = unpack_tensors(pack_tensors(sent, codec), SHAPES, codec=codec)
    assert set(found) == set(sent)
    for name, value in sent.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], rounded(value, codec))
    if codec == "fp32":
        np.testing.assert_array_equal(found["m.a"], sent["m.a"])


@pytest.mark.parametrize("codec", CODECS)
def test_tensors_are_read_one_by_one_out_of_a_mapped_file(codec: CodecName, tmp_path: Path) -> None:
    sent, path = arrays(), tmp_path / "packed"
    path.write_bytes(pack_tensors(sent, codec))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found = PackedTensors(mapped, SHAPES)
        one = found["m.b"]
    np.testing.assert_array_equal(one, rounded(sent["m.b"], codec))


@pytest.mark.parametrize("codec", CODECS)
def test_a_block_is_its_values_and_few_bytes_more(codec: CodecName) -> None:
    """A tensor of an adapter takes about four bytes of header."""
    names = [
        f"model.layers.{i}.self_attn.{p}_proj.{f}" for i in range(8) for p in "qkv" for f in "ab"
    ]
    packed = pack_tensors({name: np.ones((2, 8), np.float32) for name in names}, codec)
    header = len(packed) - len(names) * coded_bytes(codec, (2, 8))
    assert 8 < header <= 100 + 4 * len(names)


def test_the_order_of_the_tensors_does_not_change_the_bytes() -> None:
    sent = arrays()
    turned = dict(reversed(sent.items()))
    assert pack_tensors(sent, "fp32") == pack_tensors(turned, "fp32")
    assert tensors_digest(pack_tensors(sent, "fp16")) == tensors_digest(
        pack_tensors(turned, "fp16")
    )


def test_arrays_that_are_not_contiguous_are_packed_by_their_values() -> None:
    value = np.arange(10, dtype=np.float32).reshape(5, 2).T
    found = unpack_tensors(pack_tensors({"x": value}, "fp32"), {"x": (2, 5)})
    np.testing.assert_array_equal(found["x"], value)


def test_what_is_unpacked_has_its_own_memory() -> None:
    found = unpack_tensors(pack_tensors(arrays(), "fp32"), SHAPES)
    found["m.a"][0, 0] = 7.0
    assert found["m.a"][0, 0] == 7.0


def test_no_tensors_make_a_block_too() -> None:
    assert unpack_tensors(pack_tensors({}, "fp32"), {}) == {}


def test_shapes_are_read_from_the_header_alone() -> None:
    assert packed_shapes(pack_tensors(arrays(), "fp16")) == SHAPES


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_neither_sent_nor_taken(value: float) -> None:
    bad = {"x": np.array([1.0, value], dtype=np.float32)}
    with pytest.raises(ProtocolError, match="x: expected finite fp32 values"):
        pack_tensors(bad, "fp32")
    data = block({"x": ["fp32", [2]]}, bad["x"].tobytes())
    with pytest.raises(ProtocolError, match="tensor x: expected finite values, got nan or inf"):
        unpack_tensors(data, {"x": (2,)})


FOUR = np.ones(2, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected at least 8 bytes, got 0"),
        (b"\x01\x02", "expected at least 8 bytes, got 2"),
        (block({}, length=2**60), "expected a header of at most 10 bytes, got 1152921504606846976"),
        ((4).to_bytes(8, "little") + b"nope", "the header is not deflated"),
        ((0).to_bytes(8, "little"), "expected a header of at most"),
        (block({"x": ["fp32", [2]]}, length=10), "and nothing behind it"),
        (block(b"nope"), "the header is not valid JSON"),
        (block(b"\xff\xfe"), "the header is not valid JSON"),
        (block(b"[" * 60), "the header is not valid JSON"),
        (block([1]), "expected a JSON object as header"),
        (block({"y": ["fp32", [2]]}, FOUR), "x is missing"),
        (
            block({"x": ["fp32", [2]], "y": ["fp32", [2]]}, FOUR * 2),
            "expected 1 tensors, got 'y' besides",
        ),
        (block({"x": ["fp32", [1, 2]]}, FOUR), r"tensor x: expected shape \(2,\), got"),
        (block({"x": ["F32", [2]]}, FOUR), "expected a codec of fp32, .*, q2, got 'F32'"),
        (block({"x": [["fp32"], [2]]}, FOUR), "expected a codec of"),
        (block({"x": [None, [2]]}, FOUR), "expected a codec of"),
        (block({"x": ["fp32", [2], "", 0]}, FOUR), "expected codec and shape in the header"),
        (block({"x": ["fp32", [-2]]}, FOUR), "expected a shape, got"),
        (block({"x": ["fp32", [True, 2]]}, FOUR), "expected a shape, got"),
        (block({"x": ["fp32", [2.0]]}, FOUR), "expected a shape, got"),
        (block({"x": ["fp32", 2]}, FOUR), "expected a shape, got"),
        (block({"x": ["fp32", [1] * 9]}, FOUR), "expected a shape, got"),
        (block({"x": ["fp32", [2**40, 2**40]]}, FOUR), "expected 4835703278458516698824704 bytes"),
        (block({"x": ["fp32", [2]]}, FOUR * 2), "expected 8 bytes of values, got 16"),
        (block({"x": ["fp32", [2]]}, FOUR[:5]), "expected 8 bytes of values, got 5"),
        (block({"x": ["fp16", [2]]}, FOUR), "expected 4 bytes of values, got 8"),
        (block({"x": ["int8", [2]]}, FOUR), "expected 4 bytes of values, got 8"),
        (block({"x": ["q4", [2]]}, FOUR), "expected 3 bytes of values, got 8"),
        (block({"x": ["q4", [2]]}, FOUR[:2]), "expected 3 bytes of values, got 2"),
        (block({"x": ["q3", [2]]}, FOUR[:4]), "expected 3 bytes of values, got 4"),
        (block({"x": ["q4", [2]]}, b"\x80\x7f\x00"), "tensor x: expected finite scales"),
        (block({"x": ["fp32", [2], "3"]}, FOUR), "expected 1 digits of 0..8 as bits of a q4 or"),
        (block({"x": ["int8", [2], "8"]}, FOUR), "expected 1 digits"),
        (block({"x": ["q3", [2], "33"]}, FOUR), "expected 1 digits of 0..8 .* tensor, got '33'"),
        (block({"x": ["q3", [2], ""]}, FOUR), "expected 1 digits"),
        (block({"x": ["q3", [2], "9"]}, FOUR), "expected 1 digits of 0..8 .* tensor, got '9'"),
        (block({"x": ["q3", [2], "²"]}, FOUR), "expected 1 digits"),
        (block({"x": ["q3", [2], 3]}, FOUR), "expected 1 digits"),
        (block({"x": ["q3", [2], "8"]}, FOUR), "expected 4 bytes of values, got 8"),
        (block({"x": ["q3", [2], "0"]}, FOUR), "expected 0 bytes of values, got 8"),
        (block({"x": 3}), "expected codec and shape"),
        (block({"__metadata__": {}}), "expected codec and shape"),
        (block(b'{"x":["fp32",[2]],"x":1}', FOUR), "'x' comes twice"),
    ],
)
def test_a_wrong_block_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        unpack_tensors(data, {"x": (2,)}, max_bytes=10**6)


def test_a_header_that_grows_without_end_is_not_inflated() -> None:
    data = block(b" " * (MAX_HEADER_BYTES + 1))
    assert len(data) < 20_000
    with pytest.raises(ProtocolError, match="expected a header of at most 16777216 bytes inflated"):
        unpack_tensors(data, {"x": (2,)}, max_bytes=10**6)


def test_a_codec_that_was_not_asked_for_is_refused() -> None:
    data = pack_tensors(arrays(), "q4")
    with pytest.raises(ProtocolError, match=r"tensor m\.a: expected codec q3, got q4"):
        unpack_tensors(data, SHAPES, max_bytes=10**6, codec="q3")
    longer = pack_tensors({"x": np.ones((64, 64), np.float32)}, "fp32")
    with pytest.raises(ProtocolError, match="packed tensors: expected at most"):
        unpack_tensors(longer, {"x": (64, 64)}, codec="q3")


def test_a_block_longer_than_the_tensors_can_take_is_not_read() -> None:
    with pytest.raises(
        ProtocolError, match=re.escape("packed tensors: expected at most 294 bytes")
    ):
        unpack_tensors(bytes(10_000), {"x": (2,)})


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_a_protocol_error(data: bytes) -> None:
    for candidate in (data, block(data), block({"m.a": ["fp32", [2]]}, data)):
        with pytest.raises(ProtocolError):
            unpack_tensors(candidate, SHAPES)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 10**9), st.sampled_from(CODECS))
def test_a_flipped_bit_gives_a_refusal_or_finite_values_of_the_right_shape(
    seed: int, position: int, codec: CodecName
) -> None:
    data = bytearray(pack_tensors(arrays(seed), codec))
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
                | st.dictionaries(st.sampled_from(["codec", "shape", "q4"]), below, max_size=3)
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
